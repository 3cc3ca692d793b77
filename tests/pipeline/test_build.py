"""What a recipe says about its losses is what the objective does; and what the teacher lacks is refused by name."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import pytest
import torch
from transformers import LlamaConfig

from potstill.errors import RecipeError
from potstill.losses import DIVERGENCES, HeadLoss, HeadTerm, HiddenLoss, Objective
from potstill.pipeline import build
from potstill.recipes import load_recipe
from potstill.recipes.losses import LossTerm, VocabularyTerm
from potstill.types import Batch, Head, Lesson, Offer, Signal, States, StudentView

SIZES = {"num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}
STUDENT = LlamaConfig(num_hidden_layers=2, hidden_size=4, **SIZES)
TEACHER = LlamaConfig(num_hidden_layers=4, hidden_size=6, **SIZES)
KINDS = {get_args(model.model_fields["kind"].annotation)[0]: model for model in get_args(get_args(LossTerm)[0])}
NEEDED = {"alpha_beta": ", alpha: 0.7, beta: 0.4"}


def terms(losses: str) -> list[Any]:
    return load_recipe("quickstart", [f"losses={losses}"]).losses


def objective(losses: str) -> Objective:
    return build.build_objective(terms(losses), 16, STUDENT, TEACHER)


def head_terms(losses: str) -> tuple[HeadTerm, ...]:
    (loss,) = objective(losses).losses
    return loss.terms


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_loss_can_be_built_and_asks_for_what_it_said(kind):
    (term,) = terms(f"[{{kind: {kind}, weight: 0.5{NEEDED.get(kind, '')}}}]")
    built = build.build_objective([term], 16, STUDENT, TEACHER)
    (loss,) = built.losses
    assert built.needs == (frozenset() if term.needs is None else {Offer(term.needs)})
    if issubclass(KINDS[kind], VocabularyTerm):
        assert loss.terms == (HeadTerm(kind, 0.5, settings=term.settings),)
    else:
        assert (type(loss), loss.kind, loss.weight) == (HiddenLoss, kind, 0.5)


def test_recipes_and_formulas_know_the_same_divergences_with_the_same_settings():
    over_vocabulary = {kind for kind, model in KINDS.items() if issubclass(model, VocabularyTerm)}
    assert over_vocabulary == {*DIVERGENCES, "cross_entropy"}
    for kind in DIVERGENCES:
        (term,) = terms(f"[{{kind: {kind}{NEEDED.get(kind, '')}}}]")
        taken = inspect.signature(DIVERGENCES[kind]).parameters.values()
        settings = {one.name: one.default for one in taken if one.kind is one.KEYWORD_ONLY}
        assert set(term.settings) == set(settings), kind
        for name, default in settings.items():
            assert default in (term.settings[name], inspect.Parameter.empty), (kind, name)


def test_settings_temperatures_and_flags_arrive():
    losses = "[{kind: skew_forward_kl, alpha: 0.3, temperature: 2, weight: 0.7, times_temperature_squared: false},"
    losses += " {kind: cross_entropy, label_smoothing: 0.1}]"
    assert head_terms(losses) == (
        HeadTerm("skew_forward_kl", 0.7, 2.0, False, {"alpha": 0.3}),
        HeadTerm("cross_entropy", settings={"label_smoothing": 0.1}),
    )


def test_what_moves_in_a_recipe_moves_in_the_objective():
    built = objective(
        "[{kind: jsd, weight: {kind: linear, start: 0, end: 0.8}, temperature: {kind: cosine, start: 3, end: 1}},"
        " {kind: cross_entropy, weight: {kind: constant, value: 0.4}},"
        " {kind: hidden_mse, weight: {kind: linear, start: 2, end: 0}}]"
    )
    assert built.scheduled(0.0) == {"weight_jsd": 0.0, "temperature_jsd": 3.0, "weight_hidden_mse": 2.0}
    assert built.scheduled(0.5) == pytest.approx({"weight_jsd": 0.4, "temperature_jsd": 2.0, "weight_hidden_mse": 1.0})
    assert built.scheduled(1.0) == {"weight_jsd": 0.8, "temperature_jsd": 1.0, "weight_hidden_mse": 0.0}
    assert [term.weight for term in built.losses[0].terms] == [1.0, 0.4]


def test_a_loss_that_starts_at_weight_0_asks_the_teacher_from_the_start():
    built = objective("[{kind: cross_entropy}, {kind: forward_kl, weight: {kind: linear, start: 0, end: 1}}]")
    assert build.wants_of(built).final


def test_a_recipe_of_all_divergences_gives_one_pass_and_a_finite_loss():
    every = ", ".join(f"{{kind: {kind}{NEEDED.get(kind, '')}, temperature: 2}}" for kind in DIVERGENCES)
    built = objective(f"[{every}, {{kind: cross_entropy}}]")
    assert [type(loss) for loss in built.losses] == [HeadLoss]
    torch.manual_seed(0)
    batch = Batch(torch.randint(16, (2, 5)), torch.randint(16, (2, 5)), torch.ones(2, 5, dtype=torch.long))
    student = StudentView(torch.randn(10, 4, requires_grad=True), Head(torch.randn(18, 4)))
    lesson = Lesson(batch, Signal(States(torch.randn(10, 6), Head(torch.randn(16, 6)))))
    share, parts = built(student, lesson, built.counts([batch]))
    assert list(parts) == [*DIVERGENCES, "cross_entropy"]
    assert all(value > 0.0 for value in parts.values())
    factors = {name: 1.0 if name == "cross_entropy" else 4.0 for name in parts}
    assert float(share.detach()) == pytest.approx(sum(factors[name] * float(parts[name]) for name in parts), rel=1e-5)


@pytest.mark.parametrize(("kind", "need"), [("total_variation", "LOGITS"), ("hidden_cosine", "HIDDEN")])
def test_a_teacher_that_cannot_offer_what_a_loss_needs_is_refused_by_name(monkeypatch, kind, need):
    monkeypatch.setattr(build.LocalEngine, "offers", frozenset({Offer.TEXT}))
    recipe = load_recipe("quickstart", [f"losses=[{{kind: cross_entropy}}, {{kind: {kind}}}]"])
    words = (
        rf"^losses\[1\].kind={kind} needs {need}, but teacher.kind=local offers TEXT. Remove this loss, or use another"
    )
    with pytest.raises(RecipeError, match=words):
        build.check_losses(recipe)
    build.check_losses(load_recipe("quickstart", ["losses=[{kind: cross_entropy}]"]))
