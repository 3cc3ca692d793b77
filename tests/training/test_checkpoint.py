"""Whatever happens to a checkpoint, the newest whole one is found, and nothing that is not whole is loaded."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from potstill.errors import CheckpointError, RunError
from potstill.training import CheckpointStore
from potstill.training.checkpoint import random_state, restore_random_state


def state_of(step):
    return {
        "weights": {"a": torch.full((50, 3), float(step)), "b": torch.arange(step, step + 9, dtype=torch.bfloat16)},
        "optimizer": {
            "state": {0: {"step": torch.tensor(float(step)), "exp_avg": torch.ones(3)}},
            "groups": [{"lr": 0.1}],
        },
        "progress": {"step": step, "seconds": step / 7, "name": "x", "none": None, "flag": True},
    }


def assert_same(left, right):
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_same(*pair)
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    else:
        assert left == right


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


def test_a_state_comes_back_as_it_went(store):
    assert store.load_newest() is None
    path = store.save(12, state_of(12))
    assert path == store.folder / "step-000000012"
    step, state = store.load_newest()
    assert step == 12
    assert_same(state, state_of(12))


def test_the_newest_are_kept_by_number_not_by_name(store):
    for step in (9, 10, 999_999_999, 1_000_000_000):
        store.save(step, state_of(3))
    assert store.steps() == [999_999_999, 1_000_000_000]
    assert names(store) == ["step-1000000000", "step-999999999"]
    assert store.load_newest()[0] == 1_000_000_000


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_are_kept_as_asked(tmp_path, keep):
    store = CheckpointStore(tmp_path, keep)
    for step in range(1, 6):
        store.save(step, state_of(step))
        assert store.steps() == list(range(max(1, step - keep + 1), step + 1))


def test_folders_of_other_names_are_no_checkpoints(store):
    store.save(5, state_of(5))
    for name in ("step-000000009 (copy)", "step-x", "step-", "other"):
        (store.folder / name).mkdir()
    assert store.steps() == [5]
    assert store.load_newest()[0] == 5


def test_a_whole_checkpoint_is_not_written_again(store):
    store.save(5, state_of(5))
    before = (store.folder / "step-000000005" / "state.pt").stat().st_mtime_ns
    store.save(5, state_of(5))
    assert (store.folder / "step-000000005" / "state.pt").stat().st_mtime_ns == before


def test_a_damaged_checkpoint_is_written_again(store):
    (store.save(5, state_of(5)) / "state.pt").write_bytes(b"")
    store.save(5, state_of(5))
    assert_same(store.load_newest()[1], state_of(5))


def flip_byte(path):
    file = path / "state.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def truncate(path):
    with (path / "state.pt").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 1)


DAMAGES = {
    "flipped byte": (flip_byte, "is not what was written"),
    "cut short": (truncate, "were written"),
    "state missing": (lambda path: (path / "state.pt").unlink(), "FileNotFoundError"),
    "note missing": (lambda path: (path / "checkpoint.json").unlink(), "FileNotFoundError"),
    "note empty": (lambda path: (path / "checkpoint.json").write_text(""), "JSONDecodeError"),
    "note of other kind": (lambda path: (path / "checkpoint.json").write_text("[1]"), "TypeError"),
    "note without hash": (
        lambda path: (path / "checkpoint.json").write_text(json.dumps({"bytes": (path / "state.pt").stat().st_size})),
        "KeyError",
    ),
    "note not text": (lambda path: (path / "checkpoint.json").write_bytes(b"\xff\xfe\xfd"), "UnicodeDecodeError"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(store, caplog, kind):
    damage, reason = DAMAGES[kind]
    store.save(10, state_of(10))
    damage(store.save(20, state_of(20)))
    with caplog.at_level(logging.WARNING):
        step, state = store.load_newest()
    assert step == 10
    assert_same(state, state_of(10))
    (record,) = caplog.records
    assert "step-000000020 is damaged" in record.getMessage()
    assert reason in record.getMessage()
    assert names(store) == ["damaged-000000020", "step-000000010"]
    store.save(20, state_of(20))
    assert store.load_newest()[0] == 20


def test_when_none_is_whole_the_error_says_what_to_do(store, caplog):
    for step in (10, 20):
        truncate(store.save(step, state_of(step)))
    with pytest.raises(CheckpointError) as caught:
        store.load_newest()
    assert str(caught.value) == (
        f"training.checkpoint: none of the 2 checkpoints in {store.folder} is whole. They are set aside as damaged-*; "
        "run the same command again to train from the start."
    )
    assert len(caplog.records) == 2
    assert store.load_newest() is None, "the next command starts from the start, as the error says"


def test_left_parts_of_any_step_are_cleared(store):
    store.save(10, state_of(10))
    (store.folder / "part-000000015").mkdir()
    (store.folder / "part-000000015" / "state.pt").write_bytes(b"half")
    assert store.load_newest()[0] == 10
    store.save(14, state_of(14))
    assert names(store) == ["step-000000010", "step-000000014"]


def test_clearing_leaves_nothing(store):
    store.clear()
    store.save(10, state_of(10))
    store.clear()
    assert not store.folder.exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed\nstack")]
)
def test_a_full_disk_is_told_and_costs_no_older_checkpoint(store, monkeypatch, error):
    store.save(10, state_of(10))

    def fail(_, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(
        RunError, match=r"^training\.checkpoint: the state after step 20 cannot be written to "
    ) as caught:
        store.save(20, state_of(20))
    assert not isinstance(caught.value, CheckpointError)
    assert "\n" not in str(caught.value)
    assert names(store) == ["step-000000010"]
    assert store.load_newest()[0] == 10


class Killed(BaseException):
    """The process is gone: nothing that the code does about errors may run."""


def half_written(obj, file):
    whole = io_bytes(obj)
    file.write(whole[: len(whole) // 2])
    file.flush()


_torch_save = torch.save


def io_bytes(obj):
    import io

    buffer = io.BytesIO()
    _torch_save(obj, buffer)
    return buffer.getvalue()


def half_removed(path, *_, **__):
    files = sorted(Path(path).iterdir()) if Path(path).is_dir() else []
    if files:
        files[0].unlink() if files[0].is_file() else shutil.rmtree(files[0])


def kill_at(monkeypatch, moment):
    """Kill at the `moment`-th point within calls that change the disk: before, half way through, or after each."""
    points = itertools.count()

    def watched(function, half=None):
        def call(*args, **kwargs):
            for part in (None, half):
                if next(points) == moment:
                    if part is not None:
                        part(*args, **kwargs)
                    raise Killed
            result = function(*args, **kwargs)
            if next(points) == moment:
                raise Killed
            return result

        return call

    monkeypatch.setattr(torch, "save", watched(torch.save, half_written))
    monkeypatch.setattr(shutil, "rmtree", watched(shutil.rmtree, half_removed))
    monkeypatch.setattr(Path, "rename", watched(Path.rename))
    monkeypatch.setattr(Path, "mkdir", watched(Path.mkdir))
    monkeypatch.setattr(json, "dump", watched(json.dump, lambda _, file: file.write('{"step": 3')))
    monkeypatch.setattr(os, "fsync", watched(os.fsync))


def killed(monkeypatch, moment, action):
    """Whether `action` was killed at that moment, or was over before it."""
    with monkeypatch.context() as patch:
        kill_at(patch, moment)
        try:
            action()
        except Killed:
            return True
    return False


@pytest.mark.parametrize(("keep", "left_part"), [(1, False), (2, False), (2, True)])
def test_a_kill_at_any_moment_of_saving_leaves_a_whole_newest_one(tmp_path, monkeypatch, caplog, keep, left_part):
    for moment in itertools.count():
        store = CheckpointStore(tmp_path / str(moment), keep)
        for step in (10, 20):
            store.save(step, state_of(step))
        if left_part:
            shutil.copytree(store.folder / "step-000000020", store.folder / "part-000000025")
        was_killed = killed(monkeypatch, moment, lambda store=store: store.save(30, state_of(30)))
        step, state = store.load_newest()
        assert step in ((20, 30) if was_killed else (30,))
        assert_same(state, state_of(step))
        store.save(40, state_of(40))
        assert store.load_newest()[0] == 40
        assert not [name for name in names(store) if name.startswith("part-")]
        assert len(store.steps()) <= keep
        if not was_killed:
            break
    assert moment > 15
    assert not caplog.records, "no crash makes a checkpoint that must be called damaged"


def test_a_kill_at_any_moment_of_clearing_leaves_whole_ones_or_none(tmp_path, monkeypatch, caplog):
    for moment in itertools.count():
        store = CheckpointStore(tmp_path / str(moment))
        for step in (10, 20):
            store.save(step, state_of(step))
        was_killed = killed(monkeypatch, moment, store.clear)
        found = store.load_newest()
        assert found is None or found[0] == 20
        store.clear()
        assert not store.folder.exists()
        if not was_killed:
            break
    assert moment > 5
    assert not caplog.records


def test_random_numbers_go_on_as_if_nothing_had_happened(store):
    random.gauss(0, 1), np.random.standard_normal()  # both keep a second number back
    store.save(1, {"random": random_state()})

    def draw():
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.standard_normal(),
            torch.rand(3).tolist(),
        )

    expected = draw()
    draw()
    restore_random_state(store.load_newest()[1]["random"])
    assert draw() == expected
