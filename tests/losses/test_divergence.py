"""Divergences against formulas written a second time in plain Python floats, and against their closed gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from potstill.losses import cross_entropy, forward_kl, reverse_kl

Divergence = Callable[..., Tensor]
DIVERGENCES: list[Divergence] = [forward_kl, reverse_kl]
TEMPERATURES = [0.5, 1.0, 2.0, 7.0]

some_examples = settings(deadline=None, max_examples=40)

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda function: function.__name__)


def log_softmax(row: list[float], temperature: float) -> list[float]:
    scaled = [value / temperature for value in row]
    top = max(scaled)
    log_total = top + math.log(math.fsum(math.exp(value - top) for value in scaled))
    return [value - log_total for value in scaled]


def kl(log_a: list[float], log_b: list[float]) -> float:
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_a, log_b, strict=True))


def value_by_hand(divergence: Divergence, student: list[float], teacher: list[float], temperature: float) -> float:
    log_q, log_p = log_softmax(student, temperature), log_softmax(teacher, temperature)
    return kl(log_p, log_q) if divergence is forward_kl else kl(log_q, log_p)


def gradient_by_hand(divergence: Divergence, student: list[float], teacher: list[float], temperature: float):
    """(a_j - q_j sum a) / T, where a = -p for the forward and q log(q / p) for the reverse KL."""
    log_q, log_p = log_softmax(student, temperature), log_softmax(teacher, temperature)
    if divergence is forward_kl:
        a = [-math.exp(value) for value in log_p]
    else:
        a = [math.exp(q) * (q - p) for q, p in zip(log_q, log_p, strict=True)]
    total = math.fsum(a)
    return [(value - math.exp(q) * total) / temperature for value, q in zip(a, log_q, strict=True)]


@st.composite
def logit_pairs(draw: st.DrawFn, largest: float = 20.0) -> tuple[Tensor, Tensor]:
    rows, vocabulary = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    number = st.floats(-largest, largest, allow_nan=False)
    row = st.lists(number, min_size=vocabulary, max_size=vocabulary)
    pair = [draw(st.lists(row, min_size=rows, max_size=rows)) for _ in range(2)]
    return torch.tensor(pair[0], dtype=torch.float64), torch.tensor(pair[1], dtype=torch.float64)


def random_pair(rows: int = 3, vocabulary: int = 11) -> tuple[Tensor, Tensor]:
    student_NV = 3 * torch.randn(rows, vocabulary, dtype=torch.float64)
    return student_NV.requires_grad_(), 3 * torch.randn(rows, vocabulary, dtype=torch.float64)


@every_divergence
@some_examples
@given(logit_pairs(), st.sampled_from(TEMPERATURES))
def test_values_are_those_of_the_formula(divergence, pair, temperature):
    student_NV, teacher_NV = pair
    by_hand = [
        value_by_hand(divergence, *rows, temperature)
        for rows in zip(student_NV.tolist(), teacher_NV.tolist(), strict=True)
    ]
    expected_N = torch.tensor(by_hand, dtype=torch.float64)
    assert_close(divergence(student_NV, teacher_NV, temperature), expected_N, rtol=1e-10, atol=1e-12)


@every_divergence
@some_examples
@given(logit_pairs(), st.sampled_from(TEMPERATURES))
def test_the_gradient_is_the_closed_form(divergence, pair, temperature):
    student_NV, teacher_NV = pair[0].requires_grad_(), pair[1]
    (gradient_NV,) = torch.autograd.grad(divergence(student_NV, teacher_NV, temperature).sum(), student_NV)
    by_hand = [
        gradient_by_hand(divergence, *rows, temperature)
        for rows in zip(student_NV.tolist(), teacher_NV.tolist(), strict=True)
    ]
    assert_close(gradient_NV, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-9, atol=1e-11)


@every_divergence
@some_examples
@given(logit_pairs(), st.sampled_from(TEMPERATURES))
def test_never_below_zero(divergence, pair, temperature):
    assert (divergence(*pair, temperature) >= -1e-13).all()


@every_divergence
@some_examples
@given(logit_pairs(), st.sampled_from(TEMPERATURES), st.floats(-50, 50))
def test_zero_where_the_distributions_agree(divergence, pair, temperature, shift):
    logits_NV = pair[0]
    assert torch.equal(divergence(logits_NV, logits_NV, temperature), torch.zeros(len(logits_NV), dtype=torch.float64))
    shifted_N = divergence(logits_NV + shift, logits_NV, temperature)
    assert_close(shifted_N, torch.zeros_like(shifted_N), rtol=0.0, atol=1e-12)


@every_divergence
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradcheck(divergence, temperature):
    student_NV, teacher_NV = random_pair()
    assert torch.autograd.gradcheck(lambda logits_NV: divergence(logits_NV, teacher_NV, temperature), student_NV)


@every_divergence
def test_a_temperature_divides_the_logits_of_both_sides(divergence):
    student_NV, teacher_NV = random_pair()
    assert_close(divergence(student_NV, teacher_NV, 3.0), divergence(student_NV / 3.0, teacher_NV / 3.0))


def test_the_two_directions_mirror_each_other_and_are_not_the_same():
    student_NV, teacher_NV = random_pair()
    assert_close(reverse_kl(student_NV, teacher_NV), forward_kl(teacher_NV, student_NV))
    assert not torch.allclose(reverse_kl(student_NV, teacher_NV), forward_kl(student_NV, teacher_NV))


@every_divergence
@some_examples
@given(st.lists(st.booleans(), min_size=3, max_size=3))
def test_leaving_rows_out_changes_no_other_row(divergence, kept):
    student_NV, teacher_NV = random_pair()
    kept_N = torch.tensor(kept)
    assert torch.equal(divergence(student_NV, teacher_NV)[kept_N], divergence(student_NV[kept_N], teacher_NV[kept_N]))


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_ids_change_neither_value_nor_gradient(divergence, dtype):
    student_NV, teacher_NV = (logits_NV.detach().to(dtype) for logits_NV in random_pair())
    pads_NV = torch.full((len(student_NV), 3), -math.inf, dtype=dtype)
    plain_NV, padded_NV = student_NV.clone().requires_grad_(), torch.cat([student_NV, pads_NV], -1).requires_grad_()
    plain_N = divergence(plain_NV, teacher_NV, 2.0)
    padded_N = divergence(padded_NV, torch.cat([teacher_NV, pads_NV], -1), 2.0)
    plain_N.sum().backward()
    padded_N.sum().backward()
    assert_close(padded_N, plain_N)
    assert_close(padded_NV.grad[:, :-3], plain_NV.grad)
    assert torch.equal(padded_NV.grad[:, -3:], torch.zeros_like(pads_NV))


def test_what_the_teacher_rules_out_costs_nothing_forward_and_everything_backward():
    teacher_NV = torch.tensor([[0.0, -math.inf]])
    student_NV = torch.zeros(1, 2, requires_grad=True)
    value_N = forward_kl(student_NV, teacher_NV)
    value_N.sum().backward()
    assert_close(value_N.detach(), torch.tensor([math.log(2)]))
    assert_close(student_NV.grad, torch.tensor([[-0.5, 0.5]]))
    assert reverse_kl(student_NV, teacher_NV).item() == math.inf


@every_divergence
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits_stay_finite_and_right(divergence, size):
    student_NV = torch.tensor([[size, 0.0, 1.0], [0.0, size, 2.0]], requires_grad=True)
    teacher_NV = torch.tensor([[0.0, size, 1.0], [0.0, size, 2.0]])
    values_N = divergence(student_NV, teacher_NV)
    values_N.sum().backward()
    first = value_by_hand(divergence, student_NV[0].tolist(), teacher_NV[0].tolist(), 1.0)
    assert_close(values_N.detach(), torch.tensor([first, 0.0]), rtol=1e-5, atol=1e-5)
    assert torch.isfinite(student_NV.grad).all()


@some_examples
@given(logit_pairs(), st.data())
def test_cross_entropy_is_minus_the_log_probability_of_the_token_that_came(pair, data):
    logits_NV = pair[0].requires_grad_()
    rows, vocabulary = logits_NV.shape
    targets = data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=rows, max_size=rows))
    targets_N = torch.tensor(targets)
    values_N = cross_entropy(logits_NV, targets_N)
    by_hand = [-log_softmax(row, 1.0)[target] for row, target in zip(logits_NV.tolist(), targets, strict=True)]
    assert_close(values_N.detach(), torch.tensor(by_hand, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    (gradient_NV,) = torch.autograd.grad(values_N.sum(), logits_NV)
    probabilities_NV = torch.tensor([[math.exp(v) for v in log_softmax(row, 1.0)] for row in logits_NV.tolist()])
    expected_NV = probabilities_NV.double() - torch.nn.functional.one_hot(targets_N, vocabulary)
    assert_close(gradient_NV, expected_NV, rtol=1e-6, atol=1e-6)


def test_cross_entropy_gradcheck():
    logits_NV, _ = random_pair()
    targets_N = torch.randint(0, 11, (3,))
    assert torch.autograd.gradcheck(lambda rows_NV: cross_entropy(rows_NV, targets_N), logits_NV)


def test_cross_entropy_bears_padding_ids_and_large_logits():
    logits_NV = torch.tensor([[1e4, 0.0, -math.inf], [0.0, -1e4, -math.inf]], requires_grad=True)
    values_N = cross_entropy(logits_NV, torch.tensor([1, 0]))
    values_N.sum().backward()
    assert_close(values_N.detach(), torch.tensor([1e4, 0.0]))
    assert_close(logits_NV.grad, torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]))


def test_cross_entropy_refuses_a_token_beyond_the_vocabulary():
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        cross_entropy(torch.zeros(1, 4), torch.tensor([4]))
