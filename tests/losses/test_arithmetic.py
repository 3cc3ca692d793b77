"""Products with wide results, on whatever units."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from potstill.losses.arithmetic import Arithmetic
from potstill.types import Head

WIDE = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float32}
WIDE |= {torch.float64: torch.float64}

every_dtype = pytest.mark.parametrize("dtype", list(WIDE))


@every_dtype
@pytest.mark.parametrize("autocast", [False, True])
def test_products_of_narrow_numbers_are_exact_to_float32(dtype, autocast):
    a, b = torch.randn(9, 64).to(dtype), torch.randn(64, 7).to(dtype)
    arithmetic = Arithmetic.of(a)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = arithmetic.product(arithmetic.widen(a), arithmetic.widen(b))
    assert found.dtype is WIDE[dtype]
    assert_close(found.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@every_dtype
def test_products_go_where_they_are_asked_to_or_are_added_there(dtype):
    a, b = torch.randn(9, 64).to(dtype), torch.randn(64, 7).to(dtype)
    arithmetic = Arithmetic.of(a)
    wide = arithmetic.widen(a), arithmetic.widen(b)
    out = torch.empty(9, 7, dtype=WIDE[dtype])
    assert arithmetic.product(*wide, out).data_ptr() == out.data_ptr()
    arithmetic.add_product(out, *wide)
    assert_close(out, 2 * arithmetic.product(*wide))


def test_a_head_is_widened_whole_and_nothing_else_of_it_changes():
    head = Head(torch.ones(3, 2).bfloat16(), torch.ones(3).bfloat16(), 0.5, 30.0)
    wide = Arithmetic.of(torch.zeros(1, 2).bfloat16()).widen_head(head)
    assert (wide.weight_VD.dtype, wide.bias_V.dtype) == (torch.float32, torch.float32)
    assert (wide.scale, wide.softcap) == (0.5, 30.0)
    assert Arithmetic.of(torch.zeros(1, 2)).widen_head(Head(torch.ones(3, 2))).bias_V is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gpu_s_products_are_as_wide(dtype):
    a, b = torch.randn(9, 64, device="cuda").to(dtype), torch.randn(64, 7, device="cuda").to(dtype)
    arithmetic, out = Arithmetic.of(a), torch.zeros(9, 7, device="cuda")
    exact = a.double() @ b.double()
    assert_close(
        arithmetic.product(arithmetic.widen(a), arithmetic.widen(b), out).double(), exact, rtol=1e-4, atol=1e-4
    )
    arithmetic.add_product(out, arithmetic.widen(a), arithmetic.widen(b))
    assert_close(out.double(), 2 * exact, rtol=1e-4, atol=1e-4)
