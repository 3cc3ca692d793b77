"""Distances between hidden states: by hand, blind to padding, and with a projection only where widths differ."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from potstill.losses import HiddenLoss, hidden_cosine, hidden_mse
from potstill.types import IGNORE, Batch, Head, Lesson, Offer, Signal, StudentView

KINDS = ["hidden_mse", "hidden_cosine"]
DISTANCES = {"hidden_mse": hidden_mse, "hidden_cosine": hidden_cosine}

every_kind = pytest.mark.parametrize("kind", KINDS)
some_examples = settings(deadline=None, max_examples=40)


@st.composite
def vector_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    student_MD, teacher_MD = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return student_MD, teacher_MD


def by_hand(kind: str, student: list[float], teacher: list[float]) -> float:
    if kind == "hidden_mse":
        return math.fsum((s - t) ** 2 for s, t in zip(student, teacher, strict=True)) / len(student)
    dot = math.fsum(s * t for s, t in zip(student, teacher, strict=True))
    return 1.0 - dot / (math.hypot(*student) * math.hypot(*teacher))


def gradient_by_hand(kind: str, s_MD: np.ndarray, t_MD: np.ndarray) -> np.ndarray:
    """2 (s - t) / D, and (cos s/|s| - t/|t|) / |s|."""
    if kind == "hidden_mse":
        return 2.0 * (s_MD - t_MD) / s_MD.shape[1]
    size_M1 = np.linalg.norm(s_MD, axis=1, keepdims=True)
    s_unit, t_unit = s_MD / size_M1, t_MD / np.linalg.norm(t_MD, axis=1, keepdims=True)
    return ((s_unit * t_unit).sum(1, keepdims=True) * s_unit - t_unit) / size_M1


@every_kind
@some_examples
@given(vector_pairs())
def test_values_and_gradients_are_those_of_the_formula(kind, pair):
    student_MD, teacher_MD = pair[0].requires_grad_(), pair[1]
    values_M = DISTANCES[kind](student_MD, teacher_MD)
    expected = [by_hand(kind, *rows) for rows in zip(student_MD.tolist(), teacher_MD.tolist(), strict=True)]
    assert_close(values_M.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    (gradient_MD,) = torch.autograd.grad(values_M.sum(), student_MD)
    expected_MD = gradient_by_hand(kind, student_MD.detach().numpy(), teacher_MD.numpy())
    assert_close(gradient_MD, torch.from_numpy(expected_MD), rtol=1e-8, atol=1e-11)


@every_kind
@some_examples
@given(vector_pairs())
def test_zero_at_equality_and_never_below(kind, pair):
    own_M = DISTANCES[kind](pair[0], pair[0])
    assert_close(own_M, torch.zeros_like(own_M), rtol=0.0, atol=1e-14)
    assert (DISTANCES[kind](*pair) >= -1e-14).all()


@every_kind
def test_gradcheck(kind):
    student_MD = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    teacher_MD = torch.randn(4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda rows_MD: DISTANCES[kind](rows_MD, teacher_MD), student_MD)


def test_the_cosine_sees_directions_only():
    student_MD = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    teacher_MD = torch.tensor([[5.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    assert_close(hidden_cosine(student_MD, teacher_MD), torch.tensor([0.0, 1.0, 2.0]))


def test_a_vector_of_zeros_has_no_direction_but_a_finite_distance_and_gradient():
    student_MD = torch.zeros(1, 3, requires_grad=True)
    value_M = hidden_cosine(student_MD, torch.ones(1, 3))
    value_M.sum().backward()
    assert value_M.item() == 1.0
    assert torch.isfinite(student_MD.grad).all()


@every_kind
def test_bfloat16_states_are_compared_in_float32(kind):
    student_MD, teacher_MD = torch.randn(6, 64).bfloat16(), torch.randn(6, 64).bfloat16()
    found_M = DISTANCES[kind](student_MD, teacher_MD)
    assert found_M.dtype is torch.float32
    assert_close(found_M.double(), DISTANCES[kind](student_MD.double(), teacher_MD.double()), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ over a whole lesson

SEGMENTS_BT = torch.tensor([[1, 1, 2, 2, 0], [1, 1, 1, 0, 0]])
ATTENDED = 7


def batch() -> Batch:
    targets_BT = torch.full_like(SEGMENTS_BT, IGNORE)
    return Batch(torch.zeros_like(SEGMENTS_BT), targets_BT, SEGMENTS_BT)


def states(width: int, layers: int = 5, dtype: torch.dtype = torch.float64) -> dict[int, Tensor]:
    return {layer: torch.randn(*SEGMENTS_BT.shape, width).to(dtype).requires_grad_() for layer in range(layers)}


def view_of(hidden: dict[int, Tensor]) -> StudentView:
    return StudentView(torch.zeros(0, 1), Head(torch.zeros(1, 1)), hidden)


def lesson_of(hidden: dict[int, Tensor]) -> Lesson:
    return Lesson(batch(), Signal(hidden={layer: state.detach() for layer, state in hidden.items()}))


@every_kind
def test_the_sum_is_over_attended_positions_and_the_mean_over_layer_pairs(kind):
    student, teacher = states(3), states(3)
    layers = {1: 2, 3: 4, 4: 0}
    result = HiddenLoss(kind, layers, (3, 3), weight=2.5)(view_of(student), lesson_of(teacher))
    expected = 0.0
    for own, other in layers.items():
        for row, column in (SEGMENTS_BT > 0).nonzero().tolist():
            expected += by_hand(kind, student[own][row, column].tolist(), teacher[other][row, column].tolist())
    assert result.terms[kind].item() == pytest.approx(expected / 3)
    assert result.total.item() == pytest.approx(2.5 * expected / 3)
    assert result.count == HiddenLoss(kind, layers, (3, 3)).count(batch()) == ATTENDED
    assert not result.terms[kind].requires_grad


@every_kind
def test_padding_changes_nothing_and_learns_nothing(kind):
    student, teacher = states(3), states(3)
    loss = HiddenLoss(kind, {1: 2}, (3, 3))
    plain = loss(view_of(student), lesson_of(teacher)).total
    padding_BT1 = (SEGMENTS_BT == 0)[..., None]
    noisy = {layer: state.detach().masked_fill(padding_BT1, 1e6) for layer, state in teacher.items()}
    filled = {
        layer: state.detach().masked_fill(padding_BT1, math.nan).requires_grad_() for layer, state in student.items()
    }
    result = loss(view_of(filled), lesson_of(noisy)).total
    result.backward()
    assert torch.equal(result, plain)
    assert torch.equal(filled[1].grad[SEGMENTS_BT == 0], torch.zeros(3, 3, dtype=torch.float64))
    assert (filled[1].grad[SEGMENTS_BT > 0] != 0).any()


@every_kind
def test_only_mapped_layers_learn(kind):
    student = states(3)
    HiddenLoss(kind, {1: 2, 3: 4}, (3, 3))(view_of(student), lesson_of(states(3))).total.backward()
    assert [layer for layer, state in student.items() if state.grad is not None] == [1, 3]


def test_a_mapped_layer_that_was_not_read_is_an_error():
    with pytest.raises(KeyError, match="9"):
        HiddenLoss("hidden_mse", {9: 1}, (3, 3))(view_of(states(3)), lesson_of(states(3)))


def test_equal_widths_need_no_projection():
    assert list(HiddenLoss("hidden_mse", {1: 1, 2: 2}, (3, 3)).parameters()) == []


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths_that_differ_are_projected_and_projection_and_student_both_learn(kind, dtype):
    loss = HiddenLoss(kind, {1: 2, 3: 4}, (3, 5))
    student, teacher = states(3, dtype=dtype), states(5, dtype=dtype)
    result = loss(view_of(student), lesson_of(teacher))
    result.total.backward()
    assert {name: tuple(part.shape) for name, part in loss.named_parameters()} == {
        "projections.1.weight": (5, 3),
        "projections.3.weight": (5, 3),
    }
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in loss.parameters())
    assert all(student[layer].grad.abs().sum() > 0 for layer in (1, 3))
    lifted = {
        layer: state.detach().float() @ loss.projections[str(layer)].weight.T
        for layer, state in student.items()
        if layer in (1, 3)
    }
    plain = HiddenLoss(kind, {1: 2, 3: 4}, (5, 5))(view_of(lifted), lesson_of(teacher))
    assert_close(result.total, plain.total)


@every_kind
def test_a_batch_of_padding_gives_zero_with_a_graph(kind):
    student = states(3)
    empty = Batch(*(torch.zeros(2, 5, dtype=torch.long) for _ in range(3)))
    lesson = Lesson(empty, lesson_of(states(3)).signal)
    result = HiddenLoss(kind, {1: 2}, (3, 3))(view_of(student), lesson)
    result.total.backward()
    assert (result.total.item(), result.count) == (0.0, 0)
    assert torch.equal(student[1].grad, torch.zeros_like(student[1]))


def test_hidden_losses_ask_for_hidden_states():
    assert HiddenLoss("hidden_mse", {1: 1}, (3, 3)).needs == {Offer.HIDDEN}
