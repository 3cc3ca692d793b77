"""What a recipe may say of its task, of texts and of the students of a task; and in whose words the rest is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from potstill.recipes.problems import describe
from potstill.recipes.schema import Recipe

BASE: dict[str, Any] = {
    "name": "toy",
    "data": {"source": "words.jsonl"},
    "teacher": {"kind": "local", "model": "big"},
    "student": {"kind": "layers", "keep": "even", "count": 3},
    "losses": [{"kind": "forward_kl"}],
    "training": {"steps": 3},
}
TASKS = "language_model, masked_lm, classification, token_classification or embedding"


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate({**BASE, **changes})


def problem(**changes: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        recipe(**changes)
    return describe(caught.value)


def data(**changes: Any) -> dict[str, Any]:
    return {"data": {"source": "words.jsonl", **changes}}


def static(**changes: Any) -> dict[str, Any]:
    return {"static": {"training": {"epochs": 1}, **changes}}


def price(**changes: Any) -> dict[str, Any]:
    return {"evaluation": {"price": changes}}


REFUSED = [
    # task
    ({"task": {}}, f"task.kind: missing. Give {TASKS}."),
    ({"task": {"kind": "clasification"}},
     f"task.kind: got 'clasification', needs {TASKS}. Did you mean classification?"),
    ({"task": "embedding"}, f"task: got 'embedding', needs a mapping with kind: {TASKS}."),
    ({"task": {"kind": "language_model", "masked": 0.1}}, "task.masked: unknown key. Known here: kind."),
    ({"task": {"kind": "masked_lm", "masked": 0}}, "task.masked: got 0, needs a number greater than 0."),
    ({"task": {"kind": "masked_lm", "masked": 1}}, "task.masked: got 1, needs a number less than 1."),
    ({"task": {"kind": "masked_lm", "by_mask": -0.1}}, "task.by_mask: got -0.1, needs a number greater than or equal"),
    ({"task": {"kind": "masked_lm", "by_mask": 0.95}},
     "task: by_mask 0.95 + by_random 0.1 exceed 1; lower one of them."),
    ({"task": {"kind": "classification", "labels": ["one"]}}, "task.labels: got a list of 1, needs 2 or more of them."),
    ({"task": {"kind": "classification", "labels": ["no", False]}}, "task.labels[1]: got false, needs text."),
    ({"task": {"kind": "classification", "pooling": "max"}}, "task.pooling: got 'max', needs cls or mean."),
    ({"task": {"kind": "classification", "multilabel": True}},
     "task.multilabel: unknown key. Did you mean multi_label?"),
    ({"task": {"kind": "token_classification", "overlong": "cut"}},
     "task.overlong: got 'cut', needs truncate, drop or refuse."),
    ({"task": {"kind": "token_classification", "out_of_scope": "O"}}, "task.out_of_scope: unknown key."),
    ({"task": {"kind": "embedding", "normalize": True}}, "task.normalize: unknown key. Did you mean normalise?"),
    ({"task": {"kind": "embedding", "labels": ["a", "b"]}}, "task.labels: unknown key."),
    # data
    (data(labels_per_class=0), "data.labels_per_class: got 0, needs a number greater than or equal to 1."),
    (data(noise=True), "data.noise: got true, needs a mapping."),
    (data(noise={"share": 0}), "data.noise.share: got 0, needs a number greater than 0."),
    (data(noise={"copies": 0}), "data.noise.copies: got 0, needs a number greater than or equal to 1."),
    (data(noise={"rate": 0.1}), "data.noise.rate: unknown key."),
    # students
    (static(dimensions=0), "static.dimensions: got 0, needs a number greater than or equal to 1."),
    ({"static": {}}, "static.training: missing. How it is trained."),
    (static(kind="static"), "static.kind: unknown key. Known here: dimensions, training."),
    ({"student": {"kind": "layers", "keep": [0, 1], "architecture": "bert"}},
     "student.architecture: got 'bert', needs teacher or distilbert."),
    ({"student": {"kind": "layers", "keep": []}}, "student.keep: an empty list keeps no layer; name at least one."),
    ({"student": {"kind": "layers", "keep": [1, 0]}}, "student.keep: [1, 0] must be ascending, each layer once; sort "),
    ({"student": {"kind": "layers", "keep": [0, 1], "count": 3}},
     "student.count: 3 but keep lists 2 layers; leave count out."),
    # training and evaluation
    ({"training": {"steps": 1, "schedule": {"kind": "linear", "final": 2}}},
     "training.schedule.final: got 2, needs a number less than or equal to 1."),
    ({"training": {"steps": 1, "epochs": 1}}, "training: needs exactly one of tokens, steps, epochs; got steps, epoch"),
    (price(), "evaluation.price.machine_usd_per_hour: missing. Price of a machine such as this one, kept busy."),
    (price(machine_usd_per_hour=0), "evaluation.price.machine_usd_per_hour: got 0, needs a number greater than 0."),
    (price(machine_usd_per_hour=1, teacher_usd_per_1000=-1), "evaluation.price.teacher_usd_per_1000: got -1, needs a"),
    ({"evaluation": {"precision": 1}}, "evaluation.precision: got 1, needs a number less than 1."),
    ({"evaluation": {"calibrate": 3}}, "evaluation.calibrate: got 3, needs true or false."),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[words.partition(":")[0] for _, words in REFUSED])
def test_what_a_task_cannot_be_is_one_line_in_the_recipes_words(changes, words):
    found = problem(**changes)
    assert found.startswith(words)
    assert "\n" not in found


@pytest.mark.parametrize(("kind", "over_texts", "control"), [
    ("language_model", False, True), ("masked_lm", False, True), ("classification", True, True),
    ("token_classification", True, True), ("embedding", True, False),
])  # fmt: skip
def test_the_task_says_whether_there_are_texts_and_hard_labels(kind, over_texts, control):
    made = recipe(task={"kind": kind})
    assert (made.over_texts, made.has_control) == (over_texts, control)
    assert not recipe(task={"kind": kind}, control={"enabled": False}).has_control


def test_a_recipe_that_says_no_task_is_about_the_next_token():
    assert recipe() == recipe(task={"kind": "language_model"})


def test_masks_may_all_be_shown_or_all_be_random():
    for shares in (
        {"by_mask": 1.0, "by_random": 0.0},
        {"by_mask": 0.0, "by_random": 1.0},
        {"by_mask": 0, "masked": 1e-6},
    ):
        assert recipe(task={"kind": "masked_lm", **shares}).task.kind == "masked_lm"
