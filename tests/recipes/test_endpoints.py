"""How an API is asked for classes: what could not be read or filled in is refused with the recipe."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from potstill.recipes.endpoints import Labelling, OpenAITeacher


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"prompt": "Which of {labels}?"}, "prompt: {text} is not in it"),
        ({"prompt": "{label} {txt}"}, "prompt: {text} is not in it"),
        ({"prompt": "What is {text}?", "answers": "probabilities"}, "prompt: {labels} is not in it"),
        ({"prompt": "{txt}?", "answers": "probabilities"}, "prompt: {labels} and {text} is not in it"),
        ({"answers": "probabilities", "votes": 2}, "answers: probabilities are read from one token of one answer"),
        ({"answers": "probabilities", "max_tokens": 9}, "answers: probabilities are read from one token of one answer"),
        ({"votes": 0}, "votes"),
        ({"missing": 1.0}, "missing"),
        ({"missing": -0.1}, "missing"),
    ],
)
def test_what_cannot_be_asked_or_read_is_refused(settings, problem):
    with pytest.raises(ValidationError) as caught:
        Labelling(**settings)
    assert problem in str(caught.value)


def test_other_braces_may_stand_in_a_prompt():
    prompt = '{"label": one of {labels}, "of": {text}} {} {0}'
    assert Labelling(prompt=prompt).prompt == prompt


def test_a_prompt_of_examples_needs_no_list():
    prompt = "Rome: place\n{text}:"
    assert Labelling(prompt=prompt).prompt == prompt


def test_by_default_a_label_is_asked_for_once():
    asked = OpenAITeacher(kind="openai", model="m").labelling
    assert (asked.answers, asked.votes, asked.missing) == ("label", 1, 0.02)
