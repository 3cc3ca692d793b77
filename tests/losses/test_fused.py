"""The forms that compile well against the definitions, in values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from potstill.losses import DIVERGENCES
from potstill.losses.fused import FUSED

NAMES = {"jsd": "beta", "normalised_jsd": "beta", "skew_forward_kl": "alpha", "skew_reverse_kl": "alpha"}

every_form = pytest.mark.parametrize("kind", list(FUSED))


def value_and_gradient(function: Any, student_NV: Tensor, teacher_NV: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    student_NV = student_NV.clone().requires_grad_()
    values_N = function(student_NV, teacher_NV, **more)
    return values_N.detach(), torch.autograd.grad(values_N.sum(), student_NV)[0]


def test_every_form_has_a_definition():
    assert NAMES.keys() == FUSED.keys() <= DIVERGENCES.keys()


@every_form
@settings(deadline=None, max_examples=40)
@given(
    st.floats(0.001, 0.999),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=1, max_size=8),
)
def test_a_form_is_its_definition(kind, weight, temperature, pairs):
    student_NV, teacher_NV = torch.tensor(pairs, dtype=torch.float64).T[:, None]
    more = {"temperature": temperature, NAMES[kind]: weight}
    found, expected = (
        value_and_gradient(table[kind], student_NV, teacher_NV, **more) for table in (FUSED, DIVERGENCES)
    )
    assert_close(found, expected, rtol=1e-9, atol=1e-11)


@every_form
@pytest.mark.parametrize("weight", [0.0, 1e-300, 1e-9, 0.04])
def test_for_small_weights_the_definition_itself_is_used(kind, weight):
    student_NV, teacher_NV = torch.randn(2, 3, 7, dtype=torch.float64)
    more = {NAMES[kind]: weight}
    found, expected = (
        value_and_gradient(table[kind], student_NV, teacher_NV, **more) for table in (FUSED, DIVERGENCES)
    )
    assert_close(found, expected, rtol=1e-12, atol=0.0)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_equality_value_and_gradient_are_zero(kind, dtype):
    logits_NV = 5 * torch.randn(4, 9, dtype=dtype)
    values_N, gradient_NV = value_and_gradient(FUSED[kind], logits_NV, logits_NV)
    assert torch.equal(values_N, torch.zeros_like(values_N))
    assert_close(gradient_NV, torch.zeros_like(gradient_NV), rtol=0.0, atol=1e-6 if dtype is torch.float32 else 1e-14)


@every_form
def test_extreme_logits_and_padding_stay_finite_and_right(kind):
    student_NV = torch.tensor([[1e4, 0.0, -1e4, -math.inf], [0.0, 1e4, 3.0, -math.inf], [-math.inf, 1.0, 2.0, 3.0]])
    teacher_NV = torch.tensor([[-1e4, 0.0, 1e4, -math.inf], [0.0, 1e4, 3.0, -math.inf], [0.0, -math.inf, 2.0, 3.0]])
    found, expected = (value_and_gradient(table[kind], student_NV, teacher_NV) for table in (FUSED, DIVERGENCES))
    assert all(torch.isfinite(part).all() for part in found)
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


@every_form
@pytest.mark.parametrize("weight", [0.001, 0.011, 0.1, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("gap", [0.02, 1.0, 20.0])
def test_float32_gradients_are_right_however_near_the_sides_and_however_small_a_share(kind, weight, gap):
    teacher_NV = 3 * torch.randn(16, 3000)
    student_NV = teacher_NV + gap * torch.randn(16, 3000)
    found = value_and_gradient(FUSED[kind], student_NV, teacher_NV, **{NAMES[kind]: weight})[1]
    exact = value_and_gradient(DIVERGENCES[kind], student_NV.double(), teacher_NV.double(), **{NAMES[kind]: weight})[1]
    assert float((found - exact).norm() / exact.norm()) < 2e-3
