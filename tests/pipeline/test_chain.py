"""Assistant chains: one command runs what is missing of them, nothing stale is trained on, and no chain is endless."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from potstill.errors import PotstillError, RecipeError, RunError
from potstill.pipeline import arms, remarks, run, rundir
from potstill.pipeline.chain import load_chain, settle
from potstill.pipeline.inspection import inspect_recipe
from potstill.pipeline.plan import print_plan
from potstill.pipeline.run import STAGES, explain_run, is_trained, run_recipe
from potstill.pipeline.rundir import open_run
from potstill.recipes import Recipe, load_recipe
from potstill.students import save_student
from potstill.training import CheckpointStore

SHORT = {"control": {"enabled": False}}
STAGES_RUN = [stage for stage in STAGES if stage not in ("generate", "finetune", "capture", "control", "static")]


@pytest.fixture(scope="module")
def write_chain(write_tiny_recipe) -> Callable[[Path], Path]:
    """Writes `assistant.yaml` (3 layers of the tiny model) and `final.yaml` (2 of those); returns the last."""

    def write(folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        tiny = json.loads(write_tiny_recipe(folder).read_text()) | SHORT
        tiny["training"]["steps"] = 6
        change(folder / "assistant.yaml", tiny, name="three-layers", run_dir=str(folder / "assistant"))
        taught = {"kind": "run", "recipe": "assistant.yaml", "dtype": "fp32"}
        change(folder / "final.yaml", tiny, teacher=taught, run_dir=str(folder / "final"))
        change(folder / "assistant.yaml", student={"kind": "layers", "keep": "even", "count": 3})
        return folder / "final.yaml"

    return write


def change(file: Path, start: dict[str, Any] | None = None, **keys: Any) -> None:
    recipe = start if start is not None else json.loads(file.read_text())
    file.write_text(json.dumps({**recipe, **keys}))


@pytest.fixture
def final(tmp_path: Path, write_chain) -> Path:
    return write_chain(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, write_chain) -> Path:
    """File of a chain that was run. Change nothing of it, but in copies."""
    file = write_chain(tmp_path_factory.mktemp("chain"))
    run_recipe(load_recipe(file))
    return file


def states(recipe: Recipe) -> dict[str, str]:
    return {status.stage: status.state for status in explain_run(recipe)}


def weights(recipe: Recipe, stage: str = "train") -> dict[str, torch.Tensor]:
    return dict(load_file(recipe.folder / stage / "student" / "model.safetensors"))


def test_one_command_runs_the_assistant_and_then_its_student_teaches(finished):
    recipe = load_recipe(finished)
    (assistant,) = load_chain(recipe)
    assert set(states(recipe).values()) == set(states(assistant).values()) == {"done"}
    taught, first = weights(assistant), weights(recipe, "initialise")
    assert torch.equal(first["model.layers.1.mlp.up_proj.weight"], taught["model.layers.2.mlp.up_proj.weight"])
    assert settle(recipe).teacher.model == str(assistant.folder.absolute() / "train" / "student")


def test_the_report_says_whose_student_the_teacher_is(finished):
    recipe = load_recipe(finished)
    model = load_chain(recipe)[0].teacher.model
    words = f"assistant three-layers, itself distilled from {model}"
    for page in ("report/index.html", "report/report.md", "train/student/README.md"):
        assert words in (recipe.folder / page).read_text().replace("\\", ""), page
    assert "is measured against the assistant three-layers" in (recipe.folder / "report" / "report.md").read_text()


def test_the_saved_recipe_finds_the_assistant_from_everywhere(finished, tmp_path, monkeypatch):
    recipe = load_recipe(finished)
    monkeypatch.chdir(tmp_path)
    saved = load_recipe(recipe.folder / "recipe.yaml")
    assert saved == recipe
    assert Path(saved.teacher.recipe) == finished.with_name("assistant.yaml").resolve()
    assert set(states(saved).values()) == {"done"}


def test_a_finished_chain_is_not_walked_again(finished, caplog):
    caplog.set_level(logging.INFO)
    run_recipe(load_recipe(finished))
    assert caplog.text.count("all done before: nothing to do") == 1


@pytest.mark.parametrize(
    ("keys", "stale"),
    [
        ({"report": {"title": "Another"}}, []),
        ({"evaluation": {"max_rows": 4}}, []),
        ({"student": {"kind": "layers", "keep": [0, 1, 3]}}, STAGES_RUN),
        ({"losses": [{"kind": "reverse_kl"}]}, STAGES_RUN),
    ],
)
def test_what_changes_the_assistants_student_makes_stale_what_it_teaches(finished, tmp_path, keys, stale):
    recipe = load_recipe(finished)
    other = tmp_path / "assistant.yaml"
    change(other, json.loads(finished.with_name("assistant.yaml").read_text()), **keys)
    changed = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"recipe": str(other)})})
    assert [stage for stage, state in states(changed).items() if state == "stale"] == stale


def test_killed_within_the_assistant_the_same_command_ends_alike(finished, final, monkeypatch):
    save = CheckpointStore.save

    def save_and_stop(self, step, state):
        save(self, step, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointStore, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(load_recipe(final))
    monkeypatch.undo()
    recipe = load_recipe(final)
    assert states(load_chain(recipe)[0])["train"] == "partial"
    assert set(states(recipe).values()) == {"missing"}
    run_recipe(recipe)
    expected = weights(load_recipe(finished))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(recipe).items())


def test_up_to_a_stage_the_assistant_is_still_finished_first(final):
    recipe = load_recipe(final)
    run_recipe(recipe, until="prepare")
    assert set(states(load_chain(recipe)[0]).values()) == {"done"}
    assert states(recipe)["initialise"] == "missing"


def test_what_is_wrong_with_the_last_recipe_shows_before_the_assistant_begins(final):
    with pytest.raises(RecipeError, match=r"student\.count: 4 exceeds the teacher's 3 layers"):
        run_recipe(load_recipe(final, ["student.count=4"]))
    assert not (final.parent / "assistant").exists()


def test_what_is_wrong_with_the_assistant_is_said_of_it(final):
    change(final.with_name("assistant.yaml"), student={"kind": "layers", "keep": [0, 41]})
    with pytest.raises(RecipeError, match=r"^teacher\.recipe: in the run of three-layers: student\.keep"):
        run_recipe(load_recipe(final))


def test_a_busy_assistant_is_respected(final):
    recipe = load_recipe(final)
    with open_run(load_chain(recipe)[0].folder), pytest.raises(RunError, match=r"three-layers: run_dir: .* is in use"):
        run_recipe(recipe)


def test_an_assistant_that_changes_while_it_teaches_is_noticed(final, monkeypatch):
    recipe = load_recipe(final)
    work = run._Walk.work

    def meddle(self, name, stage):
        work(self, name, stage)
        if self.asked == recipe and name == "prepare":
            (final.parent / "assistant" / "train" / "student" / "config.json").write_text("{}")

    monkeypatch.setattr(run._Walk, "work", meddle)
    with pytest.raises(RunError, match=r"^teacher\.recipe: the student of three-layers in .* was changed meanwhile\."):
        run_recipe(recipe)
    assert states(recipe)["initialise"] == "missing"
    monkeypatch.undo()
    run_recipe(recipe, until="initialise")  # the assistant's training is done anew
    assert is_trained(load_chain(recipe)[0])


@pytest.mark.parametrize("measure", [False, True])
def test_check_shows_the_whole_chain_before_anything_is_run(final, capsys, measure):
    print_plan(load_recipe(final), measure=measure)
    shown = capsys.readouterr().out
    assert shown.index("three-layers: ") < shown.index("tiny: ")
    assert shown.count("not begun") == 2 * len(STAGES_RUN)
    assert shown.count("time: train student") == (2 if measure else 0)
    assert not (final.parent / "assistant").exists()


def test_check_shows_what_is_finished(finished, capsys):
    print_plan(load_recipe(finished), measure=True)
    assert capsys.readouterr().out.count("done") == 2 * len(STAGES_RUN)


def test_an_assistant_may_have_an_assistant(final):
    middle = {"kind": "run", "recipe": str(final.with_name("assistant.yaml")), "dtype": "fp32"}
    start = json.loads(final.read_text())
    two = {"kind": "layers", "keep": "even", "count": 2}
    change(final.with_name("middle.yaml"), start, name="middle", teacher=middle, student=two, run_dir=None)
    one = {"kind": "layers", "keep": [0]}
    change(final, teacher={"kind": "run", "recipe": "middle.yaml"}, student=one)
    assert [recipe.name for recipe in load_chain(load_recipe(final))] == ["middle", "three-layers"]


# Chains that cannot be


def circle(folder: Path, names: list[str], start: dict[str, Any]) -> Path:
    for name, taught_by in zip(names, [*names[1:], names[0]], strict=True):
        change(folder / f"{name}.yaml", start, name=name, teacher={"kind": "run", "recipe": f"{taught_by}.yaml"})
    return folder / f"{names[0]}.yaml"


@pytest.mark.parametrize(
    ("names", "words"),
    [(["a"], "a.yaml -> a.yaml"), (["a", "b", "c"], "b.yaml -> c.yaml -> a.yaml -> b.yaml")],
)
def test_a_circle_is_refused_with_its_runs_named(final, names, words):
    file = circle(final.parent, names, json.loads(final.read_text()))
    for act in (run_recipe, lambda recipe: print_plan(recipe, measure=False)):
        with pytest.raises(RecipeError, match=rf"^teacher\.recipe: {words} goes in a circle"):
            act(load_recipe(file))


def test_two_runs_of_a_chain_in_one_folder_are_refused(final):
    change(final, run_dir=str(final.parent / "other" / ".." / "assistant"))
    with pytest.raises(RecipeError, match=r"^teacher\.recipe: three-layers and the run that it is to teach have one"):
        run_recipe(load_recipe(final))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, r"^teacher\.recipe: /.*assistant\.yaml: there is no such file"),
        ("[1, 2]", r"^teacher\.recipe: /.*assistant\.yaml: .*needs a mapping of keys"),
        ('{"name": "x"}', r"^teacher\.recipe: in .*assistant\.yaml: teacher: missing"),
    ],
)
def test_an_assistant_that_is_no_recipe_is_named(final, text, words):
    file = final.with_name("assistant.yaml")
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(PotstillError, match=words):
        run_recipe(load_recipe(final))


@pytest.mark.parametrize("keys", [{"seed": 5}, {"data": {"splits": {"validation": 0.1, "test": 0.3}}}])
def test_an_assistant_that_would_train_on_what_is_held_out_is_refused(final, keys):
    tiny = json.loads(final.with_name("assistant.yaml").read_text())
    data = {**tiny["data"], **keys.get("data", {})}
    change(final.with_name("assistant.yaml"), **{**keys, "data": data})
    with pytest.raises(RecipeError, match=r"holds out other documents of .*Give both the same seed and data\.splits"):
        load_chain(load_recipe(final))


def test_of_an_assistant_with_other_data_the_report_says_that_nobody_looked(finished, tmp_path):
    other = tmp_path / "assistant.yaml"
    tiny = json.loads(finished.with_name("assistant.yaml").read_text())
    change(other, tiny, seed=5, data={**tiny["data"], "source": "elsewhere.jsonl"})
    recipe = load_recipe(finished)
    recipe = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"recipe": str(other)})})
    (_, note) = remarks._on_teacher(recipe, {})
    assert "was trained on other data (elsewhere.jsonl)" in note
    assert "was not checked" in note


def test_what_is_wrong_with_the_data_shows_before_the_assistant_runs(final):
    tiny = json.loads(final.read_text())
    change(final, data={**tiny["data"], "text": "nocolumn"})
    recipe = load_recipe(final)
    with pytest.raises(PotstillError, match="nocolumn"):
        run_recipe(recipe)
    assert not (load_chain(recipe)[0].folder / "train").exists()


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """The finished chain's recipes and run folders once more, to be changed."""
    for name in ("assistant", "final"):
        shutil.copytree(finished.with_name(name), tmp_path / name)
        change(tmp_path / f"{name}.yaml", json.loads(finished.with_name(f"{name}.yaml").read_text()))
        change(tmp_path / f"{name}.yaml", run_dir=str(tmp_path / name))
    return tmp_path / "final.yaml"


def _save_rounded(model: Any, *others: Any) -> None:
    """Another machine's training ends in other last digits."""
    for parameter in model.parameters():
        parameter.data.mul_(1.001)
    save_student(model, *others)


@pytest.mark.parametrize("hashed", [True, False])
def test_an_assistant_with_other_weights_is_refused_by_what_learned_from_the_former(copied, monkeypatch, hashed):
    recipe = load_recipe(copied)
    (assistant,) = load_chain(recipe)
    if not hashed:  # as any model is that is not tiny: of its files the manifest knows the sizes
        monkeypatch.setattr(rundir, "HASHED_BYTES", 0)
        for folder in (assistant.folder, recipe.folder):
            shutil.rmtree(folder)
        run_recipe(recipe)
    shutil.rmtree(assistant.folder)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(arms, "save_student", _save_rounded)
        run_recipe(assistant)
    other = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"max_rows": 3})})
    with pytest.raises(PotstillError, match=r"trained again since initialise, train of this run.*Delete .*initialise"):
        run_recipe(other)


def test_a_finished_run_needs_its_assistant_no_more(copied, caplog):
    caplog.set_level(logging.INFO)
    recipe = load_recipe(copied)
    shutil.rmtree(load_chain(recipe)[0].folder)
    run_recipe(recipe)
    assert "all done before: nothing to do" in caplog.text
    run_recipe(recipe.model_copy(update={"report": recipe.report.model_copy(update={"title": "Another"})}))
    assert "Another" in (recipe.folder / "report" / "report.md").read_text()
    assert not load_chain(recipe)[0].folder.exists()


def test_a_finished_assistant_is_known_by_its_student_alone(copied):
    change(
        copied.with_name("assistant.yaml"),
        training={**json.loads(copied.read_text())["training"], "trackers": ["wandb"]},
    )
    found = inspect_recipe(load_recipe(copied))
    assert found.teachers[0].config.num_hidden_layers == 3


def test_the_control_arm_of_a_chain_learns_hard_labels_alone(final):
    change(final, control={"enabled": True})
    recipe = load_recipe(final)
    run_recipe(recipe)
    lines = [json.loads(line) for line in (recipe.folder / "control" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] == pytest.approx(line["cross_entropy"]) for line in lines)
    measured = json.loads((recipe.folder / "evaluate" / "measurements.json").read_text())
    assert {row["arm"] for row in measured} == {"teacher", "untrained", "control", "student"}


@pytest.mark.parametrize("kind", ["words", "parts", "unlabelled"])
def test_an_assistant_is_run_first_for_texts_of_any_form(task, write_task, make_encoder, queries, write_rows, kind):
    """What is looked at before its run are the texts as they will be prepared, with the classes it will know."""
    rows, labels, own = queries(80), ("counting", "finding", "painting"), {}
    assistant = {"teacher": _local(make_encoder("classes", labels=labels))}
    if kind == "words":
        keys = {"task": {"kind": "token_classification"}, "data": {"text": "words", "label": "word_labels"}}
        assistant["teacher"] = _local(make_encoder("words", labels=("B-BEAST", "B-HUE", "O")))
    elif kind == "parts":
        file = write_rows([]).with_name("parts.json")
        parts = {"train": rows[:60], "test": rows[60:]}
        file.write_text(json.dumps({part: [[row["text"], row["label"]] for row in own] for part, own in parts.items()}))
        keys = {"data": {"source": str(file)}}
    else:
        keys = {"control": {"enabled": False}, "losses": [{"kind": "forward_kl"}]}
        bare = [{key: row[key] for key in ("id", "text")} | {"split": "train"} for row in rows[:60]]
        held = [row | {"split": "test"} for row in rows[60:]]
        own = {"data": {"source": str(write_rows([*bare, *held]))}}
    file = write_task("assistant", **{**keys, **assistant})
    student = {"kind": "layers", "keep": "even", "count": 1}
    final = task(
        "own", teacher={"kind": "run", "recipe": str(file), "dtype": "fp32"}, student=student, **{**keys, **own}
    )
    print_plan(final, measure=False)
    run_recipe(final, until="initialise")
    assert is_trained(load_chain(final)[0])


def _local(model: Path) -> dict[str, Any]:
    return {"kind": "local", "model": str(model), "dtype": "fp32"}
