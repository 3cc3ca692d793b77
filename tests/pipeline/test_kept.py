"""A teacher that is kept beside the runs is taken as it was left, or not at all."""

from __future__ import annotations

import pytest

from potstill.pipeline.run import explain_run, run_recipe


@pytest.fixture
def taught(task, make_encoder, brief):
    teacher = {"kind": "finetune", "model": str(make_encoder("masked")), "dtype": "fp32", "training": brief(4)}
    return lambda name="task": task(name, teacher=teacher)


def weights(recipe):
    return recipe.folder / "finetune" / "teacher" / "model.safetensors"


def flip(path):
    """Turn a bit where the file lies, in every run that it is linked into."""
    with path.open("r+b") as file:
        file.seek(-50, 2)
        byte = file.read(1)[0]
        file.seek(-50, 2)
        file.write(bytes([byte ^ 1]))


def test_a_damaged_teacher_is_trained_again_and_not_taken_from_where_it_is_damaged_too(taught):
    recipe = taught()
    run_recipe(recipe, until="finetune")
    whole = weights(recipe).read_bytes()
    flip(weights(recipe))
    assert {status.stage: status.state for status in explain_run(recipe)}["finetune"] == "damaged"
    run_recipe(recipe, until="finetune")
    assert weights(recipe).read_bytes() == whole


def test_another_run_takes_no_teacher_that_was_changed_meanwhile(taught):
    first, second = taught("first"), taught("second")
    run_recipe(first, until="finetune")
    whole = weights(first).read_bytes()
    flip(weights(first))
    run_recipe(second, until="finetune")
    assert weights(second).read_bytes() == whole
