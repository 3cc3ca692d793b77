"""What a recipe says of a teacher that writes."""

from __future__ import annotations

import pytest

from potstill.recipes import load_recipe


@pytest.mark.parametrize(
    ("change", "temperature"), [("{max_tokens: 9}", 0.0), ("{temperature: 0.6}", 0.6), ("{}", 0.0)]
)
def test_held_out_prompts_are_answered_greedily_unless_the_recipe_says_otherwise(change, temperature):
    recipe = load_recipe("r1-sample", [f"evaluation.answers={change}", "evaluation.attempts=1"])
    assert recipe.evaluation.answers.temperature == temperature
