"""Teachers that are trained first: once, for all runs beside; anew where anything that decides them is another."""

from __future__ import annotations

import json
import shutil

import pytest

from potstill.errors import DataError, RecipeError
from potstill.pipeline import remarks, tutor
from potstill.pipeline.run import explain_run, run_recipe
from potstill.pipeline.rundir import RunDir


@pytest.fixture
def taught(task, make_encoder, brief):
    """A recipe whose teacher is trained first."""

    def make(name="task", *overrides, **keys):
        teacher = {"kind": "finetune", "model": str(make_encoder("masked")), "dtype": "fp32", "training": brief(4)}
        return task(name, *overrides, **{"teacher": teacher, "signals": {"kind": "dense"}, **keys})

    return make


@pytest.fixture
def trainings(monkeypatch):
    """What was trained in this process as a teacher."""
    seen, take = [], tutor.take

    def counted(course, settings, stage, **options):
        seen.append(options["label"])
        return take(course, settings, stage, **options)

    monkeypatch.setattr(tutor, "take", counted)
    return seen


def teacher(recipe):
    return (recipe.folder / "finetune" / "teacher" / "model.safetensors").read_bytes()


def facts(recipe, stage="finetune"):
    return RunDir(recipe.folder).manifest(stage).facts


def test_a_run_beside_finds_teacher_and_answers_and_asks_for_neither_again(taught, trainings):
    first = taught("first")
    run_recipe(first, until="train")
    other = taught("second", student={"kind": "layers", "keep": [0]}, losses=[{"kind": "reverse_kl"}])
    run_recipe(other, until="train")
    assert len(trainings) == 1
    assert teacher(first) == teacher(other)
    assert facts(other)["found"].startswith(str(first.folder.parent / "teachers"))
    assert facts(first, "capture")["captured"] > 0
    assert facts(other, "capture")["captured"] == 0


@pytest.mark.parametrize(
    "change", ["seed=1", "data.max_documents=70", "teacher.training.learning_rate=1e-3", "teacher.learns=head"]
)
def test_a_teacher_of_another_seed_data_or_training_is_another(taught, trainings, change):
    run_recipe(taught("first"), until="finetune")
    run_recipe(taught("second", change), until="finetune")
    assert len(trainings) == 2


def test_how_the_teacher_is_watched_and_run_makes_no_other(taught, trainings):
    run_recipe(taught("first"), until="finetune")
    for number, change in enumerate(["teacher.training.checkpoint.every_steps=2", "teacher.dtype=bf16"]):
        run_recipe(taught(f"other{number}", change), until="finetune")
    assert len(trainings) == 1


def test_a_copy_that_was_interrupted_is_not_taken(taught, trainings, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tutor, "sync_tree", crash)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(taught("first"), until="finetune")
    monkeypatch.undo()
    second = taught("second")
    run_recipe(second, until="finetune")
    assert "found" not in facts(second)


@pytest.mark.parametrize("lost", ["facts.json", "teacher/model.safetensors", "metrics.jsonl"])
def test_a_kept_teacher_that_lost_a_file_is_trained_and_kept_again(taught, trainings, lost):
    first, second, third = taught("first"), taught("second"), taught("third")
    run_recipe(first, until="finetune")
    (kept,) = (first.folder.parent / "teachers").iterdir()
    (kept / lost).unlink()
    run_recipe(second, until="finetune")
    assert len(trainings) == 2
    assert teacher(second) == teacher(first)
    run_recipe(third, until="finetune")
    assert len(trainings) == 2


def test_the_kept_teacher_outlives_the_run_that_trained_it(taught, trainings):
    first, second = taught("first"), taught("second")
    run_recipe(first, until="finetune")
    shutil.rmtree(first.folder)
    run_recipe(second)
    assert len(trainings) == 1
    assert {status.state for status in explain_run(second)} == {"done"}


def test_unlabelled_texts_are_left_out_of_the_teachers_training(taught, queries, write_rows):
    rows = queries(80)
    for row in rows[:40]:
        row["label"] = None
    recipe = taught(data={"source": str(write_rows(rows))})
    run_recipe(recipe, until="finetune")
    labelled = RunDir(recipe.folder).manifest("prepare").facts["labelled"]["train"]
    assert facts(recipe)["rows"] == labelled < facts(recipe, "prepare")["documents"]["train"]


def test_a_head_that_alone_learns_takes_its_drawn_pooler_along(taught, make_encoder):
    """The pooler of a BERT is drawn with the head where the model lacks it: frozen, it would stay a random layer."""
    from safetensors.torch import load_file

    recipe = taught("task", "teacher.learns=head")
    run_recipe(recipe, until="finetune")
    trained = load_file(recipe.folder / "finetune" / "teacher" / "model.safetensors")
    start = load_file(make_encoder("masked") / "model.safetensors")
    assert all(trained[name].equal(start[name]) for name in start if name.startswith("bert."))
    assert trained["bert.pooler.dense.bias"].abs().max() > 0  # it is drawn as zeros


@pytest.mark.parametrize(("head", "said"), [("body", True), ("masked", False)])
def test_a_language_head_that_the_model_lacked_is_told(task, make_encoder, brief, head, said):
    own = {"kind": "finetune", "model": str(make_encoder(head)), "dtype": "fp32", "training": brief(4)}
    losses = [{"kind": "forward_kl"}, {"kind": "cross_entropy"}]
    recipe = task("task", task={"kind": "masked_lm"}, teacher=own, losses=losses, training={"steps": 4})
    run_recipe(recipe, until="initialise")
    assert facts(recipe)["new_head"] is said
    told = {stage: facts(recipe, stage) for stage in ("prepare", "finetune", "initialise")}
    notes = " | ".join(remarks.remarks_on(recipe, told))
    assert ("has no head for this task: one was fitted first" in notes) is said
    assert ("all other weights with it" in notes) is said


def test_labels_are_required_where_a_teacher_learns_from_them(taught, queries, write_rows):
    splits = ["train"] * 30 + ["validation"] * 10 + ["test"] * 10
    rows = [{**row, "split": split} for row, split in zip(queries(50), splits, strict=True)]
    for row in rows[:30]:
        row["label"] = None
    recipe = taught(
        data={"source": str(write_rows(rows))},
        task={"kind": "classification", "labels": ["counting", "finding", "painting"]},
        losses=[{"kind": "forward_kl"}],
        control={"enabled": False},
    )
    with pytest.raises(DataError, match=r"^data\.label: none of the 30 training texts has a label"):
        run_recipe(recipe)


def test_the_saved_teacher_names_its_classes_and_loads_anywhere(taught):
    from transformers import AutoModelForSequenceClassification

    recipe = taught()
    run_recipe(recipe, until="finetune")
    model = AutoModelForSequenceClassification.from_pretrained(recipe.folder / "finetune" / "teacher")
    assert model.config.id2label == {0: "counting", 1: "finding", 2: "painting"}
    log = [json.loads(line) for line in (recipe.folder / "finetune" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]


def test_a_teacher_that_is_taken_as_it_is_has_no_such_stage(task, make_encoder):
    ready = make_encoder("classes", labels=("counting", "finding", "painting"))
    recipe = task(teacher={"kind": "local", "model": str(ready), "dtype": "fp32"})
    with pytest.raises(RecipeError, match=r"^teacher\.kind: only `finetune` is trained first"):
        run_recipe(recipe, until="finetune")
