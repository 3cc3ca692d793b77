"""What the first stages must not leave for later ones to find."""

from __future__ import annotations

import pytest

from potstill.errors import DataError
from potstill.pipeline.run import explain_run, run_recipe

CLASSES = ("counting", "finding", "painting")


@pytest.fixture
def recorded(task, queries, write_rows, make_encoder):
    """A recipe whose teacher's answers to the first so many of 80 texts were recorded."""

    def make(count: int, **keys):
        told = [{"id": row["id"], "text": row["text"], "said": row["label"]} for row in queries(count)]
        keys = {"student": {"kind": "model", "model": str(make_encoder("masked", layers=2))}, **keys}
        return task(
            task={"kind": "classification", "labels": list(CLASSES)},
            teacher={"kind": "recorded", "path": str(write_rows(told)), "label": "said"},
            **keys,
        )

    return make


@pytest.mark.parametrize("count", [79, 20])
def test_texts_of_which_no_answer_was_recorded_are_counted_before_anything_is_trained(recorded, count):
    recipe = recorded(count)
    with pytest.raises(DataError, match=rf"^teacher\.path: .* has no answer to {80 - count} of 80 texts"):
        run_recipe(recipe)
    assert {status.stage for status in explain_run(recipe) if status.state == "missing"} >= {"train", "control"}


def test_a_noisy_copy_needs_no_answer_of_its_own(recorded):
    run_recipe(recorded(80, data={"noise": {"copies": 1, "share": 0.3}}), until="train")
