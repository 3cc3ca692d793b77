"""What the benchmarks compute beside measuring: shares, bits, batches, and whether a flipped byte was named."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import numpy as np
import pytest

from potstill.signals import Stamp, open_store, reopen_store

BENCH = Path(__file__).parents[1] / "bench"
KEYS = [bytes([number]) * 16 for number in range(40)]


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def measured(**arms):
    """A seed's measurements: by arm, kl, nll and agreement."""
    names = ("kl", "nll", "agreement")
    return {
        arm: {name: {"value": v, "unit": ""} for name, v in zip(names, values, strict=True)}
        for arm, values in arms.items()
    }


@pytest.fixture
def place(tmp_path):
    """A store of 40 pieces of 100 records in two shards, with a file beside them."""
    folder, draw = tmp_path / "whole", np.random.default_rng(0)
    store = open_store(folder, Stamp("teacher", "tokenizer", "spec"), 37)
    for keys in (KEYS[:25], KEYS[25:]):
        with store.writer() as writer:
            for key in keys:
                writer.append(key, draw.integers(256, size=(100, 37), dtype=np.uint8))
    store.put_file("beside.txt", Path(__file__))
    return folder


def test_an_arm_as_good_as_the_exact_one_keeps_all_and_one_as_bad_as_hard_labels_nothing(bench):
    hard, exact = (2.0, 5.0, 0.4), (1.0, 4.0, 0.5)
    seeds = [measured(hard=hard, exact=exact, sampled=exact), measured(hard=hard, exact=exact, sampled=hard)]
    rows = bench("gain").kept_rows(seeds, "sampled")
    assert [row.id for row in rows] == ["store.gain_kept", "store.gain_kept_nll", "store.gain_kept_agreement"]
    for row in rows:
        assert (row.low, row.value, row.high, row.n) == pytest.approx((0.0, 0.5, 1.0, 2))


def test_where_the_exact_teacher_gains_nothing_there_is_no_share_of_it(bench):
    seeds = [measured(hard=(2.0, 4.0, 0.5), exact=(1.0, 4.0, 0.4), sampled=(1.5, 4.0, 0.5))]
    assert [row.id for row in bench("gain").kept_rows(seeds, "sampled")] == ["store.gain_kept"]


@pytest.mark.parametrize("unique", [1, 12, 50])
def test_the_peer_pays_the_fewest_bits_for_its_tokens(bench, unique):
    exact = math.log2(math.comb(49_152, unique)) + 6 * unique
    assert bench("_estimates").stored_bits(unique, 49_152) == pytest.approx(exact, rel=1e-9)


def test_the_compared_record_is_the_largest_that_is_not_larger(bench):
    module = bench("_estimates")
    k = module.largest_k(49_152, 40.0)
    assert module.stride_of(49_152, k) <= 40 < module.stride_of(49_152, k + 1)


def test_every_piece_is_in_one_batch_and_only_the_last_is_small(bench):
    module = bench("_decode")
    counts = {key: 100 + number for number, key in enumerate(KEYS)}
    batches = list(module.in_batches(KEYS, counts))
    assert [key for batch in batches for key in batch] == KEYS
    assert all(sum(counts[key] for key in batch) >= module.BATCH_POSITIONS for batch in batches[:-1])


def test_a_repeated_store_holds_the_same_records_under_new_keys(bench, place, tmp_path):
    counts = bench("_decode").repeat_store(place, tmp_path / "wide", 9000)
    narrow, wide = reopen_store(place), reopen_store(tmp_path / "wide")
    assert len(counts) == 120
    assert sum(counts.values()) == wide.num_records == 12_000
    assert not wide.missing(counts)
    found = {wide.read([key]).records_NS.tobytes() for key in counts}
    assert found == {narrow.read([key]).records_NS.tobytes() for key in narrow}


def test_flips_are_named_and_none_is_read(bench, place, tmp_path):
    rows, facts = bench("_harm").flip_rows(place, tmp_path, 30)
    assert {row.id: row.value for row in rows} == {"store.flips_missed": 0.0, "store.flips_read": 0.0}
    assert all(part in facts["flips"] for part in ("header", "index", "data", "files", "store.json"))
    assert not reopen_store(place).verify()


def test_a_flip_that_another_file_or_block_is_blamed_for_is_missed(bench):
    module = bench("_harm")
    flip = module.Flip("shards/a.shard", "data", 70_000, 1)

    def blamed(file, block):
        return [module.Damage(file, "block", "other bytes", block, (65_536, 131_072))]

    assert module.is_named(flip, blamed("shards/a.shard", 1))
    assert not module.is_named(flip, blamed("shards/b.shard", 1))
    assert not module.is_named(flip, blamed("shards/a.shard", 0))
    assert not module.is_named(flip, [])


def test_lost_pieces_are_counted_and_new_ones_held(bench, place):
    module = bench("_harm")
    held = {}
    assert module.count_lost(held, place) == 0
    assert set(held) == set(KEYS)
    held[KEYS[0]], held[b"x" * 16] = b"other", b"gone"
    assert module.count_lost(held, place) == 2
