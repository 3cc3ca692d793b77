"""Matrix products with wide results: float32 (float64 for float64), also where bfloat16 units compute them.

Refuses to leave a trace: torch's global settings of precision are afterwards as they were before.

Suffixes: n rows of one chunk, V vocabulary, D width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast, overload

import torch
from torch import Tensor

__all__ = ["Arithmetic", "slices"]

SLAB_BYTES = {"cpu": 14 << 20, "cuda": 256 << 20}
"""Part of a bfloat16 head that is widened at once on a CPU, or of its gradient that is added at once on a GPU.

A whole wide copy would double the memory of a loss; smaller parts cost more calls than they save."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How products with some rows are computed: `wide` results; operands rounded to `narrow` where that is faster.

    Rows in bfloat16 mean bfloat16 units. Their results must not be rounded before the softmax. On a GPU, torch.mm has
    `out_dtype` for that. On a CPU, float32 tensors multiplied in oneDNN's bf16 mode are rounded on the way in (exact
    for what came in bfloat16) and accumulated in float32. Autocast is kept out: it would round the results too.
    """

    wide: torch.dtype
    narrow: torch.dtype
    device_type: str

    @staticmethod
    def of(rows_ND: Tensor) -> Arithmetic:
        """The arithmetic for products with these rows."""
        wide, kind = torch.promote_types(rows_ND.dtype, torch.float32), rows_ND.device.type
        narrow = torch.bfloat16 if rows_ND.dtype is torch.bfloat16 and _has_bf16_units(kind) else wide
        return Arithmetic(wide, narrow, kind)

    @property
    def in_place(self) -> bool:
        """Whether a product below wants the wide gradient, which then overwrites the logits it belongs to."""
        return self.narrow is self.wide or self.device_type != "cuda"

    @overload
    def widen(self, tensor: Tensor) -> Tensor: ...
    @overload
    def widen(self, tensor: None) -> None: ...
    def widen(self, tensor: Tensor | None) -> Tensor | None:
        """The tensor in the dtype of the results."""
        return None if tensor is None else tensor.to(self.wide)

    def prepare(self, weight_VD: Tensor) -> Tensor:
        """The head as `logits` wants it, once a call: a GPU narrow, a CPU wide or else as it is, without a copy."""
        if self.device_type == "cuda":
            return weight_VD.to(self.narrow)
        return weight_VD if weight_VD.dtype is self.narrow else weight_VD.to(self.wide)

    def logits(self, rows_nD: Tensor, weight_VD: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows times weight^T, wide [n, V], in `out` where it is given. `weight_VD` comes from `prepare`."""
        if self.device_type == "cuda" and self.narrow is not self.wide:
            return torch.mm(rows_nD.to(self.narrow), weight_VD.T, out_dtype=self.wide, out=out)
        with self._units():
            rows_nD = self.widen(rows_nD)
            if weight_VD.dtype is self.wide:
                return torch.mm(rows_nD, weight_VD.T, out=out)
            out = rows_nD.new_empty(len(rows_nD), len(weight_VD)) if out is None else out
            slabs = list(self._slabs(weight_VD))
            most = max(slab.stop - slab.start for slab in slabs)
            wide_VD = rows_nD.new_empty(most, weight_VD.shape[1])
            for slab in slabs:
                slab_VD = wide_VD[: slab.stop - slab.start].copy_(weight_VD[slab])
                torch.mm(rows_nD, slab_VD.T, out=out[:, slab])
            return out

    def rows_gradient(self, gradient_nV: Tensor, weight_VD: Tensor) -> Tensor:
        """Gradient times weight, [n, D], added up in float32; on a CPU rounded at the end to the dtype of both."""
        if self.device_type == "cuda" and self.narrow is not self.wide:  # which may add up parts in bfloat16 otherwise
            return torch.mm(gradient_nV, weight_VD, out_dtype=self.wide)
        with self._units():
            return torch.mm(gradient_nV, weight_VD)

    def head_gradient(self, gradient_nV: Tensor, rows_nD: Tensor, out_VD: Tensor, *, add: bool) -> None:
        """Write gradient^T rows to the wide `out_VD`, or add it; `gradient_nV` is wide if `in_place`, else narrow."""
        if gradient_nV.dtype is self.wide:
            with self._units():
                rows_nD = self.widen(rows_nD)
                if add:
                    torch.addmm(out_VD, gradient_nV.T, rows_nD, out=out_VD)
                else:
                    torch.mm(gradient_nV.T, rows_nD, out=out_VD)
            return
        for slab in self._slabs(out_VD):
            part_VD = torch.mm(gradient_nV[:, slab].T, rows_nD.to(self.narrow), out_dtype=self.wide)
            out_VD[slab] = out_VD[slab] + part_VD if add else part_VD

    def _slabs(self, weight_VD: Tensor) -> Iterator[slice]:
        return slices(len(weight_VD), 4 * weight_VD.shape[1], SLAB_BYTES.get(self.device_type, SLAB_BYTES["cpu"]))

    @contextmanager
    def _units(self) -> Iterator[None]:
        """The bf16 mode of oneDNN, for the whole process as long as a product takes."""
        matmul = cast(Any, torch.backends.mkldnn).matmul
        before = matmul.fp32_precision
        change = self.narrow is not self.wide and before != "bf16"
        if change:
            matmul.fp32_precision = "bf16"
        try:
            with torch.autocast(self.device_type, enabled=False):
                yield
        finally:
            if change:
                matmul.fp32_precision = "none"
                if matmul.fp32_precision != before:  # it was set here, not inherited: inherited, it would now be pinned
                    matmul.fp32_precision = before


def slices(count: int, row_bytes: int, budget: int) -> Iterator[slice]:
    """At least one slice, all of nearly equal size and within the budget, or of one row where that is too much.

    Equal, because a short last one would waste a pass over the head, and one of a single row a compilation.
    """
    number = max(1, -(-count // max(1, budget // max(1, row_bytes))))
    edges = [count * i // number for i in range(number + 1)]
    yield from itertools.starmap(slice, itertools.pairwise(edges))


@functools.cache
def _has_bf16_units(device_type: str) -> bool:
    """Whether bfloat16 operands are fast. Elsewhere they are widened, which is exact and no slower."""
    return device_type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
