"""Products with wide results, on whatever units."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from potstill.losses import arithmetic as module
from potstill.losses.arithmetic import Arithmetic, slices

WIDE = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float32}
WIDE |= {torch.float64: torch.float64}

every_dtype = pytest.mark.parametrize("dtype", list(WIDE))
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@every_device
@every_dtype
@pytest.mark.parametrize("weight_dtype", list(WIDE))
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_of_narrow_numbers_are_exact_to_float32(dtype, weight_dtype, autocast, device):
    rows_nD, weight_VD = (torch.randn(size, 64, device=device).bfloat16() for size in (9, 7))
    arithmetic = Arithmetic.of(rows_nD.to(dtype))
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        found = arithmetic.logits(rows_nD.to(dtype), arithmetic.prepare(weight_VD.to(weight_dtype)))
    assert found.dtype is WIDE[dtype]
    assert_close(found.double(), rows_nD.double() @ weight_VD.double().T, rtol=1e-5, atol=1e-5)


@every_device
@every_dtype
def test_logits_go_where_they_are_asked_to(dtype, device):
    rows_nD, weight_VD = (torch.randn(size, 64, device=device).to(dtype) for size in (9, 7))
    arithmetic, out = Arithmetic.of(rows_nD), torch.empty(9, 7, dtype=WIDE[dtype], device=device)
    weight_VD = arithmetic.prepare(weight_VD)
    assert arithmetic.logits(rows_nD, weight_VD, out).data_ptr() == out.data_ptr()
    assert torch.equal(out, arithmetic.logits(rows_nD, weight_VD))


@every_device
@every_dtype
def test_gradients_are_those_of_the_product(dtype, device):
    gradient_nV = torch.randn(9, 33, device=device).bfloat16()
    rows_nD, weight_VD = (torch.randn(size, 5, device=device).bfloat16() for size in (9, 33))
    arithmetic = Arithmetic.of(rows_nD.to(dtype))
    narrow_nV, operand_VD = gradient_nV.to(arithmetic.narrow), weight_VD.to(arithmetic.narrow)
    found = arithmetic.rows_gradient(narrow_nV, operand_VD)
    rounding = 2**-8 if found.dtype is torch.bfloat16 else 1e-5
    assert_close(found.double(), gradient_nV.double() @ weight_VD.double(), rtol=rounding, atol=1e-5)
    out_VD = torch.ones(33, 5, dtype=arithmetic.wide, device=device)
    own_nV = gradient_nV.to(arithmetic.wide if arithmetic.in_place else arithmetic.narrow)
    for add in (False, True):
        arithmetic.head_gradient(own_nV, rows_nD.to(dtype), out_VD, add=add)
        expected_VD = (1 + add) * gradient_nV.double().T @ rows_nD.double()
        assert_close(out_VD.double(), expected_VD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_a_narrow_head_is_widened_part_by_part_with_the_same_result(monkeypatch, rows):
    rows_nD, weight_VD = torch.randn(4, 16).bfloat16(), torch.randn(33, 16).bfloat16()
    arithmetic = Arithmetic.of(rows_nD)
    whole = arithmetic.logits(rows_nD, arithmetic.widen(weight_VD))
    monkeypatch.setitem(module.SLAB_BYTES, "cpu", rows * 16 * 4)
    assert_close(arithmetic.logits(rows_nD, arithmetic.prepare(weight_VD)), whole, rtol=1e-6, atol=1e-6)


def test_a_narrow_head_is_never_copied_whole(monkeypatch, watch):
    monkeypatch.setitem(module.SLAB_BYTES, "cpu", 100 * 16 * 4)
    rows_nD, weight_VD = torch.randn(4, 16).bfloat16(), torch.randn(1000, 16).bfloat16()
    arithmetic, out = Arithmetic.of(rows_nD), torch.empty(4, 1000)
    with watch:
        arithmetic.logits(rows_nD, arithmetic.prepare(weight_VD), out)
    assert watch.largest <= max(100 * 16, out.numel())


def test_without_bfloat16_units_everything_is_widened(monkeypatch):
    monkeypatch.setattr(module, "_has_bf16_units", lambda device_type: False)
    arithmetic = Arithmetic.of(torch.zeros(1, 2).bfloat16())
    assert (arithmetic.wide, arithmetic.narrow, arithmetic.in_place) == (torch.float32, torch.float32, True)
    assert arithmetic.prepare(torch.zeros(3, 2).bfloat16()).dtype is torch.float32


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(0, 50), st.integers(0, 500))
def test_slices_cover_everything_once_within_the_budget_and_evenly(count, row_bytes, budget):
    found = list(slices(count, row_bytes, budget))
    sizes = [piece.stop - piece.start for piece in found]
    assert [row for piece in found for row in range(count)[piece]] == list(range(count))
    assert max(sizes) * row_bytes <= max(budget, row_bytes)
    assert max(sizes) - min(sizes) <= 1
