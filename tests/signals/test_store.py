"""What was committed is read bit for bit or not at all, whoever writes, whoever is killed, whatever a disk forgets."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.errors import StoreError
from potstill.signals import audit, places, store
from potstill.signals.store import Stamp, Store, open_store, read_stamp, reopen_store

STRIDE = 42
STAMP = Stamp("teacher-1", "tokenizer-1", "spec-1", "template-1", {"k": 16}, {"teacher": "a large model"})

IN_A_PROCESS = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_store
test_store.{call}
"""


def key_of(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


def records_of(number: int, stride: int = STRIDE) -> np.ndarray:
    draw = random.Random(number)
    count = draw.randrange(0, 60)
    return np.frombuffer(draw.randbytes(count * stride), np.uint8).reshape(count, stride)


def fill(place: Path, numbers: range, **limits: float) -> Store:
    filled = open_store(place, STAMP, STRIDE)
    with filled.writer(**limits) as writer:
        for number in numbers:
            writer.append(key_of(number), records_of(number), str(number).encode())
    return filled


def assert_holds(opened: Store, numbers: range | list[int]) -> None:
    read = opened.read([key_of(number) for number in numbers])
    expected = [records_of(number) for number in numbers]
    assert read.records_NS.tobytes() == b"".join(records.tobytes() for records in expected)
    assert read.counts.tolist() == [len(records) for records in expected]
    assert read.notes == tuple(str(number).encode() for number in numbers)


def run_apart(call: str) -> None:
    """Calls a function of this file in a process of its own, which may fork: it has a single thread."""
    code = IN_A_PROCESS.format(tests=str(Path(__file__).parent), call=call)
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 0, finished.stderr


def forked_writer(place: Path, numbers: range) -> tuple[int, int]:
    """(process, pipe) of a writer that captures what is missing and tells, after every third piece, how far it is."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    opened = open_store(place, STAMP, STRIDE)
    numbers_of = {key_of(number): number for number in numbers}
    missing = [numbers_of[key] for key in opened.missing(numbers_of)]
    os.write(writing, b"ready\n")
    with opened.writer(shard_bytes=20_000) as writer:
        for number in missing:
            writer.append(key_of(number), records_of(number), str(number).encode())
            if number % 3 == 0:
                writer.commit()
                os.write(writing, f"{number}\n".encode())
    os._exit(0)


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x40
    path.write_bytes(raw)


def shard_files(place: Path) -> list[Path]:
    return sorted((place / "shards").iterdir())


@settings(max_examples=40, deadline=None)
@given(
    pieces=st.dictionaries(st.binary(min_size=16, max_size=16), st.tuples(st.integers(0, 30), st.binary(max_size=9))),
    stride=st.integers(1, 3000),
    shard_bytes=st.integers(1, 200_000),
    order=st.randoms(use_true_random=False),
)
def test_what_is_appended_is_read_in_any_order(tmp_path_factory, pieces, stride, shard_bytes, order):
    opened = open_store(tmp_path_factory.mktemp("stores") / "s", STAMP, stride)
    draw = np.random.default_rng(len(pieces))
    records = {key: draw.integers(0, 256, (count, stride), np.uint8) for key, (count, _) in pieces.items()}
    with opened.writer(shard_bytes=shard_bytes) as writer:
        for key, (_, note) in pieces.items():
            writer.append(key, records[key], note)
    keys = [*pieces, *pieces]
    order.shuffle(keys)
    for reader in (opened, open_store(opened.place, STAMP, stride)):
        read = reader.read(keys)
        assert read.records_NS.tobytes() == b"".join(records[key].tobytes() for key in keys)
        assert read.counts.tolist() == [len(records[key]) for key in keys]
        assert read.notes == tuple(pieces[key][1] for key in keys)
        assert sorted(reader) == sorted(pieces)
        assert reader.num_records == sum(map(len, records.values()))
        assert reader.verify() == []


def test_missing_are_the_absent_ones_once_and_in_order(tmp_path):
    filled = fill(tmp_path / "s", range(10))
    asked = [key_of(number) for number in (30, 3, 20, 30, 9, 10)]
    assert filled.missing(asked) == [key_of(30), key_of(20), key_of(10)]
    assert key_of(9) in filled
    assert key_of(10) not in filled
    assert filled.missing([]) == []
    assert filled.read([]).records_NS.shape == (0, STRIDE)


def test_a_piece_that_is_not_there_is_named(tmp_path):
    filled = fill(tmp_path / "s", range(3))
    with pytest.raises(StoreError, match=rf"has no piece {key_of(7).hex()}\. Run the same command again"):
        filled.read([key_of(1), key_of(7)])


def test_equal_keys_are_one_piece(tmp_path):
    for _ in range(3):
        filled = fill(tmp_path / "s", range(5))
    assert (filled.num_pieces, filled.num_shards) == (5, 3)
    assert_holds(filled, range(5))


@pytest.mark.parametrize("what", ["teacher", "tokenizer", "spec"])
def test_a_store_of_another_is_refused_with_both_fingerprints(tmp_path, what):
    fill(tmp_path / "s", range(3))
    names = {"teacher": "teacher-1", "tokenizer": "tokenizer-1", "spec": "spec-1", what: "the-other"}
    with pytest.raises(StoreError, match=rf"^signals\.store: .*another {what}.*{what}-1.*the-other.*Choose"):
        open_store(tmp_path / "s", Stamp(**names), STRIDE)


def test_another_template_is_fine_and_another_stride_is_not(tmp_path):
    fill(tmp_path / "s", range(3))
    assert open_store(tmp_path / "s", Stamp("teacher-1", "tokenizer-1", "spec-1", "other"), STRIDE).num_pieces == 3
    with pytest.raises(StoreError, match=r"records of 42 bytes.*writes 43"):
        open_store(tmp_path / "s", STAMP, 43)
    with pytest.raises(ValueError, match="at least 1 byte"):
        open_store(tmp_path / "t", STAMP, 0)


def test_the_stamp_can_be_read_by_place_alone(tmp_path):
    fill(tmp_path / "s", range(3))
    assert read_stamp(tmp_path / "s") == STAMP
    assert_holds(reopen_store(tmp_path / "s"), range(3))


def test_no_store_is_said_and_none_is_made(tmp_path):
    for look in (read_stamp, reopen_store, lambda place: open_store(place, STAMP, STRIDE, create=False)):
        with pytest.raises(StoreError, match=r"^signals\.store: .*holds no store of signals"):
            look(tmp_path / "s")
    assert not (tmp_path / "s").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot be used.*Not a directory"):
        open_store(tmp_path / "file", STAMP, STRIDE)


def test_a_damaged_manifest_is_refused_and_its_shards_are_used_by_their_owner_only(tmp_path):
    fill(tmp_path / "s", range(3))
    flip(tmp_path / "s" / "store.json", 40)
    with pytest.raises(StoreError, match=r"store\.json is damaged\. Delete that file and run the same command again"):
        open_store(tmp_path / "s", STAMP, STRIDE)
    (tmp_path / "s" / "store.json").unlink()
    assert_holds(open_store(tmp_path / "s", STAMP, STRIDE), range(3))
    (tmp_path / "s" / "store.json").unlink()
    other = open_store(tmp_path / "s", Stamp("teacher-2", "tokenizer-1", "spec-1"), STRIDE)
    assert other.num_pieces == 0
    assert [found.what for found in other.verify()] == ["foreign"]


def test_a_writer_commits_by_size_and_by_time_and_when_it_leaves(tmp_path, monkeypatch):
    filled, now = open_store(tmp_path / "s", STAMP, STRIDE), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    block = np.zeros((10, STRIDE), np.uint8)
    with filled.writer(shard_bytes=2000, seconds=30) as writer:
        for number, shards in enumerate([0, 0, 0, 0, 1]):
            writer.append(key_of(number), block)
            assert len(list((tmp_path / "s").glob("shards/*"))) == shards
        writer.append(key_of(10), block)
        now[0] = 31.0
        writer.append(key_of(11), block)
        assert len(shard_files(tmp_path / "s")) == 2
        writer.append(key_of(12), block)
    assert len(shard_files(tmp_path / "s")) == 3
    assert filled.num_pieces == 8


def test_pieces_without_records_fill_a_shard_too(tmp_path):
    filled = open_store(tmp_path / "s", STAMP, STRIDE)
    with filled.writer(shard_bytes=330) as writer:
        for number in range(20):
            writer.append(key_of(number), np.zeros((0, STRIDE), np.uint8))
    assert (filled.num_shards, filled.num_pieces, filled.num_records) == (2, 20, 0)


def test_an_interrupted_block_commits_what_was_appended(tmp_path):
    filled = open_store(tmp_path / "s", STAMP, STRIDE)

    def capture() -> None:
        with filled.writer() as writer:
            writer.append(key_of(1), records_of(1), b"1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture()
    assert_holds(filled, [1])


@pytest.mark.parametrize(
    "piece",
    [
        (b"short", np.zeros((1, STRIDE), np.uint8)),
        (key_of(1), np.zeros((1, STRIDE + 1), np.uint8)),
        (key_of(1), np.zeros(STRIDE, np.uint8)),
        (key_of(1), np.zeros((1, STRIDE), np.int8)),
    ],
)
def test_a_piece_that_does_not_fit_is_refused_and_leaves_the_writer_as_it_was(tmp_path, piece):
    filled = open_store(tmp_path / "s", STAMP, STRIDE)
    with filled.writer() as writer:
        writer.append(key_of(2), records_of(2), b"2")
        with pytest.raises(ValueError, match=r"16 bytes|must be uint8 \[n, 42\]"):
            writer.append(*piece)
    assert list(filled) == [key_of(2)]
    assert_holds(filled, [2])


def test_a_full_disk_leaves_no_half_shard_says_so_and_the_writer_can_go_on(tmp_path, monkeypatch):
    filled = fill(tmp_path / "s", range(5))
    room = [False]
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with filled.writer() as writer:
        writer.append(key_of(5), records_of(5), b"5")
        monkeypatch.setattr(places.os, "fsync", fsync)
        with pytest.raises(StoreError, match=r"no room left.*What was committed is safe: free some space"):
            writer.commit()
        assert len(list((tmp_path / "s" / "shards").iterdir())) == 1
        room[0] = True
    assert_holds(filled, range(6))


def test_a_store_error_is_not_hidden_by_a_second_attempt(tmp_path, monkeypatch):
    filled = open_store(tmp_path / "s", STAMP, STRIDE)
    attempts = []
    monkeypatch.setattr(store.Writer, "commit", lambda _self: attempts.append(1))
    with pytest.raises(StoreError, match="the first"), filled.writer():
        raise StoreError("the first")
    assert attempts == []


def test_old_parts_of_dead_writers_are_swept_and_young_ones_left(tmp_path):
    fill(tmp_path / "s", range(2))
    old, young = (tmp_path / "s" / "shards" / f".{name}.partial" for name in ("old", "young"))
    for part in (old, young):
        part.write_bytes(b"half")
    os.utime(old, (0, 0))
    filled = fill(tmp_path / "s", range(2, 4))
    assert (old.exists(), young.exists()) == (False, True)
    assert_holds(filled, range(4))
    assert filled.verify() == []


def test_every_one_of_200_flipped_bytes_is_named_and_none_is_read(tmp_path):
    place = tmp_path / "s"
    fill(place, range(60), shard_bytes=30_000)
    (tmp_path / "head").write_bytes(os.urandom(3000))
    reopen_store(place).put_file("head.bin", tmp_path / "head")
    files = [path for path in sorted(place.rglob("*")) if path.is_file()]
    sizes, draw = [path.stat().st_size for path in files], random.Random(1)
    before = reopen_store(place)
    for _ in range(200):
        path = draw.choices(files, sizes)[0] if draw.random() < 0.7 else draw.choice(files)
        raw, spot = path.read_bytes(), draw.randrange(path.stat().st_size)
        path.write_bytes(raw[:spot] + bytes([raw[spot] ^ draw.randrange(1, 256)]) + raw[spot + 1 :])
        (found,) = before.verify()
        assert found.file == path.relative_to(place).as_posix()
        if path.suffix == ".shard":
            assert found.what in ("header", "index", "block")
            assert found.span[0] <= spot < found.span[1]
            assert_never_wrong(place)
        path.write_bytes(raw)
        for record in place.glob("quarantine/*"):
            record.unlink()
    before.refresh()
    assert_holds(before, range(60))


def assert_never_wrong(place: Path) -> None:
    reader = reopen_store(place)
    for number in range(60):
        if key_of(number) in reader:
            try:
                read = reader.read([key_of(number)])
            except StoreError:
                continue
            assert read.records_NS.tobytes() == records_of(number).tobytes()
            assert read.notes == (str(number).encode(),)
    assert reader.num_pieces < 60


def test_a_damaged_block_is_set_aside_for_all_readers_and_captured_again_elsewhere(tmp_path):
    place = tmp_path / "s"
    fill(place, range(200))
    (shard,) = shard_files(place)
    flip(shard, shard.stat().st_size - 1)
    readers = [reopen_store(place), reopen_store(place)]
    last = key_of(max(number for number in range(200) if len(records_of(number))))
    words = rf"{shard.name}: block \d+ \(bytes \d+ to \d+\).*{last.hex()}|{shard.name}.*and \d+ more"
    with pytest.raises(StoreError, match=words) as caught:
        readers[0].read([last])
    assert "run the same command again" in str(caught.value)
    readers[1].refresh()
    for reader in (*readers, reopen_store(place)):
        assert last not in reader
        assert reader.quarantined.blocks == 1
        assert reader.quarantined.pieces == 200 - reader.num_pieces
        assert reader.verify() == []
    lost = [number for number in range(200) if key_of(number) not in readers[0]]
    assert 0 < len(lost) < 200
    with readers[0].writer() as writer:
        for number in lost:
            writer.append(key_of(number), records_of(number), str(number).encode())
    assert_holds(readers[0], range(200))


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 200, 3000, -1])
def test_a_truncated_shard_counts_as_missing_and_is_set_aside_whole(tmp_path, caplog, length):
    place = tmp_path / "s"
    for numbers in (range(10), range(10, 20)):
        reader = fill(place, numbers)
    assert_holds(reader, range(20))
    shard = shard_files(place)[1]
    os.truncate(shard, length if length >= 0 else shard.stat().st_size + length)
    with pytest.raises(StoreError, match=r"size.*captured anew"):
        reader.read([key_of(12)])
    assert_holds(reader, range(10))
    late = reopen_store(place)
    assert late.missing(key_of(number) for number in range(20)) == [key_of(number) for number in range(10, 20)]
    assert late.quarantined.shards == 1
    assert late.verify() == []


def test_an_unreadable_shard_is_warned_of_and_named_but_not_touched_by_looking(tmp_path, caplog):
    place = tmp_path / "s"
    fill(place, range(10))
    flip(shard_files(place)[0], 70)
    reader = reopen_store(place)
    assert "what it held counts as missing" in caplog.text
    assert (reader.num_pieces, reader.quarantined.shards) == (0, 1)
    assert not (place / "quarantine").exists()
    damages = reader.verify()
    assert [found.what for found in damages] == ["index"]
    assert reader.quarantine(damages) == 1
    assert reader.verify() == []


def test_strangers_and_missing_shards_are_named_and_never_read(tmp_path):
    place = tmp_path / "s"
    reader = fill(place, range(10))
    for name in ("shards/notes.txt", "shards/00.shard", "files/head", "quarantine/x.json"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("mine")
    for name in (".DS_Store", ".hidden.shard", ".x.partial"):
        (place / "shards" / name).write_text("the system's")
    (place / "shards" / "folder").mkdir()
    (shard,) = (path for path in shard_files(place) if len(path.name) > 30)
    empty = shard.with_name(f"{'0' * 16}-{'0' * 16}.shard")
    empty.write_bytes(b"")
    shard.unlink()
    found = {damage.file: damage.what for damage in reader.verify()}
    assert found.pop(f"shards/{shard.name}") == "missing"
    assert found.pop(f"shards/{empty.name}") == "size"
    assert set(found.values()) == {"foreign"}
    assert len(found) == 4
    with pytest.raises(StoreError, match="missing"):
        reader.read([key_of(1)])
    assert reader.num_pieces == 0


def test_more_shards_than_may_be_mapped_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MAPPED", 3)
    reader = fill(tmp_path / "s", range(30), shard_bytes=1)
    assert reader.num_shards == 30
    for _ in range(2):
        assert_holds(reader, range(30))


def test_a_block_is_compared_once_by_a_reader(tmp_path, monkeypatch):
    reader = fill(tmp_path / "s", range(100))
    compared = []
    real = store.check_blocks
    monkeypatch.setattr(store, "check_blocks", lambda shard, blocks: compared.extend(blocks) or real(shard, blocks))
    for _ in range(3):
        assert_holds(reader, range(100))
    assert sorted(compared) == list(range(len(set(compared))))


def test_threads_read_while_one_refreshes(tmp_path):
    reader = fill(tmp_path / "s", range(60), shard_bytes=5000)
    wrong: list[Exception] = []

    def read() -> None:
        try:
            for _ in range(20):
                assert_holds(reader, random.sample(range(60), 20))
        except (AssertionError, StoreError) as error:
            wrong.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(60, 70):
        fill(tmp_path / "s", range(number, number + 1))
        reader.refresh()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert_holds(reader, range(70))


def test_two_that_create_at_once_agree_on_one_manifest(tmp_path):
    stamps = [Stamp(f"teacher-{number}", "tokenizer-1", "spec-1") for number in range(6)]
    opened: list[str] = []
    refused: list[str] = []
    gate = threading.Barrier(len(stamps))

    def create(stamp: Stamp) -> None:
        gate.wait()
        try:
            opened.append(open_store(tmp_path / "s", stamp, STRIDE).stamp.teacher)
        except StoreError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=create, args=(stamp,)) for stamp in stamps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == [read_stamp(tmp_path / "s").teacher]
    assert ["another teacher" in words for words in refused] == [True] * 5
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["store.json"]


def test_two_processes_fill_one_store_while_a_third_reads(tmp_path):
    run_apart(f"two_fill_and_one_reads(Path({str(tmp_path / 's')!r}))")


def two_fill_and_one_reads(place: Path) -> None:
    reader = open_store(place, STAMP, STRIDE)
    children = {forked_writer(place, numbers)[0] for numbers in (range(0, 200), range(150, 350))}
    seen = []
    while children:
        reader.refresh()
        seen.append(reader.num_pieces)
        assert_holds(reader, [number for number in range(350) if key_of(number) in reader])
        child, status = os.waitpid(-1, os.WNOHANG)
        assert status == 0
        children.discard(child)
    assert seen == sorted(seen)
    assert len(set(seen)) > 2
    reader.refresh()
    assert_holds(reader, range(350))
    assert reader.verify() == []


@pytest.mark.parametrize("kills", [20, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_anywhere_a_writer_loses_nothing_that_it_committed(tmp_path, kills):
    run_apart(f"kill_and_complete(Path({str(tmp_path / 's')!r}), {kills})")


def kill_and_complete(place: Path, kills: int) -> None:
    draw = random.Random(kills)
    committed: set[int] = set()
    for _ in range(kills):
        child, pipe = forked_writer(place, range(kills * 150))
        with os.fdopen(pipe) as stream:
            assert draw.random() < 0.1 or stream.readline() == "ready\n"
            time.sleep(draw.random() * 0.05)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            committed |= {int(line) for line in stream.read().splitlines() if line.isdecimal()}
        opened = open_store(place, STAMP, STRIDE)
        assert opened.missing(map(key_of, committed)) == []
        assert_holds(opened, [number for number in range(max(committed, default=0)) if key_of(number) in opened])
        assert opened.verify() == []
    assert committed
    last = max(committed) + 20
    child, _ = forked_writer(place, range(last))
    assert os.waitpid(child, 0)[1] == 0
    opened = open_store(place, STAMP, STRIDE)
    assert_holds(opened, range(last))
    assert opened.num_pieces >= last


def test_files_are_kept_once_and_given_back_whole(tmp_path):
    filled = fill(tmp_path / "s", range(1))
    (tmp_path / "head").write_bytes(b"weights" * 1000)
    for _ in range(2):
        filled.put_file("head.safetensors", tmp_path / "head")
    assert len(list((tmp_path / "s" / "files").iterdir())) == 1
    assert filled.get_file("head.safetensors").read_bytes() == b"weights" * 1000
    (tmp_path / "head").write_bytes(b"others")
    with pytest.raises(StoreError, match=r"another file head\.safetensors"):
        filled.put_file("head.safetensors", tmp_path / "head")


def test_a_damaged_file_is_not_given_out_and_is_replaced(tmp_path):
    filled = fill(tmp_path / "s", range(1))
    (tmp_path / "head").write_bytes(b"weights" * 1000)
    filled.put_file("head", tmp_path / "head")
    flip(next((tmp_path / "s" / "files").iterdir()), 99)
    with pytest.raises(StoreError, match=r"file head of .* is damaged\. Run the same command again"):
        filled.get_file("head")
    filled.put_file("head", tmp_path / "head")
    assert filled.get_file("head").read_bytes() == b"weights" * 1000
    with pytest.raises(StoreError, match="is not there"):
        filled.get_file("other")


@pytest.mark.parametrize("name", ["..", "../head", "/etc/head", "a/b", "", ".hidden", "a\\b", "a\0b", "x" * 101])
def test_hostile_names_are_refused(tmp_path, name):
    filled = fill(tmp_path / "s", range(1))
    (tmp_path / "head").write_bytes(b"weights")
    with pytest.raises(ValueError, match="plain name"):
        filled.put_file(name, tmp_path / "head")
    with pytest.raises(ValueError, match="plain name"):
        filled.get_file(name)


def test_a_store_that_cannot_be_written_says_so_when_it_sets_aside(tmp_path, monkeypatch):
    place = tmp_path / "s"
    reader = fill(place, range(10))
    flip(shard_files(place)[0], -1)

    def refuse(*_: object) -> bool:
        raise StoreError("signals.store: read-only")

    monkeypatch.setattr(places.LocalPlace, "create", refuse)
    lost = [number for number in range(10) if len(records_of(number))]
    with pytest.raises(StoreError, match=r"could not be set aside \(signals\.store: read-only\)"):
        reader.read([key_of(number) for number in lost])


def test_an_index_takes_36_bytes_a_piece(tmp_path):
    reader = fill(tmp_path / "s", range(100), shard_bytes=1)
    index = reader._seen.index
    columns = (index.keys, index.shards, index.pieces, index.starts, index.counts)
    assert sum(column.nbytes for column in columns) == 36 * 100
    assert all(column.base is None or column.base.nbytes == column.nbytes for column in columns)


def test_the_quarantine_is_told_by_names_that_are_not_shards_of_elsewhere():
    assert audit.CONDEMNED.fullmatch(f"{'0' * 16}-{'1' * 16}.shard.12.json")
    assert not audit.CONDEMNED.fullmatch(f"../{'0' * 16}-{'1' * 16}.shard.12.json")
