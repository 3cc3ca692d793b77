"""What `check` says of sizes is what the run will have."""

from __future__ import annotations

import pytest

from potstill.errors import RecipeError
from potstill.pipeline.build import build_teacher
from potstill.pipeline.chain import phases_of
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


@pytest.mark.parametrize(("family", "longest"), [("bert", 48), ("roberta", 47)])
def test_positions_that_a_model_counts_from_its_padding_on_hold_no_tokens(task, make_encoder, family, longest):
    """A RoBERTa of 514 positions reads 512 tokens: of one more, its table of positions knows nothing."""
    teacher = {
        "kind": "local",
        "model": str(make_encoder("classes", family=family, labels=("a", "b"))),
        "dtype": "fp32",
    }
    inspect_recipe(task(teacher=teacher, data={"sequence_length": longest}))
    with pytest.raises(RecipeError, match=rf"^data\.sequence_length: .*Use at most {longest}\."):
        inspect_recipe(task(teacher=teacher, data={"sequence_length": longest + 1}))


def test_phases_are_known_before_the_first_of_them_has_left_a_student(tiny_recipe):
    recipe = load_recipe(tiny_recipe, ["phases=[{name: one}, {name: two}]"])
    alone, found = inspect_recipe(load_recipe(tiny_recipe)), inspect_recipe(recipe)
    assert not recipe.folder.exists()
    assert found.student_parameters == alone.student_parameters
    assert found.student_tokenizer.get_vocab() == alone.student_tokenizer.get_vocab()
    for phase in phases_of(recipe):
        assert inspect_recipe(phase).student.config.num_hidden_layers == 2
