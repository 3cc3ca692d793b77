"""A store on object storage is the same store; what cannot be reached is said before any work, with what to set."""

from __future__ import annotations

import errno
import sys
import types
import uuid

import fsspec
import numpy as np
import pytest

from potstill.errors import MissingExtra, StoreError
from potstill.signals import remote
from potstill.signals.places import LocalPlace
from potstill.signals.remote import check_place, place_at
from potstill.signals.store import Stamp, open_store, read_stamp, reopen_store

STAMP = Stamp("teacher-1", "tokenizer-1", "spec-1")
KEYS = [bytes([number]) * 16 for number in range(20)]
RECORDS = np.random.default_rng(0).integers(0, 256, (20, 50, 8), np.uint8)


@pytest.fixture
def address():
    place = f"memory://{uuid.uuid4().hex}/store"
    yield place
    fsspec.filesystem("memory").rm(place, recursive=True) if fsspec.filesystem("memory").exists(place) else None


def fill(address, cache, numbers=range(20)):
    filled = open_store(address, STAMP, 8, cache=cache)
    with filled.writer(shard_bytes=2000) as writer:
        for number in numbers:
            writer.append(KEYS[number], RECORDS[number], b"note")
    return filled


def damage(address, where):
    """Flips the last byte of every file below a folder of the memory file system."""
    files = fsspec.filesystem("memory")
    for path in files.find(f"{address}/{where}"):
        raw = files.cat_file(path)
        files.pipe_file(path, raw[:-1] + bytes([raw[-1] ^ 1]))


class Refusing:
    """A file system that answers everything with one error."""

    def __init__(self, error):
        self.error = error

    def __getattr__(self, name):
        def refuse(*_, **__):
            raise self.error

        return refuse


def answer_with(monkeypatch, error):
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda address: (Refusing(error), address.partition("://")[2]))


def test_what_one_machine_stores_another_reads(address, tmp_path):
    fill(address, tmp_path / "one")
    reader = open_store(address, STAMP, 8, cache=tmp_path / "two")
    read = reader.read(KEYS[::-1])
    assert (read.records_NS == RECORDS[::-1].reshape(-1, 8)).all()
    assert set(read.notes) == {b"note"}
    assert reader.verify() == []
    assert read_stamp(address, tmp_path / "three") == STAMP
    assert not (tmp_path / "three").exists()


def test_copies_are_fetched_once(address, tmp_path, monkeypatch):
    fill(address, tmp_path / "one")
    open_store(address, STAMP, 8, cache=tmp_path / "two")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "get_file", lambda *_: pytest.fail("downloaded again"))
    for cache in ("one", "two"):
        assert len(open_store(address, STAMP, 8, cache=tmp_path / cache).read(KEYS).counts) == 20


def test_of_two_that_create_one_wins(address, tmp_path):
    one, two = (place_at(address, tmp_path / name) for name in ("one", "two"))
    assert (one.create("store.json", b"one"), two.create("store.json", b"two")) == (True, False)
    assert two.read("store.json") == b"one"


def test_readers_see_what_others_commit(address, tmp_path):
    reader = fill(address, tmp_path / "one", range(10))
    fill(address, tmp_path / "two", range(10, 20))
    assert reader.num_pieces == 10
    reader.refresh()
    assert reader.num_pieces == 20


def test_another_teacher_is_refused(address, tmp_path):
    fill(address, tmp_path / "one")
    with pytest.raises(StoreError, match=r"another teacher.*teacher-1.*teacher-2"):
        open_store(address, Stamp("teacher-2", "tokenizer-1", "spec-1"), 8, cache=tmp_path / "one")


def test_a_damaged_copy_is_fetched_again_and_nothing_is_set_aside(address, tmp_path):
    fill(address, tmp_path / "one")
    for harm in (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), lambda raw: raw[:99], lambda raw: b"?" + raw[1:]):
        for copy in (tmp_path / "one" / "shards").iterdir():
            copy.write_bytes(harm(copy.read_bytes()))
        reader = reopen_store(address, tmp_path / "one")
        assert (reader.read(KEYS).records_NS == RECORDS.reshape(-1, 8)).all()
        assert reader.quarantined.blocks == reader.quarantined.shards == 0


def test_a_damaged_original_is_set_aside_for_all(address, tmp_path):
    fill(address, tmp_path / "one")
    damage(address, "shards")
    reader = reopen_store(address, tmp_path / "two")
    damages = reader.verify()
    assert {found.what for found in damages} == {"block"}
    with pytest.raises(StoreError, match="is set aside"):
        reader.read(KEYS)
    reader.quarantine(damages)
    assert reopen_store(address, tmp_path / "one").missing(KEYS) == KEYS


def test_verify_looks_at_the_originals_even_where_copies_are_whole(address, tmp_path):
    filled = fill(address, tmp_path / "one")
    damage(address, "shards")
    assert {found.what for found in filled.verify()} == {"block"}


def test_files_are_kept_and_their_copies_checked(address, tmp_path):
    filled = fill(address, tmp_path / "one")
    (tmp_path / "head").write_bytes(b"weights")
    filled.put_file("head", tmp_path / "head")
    copy = reopen_store(address, tmp_path / "two").get_file("head")
    assert copy.read_bytes() == b"weights"
    copy.write_bytes(b"weighty")
    assert reopen_store(address, tmp_path / "two").get_file("head").read_bytes() == b"weights"
    damage(address, "files")
    assert [found.what for found in filled.verify()] == ["content"]
    filled.put_file("head", tmp_path / "head")
    assert filled.verify() == []


@pytest.mark.parametrize(
    ("place", "extra"), [("s3://bucket/x", "s3"), ("gs://bucket/x", "gcs"), ("az://container/x", "azure")]
)
def test_an_absent_package_is_named_with_its_extra(monkeypatch, place, extra):
    for name in ("s3fs", "gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=rf'signals\.store: {place}.*pip install "potstill\[{extra}\]"'):
        check_place(place)


@pytest.mark.parametrize(
    ("place", "variable"),
    [
        ("s3://bucket/x", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"),
        ("gs://bucket/x", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("az://container/x", "AZURE_STORAGE_CONNECTION_STRING"),
    ],
)
def test_absent_credentials_are_named_before_any_work(monkeypatch, place, variable):
    answer_with(monkeypatch, PermissionError("Forbidden\nat the gate"))
    with pytest.raises(StoreError, match=rf"signals\.store: {place} cannot be reached \(Forbidden\)\. .*{variable}"):
        check_place(place)


def test_what_a_service_raises_of_its_own_is_told_like_all_else(monkeypatch, tmp_path):
    class NoCredentialsError(Exception):
        pass

    module = types.ModuleType("botocore.exceptions")
    module.BotoCoreError = NoCredentialsError
    monkeypatch.setitem(sys.modules, "botocore.exceptions", module)
    answer_with(monkeypatch, NoCredentialsError("Unable to locate credentials"))
    for ask in (check_place, lambda place: open_store(place, STAMP, 8, cache=tmp_path)):
        with pytest.raises(StoreError, match=r"Unable to locate credentials.*AWS_PROFILE"):
            ask("s3://bucket/x")


def test_a_mistake_of_ours_is_not_taken_for_the_network(monkeypatch):
    answer_with(monkeypatch, TypeError("ours"))
    with pytest.raises(TypeError, match="ours"):
        check_place("s3://bucket/x")


def test_a_full_disk_under_the_copies_is_told_as_such(address, tmp_path, monkeypatch):
    fill(address, tmp_path / "one")
    full = OSError(errno.ENOSPC, "No space left on device")
    place = place_at(address, tmp_path / "two")
    name = f"shards/{next(iter(place.list('shards')))}"
    monkeypatch.setattr(place, "_files", Refusing(full))
    with pytest.raises(StoreError, match=r"two has no room left"):
        place.fetch(name)
    assert list((tmp_path / "two" / "shards").iterdir()) == []


@pytest.mark.parametrize("place", ["ftp://host/x", "file:///tmp/x", "simplecache::s3://bucket/x", "https://host/x"])
def test_unknown_kinds_of_addresses_are_refused(place):
    with pytest.raises(StoreError, match="unknown kind"):
        check_place(place)


def test_an_address_needs_a_folder_for_copies(address):
    with pytest.raises(ValueError, match="cache folder"):
        place_at(address)


def test_a_place_that_answers_is_fine_and_stays_empty(address, tmp_path):
    check_place(address)
    check_place(tmp_path / "not" / "there" / "yet")
    assert not fsspec.filesystem("memory").exists(address)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"^signals\.store: .*file: not a folder"):
        check_place(tmp_path / "file" / "store")
    monkeypatch.setattr("potstill.signals.places.os.access", lambda *_: False)
    with pytest.raises(StoreError, match="no permission"):
        check_place(str(tmp_path / "store"))


def test_a_file_system_without_links_still_makes_a_store(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("potstill.signals.places.os.link", refuse)
    place = LocalPlace(tmp_path / "s")
    assert place.create("store.json", b"one")
    assert not place.create("store.json", b"two")
    assert place.read("store.json") == b"one"
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["store.json"]


def test_every_kind_of_address_has_its_extra_and_its_credentials():
    assert set(remote.EXTRAS.values()) == set(remote.CREDENTIALS)
