"""What a recipe may say of what is kept of its teacher, and what it means where nothing is said."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from potstill.errors import RecipeError
from potstill.recipes import dump_recipe, load_recipe
from potstill.recipes.signals import Positions, Signals

TRUNCATED = ("sampled", "topk", "topk_renormalised")
STORED = (*TRUNCATED, "hidden", "dense")


def signals(kind: str, **fields: Any) -> Any:
    return TypeAdapter(Signals).validate_python({"kind": kind, **fields})


def refused(text: str) -> str:
    """The one line about a recipe with these signals."""
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", [f"signals={text}"])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_is_kept_where_nothing_is_said(tiny_recipe):
    kept = load_recipe(tiny_recipe).signals
    assert kept.kind == "online"
    assert kept.everywhere


@pytest.mark.parametrize("kind", STORED)
def test_every_kind_needs_nothing_but_its_name(kind):
    kept = signals(kind)
    assert (kept.kind, kept.store, kept.batch_tokens, kept.positions.kind) == (kind, None, 4096, "all")
    assert kept.everywhere
    assert kept.share == 1.0
    if kind in TRUNCATED:
        assert (kept.k, kept.temperatures) == (16, None)
    else:
        assert not {"k", "temperatures"} & type(kept).model_fields.keys()


@pytest.mark.parametrize("kind", ["online", *STORED])
def test_every_kind_tells_a_user_when_to_choose_it(kind):
    assert type(signals(kind)).__doc__


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("positions", ["random", "highest_entropy"])
@given(share=st.floats(0.0, 1.0, exclude_min=True, exclude_max=True))
def test_a_share_of_the_positions_is_not_everywhere(kind, positions, share):
    kept = signals(kind, positions={"kind": positions, "share": share})
    assert kept.share == share
    assert not kept.everywhere


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf"), True, "half"])
def test_a_share_lies_between_none_and_all(share):
    with pytest.raises(ValidationError):
        TypeAdapter(Positions).validate_python({"kind": "random", "share": share})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{kind: sampeld}", ["signals.kind: got 'sampeld'", "Did you mean sampled?"]),
        ("{kind: sampled, kk: 3}", ["signals.kk: unknown key", "Did you mean k?"]),
        ("{kind: hidden, k: 3}", ["signals.k: unknown key"]),
        ("{kind: dense, temperatures: [1]}", ["signals.temperatures: unknown key"]),
        ("{kind: online, store: here}", ["signals.store: unknown key"]),
        ("{kind: sampled, k: 0}", ["signals.k: got 0"]),
        ("{kind: topk, k: -3}", ["signals.k: got -3"]),
        ("{kind: topk, k: 2.5}", ["signals.k: got 2.5"]),
        ("{kind: sampled, batch_tokens: 0}", ["signals.batch_tokens: got 0"]),
        ("{kind: sampled, temperatures: []}", ["signals.temperatures: got an empty list"]),
        ("{kind: sampled, temperatures: [1, 0]}", ["signals.temperatures[1]: got 0"]),
        ("{kind: sampled, temperatures: [.inf]}", ["signals.temperatures[0]: got inf"]),
        ("{kind: sampled, temperatures: [1, 2, 1.0]}", ["signals.temperatures", "has one twice", "name each once"]),
        ("{kind: hidden, positions: {kind: random}}", ["signals.positions.share: missing"]),
        ("{kind: hidden, positions: {kind: all, share: 0.5}}", ["signals.positions.share: unknown key"]),
        ("{kind: hidden, positions: {kind: random, share: 1}}", ["signals.positions.share: got 1"]),
        ("{kind: hidden, positions: {kind: highest_entropy, share: 0}}", ["signals.positions.share: got 0"]),
        ("{kind: hidden, positions: some}", ["signals.positions"]),
    ],
)
def test_a_mistake_is_told_in_one_line(text, words):
    line = refused(text)
    for word in words:
        assert word in line, line


def test_what_is_kept_survives_the_saved_recipe(tmp_path):
    text = "{kind: sampled, k: 8, temperatures: [1, 2.5], store: there, positions: {kind: random, share: 0.25}}"
    recipe = load_recipe("quickstart", [f"signals={text}"])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
