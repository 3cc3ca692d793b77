"""What the benchmarks compute beside measuring: shares, bits, intervals, and whether a flipped byte was named."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from transformers import DistilBertConfig, DistilBertForMaskedLM

from potstill.recipes import load_recipe
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


def evaluated(folder, **arms):
    """A run folder that evaluated these arms: by arm, {name: value} over the test split; other slices stand beside."""
    rows = [
        {"arm": arm, "name": name, "slice": part, "value": value if part == "test" else -1.0, "unit": "share"}
        for arm, values in arms.items()
        for name, value in values.items()
        for part in ("class:first", "test")
    ]
    (folder / "evaluate").mkdir(parents=True)
    (folder / "evaluate" / "measurements.json").write_text(json.dumps(rows))
    return folder


def staged(folder, **stages):
    """A run folder with the manifests of these stages: (minutes, facts)."""
    for stage, (minutes, facts) in stages.items():
        (folder / stage).mkdir(parents=True)
        manifest = {"stage": stage, "wall_s": 60 * minutes, "facts": facts}
        (folder / stage / "manifest.json").write_text(json.dumps(manifest))
    return folder


def claimed(factor):
    """The values of an intent run; every claim is `factor` times its place in the list."""
    values = {"teacher": {}, "student": {}, "static": {}}
    for place, (arm, name) in enumerate(CLAIMS, start=1):
        values[arm][name] = factor * place
    return values


CLAIMS = [
    ("teacher", "accuracy"),
    ("student", "retention"),
    ("student", "throughput_vs_teacher"),
    ("student", "latency_vs_teacher"),
    ("static", "retention"),
    ("static", "throughput_vs_teacher"),
]


def test_every_intent_claim_is_the_mean_of_its_own_measurement_and_is_judged(bench, tmp_path):
    module, table = bench("_intent_rows"), bench("_table")
    seeds = [module.read_run(evaluated(tmp_path / str(factor), **claimed(factor))) for factor in (1.0, 3.0)]
    rows = module.claim_rows(seeds)
    assert list(module.CLAIMS.values()) == CLAIMS
    assert {row.id: row.value for row in rows} == {name: 2.0 * place for place, name in enumerate(module.CLAIMS, 1)}
    assert set(module.CLAIMS) <= set(table.BARS)


def test_what_stands_beside_the_claims_is_told_where_every_seed_has_it(bench, tmp_path):
    module, runs = bench("_intent_rows"), []
    for number in range(2):
        values = claimed(1.0)
        values["student"]["accuracy"] = 0.9
        values["student"]["agreement"] = 0.8
        if number:
            del values["student"]["agreement"]
        runs.append(module.read_run(evaluated(tmp_path / str(number), **values)))
    beside = {row.id for row in module.claim_rows(runs)} - set(module.CLAIMS)
    assert beside == {"intent.accuracy.student"}


def test_a_claim_that_was_not_measured_is_no_row_of_zero(bench, tmp_path):
    module, values = bench("_intent_rows"), claimed(1.0)
    del values["static"]
    with pytest.raises(KeyError):
        module.claim_rows([module.read_run(evaluated(tmp_path / "run", **values))])


def test_the_minutes_of_a_run_are_those_of_all_its_stages(bench, tmp_path):
    capture = {"pieces": 7, "captured": 7}
    run = staged(tmp_path / "run", finetune=(2.0, {"steps": 9}), capture=(0.5, capture), train=(3.0, {}))
    rows = {row.id: row.value for row in bench("_intent_rows").minutes_rows(run)}
    parts = {"intent.minutes.finetune": 2.0, "intent.minutes.capture": 0.5, "intent.minutes.train": 3.0}
    assert rows == pytest.approx({"intent.minutes": 5.5, **parts})


@pytest.mark.parametrize(
    "taken", [{"finetune": (0.0, {"found": "elsewhere"})}, {"capture": (0.0, {"pieces": 7, "captured": 3})}]
)
def test_a_run_that_took_over_what_another_made_has_no_minutes(bench, tmp_path, taken):
    assert bench("_intent_rows").minutes_rows(staged(tmp_path / "run", train=(3.0, {}), **taken)) == []


def few(gain):
    """A seed's measurements where the student has the control's accuracy and `gain`."""
    values = {("control", "accuracy"): 0.8, ("student", "accuracy"): 0.8 + gain, ("teacher", "accuracy"): 0.95}
    values["student", "accuracy_gain_over_control"] = gain
    return {key: {"value": value, "unit": "share"} for key, value in values.items()}


def test_the_gain_with_few_labels_that_has_the_bar_is_that_of_the_ready_teacher(bench):
    rows = bench("_intent_rows").fewlabel_rows([few(0.05), few(0.06), few(0.07)], [few(0.0), few(0.01), few(0.02)])
    found = {row.id: row for row in rows}
    gain = found["intent.fewlabel_gain"]
    assert gain.value == pytest.approx(0.06)
    assert found["intent.fewlabel_gain_low"].value == gain.low == pytest.approx(0.06 - 4.303 * 0.01 / 3**0.5)
    assert found["intent.fewlabel_gain.own_teacher"].value == pytest.approx(0.01)
    assert found["intent.fewlabel.own_teacher.student"].value == pytest.approx(0.81)


def test_one_seed_has_no_interval_that_could_exclude_anything(bench):
    rows = bench("_intent_rows").fewlabel_rows([few(0.05)], [few(0.0)])
    assert "intent.fewlabel_gain_low" not in {row.id for row in rows}
    assert all(row.low is None for row in rows)


def test_too_many_seeds_for_the_table_of_t_are_refused(bench):
    with pytest.raises(ValueError, match="11 seeds"):
        bench("_table").seeds_row("a", [1.0] * 11, "share")


def test_the_peers_ratios_are_ours_over_the_peers_round_by_round(bench):
    rows = bench("_intent_sides").side_rows(
        {"ours": [1.0, 3.0, 2.0], "peer": [2.0, 4.0, 8.0]}, {"ours": [0.9, 0.8, 0.9], "peer": [0.9, 1.0, 0.6]}
    )
    found = {row.id: (row.low, row.value, row.high) for row in rows}
    assert found["intent.time_vs_peer"] == (0.25, 0.5, 0.75)
    assert found["intent.quality_vs_peer"] == pytest.approx((0.8, 1.0, 1.5))


def test_an_ablation_arm_lacks_its_term_and_nothing_else(bench, tmp_path):
    module = bench("distilbert")
    recipe = load_recipe("distilbert-sample")
    made = {arm: module.general_recipe(recipe, arm, tmp_path) for arm in module.ARMS}
    kinds = {arm: {term.kind for term in one.losses} for arm, one in made.items()}
    assert kinds["full"] == kinds["random_start"] == {"forward_kl", "cross_entropy", "hidden_cosine"}
    assert {arm: kinds["full"] - kinds[arm] for arm in module.WITHOUT} == {
        arm: {term} for arm, term in module.WITHOUT.items()
    }
    for arm, one in made.items():
        changed = {name for name in type(one).model_fields if getattr(one, name) != getattr(made["full"], name)}
        assert changed - {"name", "run_dir"} == {"random_start": {"student"}, "full": set()}.get(arm, {"losses"})


def test_a_probe_learns_from_hard_labels_alone_and_begins_with_the_arms_student(bench, tmp_path):
    module = bench("distilbert")
    recipe = load_recipe("distilbert-sample")
    student = tmp_path / "no_kd" / "train" / "student"
    probe = module.probe_recipe(recipe, "no_kd", student)
    assert [term.kind for term in probe.losses] == ["cross_entropy"]
    assert (probe.student.model, probe.folder) == (str(student), tmp_path / "no_kd-probe")
    assert (probe.phases, probe.task, probe.data, probe.training) == ([], recipe.task, recipe.data, recipe.training)


def test_an_arm_that_is_worse_than_the_full_loss_has_losses_above_zero(bench):
    module = bench("distilbert")
    nll, probe = dict.fromkeys(module.ARMS, 6.0), dict.fromkeys(module.ARMS, 0.9)
    seeds = [
        {"nll": {**nll, "no_kd": 6.5 + shift}, "probe": {**probe, "no_kd": 0.8 - shift}} for shift in (0.0, 0.1, 0.2)
    ]
    rows = {row.id: row for row in module.ablation_rows(seeds)}
    assert rows["distilbert.nll_above_full.no_kd"].value == pytest.approx(0.6)
    assert rows["distilbert.probe_below_full.no_kd"].value == pytest.approx(0.2)
    assert rows["distilbert.nll_above_full.no_kd"].low == pytest.approx(0.6 - 4.303 * 0.1 / 3**0.5)
    assert rows["distilbert.nll_above_full.random_start"].value == 0.0


def test_random_weights_are_of_the_same_shape_follow_from_the_seed_and_are_drawn_once(bench, tmp_path, tiny_tokenizer):
    size = {"dim": 8, "n_heads": 2, "hidden_dim": 16, "n_layers": 2, "max_position_embeddings": 16}
    like = DistilBertForMaskedLM(DistilBertConfig(vocab_size=300, **size))
    like.save_pretrained(tmp_path / "like")
    tiny_tokenizer.save_pretrained(tmp_path / "like")
    draw = bench("distilbert").draw_weights
    for name, seed in (("a", 0), ("b", 0), ("c", 1), ("a", 1)):  # the last finds a folder that is whole
        draw(tmp_path / "like", tmp_path / name, seed)
    drawn = {name: DistilBertForMaskedLM.from_pretrained(tmp_path / name).state_dict() for name in "abc"}
    assert {key: value.shape for key, value in drawn["a"].items()} == {k: v.shape for k, v in like.state_dict().items()}
    key = "distilbert.embeddings.word_embeddings.weight"
    assert drawn["a"][key].equal(drawn["b"][key])
    assert not drawn["a"][key].equal(drawn["c"][key])
    assert not drawn["a"][key].equal(like.state_dict()[key])
