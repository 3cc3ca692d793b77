"""Terms about how positions and texts relate: what they sum, what they count, and that padding is nothing to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from potstill.losses import (
    AttentionLoss,
    PooledLoss,
    SimilarityLoss,
    VectorsLoss,
    attention_kl,
    attention_mse,
    gram_mse,
    hidden_cosine,
    hidden_mse,
    linear_cka,
    minilm,
    minilm_v2,
    rkd_angle,
    rkd_distance,
)
from potstill.types import IGNORE, AttentionVectors, Batch, Lesson, Offer, Signal, StudentView, Wants

B, T, H, E, D = 3, 6, 2, 4, 8
TEXTS_BT = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
PACKED_BT = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0], [1, 2, 2, 2, 3, 3]])
LAYERS = {1: 2, 2: 4}
SIMILARITIES: dict[str, Callable[..., Tensor]] = {
    "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
    "gram_mse": gram_mse,
    "linear_cka": linear_cka,
}

LOSSES: dict[str, Callable[[], Any]] = {
    "attention_mse": lambda: AttentionLoss("attention_mse", LAYERS, causal=False, weight=0.5),
    "attention_kl": lambda: AttentionLoss("attention_kl", LAYERS, causal=False, heads="averaged", weight=0.5),
    "attention_kl causal": lambda: AttentionLoss("attention_kl", LAYERS, causal=True, weight=0.5),
    "minilm": lambda: VectorsLoss("minilm", LAYERS, causal=False, weight=0.5),
    "minilm_v2": lambda: VectorsLoss("minilm_v2", LAYERS, causal=True, relation_heads=4, weight=0.5),
    **{name: lambda name=name: SimilarityLoss(name, LAYERS, weight=0.5) for name in SIMILARITIES},
    **{
        f"{name} of texts": lambda name=name: SimilarityLoss(name, {}, over="texts", weight=0.5)
        for name in SIMILARITIES
    },
    "vector_mse": lambda: PooledLoss("vector_mse", (D, D), 0.5),
    "vector_cosine": lambda: PooledLoss("vector_cosine", (D, D), 0.5),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def batch_of(segments_BT: Tensor) -> Batch:
    return Batch(torch.ones_like(segments_BT), torch.full_like(segments_BT, IGNORE), segments_BT)


def insides(seed: int, segments_BT: Tensor, width: int = D, heads: int = H) -> dict[str, Any]:
    """All that may lie behind a model's answers, in float64; attention maps are 0 where nobody may look."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, length = segments_BT.shape
    seen_B1TT = (segments_BT[:, :, None] == segments_BT[:, None, :]).unsqueeze(1)
    layers = range(1, 5)
    return {
        "hidden": {layer: draw(rows, length, width) for layer in (0, *layers)},
        "attentions": {
            layer: draw(rows, heads, length, length).masked_fill(~seen_B1TT, -math.inf).softmax(-1) for layer in layers
        },
        "vectors": {
            layer: AttentionVectors(*(draw(rows, heads, length, width // heads) for _ in range(3))) for layer in layers
        },
        "pooled_BD": draw(rows, width),
    }


def mapped(parts: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The same with every tensor changed."""
    return {
        "hidden": {layer: change(state) for layer, state in parts["hidden"].items()},
        "attentions": {layer: change(maps) for layer, maps in parts["attentions"].items()},
        "vectors": {
            layer: AttentionVectors(*(change(getattr(one, name)) for name in one.__dataclass_fields__))
            for layer, one in parts["vectors"].items()
        },
        "pooled_BD": change(parts["pooled_BD"]),
    }


def tensors_of(parts: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(parts, lambda tensor: found.append(tensor) or tensor)
    return found


def ask(loss: Any, student: dict[str, Any], teacher: dict[str, Any], batch: Batch) -> tuple[Any, list[Tensor | None]]:
    """The loss, and the gradients of all that the student gave."""
    student = mapped(student, lambda tensor: tensor.detach().clone().requires_grad_())
    result = loss(StudentView(torch.zeros(0, 1), None, **student), Lesson(batch, Signal(None, **teacher)))
    result.total.backward()
    return result, [tensor.grad for tensor in tensors_of(student)]


def unpad(parts: dict[str, Any], row: int, length: int) -> dict[str, Any]:
    """One row without its padding."""

    def cut(tensor: Tensor) -> Tensor:
        one = tensor[row : row + 1]
        if one.ndim == 2:
            return one
        return one[:, :length] if one.ndim == 3 else one[:, :, :length, : length if one.shape[-1] == T else None]

    return mapped(parts, cut)


@every_loss
@pytest.mark.parametrize("segments_BT", [TEXTS_BT, PACKED_BT], ids=["texts", "packed"])
def test_what_stands_at_padding_changes_nothing_and_learns_nothing(name, segments_BT):
    loss, batch = LOSSES[name](), batch_of(segments_BT)
    student, teacher = insides(1, segments_BT), insides(2, segments_BT)
    padding_BT = segments_BT == 0

    def spoil(tensor: Tensor) -> Tensor:
        if tensor.ndim == 2:
            return tensor
        where_BT1 = padding_BT[:, :, None]
        if tensor.ndim == 3:
            return tensor.masked_fill(where_BT1, math.nan)
        keys = tensor.shape[-1] == T
        where = where_BT1[:, None] | padding_BT[:, None, None, :] if keys else where_BT1[:, None]
        return tensor.masked_fill(where, math.nan)

    one, gradients = ask(loss, student, teacher, batch)
    other, spoiled = ask(loss, mapped(student, spoil), mapped(teacher, spoil), batch)
    assert torch.equal(one.total, other.total)
    assert one.count == other.count == loss.count(batch)
    for left, right in zip(gradients, spoiled, strict=True):
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right)


@pytest.mark.parametrize("name", [name for name in LOSSES if not name.endswith("texts")])
def test_padded_texts_are_what_they_are_alone(name):
    loss = LOSSES[name]()
    student, teacher = insides(3, TEXTS_BT), insides(4, TEXTS_BT)
    whole, gradients = ask(loss, student, teacher, batch_of(TEXTS_BT))
    total, count = 0.0, 0
    for row, length in enumerate((TEXTS_BT > 0).sum(1).tolist()):
        parts = [unpad(side, row, length) for side in (student, teacher)]
        alone, own = ask(loss, *parts, batch_of(TEXTS_BT[row : row + 1, :length]))
        total, count = total + alone.total, count + alone.count
        whole_parts = unpad_gradients(student, gradients, row, length)
        for left, right in zip(whole_parts, own, strict=True):
            assert (left is None) == (right is None)
            if left is not None:
                assert_close(left, right, rtol=1e-9, atol=1e-12)
    assert_close(whole.total, total, rtol=1e-9, atol=1e-12)
    assert whole.count == count


def unpad_gradients(like: dict[str, Any], gradients: list[Tensor | None], row: int, length: int) -> list[Tensor | None]:
    numbered = iter(gradients)
    known = mapped(like, lambda tensor: torch.zeros_like(tensor) if (g := next(numbered)) is None else g)
    cut = tensors_of(unpad(known, row, length))
    return [None if gradient is None else part for gradient, part in zip(gradients, cut, strict=True)]


@every_loss
def test_zero_at_equality_and_a_total_that_is_the_weighted_term(name):
    loss, student = LOSSES[name](), insides(5, PACKED_BT)
    same = {
        part: {its: student[part][own] for own, its in LAYERS.items()} for part in ("hidden", "attentions", "vectors")
    }
    same["pooled_BD"] = student["pooled_BD"]
    assert abs(ask(loss, student, same, batch_of(PACKED_BT))[0].total.item()) < 1e-9
    result, gradients = ask(loss, student, insides(6, PACKED_BT), batch_of(PACKED_BT))
    assert set(result.terms) == {loss.kind}
    assert_close(result.total.detach(), 0.5 * result.terms[loss.kind])
    assert result.terms[loss.kind].item() > 0.0
    assert not result.terms[loss.kind].requires_grad
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@every_loss
def test_a_batch_of_padding_gives_zero_with_a_graph(name):
    loss, empty = LOSSES[name](), batch_of(torch.zeros_like(TEXTS_BT)).rows(0, 0 if "vector" in name else 3)
    if "texts" in name or "vector" in name:
        empty = empty.rows(0, 0)
    student, teacher = (insides(seed, empty.segments_BT) for seed in (7, 8))
    result, _ = ask(loss, *(mapped(side, lambda t: t.nan_to_num(0.5)) for side in (student, teacher)), empty)
    assert (result.total.item(), result.count) == (0.0, 0)


@every_loss
def test_what_is_wanted_is_what_is_needed_and_no_more(name):
    loss = LOSSES[name]()
    own, its = loss.wants()
    parts = {
        Offer.HIDDEN: (own.layers, its.layers),
        Offer.ATTENTION: (own.attentions, its.attentions),
        Offer.VECTORS: (own.vectors, its.vectors),
        Offer.POOLED: (own.pooled, its.pooled),
    }
    (need,) = loss.needs
    expected = (True, True) if need is Offer.POOLED else ((1, 2), (2, 4))
    assert parts.pop(need) == expected
    assert not any(part for pair in parts.values() for part in pair)
    assert isinstance(own, Wants)
    assert (own.final, its.final) == (False, False)


def test_over_positions_each_mapped_pair_counts_alike_and_the_formulas_are_those_of_relation():
    student, teacher, batch = insides(9, PACKED_BT), insides(10, PACKED_BT), batch_of(PACKED_BT)
    formulas = {
        "attention_mse": (attention_mse, "attentions", {"causal": False}),
        "attention_kl": (attention_kl, "attentions", {"causal": False, "heads": "averaged"}),
        "attention_kl causal": (attention_kl, "attentions", {"causal": True}),
        "minilm": (minilm, "vectors", {"causal": False}),
        "minilm_v2": (minilm_v2, "vectors", {"causal": True, "relation_heads": 4}),
        **{name: (measure, "hidden", {}) for name, measure in SIMILARITIES.items()},
    }
    for name, (measure, part, options) in formulas.items():
        found, _ = ask(LOSSES[name](), student, teacher, batch)
        values = [
            measure(student[part][own], teacher[part][its], PACKED_BT, **options).sum() for own, its in LAYERS.items()
        ]
        assert_close(found.terms[name.split()[0]], torch.stack(values).mean())


def test_positions_are_counted_and_documents_for_cka():
    batch = batch_of(PACKED_BT)
    for name in ("attention_mse", "minilm", "rkd_distance", "gram_mse"):
        assert LOSSES[name]().count(batch) == 5 + 4 + 6
    assert LOSSES["linear_cka"]().count(batch) == 2 + 1 + 3
    assert linear_cka(*(insides(seed, PACKED_BT)["hidden"][1] for seed in (1, 2)), PACKED_BT).shape == (6,)


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_texts_of_a_batch_are_one_set_of_points(kind):
    student, teacher, batch = insides(11, TEXTS_BT), insides(12, TEXTS_BT), batch_of(TEXTS_BT)
    loss = SimilarityLoss(kind, {}, over="texts")
    found, _ = ask(loss, student, teacher, batch)
    points = [side["pooled_BD"].unsqueeze(0) for side in (student, teacher)]
    assert_close(found.total.detach(), SIMILARITIES[kind](*points, torch.ones(1, B).long()).sum())
    assert found.count == loss.count(batch) == (1 if kind == "linear_cka" else B)
    turned, _ = ask(loss, student, {**teacher, "pooled_BD": 3 * student["pooled_BD"].roll(1, -1)}, batch)
    assert abs(turned.total.item()) < 1e-9, "no turning of the axes and no scale matters"
    longer = replace(batch, segments_BT=functional.pad(batch.segments_BT, (0, 4)))
    assert torch.equal(ask(loss, student, teacher, longer)[0].total, found.total)
    assert ask(loss, mapped(student, lambda t: t[:1]), mapped(teacher, lambda t: t[:1]), batch.rows(0, 1))[0].total == 0


def test_vectors_of_texts_are_compared_one_by_one():
    student, teacher, batch = insides(13, TEXTS_BT), insides(14, TEXTS_BT), batch_of(TEXTS_BT)
    for kind, distance in (("vector_mse", hidden_mse), ("vector_cosine", hidden_cosine)):
        loss = PooledLoss(kind, (D, D))
        found, _ = ask(loss, student, teacher, batch)
        assert_close(found.total.detach(), distance(student["pooled_BD"], teacher["pooled_BD"]).sum())
        assert found.count == loss.count(batch) == B
        assert list(loss.parameters()) == []


@pytest.mark.parametrize("kind", ["vector_mse", "vector_cosine"])
def test_vectors_of_another_width_are_projected_and_the_projection_learns(kind):
    torch.manual_seed(0)
    loss = PooledLoss(kind, (D, 2 * D)).double()
    student, teacher = insides(15, TEXTS_BT), insides(16, TEXTS_BT, width=2 * D)
    found, _ = ask(loss, student, teacher, batch_of(TEXTS_BT))
    assert {name: tuple(part.shape) for name, part in loss.named_parameters()} == {"projection.weight": (2 * D, D)}
    assert loss.projection.weight.grad.abs().sum() > 0
    lifted = {**student, "pooled_BD": student["pooled_BD"] @ loss.projection.weight.detach().T}
    assert_close(ask(PooledLoss(kind, (2, 2)), lifted, teacher, batch_of(TEXTS_BT))[0].total, found.total)


@pytest.mark.parametrize("name", ["vector_mse", "gram_mse of texts"])
def test_missing_vectors_are_told(name):
    student, teacher, batch = insides(17, TEXTS_BT), insides(18, TEXTS_BT), batch_of(TEXTS_BT)
    with pytest.raises(
        ValueError, match=r"the teacher's vectors of texts: got none, needs \[3, D\], one a row\. Read them"
    ):
        ask(LOSSES[name](), student, {**teacher, "pooled_BD": None}, batch)
    with pytest.raises(ValueError, match=r"the student's vectors of texts: got \(2, 8\), needs \[3, D\]"):
        ask(LOSSES[name](), {**student, "pooled_BD": student["pooled_BD"][:2]}, teacher, batch)


@pytest.mark.parametrize("name", ["attention_mse", "minilm", "gram_mse"])
def test_a_mapped_layer_that_was_not_read_is_an_error(name):
    student, teacher = insides(19, TEXTS_BT), insides(20, TEXTS_BT)
    for part in ("hidden", "attentions", "vectors"):
        teacher[part].pop(4)
    with pytest.raises(KeyError, match="4"):
        ask(LOSSES[name](), student, teacher, batch_of(TEXTS_BT))


def test_heads_that_do_not_fit_and_widths_that_do():
    student, teacher, batch = insides(21, TEXTS_BT), insides(22, TEXTS_BT, width=16, heads=4), batch_of(TEXTS_BT)
    for name in ("attention_mse", "minilm"):
        with pytest.raises(ValueError, match="the student has 2 heads and the teacher 4"):
            ask(LOSSES[name](), student, teacher, batch)
    for name in ("attention_kl", "minilm_v2", "linear_cka", "rkd_angle"):
        assert ask(LOSSES[name](), student, teacher, batch)[0].total > 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: AttentionLoss("attention_kl", {0: 1}, causal=False),
            r"attention_kl: got the layers \{0: 1\}, needs blocks",
        ),
        (lambda: VectorsLoss("minilm", {1: 0}, causal=False), "begin with 1"),
        (lambda: AttentionLoss("attention_kl", {}, causal=False), "needs blocks"),
        (lambda: VectorsLoss("minilm_v2", {1: 1}, causal=False), "minilm_v2 needs a number"),
        (lambda: VectorsLoss("minilm", {1: 1}, causal=False, relation_heads=2), "minilm takes none"),
        (lambda: SimilarityLoss("gram_mse", {}), "needs some for positions"),
        (lambda: SimilarityLoss("gram_mse", {1: 1}, over="texts"), "none for texts"),
    ],
)
def test_layers_and_heads_that_make_no_sense_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
