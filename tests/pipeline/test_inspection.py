"""What `check` says of sizes is what the run will have."""

from __future__ import annotations

import pytest

from potstill.pipeline.build import build_teacher
from potstill.pipeline.inspection import count_parameters, inspect_recipe
from potstill.recipes import load_recipe
from potstill.students import cut_layers


@pytest.mark.parametrize("student", ["{kind: layers, keep: [0, 2]}", "{kind: config}"])
def test_tied_weights_are_counted_once_without_weights_too(tiny_recipe, student):
    recipe = load_recipe(tiny_recipe, [f"student={student}"])
    teacher = build_teacher(recipe).model
    found = inspect_recipe(recipe)
    assert found.teacher_parameters == count_parameters(teacher)
    real = cut_layers(teacher, [0, 2]) if "layers" in student else teacher
    assert found.student_parameters == count_parameters(real)
