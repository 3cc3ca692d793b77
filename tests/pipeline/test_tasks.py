"""Every task from its recipe to its report, with every kind of teacher that suits it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from potstill.pipeline.run import explain_run, run_recipe
from potstill.recipes import Recipe

CLASSES = ("counting", "finding", "painting")


def measured(recipe: Recipe) -> dict[tuple[str, str], float]:
    """(arm, name) -> value, of the whole test split."""
    rows = json.loads((recipe.folder / "evaluate" / "measurements.json").read_text())
    return {(row["arm"], row["name"]): row["value"] for row in rows if row["slice"] == "test"}


def finish(recipe: Recipe) -> dict[tuple[str, str], float]:
    """Runs the recipe to its report and says what was measured."""
    run_recipe(recipe)
    assert {status.state for status in explain_run(recipe)} == {"done"}
    assert (recipe.folder / "report" / "index.html").is_file()
    assert (recipe.folder / "train" / "student" / "README.md").is_file()
    return measured(recipe)


def lines(recipe: Recipe, stage: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (recipe.folder / stage / "metrics.jsonl").read_text().splitlines()]


def local(model: Path) -> dict[str, Any]:
    return {"kind": "local", "model": str(model), "dtype": "fp32"}


@pytest.fixture
def classifier(make_encoder) -> dict[str, Any]:
    return local(make_encoder("classes", labels=CLASSES))


def test_masked_language_modelling(task, make_encoder):
    losses = [
        {"kind": "forward_kl", "weight": 5.0, "temperature": 2.0, "times_temperature_squared": True},
        {"kind": "cross_entropy", "weight": 2.0},
        {"kind": "hidden_cosine"},
    ]
    recipe = task(task={"kind": "masked_lm"}, teacher=local(make_encoder("masked")), losses=losses)
    found = finish(recipe)
    assert found["student", "kl_to_teacher"] < found["untrained", "kl_to_teacher"]
    assert found["student", "nll"] > 0


@pytest.mark.parametrize("family", ["distilbert", "roberta", "modernbert"])
def test_one_label_a_text_for_every_family(task, make_encoder, family):
    recipe = task(teacher=local(make_encoder("classes", labels=CLASSES, family=family)))
    found = finish(recipe)
    assert found["student", "kl_to_teacher"] < found["untrained", "kl_to_teacher"]


def test_several_labels_a_text(task, make_encoder):
    teacher = local(make_encoder("classes", labels=("bird", "warm")))
    found = finish(
        task(task={"kind": "classification", "multi_label": True}, data={"label": "tags"}, teacher=teacher)
    )
    assert found["student", "kl_to_teacher"] < found["untrained", "kl_to_teacher"]
    assert 0.0 <= found["student", "micro_f1"] <= 1.0


def test_pairs_of_texts(task, classifier):
    found = finish(task(data={"text_pair": "second", "sequence_length": 24}, teacher=classifier))
    assert found["student", "kl_to_teacher"] < found["untrained", "kl_to_teacher"]


def test_a_label_for_every_word(task, make_encoder):
    data = {"text": "words", "label": "word_labels"}
    teacher = local(make_encoder("words", labels=("B-BEAST", "B-HUE", "O")))
    found = finish(task(task={"kind": "token_classification"}, data=data, teacher=teacher))
    assert found["student", "kl_to_teacher"] < found["untrained", "kl_to_teacher"]
    assert ("student", "entity_f1") in found


@pytest.mark.parametrize("signals", ["online", "dense"])
def test_vectors_of_texts(task, make_encoder, signals):
    losses = [{"kind": "vector_mse"}, {"kind": "rkd_distance", "over": "texts"}]
    recipe = task(
        task={"kind": "embedding"}, teacher=local(make_encoder("body")), losses=losses, signals={"kind": signals}
    )
    found = finish(recipe)
    assert found["student", "cosine_to_teacher"] > found["untrained", "cosine_to_teacher"]
    assert ("control", "cosine_to_teacher") not in found


# Teachers of every kind


def finetuned(model: Path, training: dict[str, Any], learns: str = "all") -> dict[str, Any]:
    return {"kind": "finetune", "model": str(model), "dtype": "fp32", "learns": learns, "training": training}


def test_a_teacher_that_is_trained_first_knows_the_labels(task, make_encoder, brief):
    start = make_encoder("masked")
    recipe = task(teacher=finetuned(start, brief(30)))
    found = finish(recipe)
    assert found["teacher", "accuracy"] > 0.8
    assert found["student", "retention"] == pytest.approx(
        found["student", "accuracy"] / found["teacher", "accuracy"], abs=1e-6
    )
    assert lines(recipe, "finetune")[-1]["loss"] < lines(recipe, "finetune")[0]["loss"]


def test_where_the_head_alone_learns_the_body_stays_bit_by_bit(task, make_encoder, brief):
    from safetensors.torch import load_file

    start = make_encoder("masked")
    recipe = task(teacher=finetuned(start, brief(3), "head"), task={"kind": "classification"})
    run_recipe(recipe, until="finetune")
    trained, before = (
        load_file(folder / "model.safetensors") for folder in (recipe.folder / "finetune" / "teacher", start)
    )
    body = [name for name in trained if name.startswith("bert.") and name in before]
    assert len(body) > 30
    assert all(trained[name].equal(before[name]) for name in body)


def test_a_head_for_masked_language_modelling_is_trained_first_where_it_lacks(task, make_encoder, brief):
    recipe = task(task={"kind": "masked_lm"}, teacher=finetuned(make_encoder("body"), brief(4), "head"))
    found = finish(recipe)
    assert found["teacher", "nll"] > 0


def test_words_are_taught_by_a_teacher_that_is_trained_first(task, make_encoder, brief):
    data = {"text": "words", "label": "word_labels"}
    teacher = finetuned(make_encoder("masked"), brief(20))
    found = finish(task(task={"kind": "token_classification"}, data=data, teacher=teacher, signals={"kind": "dense"}))
    assert found["teacher", "accuracy"] > 0.9


def test_two_teachers_of_different_tokenizers_teach_by_their_weighted_mean(task, make_encoder):
    members = [
        {"model": str(make_encoder("classes", labels=CLASSES)), "weight": 3.0},
        {"model": str(make_encoder("classes", labels=CLASSES[::-1], seed=2, backwards=True)), "weight": 1.0},
    ]
    teacher = {"kind": "mixture", "members": members, "dtype": "fp32"}
    found = finish(task(teacher=teacher, signals={"kind": "dense"}))
    assert found["student", "kl_to_teacher"] < found["untrained", "kl_to_teacher"]


def test_the_student_of_another_run_teaches(task, write_task, classifier):
    assistant = write_task("assistant", teacher=classifier)
    recipe = task(
        "final",
        teacher={"kind": "run", "recipe": str(assistant), "dtype": "fp32"},
        student={"kind": "layers", "keep": [0]},
    )
    found = finish(recipe)
    assert found["student", "kl_to_teacher"] < found["untrained", "kl_to_teacher"]


RECORDED = {
    "a mapping": ({"probabilities": "p"}, lambda p, _: {"p": dict(zip(CLASSES, p, strict=True))}),
    "a list": ({"probabilities": "p"}, lambda p, _: {"p": list(p)}),
    "by id": ({"probabilities": "p", "match": "id"}, lambda p, row: {"p": list(p), "id": row["id"], "text": None}),
}


def answers(rows: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    """Sure of the true class, and leaning to the first of the others."""
    return [tuple(0.85 if name == row["label"] else 0.1 if n < 1 else 0.05 for n, name in enumerate(CLASSES)) for row in rows]


def normal(p: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(one / sum(p) for one in p)


@pytest.mark.parametrize("form", [*RECORDED, "labels alone"])
def test_recorded_answers_teach_in_any_order_and_form(task, queries, write_rows, make_encoder, form):
    rows = queries(80)
    if form == "labels alone":
        keys, told = {"label": "said"}, [{"text": row["text"], "said": row["label"]} for row in rows]
    else:
        keys, write = RECORDED[form]
        told = [{"text": row["text"], **write(normal(p), row)} for p, row in zip(answers(rows), rows, strict=True)]
    recipe = task(
        task={"kind": "classification", "labels": list(CLASSES)},
        teacher={"kind": "recorded", "path": str(write_rows(told[::-1])), **keys},
        student={"kind": "model", "model": str(make_encoder("masked", layers=2))},
        training=brief_steps(40),
    )
    found = finish(recipe)
    assert found["teacher", "accuracy"] == 1.0
    assert found["student", "agreement"] > found["untrained", "agreement"]
    assert ("teacher", "parameters") not in found


def brief_steps(steps: int) -> dict[str, Any]:
    return {"steps": steps}
