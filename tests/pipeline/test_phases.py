"""Several trainings in one recipe: each is a run of its own, and the next begins with the student that it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from potstill.errors import PotstillError, RecipeError
from potstill.pipeline.chain import phases_of, settle
from potstill.pipeline.inspection import inspect_recipe
from potstill.pipeline.run import explain_run, run_recipe
from potstill.pipeline.rundir import RunDir
from potstill.recipes import Recipe, load_recipe
from potstill.training import CheckpointStore


def states(recipe: Recipe) -> dict[str, str]:
    return {status.stage: status.state for status in explain_run(recipe)}


def weights(recipe: Recipe, stage: str = "train") -> dict[str, Any]:
    return dict(load_file(recipe.folder / stage / "student" / "model.safetensors"))


def measured(recipe: Recipe) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((recipe.folder / "evaluate" / "measurements.json").read_text())
    return found


@pytest.fixture
def general(task, make_encoder, brief):
    """General distillation of an encoder, then a classifier from it."""

    def make(name: str = "task", *overrides: str, steps: int = 4, **keys: Any) -> Recipe:
        teacher = {"kind": "local", "model": str(make_encoder("masked")), "dtype": "fp32"}
        ready = make_encoder("classes", labels=("counting", "finding", "painting"), seed=3)
        first = {
            "name": "general",
            "task": {"kind": "masked_lm"},
            "teacher": teacher,
            "losses": [{"kind": "forward_kl"}, {"kind": "cross_entropy"}, {"kind": "hidden_cosine"}],
            "training": brief(steps),
        }
        own = {"kind": "local", "model": str(ready), "dtype": "fp32"}
        return task(name, *overrides, **{"teacher": own, "phases": [first], "training": brief(steps), **keys})

    return make


def test_an_encoder_is_distilled_in_general_and_then_for_a_task(general):
    recipe = general()
    run_recipe(recipe)
    (phase,) = phases_of(recipe)
    assert phase.folder == recipe.folder / "phases" / "general"
    assert set(states(recipe).values()) == set(states(phase).values()) == {"done"}
    assert {row["name"] for row in measured(phase)} >= {"nll", "kl_to_teacher"}
    assert {row["name"] for row in measured(recipe)} >= {"accuracy", "kl_to_teacher"}
    left, begun = weights(phase), weights(recipe, "initialise")
    body = [name for name in begun if name.startswith("bert.") and name in left]
    assert any("layer.1." in name for name in body)
    assert all(left[name].equal(begun[name]) for name in body)
    assert RunDir(recipe.folder).manifest("initialise").facts["head"] == "fresh"
    assert "general" in (recipe.folder / "report" / "index.html").read_text()


def test_what_changes_in_the_last_phase_leaves_the_first_done(general):
    run_recipe(general())
    before = RunDir(phases_of(general())[0].folder).manifest("train")
    changed = general("task", "training.learning_rate=1e-3")
    assert states(changed)["train"] == "stale"
    assert set(states(phases_of(changed)[0]).values()) == {"done"}
    run_recipe(changed)
    assert RunDir(phases_of(changed)[0].folder).manifest("train") == before


def test_what_changes_in_the_first_phase_makes_the_last_stale(general):
    run_recipe(general())
    changed = general("task", "phases[0].training.learning_rate=1e-3")
    assert states(changed)["prepare"] == "done"
    assert {states(changed)[stage] for stage in ("initialise", "train", "control", "evaluate")} == {"stale"}
    same = general("task", "phases[0].evaluation={resamples: 101, speed: false}")
    assert {stage for stage, state in states(same).items() if state == "stale"} == {"report"}  # it tells of them all


def test_stopped_within_the_first_phase_the_same_command_ends_alike(general, monkeypatch):
    whole, recipe = general("whole", steps=6), general("stopped", steps=6)
    run_recipe(whole)
    save = CheckpointStore.save

    def save_and_stop(self, step, state):
        save(self, step, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointStore, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe)
    assert not (recipe.folder / "initialise").exists()
    monkeypatch.undo()
    run_recipe(recipe)
    ours, theirs = weights(recipe), weights(whole)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert [row for row in measured(recipe) if row["name"] != "folder_bytes"] == [
        row for row in measured(whole) if row["name"] != "folder_bytes"
    ]


def test_every_phase_begins_with_the_student_of_the_one_before(general, brief):
    recipe = general()
    second = recipe.phases[0].model_copy(update={"name": "more"})
    recipe = recipe.model_copy(update={"phases": [*recipe.phases, second]})
    first, more = phases_of(recipe)
    assert more.student.model == str(first.folder.absolute() / "train" / "student")
    assert settle(recipe).student.model == str(more.folder.absolute() / "train" / "student")
    inspect_recipe(recipe)


def test_a_language_model_is_distilled_and_then_learns_from_the_text_alone(tiny_recipe):
    recipe = json.loads(tiny_recipe.read_text())
    recipe["training"]["steps"] = 4
    recipe["phases"] = [{"name": "distil", "losses": [{"kind": "forward_kl"}, {"kind": "hidden_cosine"}]}]
    recipe["losses"] = [{"kind": "cross_entropy"}]
    tiny_recipe.write_text(json.dumps(recipe))
    loaded = load_recipe(tiny_recipe)
    run_recipe(loaded)
    (phase,) = phases_of(loaded)
    assert set(states(loaded).values()) == set(states(phase).values()) == {"done"}
    left, begun, ended = weights(phase), weights(loaded, "initialise"), weights(loaded)
    assert all(left[name].equal(begun[name]) for name in left)
    assert any(not ended[name].equal(begun[name]) for name in begun)


def test_student_and_control_of_a_phase_begin_alike(general):
    losses = [{"kind": "forward_kl"}, {"kind": "cross_entropy"}]
    recipe = general("task", steps=1, losses=losses)
    run_recipe(recipe, until="control")
    rows = {}
    for stage in ("train", "control"):
        line = (recipe.folder / stage / "metrics.jsonl").read_text().splitlines()[0]
        rows[stage] = json.loads(line)["cross_entropy"]
    assert rows["train"] == pytest.approx(rows["control"], rel=1e-5)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("phases[0].losses=[{kind: vector_mse}]", r"^phases\[0\]: .*losses\[0\]\.kind=vector_mse"),
        ("phases[0].losses=[{kind: hidden_mse, layers: {9: 1}}]", r"^phases\[0\]: .*losses\[0\]\.layers"),
        ("phases[0].teacher.model=/nowhere/model", r"^phases\[0\]: .*teacher\.model"),
        ("phases[0].data={source: /nowhere/rows.jsonl, sequence_length: 16}", r"^phases\[0\]: .*data\.source"),
        ("phases[0].signals={kind: dense}", r"^phases\[0\]: .*signals\.kind"),
    ],
)
def test_what_is_wrong_with_a_phase_is_said_of_it_before_anything_is_done(general, override, words):
    recipe = general("task", override)
    with pytest.raises(PotstillError, match=words):
        run_recipe(recipe)
    assert not (recipe.folder / "prepare").exists()
    assert not (recipe.folder / "phases" / "general" / "initialise").exists()


def test_an_unknown_key_of_a_phase_is_named(general, tmp_path):
    general()
    with pytest.raises(RecipeError, match=r"phases\[0\]\.trainning"):
        load_recipe(tmp_path / "task.yaml", ["phases[0].trainning=3"])


def test_a_folder_of_a_phase_that_is_another_run_is_left_alone(general):
    recipe = general()
    foreign: Path = recipe.folder / "phases" / "general"
    foreign.mkdir(parents=True)
    (foreign / "recipe.yaml").write_text("mine: true")
    with pytest.raises(PotstillError, match=r"^phases\[0\]: "):
        run_recipe(recipe)
    assert (foreign / "recipe.yaml").read_text() == "mine: true"
    assert not (foreign / "prepare").exists()
