"""Matrix products whose results are wide: float32 (float64 for float64), also where bfloat16 units compute them.

Refuses to leave a trace: torch's global settings of precision are afterwards as they were before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast, overload

import torch
from torch import Tensor

from potstill.types import Head

__all__ = ["Arithmetic"]


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How products are computed: always with a wide result; on bfloat16 units where the rows came in bfloat16.

    On a CPU, float32 tensors multiplied in oneDNN's bf16 mode are rounded to bfloat16 on the way in (exact for what
    came in bfloat16) and accumulated in float32. It is as fast as bfloat16 tensors, whose results would be rounded.
    Autocast is kept out: it would round the results too.
    """

    dtype: torch.dtype
    bf16_units: bool

    @staticmethod
    def of(rows_ND: Tensor) -> Arithmetic:
        """The arithmetic for products with these rows."""
        return Arithmetic(torch.promote_types(rows_ND.dtype, torch.float32), rows_ND.dtype is torch.bfloat16)

    @overload
    def widen(self, tensor: Tensor) -> Tensor: ...
    @overload
    def widen(self, tensor: None) -> None: ...
    def widen(self, tensor: Tensor | None) -> Tensor | None:
        """The tensor in the dtype of the results."""
        return None if tensor is None else tensor.to(self.dtype)

    def widen_head(self, head: Head) -> Head:
        """Once a call: exact for a bfloat16 head, and faster than once a chunk."""
        return replace(head, weight_VD=self.widen(head.weight_VD), bias_V=self.widen(head.bias_V))

    def product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """The matrix product, in `out` where it is given."""
        if a.is_cuda and self.bf16_units:
            return torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=self.dtype, out=out)
        with self._units(a.device.type):
            return torch.mm(a, b, out=out)

    def add_product(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """Add the matrix product to `out`."""
        if out.is_cuda and self.bf16_units:
            out += torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=self.dtype)
            return
        with self._units(out.device.type):
            torch.addmm(out, a, b, out=out)

    @contextmanager
    def _units(self, device_type: str) -> Iterator[None]:
        matmul = cast(Any, torch.backends.mkldnn).matmul
        before = matmul.fp32_precision
        change = self.bf16_units and before != "bf16"  # writing back an inherited setting would pin it
        if change:
            matmul.fp32_precision = "bf16"
        try:
            with torch.autocast(device_type, enabled=False):
                yield
        finally:
            if change:
                matmul.fp32_precision = before
