from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from potstill.errors import RunError, SampleError
from potstill.pipeline import disk, rundir
from potstill.pipeline.disk import check_disk, read_json, replace_folder, write_json_atomic, write_text_atomic
from potstill.pipeline.memory import peak_memory_bytes, reset_peak_memory
from potstill.pipeline.rundir import RunDir, open_run

RECIPE = "name: toy\n"
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def make_stage(run: RunDir, name: str = "prepare", fingerprint: str = "f1", content: str = "rows") -> None:
    with run.stage(name, fingerprint, inputs={"data": "abc"}, seed=7) as stage:
        (stage.folder / "deep").mkdir(exist_ok=True)
        (stage.folder / "deep" / "rows.txt").write_text(content)
        stage.finish(rows=3)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- a stage's life ---------------------------------------------------------------------------------------------------


def test_a_finished_stage_is_done_and_says_what_it_did(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        assert run.state("prepare", "f1") == "missing"
        run.write_recipe(RECIPE)
        make_stage(run)
        assert run.state("prepare", "f1") == "done"
        manifest = run.manifest("prepare")
    assert (tmp_path / "run" / "recipe.yaml").read_text() == rundir.RECIPE_MARK + RECIPE
    assert (manifest.stage, manifest.fingerprint, manifest.seed) == ("prepare", "f1", 7)
    assert manifest.inputs == {"data": "abc"}
    assert manifest.facts == {"rows": 3}
    assert manifest.attempts == 1
    assert list(manifest.outputs) == ["deep/rows.txt"]
    assert manifest.outputs["deep/rows.txt"].size == 4
    assert {"python", "torch", "potstill"} <= manifest.versions.keys()
    assert manifest.wall_s >= 0
    assert manifest.peak_rss_bytes > 2**20
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", manifest.finished_at)


def test_another_fingerprint_is_stale_and_nothing_is_touched_before_it_begins(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        make_stage(run)
        before = tree(tmp_path / "prepare")
        assert run.state("prepare", "f2") == "stale"
        assert tree(tmp_path / "prepare") == before
        with run.stage("prepare", "f2") as stage:
            assert sorted(path.name for path in stage.folder.iterdir()) == ["started.json"]
            assert not stage.resumed
            stage.finish()
        assert run.state("prepare", "f1") == "stale"
        assert run.state("prepare", "f2") == "done"
    assert not (tmp_path / ".prepare.old").exists()


def interrupt(run: RunDir, fingerprint: str) -> None:
    with contextlib.suppress(KeyboardInterrupt), run.stage("train", fingerprint) as stage:
        (stage.folder / "checkpoint").write_text("10 steps")
        raise KeyboardInterrupt


def test_interrupted_work_is_kept_for_the_same_fingerprint_only(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        interrupt(run, "f1")
        assert run.state("train", "f1") == "partial"
        assert run.state("train", "f2") == "stale"
        with run.stage("train", "f1") as stage:
            assert stage.resumed
            assert (stage.folder / "checkpoint").read_text() == "10 steps"
            assert stage.finish().attempts == 2
        interrupt(run, "f2")
        with run.stage("train", "f3") as stage:
            assert not (stage.folder / "checkpoint").exists()
            stage.finish()


def test_a_done_stage_that_is_begun_again_starts_from_nothing(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        make_stage(run)
        with run.stage("prepare", "f1") as stage:
            assert not (stage.folder / "deep").exists()
            stage.finish()


def test_a_stage_that_forgets_to_finish_is_not_done(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        with pytest.raises(RunError, match="without finishing"), run.stage("train", "f1"):
            pass
        assert run.state("train", "f1") == "partial"


def test_only_named_outputs_must_stay(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        with run.stage("train", "f1") as stage:
            for name in ("student", "checkpoints"):
                (stage.folder / name).mkdir()
                (stage.folder / name / "weights").write_text(name)
            (stage.folder / "metrics.jsonl").write_text("{}")
            manifest = stage.finish("student", "metrics.jsonl")
        assert sorted(manifest.outputs) == ["metrics.jsonl", "student/weights"]
        shutil.rmtree(tmp_path / "train" / "checkpoints")
        (tmp_path / "train" / "student" / "README.md").write_text("a card, added later")
        assert run.state("train", "f1") == "done"


def test_an_output_that_was_promised_and_not_made_is_refused(tmp_path: Path) -> None:
    with (
        open_run(tmp_path) as run,
        pytest.raises(RunError, match=r"run_dir: .*train/student cannot be written \(No such file"),
        run.stage("train", "f1") as stage,
    ):
        stage.finish("student")
    assert run.state("train", "f1") == "partial"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_never_reaches_the_manifest(tmp_path: Path, value: float) -> None:
    with open_run(tmp_path) as run:
        with pytest.raises(ValueError, match="not JSON compliant"), run.stage("train", "f1") as stage:
            stage.finish(loss=value)
        assert run.state("train", "f1") == "partial"


def test_a_recipe_of_the_users_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: toy  # my comment\n")
    with pytest.raises(RunError, match=r"run_dir: .*/recipe\.yaml was not written by potstill\."), open_run(tmp_path):
        pass
    assert tree(tmp_path) == {"recipe.yaml": b"name: toy  # my comment\n"}


def test_what_potstill_wrote_it_writes_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with open_run(tmp_path) as run:
            run.write_recipe(f"name: {name}\n")
    assert (tmp_path / "recipe.yaml").read_text().splitlines()[1:] == ["name: two"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"run_dir: .*train cannot be written \(No space left"),
        (SafetensorError("I/O error: full (os error 28)"), r"run_dir: .*train cannot be written \(I/O error"),
        (PermissionError(errno.EACCES, "Permission denied", "IN/a"), r"run_dir: .*train/a cannot be .*Permission"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/a"), r"could not go on \(.*'/data/a'\)\. Mend that"),
        (ConnectionError("no route"), r"run_dir: the stage in .*train could not go on \(no route\)"),
    ],
    ids=["full", "safetensors", "ours", "theirs", "network"],
)
def test_what_the_system_refuses_in_a_stage_is_told(tmp_path: Path, error: Exception, message: str) -> None:
    if str(getattr(error, "filename", "")).startswith("IN/"):
        error.filename = str(tmp_path / "train" / "a")
    with open_run(tmp_path) as run:
        with pytest.raises(RunError, match=message), run.stage("train", "f1"):
            raise error
        assert run.state("train", "f1") == "partial"


def test_errors_of_potstill_leave_a_stage_as_they_are(tmp_path: Path) -> None:
    with open_run(tmp_path) as run, pytest.raises(SampleError, match=r"^sample: gone$"), run.stage("train", "f1"):
        raise SampleError("sample: gone")


def test_a_stage_costs_what_all_its_attempts_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = iter([0.0, 100.0, 1000.0, 1010.0])
    peaks = iter([7, 5])
    monkeypatch.setattr(rundir.time, "monotonic", lambda: next(now_s))
    monkeypatch.setattr(rundir, "peak_memory_bytes", lambda: next(peaks))
    run = RunDir(tmp_path)
    interrupt(run, "f1")
    with run.stage("train", "f1") as stage:
        manifest = stage.finish()
    assert (manifest.attempts, manifest.timed_attempts) == (2, 2)
    assert (manifest.wall_s, manifest.peak_rss_bytes) == (110.0, 7)


def test_an_attempt_that_was_killed_is_not_counted_as_timed(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    interrupt(run, "f1")
    started = json.loads((tmp_path / "train" / "started.json").read_text())
    (tmp_path / "train" / "started.json").write_text(json.dumps(started | {"attempts": 2}))  # as kill -9 leaves it
    with run.stage("train", "f1") as stage:
        manifest = stage.finish()
    assert (manifest.attempts, manifest.timed_attempts) == (3, 2)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hurt",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text("row"),
        lambda path: path.write_text("rowz"),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: shutil.rmtree(path.parent),
    ],
    ids=["gone", "short", "changed", "folder", "parent gone"],
)
def test_an_output_that_is_not_what_it_was_is_damage(tmp_path: Path, hurt: Callable[[Path], object]) -> None:
    with open_run(tmp_path) as run:
        make_stage(run)
        hurt(tmp_path / "prepare" / "deep" / "rows.txt")
        assert run.state("prepare", "f1") == "damaged"
        assert "deep/rows.txt changed or vanished" in run.status("prepare", "f1").why
        make_stage(run)
        assert run.state("prepare", "f1") == "done"


def test_beginning_a_damaged_stage_drops_what_is_broken_and_keeps_the_rest(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        with run.stage("train", "f1") as stage:
            (stage.folder / "good").write_text("good")
            (stage.folder / "bad").write_text("bad")
            stage.finish()
        (tmp_path / "train" / "bad").write_text("BAD")
        with run.stage("train", "f1") as stage:
            assert sorted(path.name for path in stage.folder.iterdir()) == ["good", "started.json"]
            assert stage.resumed
            stage.finish()


def test_large_outputs_are_verified_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "HASHED_BYTES", 3)
    with open_run(tmp_path) as run:
        make_stage(run)
        assert run.manifest("prepare").outputs["deep/rows.txt"].blake2b is None
        (tmp_path / "prepare" / "deep" / "rows.txt").write_text("rowz")
        assert run.state("prepare", "f1") == "done"
        (tmp_path / "prepare" / "deep" / "rows.txt").write_text("row")
        assert run.state("prepare", "f1") == "damaged"


HOSTILE = [
    b"",
    b"{",
    b"\xff\xfe\x00",
    b"[]",
    b"null",
    b'"x"',
    b'{"stage": "prepare"}',
    b"[" * 100_000,
    b'{"fingerprint": 1}',
]


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_a_damaged_manifest_is_never_taken_for_done(tmp_path: Path, content: bytes) -> None:
    with open_run(tmp_path) as run:
        make_stage(run)
        (tmp_path / "prepare" / "manifest.json").write_bytes(content)
        assert run.state("prepare", "f1") == "damaged"
        assert str(tmp_path / "prepare" / "manifest.json") in run.status("prepare", "f1").why
        with run.stage("prepare", "f1") as stage:
            assert not (stage.folder / "deep").exists()
            stage.finish()
        assert run.state("prepare", "f1") == "done"


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10**4), junk=st.binary(max_size=3))
def test_a_torn_manifest_is_damaged_or_whole(tmp_path_factory: pytest.TempPathFactory, cut: int, junk: bytes) -> None:
    folder = tmp_path_factory.mktemp("run")
    run = RunDir(folder)
    make_stage(run)
    path = folder / "prepare" / "manifest.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % len(whole)] + junk)
    assert run.state("prepare", "f1") in ("damaged", "stale")


@pytest.mark.parametrize("name", ["../../precious", "/tmp/precious"])
def test_a_forged_manifest_cannot_reach_outside_of_its_stage(tmp_path: Path, name: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    run = RunDir(tmp_path / "run")
    make_stage(run)
    path = tmp_path / "run" / "prepare" / "manifest.json"
    forged = json.loads(path.read_text())
    forged["outputs"][name] = {"size": 1, "blake2b": None}
    path.write_text(json.dumps(forged))
    assert run.state("prepare", "f1") == "damaged"
    make_stage(run)
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_work_of_unknown_origin_is_not_continued(tmp_path: Path, content: bytes) -> None:
    with open_run(tmp_path) as run:
        interrupt(run, "f1")
        (tmp_path / "train" / "started.json").write_bytes(content)
        assert run.state("train", "f1") == "missing"
        with run.stage("train", "f1") as stage:
            assert not (stage.folder / "checkpoint").exists()
            stage.finish()


def test_somebody_elses_folder_is_never_cleared(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "thesis.tex").write_text("ten years")
    with (
        open_run(tmp_path) as run,
        pytest.raises(RunError, match=r"run_dir: .*/report holds files that potstill did not write\. Move them"),
        run.stage("report", "f1"),
    ):
        pass
    assert (tmp_path / "report" / "thesis.tex").read_text() == "ten years"


def test_a_linked_stage_folder_is_unlinked_and_its_target_left_alone(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        make_stage(run)
        (tmp_path / "run" / "prepare").rename(tmp_path / "elsewhere")
        (tmp_path / "run" / "prepare").symlink_to(tmp_path / "elsewhere")
        assert run.state("prepare", "f1") == "done"
        make_stage(run, fingerprint="f2")
    assert (tmp_path / "elsewhere" / "deep" / "rows.txt").exists()
    assert not (tmp_path / "run" / "prepare").is_symlink()


def test_explain_tells_every_stage_in_order(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        for name in ("prepare", "initialise", "evaluate"):
            make_stage(run, name)
        (tmp_path / "evaluate" / "deep" / "rows.txt").unlink()
        interrupt(run, "f1")
        stages = [("prepare", "f1"), ("initialise", "f2"), ("train", "f1"), ("evaluate", "f1"), ("report", "f1")]
        found = run.explain(stages)
    assert [(status.stage, status.state) for status in found] == [
        ("prepare", "done"),
        ("initialise", "stale"),
        ("train", "partial"),
        ("evaluate", "damaged"),
        ("report", "missing"),
    ]
    assert re.fullmatch(r"finished 20\S+ in \d+\.\d s", found[0].why)
    assert re.fullmatch(r"finished 20\S+ with another recipe, input or earlier stage; will run again", found[1].why)
    assert found[2].why == "interrupted; will continue"
    assert re.fullmatch(r"deep/rows.txt changed or vanished since 20\S+; will run again", found[3].why)
    assert found[4].why == "not begun"


# --- crashes ----------------------------------------------------------------------------------------------------------

DEADLY = ("replace", "rename", "fsync", "unlink", "mkdir", "rmdir")


def die_at(number: int, act: Callable[[], None]) -> bool:
    """Runs `act` in a child that is gone, without a goodbye, before its `number`-th file operation. True if it died."""
    child = os.fork()
    if child == 0:
        count = 0

        def deadly(original: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal count
                count += 1
                if count == number:
                    if original is fsync:  # what was not synced may be lost with the power
                        with contextlib.suppress(OSError):
                            os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return call

        fsync = os.fsync
        for name in DEADLY:
            setattr(os, name, deadly(getattr(os, name)))
        code = 1
        try:
            act()
            code = 0
        finally:  # never back into pytest
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def run_both(folder: Path, fingerprint: str) -> None:
    """Two stages as the pipeline runs them; the second continues what it finds."""
    with open_run(folder) as run:
        run.write_recipe(f"name: {fingerprint}\n")
        for name in ("prepare", "train"):
            if run.state(name, fingerprint) == "done":
                continue
            with run.stage(name, fingerprint) as stage:
                for step in range(2):
                    path = stage.folder / f"step{step}"
                    if not (stage.resumed and path.exists()):
                        write_text_atomic(path, f"{fingerprint} {step}")
                stage.finish(steps=2)


def outcome(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if "step" in name or name == "recipe.yaml"}


def plain(folder: Path) -> None:
    folder.mkdir()


def stale(folder: Path) -> None:
    run_both(folder, "f0")
    for name in "abcdefgh":  # enough to be cleared that a kill falls into the middle of it
        (folder / "train" / name).write_text(name)


def damaged(folder: Path) -> None:
    run_both(folder, "f1")
    (folder / "prepare" / "step1").write_text("f1 X")
    (folder / "train" / "manifest.json").write_text("{")


def interrupted(folder: Path) -> None:
    run_both(folder, "f1")
    (folder / "train" / "manifest.json").unlink()
    (folder / "train" / "step1").unlink()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of runs: without looking up package versions or waiting for the disk. A call of fsync still counts."""
    monkeypatch.setattr(rundir, "_versions", dict)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@linux
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("before", [plain, stale, damaged, interrupted])
def test_a_kill_before_any_file_operation_is_survived(tmp_path: Path, before: Callable[[Path], None]) -> None:
    run_both(tmp_path / "whole", "f1")
    wanted = outcome(tmp_path / "whole")
    number = 1
    while True:
        folder = tmp_path / f"killed{number}"
        before(folder)
        died = die_at(number, lambda folder=folder: run_both(folder, "f1"))
        run = RunDir(folder)
        for name in ("prepare", "train"):
            if run.state(name, "f1") == "done":
                assert (folder / name / "step1").read_text() == "f1 1"
        run_both(folder, "f1")
        assert outcome(folder) == wanted
        assert [status.state for status in run.explain([("prepare", "f1"), ("train", "f1")])] == ["done", "done"]
        assert not [path for path in folder.iterdir() if path.name.endswith(".old")]
        if not died:
            break
        number += 1
    assert number > 15


@linux
@pytest.mark.usefixtures("quick")
def test_two_kills_in_a_row_are_survived(tmp_path: Path) -> None:
    run_both(tmp_path / "whole", "f1")
    for first in range(2, 60, 11):
        for second in range(2, 60, 11):
            folder = tmp_path / f"killed{first}-{second}"
            stale(folder)
            die_at(first, lambda folder=folder: run_both(folder, "f1"))
            die_at(second, lambda folder=folder: run_both(folder, "f1"))
            run_both(folder, "f1")
            assert outcome(folder) == outcome(tmp_path / "whole")


@linux
def test_an_atomic_write_is_old_or_new_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    for number in range(1, 10):
        write_json_atomic(path, {"value": "old"})
        died = die_at(number, lambda: write_json_atomic(path, {"value": "new"}))
        assert read_json(path) in ({"value": "old"}, {"value": "new"})
        if not died:
            assert read_json(path) == {"value": "new"}
            break
    else:
        raise AssertionError("the write never ended")


@linux
@pytest.mark.parametrize("existing", [True, False])
def test_replace_folder_never_loses_the_last_whole_folder(tmp_path: Path, existing: bool) -> None:
    for number in range(1, 40):
        root = tmp_path / str(number)
        temp, final, aside = root / "temp", root / "final", root / ".final.old"
        for folder, content in ((temp, "new"), (final, "old"))[: 1 + existing]:
            folder.mkdir(parents=True)
            (folder / "a").write_text(content)
            (folder / "b").write_text(content)
        died = die_at(number, lambda temp=temp, final=final: replace_folder(temp, final))
        if final.exists():
            assert {path.name for path in final.iterdir()} == {"a", "b"}
            assert len({path.read_text() for path in final.iterdir() if path.stat().st_size > 1}) == 1
        elif existing:
            assert {(aside / name).read_text() for name in ("a", "b")} == {"old"}
        if not died:
            assert tree(final) == {"a": b"new", "b": b"new"}
            assert [path.name for path in root.iterdir()] == ["final"]
            break
        if temp.exists():
            for name in ("a", "b"):
                (temp / name).write_text("new")
            replace_folder(temp, final)
            assert tree(final) == {"a": b"new", "b": b"new"}
            assert [path.name for path in root.iterdir()] == ["final"]
    else:
        raise AssertionError("the replacement never ended")


# --- the lock ---------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from potstill.pipeline.rundir import open_run
with open_run(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_run_held_by_another_process_is_refused_at_once_and_survives_kill_9(tmp_path: Path, holder) -> None:
    began_s = time.monotonic()
    with pytest.raises(RunError) as caught, open_run(tmp_path / "run"):
        pass
    assert time.monotonic() - began_s < 2
    assert re.fullmatch(
        rf"run_dir: {tmp_path}/run is in use by process {holder.pid} on \S+\. "
        r"Wait until it ends or stop it, or choose another run_dir\.",
        str(caught.value),
    )
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / ".owner.json").exists()
    with open_run(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".owner.json").read_text())["pid"] == os.getpid()


def test_a_run_is_refused_to_a_second_opening_in_the_same_process_and_freed_after(tmp_path: Path) -> None:
    with open_run(tmp_path):
        with pytest.raises(RunError, match=f"in use by process {os.getpid()} on "), open_run(tmp_path):
            pass
        (tmp_path / ".owner.json").write_text("{")
        with pytest.raises(RunError, match="in use by another process"), open_run(tmp_path):
            pass
    with open_run(tmp_path):
        pass
    assert not (tmp_path / ".owner.json").exists()


def test_an_error_inside_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_run(tmp_path):
        _ = 1 / 0
    with open_run(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "run", "Not a directory")):
        with (
            pytest.raises(RunError, match=rf"run_dir: .*file.* cannot be written \({reason}\)\. Free space"),
            open_run(folder),
        ):
            pass


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match=r"run_dir: .*\(Permission denied\)"), open_run(tmp_path / "run"):
        pass
    tmp_path.chmod(0o700)


# --- files, disk, memory ----------------------------------------------------------------------------------------------


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])), st.lists
    )
)
@settings(max_examples=50, deadline=None)
def test_json_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.mktemp("json") / "value.json"
    write_json_atomic(path, value)
    assert read_json(path) == value
    assert [found.name for found in path.parent.iterdir()] == ["value.json"]


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"{tmp_path}/no\.json: cannot be read \(No such file or directory\)"):
        read_json(tmp_path / "no.json")
    (tmp_path / "torn.json").write_text('{"a": ')
    with pytest.raises(RunError, match=rf"{tmp_path}/torn\.json: is damaged, not JSON\. Delete it"):
        read_json(tmp_path / "torn.json")
    with pytest.raises(RunError, match=rf"run_dir: {tmp_path}/no/.* cannot be written \(No such file or directory\)"):
        write_text_atomic(tmp_path / "no" / "a.txt", "x")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(RunError, match=rf"run_dir: {path} cannot be written \(No space left on device\)\. Free space"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"


def test_a_disk_without_room_is_refused_before_the_stage(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "yet", 1, "training")
    with pytest.raises(RunError) as caught:
        check_disk(tmp_path / "not" / "yet", 10**18, "training")
    assert re.fullmatch(
        rf"run_dir: {tmp_path} has [\d.]+ GB free, but training needs 1000000000\.00 GB\. "
        r"Free some space, or choose another run_dir\.",
        str(caught.value),
    )


@linux
def test_peak_memory_is_in_bytes_and_of_the_stage_alone() -> None:
    if not reset_peak_memory():
        pytest.skip("the kernel does not let the peak be reset")
    before = peak_memory_bytes()
    assert before == pytest.approx(psutil.Process().memory_info().rss, rel=0.015)
    block = bytearray(os.urandom(2**20)) * 96
    high = peak_memory_bytes()
    del block
    assert 80 * 2**20 < high - before < 200 * 2**20
    assert reset_peak_memory()
    assert peak_memory_bytes() < high - 40 * 2**20
