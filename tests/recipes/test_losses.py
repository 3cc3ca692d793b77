from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from potstill.recipes.losses import ConstantRamp, CosineRamp, LayerTerm, LinearRamp, LossTerm, SoftTerm, VocabularyTerm
from potstill.recipes.problems import describe
from potstill.recipes.schema import Recipe

KINDS = {get_args(model.model_fields["kind"].annotation)[0]: model for model in get_args(get_args(LossTerm)[0])}
NEEDED = {"alpha_beta": {"alpha": 1.0, "beta": 0.5}}
SHOWS = "Change it or leave it out for the default"
WEIGHT = "Factor of this term in the sum of losses: a number, or one that moves over the training."
RAMP = "a mapping with kind: linear, cosine or constant"


def term(kind: str, **fields: Any) -> Any:
    return TypeAdapter(LossTerm).validate_python({"kind": kind, **NEEDED.get(kind, {}), **fields})


def problem(kind: str, **fields: Any) -> str:
    """The one line about a recipe whose first loss has these fields."""
    recipe = {
        "name": "toy",
        "data": {"source": "words.jsonl"},
        "teacher": {"kind": "local", "model": "big"},
        "student": {"kind": "layers", "count": 3},
        "losses": [{"kind": kind, **NEEDED.get(kind, {}), **fields}],
        "training": {"steps": 3},
    }
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(recipe)
    return describe(caught.value)


SETTINGS = {
    "forward_kl": {},
    "reverse_kl": {},
    "symmetric_kl": {},
    "jsd": {"beta": 0.5},
    "normalised_jsd": {"beta": 0.5},
    "skew_forward_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1},
    "total_variation": {},
    "alpha_beta": {"alpha": 1.0, "beta": 0.5},
    "adaptive_kl": {"mu": 0.5},
    "cross_entropy": {"label_smoothing": 0.0},
}


def test_settings_are_what_a_formula_takes_and_nothing_else() -> None:
    over_vocabulary = {kind for kind, model in KINDS.items() if issubclass(model, VocabularyTerm)}
    assert over_vocabulary == set(SETTINGS)
    for kind, settings in SETTINGS.items():
        assert term(kind, weight=3.0).settings == settings


NEEDS = {
    "cross_entropy": None,
    "hidden_mse": "hidden",
    "hidden_cosine": "hidden",
    "attention_mse": "attention",
    "attention_kl": "attention",
    "minilm": "vectors",
    "minilm_v2": "vectors",
    "rkd_distance": "hidden",
    "rkd_angle": "hidden",
    "gram_mse": "hidden",
    "linear_cka": "hidden",
    "vector_mse": "pooled",
    "vector_cosine": "pooled",
}


def test_what_a_loss_needs_of_a_teacher_is_known_without_building_it() -> None:
    for kind, model in KINDS.items():
        assert term(kind).needs == ("logits" if issubclass(model, SoftTerm) else NEEDS[kind])


def test_a_map_of_layers_is_for_what_has_layers() -> None:
    for kind, model in KINDS.items():
        if issubclass(model, LayerTerm):
            assert [term(kind, layers=given).layers for given in ("even", {1: 2})] == ["even", {1: 2}]
        else:
            assert problem(kind, layers="even").startswith("losses[0].layers: unknown key.")


BEHIND = [
    (("minilm_v2", {"relation_heads": 0}), "losses[0].relation_heads: got 0, needs a number greater than or equal to"),
    (("minilm", {"relation_heads": 12}), "losses[0].relation_heads: unknown key."),
    (("attention_kl", {"heads": "mean"}), "losses[0].heads: got 'mean', needs matched or averaged."),
    (("minilm", {"heads": "averaged"}), "losses[0].heads: unknown key."),
    (("gram_mse", {"over": "text"}), "losses[0].over: got 'text', needs positions or texts. Did you mean texts?"),
    (("hidden_mse", {"over": "texts"}), "losses[0].over: unknown key."),
    (
        ("rkd_angle", {"over": "texts", "layers": {1: 2}}),
        "losses[0].layers: with `over: texts` the vectors of whole texts are compared; leave layers out.",
    ),
]


@pytest.mark.parametrize(("asked", "words"), BEHIND, ids=[words.partition(":")[0] for _, words in BEHIND])
def test_terms_behind_the_answers_refuse_what_is_not_theirs(asked: tuple[str, dict[str, Any]], words: str) -> None:
    kind, fields = asked
    assert problem(kind, **fields).startswith(words)


def test_every_kind_tells_a_user_when_to_choose_it() -> None:
    for model in KINDS.values():
        assert model.__doc__
        assert "\n" not in model.__doc__


INSIDE = [
    ("normalised_jsd", "beta", (0.0, 0.3, 1.0), (-0.1, 1.1)),
    ("jsd", "beta", (1e-6, 0.9), (0.0, 1.0, 1.5)),
    ("skew_forward_kl", "alpha", (0.0, 0.99), (-0.1, 1.0)),
    ("skew_reverse_kl", "alpha", (0.0, 0.99), (-0.1, 1.0)),
    ("adaptive_kl", "mu", (0.01, 0.99), (0.0, 1.0)),
    ("cross_entropy", "label_smoothing", (0.0, 0.99), (-0.1, 1.0)),
    ("alpha_beta", "alpha", (0.0, 3.0), (-0.1,)),
    ("alpha_beta", "beta", (0.0, 3.0), (-0.1,)),
]


@pytest.mark.parametrize(
    ("kind", "key", "good", "bad"), INSIDE, ids=lambda value: value if isinstance(value, str) else ""
)
def test_settings_stay_within_their_range(kind: str, key: str, good: tuple[float, ...], bad: tuple[float, ...]) -> None:
    for value in good:
        assert term(kind, **{key: value}).settings[key] == value
    for value in bad:
        assert problem(kind, **{key: value}).startswith(f"losses[0].{key}: got {value}, needs a number ")
    assert problem(kind, **{key: True}).startswith(f"losses[0].{key}: got true, needs a number.")
    assert problem(kind, **{key: float("nan")}).startswith(f"losses[0].{key}: got nan, needs ")


def test_a_family_without_a_default_asks_for_its_settings() -> None:
    with pytest.raises(ValidationError, match="alpha"):
        TypeAdapter(LossTerm).validate_python({"kind": "alpha_beta"})
    assert problem("alpha_beta", alpha=0, beta=0) == (
        "losses[0]: alpha and beta are both 0, where no token counts; raise one (1 and 0 is forward KL)."
    )


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("jds", "jsd"), ("foward_kl", "forward_kl"), ("normalized_jsd", "normalised_jsd"), ("adaptive", "adaptive_kl"),
     ("alphabeta", "alpha_beta"), ("total_variance", "total_variation"), ("skew_forward", "skew_forward_kl"),
     ("symetric_kl", "symmetric_kl")],
)  # fmt: skip
def test_an_unknown_kind_suggests_the_nearest(typed: str, meant: str) -> None:
    assert problem(typed).endswith(f" kinds; docs/recipes.md lists them). Did you mean {meant}?")


def test_a_setting_of_another_kind_is_refused() -> None:
    assert problem("skew_forward_kl", beta=0.1).startswith("losses[0].beta: unknown key.")
    assert problem("cross_entropy", temperature=2.0).startswith("losses[0].temperature: unknown key.")


@pytest.mark.parametrize(
    ("given", "model"),
    [
        ({"kind": "linear", "start": 0, "end": 1}, LinearRamp),
        ({"kind": "cosine", "start": 2, "end": 0}, CosineRamp),
        ({"kind": "constant", "value": 2}, ConstantRamp),
    ],
    ids=["linear", "cosine", "constant"],
)
def test_every_weight_may_move_and_may_begin_or_end_at_0(given: dict[str, Any], model: type) -> None:
    for kind in KINDS:
        moving = term(kind, weight=given).weight
        assert isinstance(moving, model)
        assert moving.model_dump() == given


def test_a_number_stays_a_number() -> None:
    plain = term("forward_kl", weight=2, temperature=3)
    assert (plain.weight, plain.temperature) == (2.0, 3.0)
    assert type(plain.weight) is type(plain.temperature) is float


RAMPS = [
    ({"weight": 0}, f"losses[0].weight: got 0, needs a number greater than 0 or {RAMP}. {WEIGHT} {SHOWS}, 1.0."),
    ({"weight": []}, f"losses[0].weight: got an empty list, needs a number or {RAMP}. {WEIGHT} {SHOWS}, 1.0."),
    ({"weight": True}, f"losses[0].weight: got true, needs a number or {RAMP}. {WEIGHT} {SHOWS}, 1.0."),
    ({"weight": {}}, "losses[0].weight.kind: missing. Give linear, cosine or constant."),
    (
        {"weight": {"kind": "linaer", "start": 0, "end": 1}},
        "losses[0].weight.kind: got 'linaer', needs linear, cosine or constant. Did you mean linear?",
    ),
    (
        {"weight": {"kind": "linear", "start": 0}},
        "losses[0].weight.end: missing. The number in the last step.",
    ),
    (
        {"weight": {"kind": "linear", "start": 0, "ned": 1}},
        "losses[0].weight.ned: unknown key. Did you mean end?",
    ),
    (
        {"weight": {"kind": "cosine", "start": 0, "end": -1}},
        "losses[0].weight.end: got -1, needs a number greater than or equal to 0. The number in the last step.",
    ),
    (
        {"weight": {"kind": "linear", "start": 0, "end": 0}},
        "losses[0].weight: start and end are both 0, which switches the term off; remove the term, or raise one.",
    ),
    (
        {"weight": {"kind": "constant", "value": 0}},
        "losses[0].weight.value: got 0, needs a number greater than 0. The number.",
    ),
    (
        {"temperature": {"kind": "linear", "start": 2, "end": 0}},
        "losses[0].temperature.end: got 0.0, needs a number greater than 0; 1 softens nothing.",
    ),
]


@pytest.mark.parametrize(("fields", "words"), RAMPS, ids=[words.partition(":")[0] for _, words in RAMPS])
def test_a_ramp_that_cannot_be_is_one_line_in_the_recipes_words(fields: dict[str, Any], words: str) -> None:
    assert problem("forward_kl", **fields) == words
