"""A shard gives back what was written, bit for bit, or says what is wrong with it and where."""

from __future__ import annotations

import errno
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.errors import StoreError
from potstill.signals import places
from potstill.signals.shard import (
    BLOCK_BYTES,
    HEADER_BYTES,
    Contents,
    Damage,
    Shard,
    check_blocks,
    open_shard,
    still_whole,
    write_shard,
)

MARK = b"mark of the store"[:16]
FILE = "shards/one.shard"


def contents(counts: list[int], stride: int, notes: list[bytes] | None = None) -> Contents:
    draw = random.Random(str((counts, stride)))
    keys = [draw.randbytes(16) for _ in counts]
    return Contents(keys, counts, notes or [b""] * len(counts), draw.randbytes(sum(counts) * stride))


def written(path: Path, what: Contents, stride: int) -> Path:
    write_shard(path, what, stride=stride, mark=MARK, place="here")
    return path


def opened(path: Path, stride: int) -> Shard:
    shard = open_shard(path, FILE, stride=stride, mark=MARK)
    assert isinstance(shard, Shard), shard
    return shard


def damages(path: Path, stride: int) -> list[Damage]:
    shard = open_shard(path, FILE, stride=stride, mark=MARK)
    return [shard] if isinstance(shard, Damage) else check_blocks(shard, range(len(shard.checks)))


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 40), st.binary(max_size=20)), max_size=12),
    stride=st.integers(1, 9000),
)
def test_what_is_written_is_read(tmp_path_factory, pieces, stride):
    path = tmp_path_factory.mktemp("shards") / "one.shard"
    what = contents([count for count, _ in pieces], stride, [note for _, note in pieces])
    shard = opened(written(path, what, stride), stride)
    assert shard.keys.tobytes() == b"".join(what.keys)
    assert np.diff(shard.starts).tolist() == what.counts
    assert [shard.note(piece) for piece in range(len(pieces))] == what.notes
    assert shard.data.tobytes() == what.data
    assert damages(path, stride) == []


def test_every_flipped_byte_is_found_and_named_with_its_block(tmp_path):
    stride, what = 700, contents([100, 0, 120, 90], 700, [b"", b"note", b"n", b""])
    path = written(tmp_path / "one.shard", what, stride)
    raw, draw = path.read_bytes(), random.Random(0)
    shard = opened(path, stride)
    data_start = len(raw) - len(what.data)
    for place in [*range(data_start), *(draw.randrange(data_start, len(raw)) for _ in range(300))]:
        flipped = bytearray(raw)
        flipped[place] ^= draw.randrange(1, 256)
        path.write_bytes(flipped)
        (found,) = damages(path, stride)
        assert found.file == FILE
        assert found.span[0] <= place < found.span[1]
        if place < HEADER_BYTES:
            assert found.what == "header"
        elif place < data_start:
            assert found.what == "index"
        else:
            block = (place - data_start) // BLOCK_BYTES
            assert (found.what, found.block) == ("block", block)
            bounds = pairwise((shard.starts * stride).tolist())
            first, last = block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES
            touching = [key for key, (a, b) in zip(what.keys, bounds, strict=True) if a < b and a < last and b > first]
            assert list(found.pieces) == touching


def test_a_shard_that_is_cut_or_longer_at_any_boundary_is_named_by_its_size(tmp_path):
    stride, what = 500, contents([200, 3], 500, [b"abc", b""])
    raw = written(tmp_path / "one.shard", what, stride).read_bytes()
    start = len(raw) - len(what.data)
    cuts = {0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1, HEADER_BYTES + 24, start - 1, start, start + 1}
    for length in sorted(cuts | {start + BLOCK_BYTES - 1, start + BLOCK_BYTES, len(raw) - stride, len(raw) - 1}):
        (tmp_path / "cut").write_bytes(raw[:length])
        (found,) = damages(tmp_path / "cut", stride)
        assert (found.what, found.block) == ("size", None)
        assert str(length) in found.words
    (tmp_path / "cut").write_bytes(raw + b"\0")
    assert [found.what for found in damages(tmp_path / "cut", stride)] == ["size"]


def test_a_shard_of_another_store_or_version_is_foreign_and_not_damaged(tmp_path):
    path = written(tmp_path / "one.shard", contents([3], 4), 4)
    for stride, mark in ((4, b"x" * 16), (5, MARK)):
        found = open_shard(path, FILE, stride=stride, mark=mark)
        assert isinstance(found, Damage)
        assert found.what == "foreign"


def test_a_shard_that_is_gone_is_missing(tmp_path):
    path = tmp_path / "one.shard"
    assert [found.what for found in damages(path, 4)] == ["missing"]
    shard = opened(written(path, contents([3], 4), 4), 4)
    assert still_whole(shard) is None
    path.unlink()
    assert still_whole(shard).what == "missing"


def test_a_shard_that_is_cut_while_it_is_mapped_is_noticed_before_it_is_read(tmp_path):
    shard = opened(written(tmp_path / "one.shard", contents([3000], 40), 40), 40)
    with (tmp_path / "one.shard").open("rb+") as stream:
        stream.truncate(100)
    assert still_whole(shard).what == "size"


def test_a_full_disk_leaves_no_part_and_says_so(tmp_path, monkeypatch):
    def refuse(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(places.os, "fsync", refuse)
    with pytest.raises(StoreError, match=r"signals\.store: here has no room left.*run the same command again"):
        written(tmp_path / "one.shard", contents([3], 4), 4)
    assert list(tmp_path.iterdir()) == []
