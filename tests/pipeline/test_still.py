"""The static classifier beside the student: the same teacher, and a folder that model2vec alone reads."""

from __future__ import annotations

import json

import numpy as np
import pytest

from potstill.errors import RecipeError
from potstill.pipeline.answerers import answering
from potstill.pipeline.run import run_recipe
from potstill.pipeline.rundir import RunDir
from potstill.pipeline.texts import open_texts

pytest.importorskip("model2vec")

CLASSES = ("counting", "finding", "painting")


@pytest.fixture
def still(task, make_encoder, brief):
    """A recipe with a static classifier."""

    def make(*overrides, **keys):
        model = make_encoder("classes", labels=CLASSES)
        static = {"dimensions": 8, "training": {**brief(60), "learning_rate": 3e-2}}
        own = {"kind": "local", "model": str(model), "dtype": "fp32"}
        return task("task", *overrides, **{"teacher": own, "signals": {"kind": "dense"}, "static": static, **keys})

    return make


def metrics(recipe):
    return [json.loads(line) for line in (recipe.folder / "static" / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_is_evaluated_as_its_folder_answers_elsewhere(still):
    from model2vec.inference import StaticModelPipeline

    recipe = still()
    run_recipe(recipe)
    log = metrics(recipe)
    assert [line["step"] for line in log] == list(range(1, 61))
    assert sum(line["loss"] for line in log[-5:]) < sum(line["loss"] for line in log[:5])
    folder, texts = recipe.folder / "static" / "student", open_texts(recipe.folder / "prepare", "test")
    own = StaticModelPipeline.from_pretrained(folder)
    with answering(recipe, recipe.folder / "prepare", {"static": folder})("static") as arm:
        scores = arm.scores(texts)
    chances = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(own.predict_proba([text.text for text in texts]), chances, atol=1e-4)
    rows = json.loads((recipe.folder / "evaluate" / "measurements.json").read_text())
    accuracy = next(
        row["value"] for row in rows if (row["arm"], row["name"], row["slice"]) == ("static", "accuracy", "test")
    )
    right = [CLASSES[place] == text.label for place, text in zip(scores.argmax(-1), texts, strict=True)]
    assert accuracy == pytest.approx(np.mean(right))


def test_the_same_recipe_gives_the_same_folder(still, tmp_path):
    folders = []
    for name in ("one", "two"):
        recipe = still(f"run_dir={tmp_path / name}", "static.training.steps=3")
        run_recipe(recipe, until="static")
        folders.append(recipe.folder / "static" / "student")
    for file in ("model.safetensors", "head.safetensors"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


def test_losses_over_layers_are_left_out_of_it(still):
    losses = [{"kind": "forward_kl"}, {"kind": "hidden_mse"}]
    recipe = still("static.training.steps=2", losses=losses, signals={"kind": "dense", "features": True})
    run_recipe(recipe, until="static")
    assert metrics(recipe)[0]["loss"] == metrics(recipe)[0]["forward_kl"]
    assert "hidden_mse" not in metrics(recipe)[0]


def test_more_dimensions_than_the_teacher_has_are_refused(still):
    with pytest.raises(RecipeError, match=r"^static\.dimensions=64: the teacher's states have width 32"):
        run_recipe(still("static.dimensions=64"), until="static")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["signals={kind: online}"], r"^signals\.kind: online reads the student's tokens"),
        (["data.text_pair=second"], r"^static: reads one text"),
        (["task={kind: token_classification}"], r"^static: is a classifier"),
    ],
)
def test_where_it_cannot_be_it_is_refused_before_anything_is_done(still, overrides, words):
    recipe = still(*overrides)
    with pytest.raises(RecipeError, match=words):
        run_recipe(recipe)
    assert not (recipe.folder / "prepare").exists()


def test_its_stage_is_done_again_when_its_part_of_the_recipe_changes_alone(still):
    run_recipe(still("static.training.steps=2"), until="static")
    trained = RunDir(still().folder).manifest("train")
    recipe = still("static.training.steps=3")
    run_recipe(recipe, until="static")
    assert RunDir(recipe.folder).manifest("train") == trained
    assert len(metrics(recipe)) == 3
