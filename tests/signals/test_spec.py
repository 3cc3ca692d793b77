"""A spec says what can be stored, is read back as it was, and refuses the rest in the recipe's words."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.errors import RecipeError
from potstill.signals import SignalSpec

SAMPLED = SignalSpec("sampled", 300, k=16, temperatures=(1.0, 2.0), positions="random", share=0.25)
HIDDEN = SignalSpec("hidden", 300, width=64, dtype="bf16")

lists = st.builds(
    lambda kind, vocabulary, k, temperatures: SignalSpec(
        kind, max(vocabulary, k), k=k, temperatures=tuple(temperatures)
    ),
    st.sampled_from(["sampled", "topk", "topk_renormalised"]),
    st.integers(1, 1 << 24),
    st.integers(1, 1000),
    st.lists(st.floats(0.1, 10), min_size=1, max_size=3, unique=True),
)


@settings(deadline=None)
@given(lists)
def test_what_was_written_as_json_is_read_back(spec):
    again = SignalSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert again.fingerprint == spec.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "topk"},
        {"vocabulary": 301},
        {"k": 17},
        {"temperatures": (1.0,)},
        {"temperatures": (2.0, 1.0)},
        {"positions": "highest_entropy"},
        {"share": 0.5},
    ],
    ids=str,
)
def test_every_setting_is_in_the_fingerprint(change):
    assert replace(SAMPLED, **change).fingerprint != SAMPLED.fingerprint


@pytest.mark.parametrize("change", [{"width": 32}, {"dtype": "fp32"}], ids=str)
def test_the_form_of_hidden_states_is_in_the_fingerprint(change):
    assert replace(HIDDEN, **change).fingerprint != HIDDEN.fingerprint


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"kind": "sampled", "vocabulary": 8, "k": 9},
            r"^signals\.k=9: the vocabulary has 8 tokens\. Use a k of 1 to 8",
        ),
        ({"kind": "topk", "vocabulary": 8}, r"^signals\.k=0: "),
        ({"kind": "topk", "vocabulary": 8, "k": -1}, r"^signals\.k=-1: a whole number"),
        ({"kind": "topk", "vocabulary": 8, "k": True}, r"^signals\.k=True: a whole number"),
        ({"kind": "dense", "vocabulary": 8, "k": 4}, r"^signals\.k=4: kind=dense keeps every token"),
        ({"kind": "dense", "vocabulary": 0}, r"vocabulary of 0 tokens"),
        ({"kind": "dense", "vocabulary": 1 << 25}, r"vocabulary of 33554432 tokens"),
        ({"kind": "best", "vocabulary": 8}, r"^signals\.kind='best': not known\. Use one of sampled, topk"),
        ({"kind": "hidden", "vocabulary": 8, "width": 4}, r"^signals\.dtype=None: not known"),
        (
            {"kind": "hidden", "vocabulary": 8, "dtype": "bf16"},
            r"^signals\.width=0, dtype=bf16: kind=hidden needs both",
        ),
        ({"kind": "dense", "vocabulary": 8, "width": 4}, r"^signals\.width=4, dtype=None: .* kind=dense neither"),
        ({"kind": "dense", "vocabulary": 8, "temperatures": (2.0,)}, r"kind=dense is exact at every temperature"),
        ({"kind": "topk", "vocabulary": 8, "k": 2, "temperatures": ()}, r"^signals\.temperatures=\[\]: one or more"),
        ({"kind": "topk", "vocabulary": 8, "k": 2, "temperatures": (1.0, 1.0)}, r"each once"),
        ({"kind": "topk", "vocabulary": 8, "k": 2, "temperatures": (0.0,)}, r"0\.0 is no temperature"),
        ({"kind": "topk", "vocabulary": 8, "k": 2, "temperatures": (float("nan"),)}, r"nan is no temperature"),
        ({"kind": "dense", "vocabulary": 8, "share": 0.5}, r"^signals\.positions\.share=0\.5: kind=all"),
        ({"kind": "dense", "vocabulary": 8, "positions": "random", "share": 0.0}, r"^signals\.positions\.share=0\.0"),
    ],
    ids=str,
)
def test_what_cannot_be_stored_is_refused_by_the_recipes_key(settings, words):
    with pytest.raises(RecipeError, match=words) as caught:
        SignalSpec(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"extra": 1}, {"k": None}], ids=str)
def test_settings_of_another_version_are_named(change):
    content = SAMPLED.to_json() | change
    if change == {"k": None}:
        del content["k"]
    with pytest.raises(RecipeError, match=next(iter(change))):
        SignalSpec.from_json(content)


def test_temperatures_that_are_no_list_are_refused():
    with pytest.raises(RecipeError, match="a list of numbers"):
        SignalSpec.from_json(SAMPLED.to_json() | {"temperatures": 1.0})
