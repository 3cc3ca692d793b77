"""The walk from stage to stage, without models: room on the disk, requests to stop, whose recipe it is, trackers."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from potstill.errors import Interrupted, RunError
from potstill.pipeline import arms, course, metrics, run
from potstill.pipeline.run import STAGES, explain_run, run_recipe
from potstill.pipeline.rundir import Manifest
from potstill.pipeline.stopping import Stopping
from potstill.pipeline.telling import _starts
from potstill.recipes import load_recipe


@pytest.fixture
def recipe(tiny_recipe):
    return load_recipe(tiny_recipe)


@pytest.fixture
def walk(monkeypatch):
    """Lets every stage do nothing but what is said here by name; each needs 1000 bytes."""
    work = {}

    def do(self, name, stage):
        work.get(name, lambda walk, stage: None)(self, stage)
        stage.finish()

    monkeypatch.setattr(run._Walk, "work", do)
    monkeypatch.setattr(run, "_stage_bytes", lambda recipe, due: dict.fromkeys(STAGES, 1000))
    return work


def leave_room(monkeypatch, free_bytes):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_bytes))


def test_what_a_stage_has_written_is_not_asked_for_again(recipe, walk, monkeypatch):
    def write_and_stop(walk, stage):
        (stage.folder / "checkpoint").write_bytes(bytes(900))
        raise KeyboardInterrupt

    walk["train"] = write_and_stop
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe)
    del walk["train"]
    leave_room(monkeypatch, 100)
    run_recipe(recipe, until="train")
    with pytest.raises(RunError, match="the stage control needs"):
        run_recipe(recipe)


def test_a_run_without_room_writes_no_recipe(recipe, walk, monkeypatch):
    leave_room(monkeypatch, 100)
    with pytest.raises(RunError, match="the stage prepare needs"):
        run_recipe(recipe)
    assert not (recipe.folder / "recipe.yaml").exists()


def test_a_refused_recipe_is_not_written(recipe, walk, monkeypatch):
    def refuse(recipe, due):
        raise RunError("no")

    monkeypatch.setattr(run, "_stage_bytes", refuse)
    with pytest.raises(RunError):
        run_recipe(recipe)
    assert not (recipe.folder / "recipe.yaml").exists()


def ask_in_the_last_step(walk, stage):
    with walk.stopping.held():
        walk.stopping.receive(2)


def test_a_request_in_the_last_step_stops_before_the_next_stage(recipe, walk):
    walk["train"] = ask_in_the_last_step
    with pytest.raises(Interrupted, match=r"^stopped before control, evaluate, report; the same command continues\.$"):
        run_recipe(recipe, stopping=Stopping())
    states = [status.state for status in explain_run(recipe)]
    assert states == ["done", "done", "done", "missing", "missing", "missing"]


def test_a_request_in_the_last_step_of_all_that_was_asked_for_is_the_end(recipe, walk):
    walk["train"] = ask_in_the_last_step
    assert run_recipe(recipe, until="train", stopping=Stopping()) == recipe.folder


def test_trackers_are_closed_when_a_training_breaks_off(recipe, monkeypatch, tmp_path):
    closed = []

    def stop(*_):
        raise Interrupted("stopped")

    parts = course.Course(None, None, None, None, 3, (), None, 1)
    monkeypatch.setattr(arms, "_assemble", lambda *_: (parts, None, None, {}))
    tracker = SimpleNamespace(end_training=lambda: closed.append(True))
    monkeypatch.setattr(course, "start_trackers", lambda *_: tracker)
    monkeypatch.setattr(course, "train", stop)
    inputs = arms.Inputs(tmp_path, tmp_path, 1)
    with pytest.raises(Interrupted):
        arms.train_arm(recipe, SimpleNamespace(folder=tmp_path), inputs, "student", stopping=Stopping())
    assert closed == [True]
    assert metrics.read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize(
    ("attempts", "timed", "words"),
    [
        (1, 1, "train"),
        (3, 3, "train"),
        (3, 1, "train (3 starts; wall time of the last)"),
        (3, 2, "train (3 starts; wall time of 2 of them)"),
    ],
)
def test_the_report_says_what_a_stages_numbers_cover(attempts, timed, words):
    blank = {"fingerprint": "", "inputs": {}, "outputs": {}, "versions": {}, "seed": 0, "finished_at": "", "facts": {}}
    numbers = {"attempts": attempts, "timed_attempts": timed, "wall_s": 1.0, "peak_rss_bytes": 1}
    assert _starts(Manifest(stage="train", **blank, **numbers)) == words
