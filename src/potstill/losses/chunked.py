"""Head and divergence in one: the loss over a vocabulary without ever holding all its logits.

Rows go through the head in chunks of a fixed number of bytes; each chunk's gradient is taken at once, in the forward
pass, so that only a few blocks of logits live at a time. Logits and softmax are float32 (float64 for float64 inputs),
also where the products run on bfloat16 units: in bfloat16 the softmax of nearly equal distributions loses 4-23 % of the
gradient. Refuses masks: callers pass supervised rows only.

Suffixes: N supervised positions, n rows of one chunk, V vocabulary, D width.
"""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from torch.func import grad_and_value

from potstill.losses.divergence import cross_entropy, forward_kl, reverse_kl
from potstill.types import Head, LossSum

__all__ = ["HeadTerm", "can_compile", "distillation_loss", "head_logits", "position_scores"]

CHUNK_BYTES = {"cpu": 50 << 20, "cuda": 512 << 20}
"""Size of one block of logits. On a CPU small blocks stay near the cores; a GPU wants large products."""

WORTH_COMPILING = 1 << 24
"""Logits a call must have for compilation to be worth its seconds."""


@dataclass(frozen=True, slots=True)
class HeadTerm:
    """One term of the loss over the vocabulary: weight * T^2 * divergence, or weight * cross-entropy."""

    kind: Literal["forward_kl", "reverse_kl", "cross_entropy"]
    weight: float = 1.0
    temperature: float = 1.0
    times_temperature_squared: bool = True

    @property
    def needs_teacher(self) -> bool:
        """Whether the term compares with a teacher's distribution."""
        return self.kind != "cross_entropy"

    @property
    def factor(self) -> float:
        """Weight times T^2 where that is asked for."""
        squared = self.temperature**2 if self.needs_teacher and self.times_temperature_squared else 1.0
        return self.weight * squared

    def values(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor | None, targets_N: Tensor) -> Tensor:
        """The unweighted value at each position, [N]."""
        if teacher_logits_NV is None or self.kind == "cross_entropy":
            return cross_entropy(student_logits_NV, targets_N)
        divergence = forward_kl if self.kind == "forward_kl" else reverse_kl
        return divergence(student_logits_NV, teacher_logits_NV, self.temperature)


def distillation_loss(
    student_ND: Tensor,
    student_head: Head,
    targets_N: Tensor,
    terms: Sequence[HeadTerm],
    *,
    teacher_ND: Tensor | None = None,
    teacher_head: Head | None = None,
    compiled: bool | None = None,
) -> LossSum:
    """Weighted sum of `terms` over all rows, with gradients for the student's hidden states, head weight and bias.

    student_ND [N, d_s] and teacher_ND [N, d_t]: final hidden states of the supervised positions, any float dtype; with
    bfloat16 student states the products run on bfloat16 units with float32 results. The heads may have different
    widths but must have the same number of rows (slice padded heads first: `Head.sliced`). targets_N int64 [N].
    `compiled=None` compiles where a compiler exists and the problem is large; the numbers agree to float32 rounding.

    The result's total is the weighted sum, `terms` the detached sums of the unweighted values, count is N. Zero rows
    give a total of 0 that still has a graph; `backward` runs once a call. Raises ValueError where shapes disagree or a teacher is missing.
    """
    teacher = _teacher_for(terms, student_ND, teacher_ND, teacher_head)
    _check(student_ND, student_head, targets_N, teacher)
    if targets_N.numel() == 0:
        nothing = student_ND.sum().float() * 0.0 + student_head.weight_VD[:0].sum().float()
        return LossSum(nothing, 0, {term.kind: torch.zeros((), device=student_ND.device) for term in terms})
    if compiled is None:
        large = targets_N.numel() * student_head.vocabulary >= WORTH_COMPILING
        compiled = large and can_compile(student_ND.device.type)
    finishes = _Finish.of(student_head), teacher and _Finish.of(teacher[1])
    total, sums = cast(
        tuple[Tensor, Tensor],
        _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            student_ND,
            student_head.weight_VD,
            student_head.bias_V,
            teacher,
            targets_N,
            functools.partial(_kernel, tuple(terms), *finishes, compiled),
        ),
    )
    return LossSum(total, targets_N.numel(), {term.kind: sums[i] for i, term in enumerate(terms)})


def position_scores(student: tuple[Tensor, Head], teacher: tuple[Tensor, Head], targets_N: Tensor) -> dict[str, Tensor]:
    """What evaluation asks at every position, [N] each: `nll`, `kl_to_teacher` (forward, T = 1), `agreement` of top-1.

    Both sides as (final states, head); no gradient. Ties go to the lower token number on both sides.
    """
    parts: dict[str, list[Tensor]] = {"nll": [], "kl_to_teacher": [], "agreement": []}
    rows_ND, head = student
    score = _scores(targets_N.numel() * head.vocabulary >= WORTH_COMPILING and can_compile(rows_ND.device.type))
    for rows in _chunks(targets_N.numel(), head.weight_VD):
        logits_nV, teacher_nV = head_logits(rows_ND[rows], head), head_logits(teacher[0][rows], teacher[1])
        for name, values in zip(parts, score(logits_nV, teacher_nV, targets_N[rows]), strict=True):
            parts[name].append(values)
    return {name: torch.cat(values) if values else torch.zeros(0) for name, values in parts.items()}


def head_logits(rows_nD: Tensor, head: Head) -> Tensor:
    """Logits of some rows, [n, V], float32 (float64 for float64 rows). Holds all of [n, V]: call it on chunks."""
    arithmetic = _Arithmetic.of(rows_nD)
    raw_nV = arithmetic.product(arithmetic.widen(rows_nD), arithmetic.widen(head.weight_VD).T)
    return _Finish.of(head)(raw_nV, arithmetic.widen(head.bias_V))


@functools.cache
def _scores(compiled: bool) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    def scores(logits_nV: Tensor, teacher_nV: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        agreement = (logits_nV.argmax(-1) == teacher_nV.argmax(-1)).to(logits_nV.dtype)
        return cross_entropy(logits_nV, targets_n), forward_kl(logits_nV, teacher_nV), agreement

    return cast(Any, torch.compile(scores, dynamic=True) if compiled else scores)


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile can work here: a C++ compiler for the CPU, Triton for a GPU."""
    if device_type == "cpu":
        return any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return device_type == "cuda" and torch.cuda.get_device_capability() >= (7, 0)


@dataclass(frozen=True, slots=True)
class _Finish:
    """From raw products to logits: bias, scale, soft-cap. Hashable, so that a kernel is compiled once for each kind."""

    scale: float
    softcap: float | None

    @staticmethod
    def of(head: Head) -> _Finish:
        return _Finish(head.scale, head.softcap)

    def __call__(self, raw_nV: Tensor, bias_V: Tensor | None) -> Tensor:
        logits_nV = raw_nV if bias_V is None else raw_nV + bias_V
        if self.scale != 1.0:
            logits_nV = logits_nV * self.scale
        return logits_nV if self.softcap is None else self.softcap * (logits_nV / self.softcap).tanh()


@functools.cache
def _kernel(
    terms: tuple[HeadTerm, ...], student: _Finish, teacher: _Finish | None, compiled: bool, /, *, with_gradient: bool
) -> Callable[..., Any]:
    """The element-wise part: two blocks of raw products -> sums, and the gradient of the student's block.

    f(raw_student_nV, bias_V, raw_teacher_nV, teacher_bias_V, targets_n) gives (total, sums of the terms), behind the
    gradient if that is asked for. Both come from one plain definition: `HeadTerm.values`.
    """

    def sums(raw_nV: Tensor, bias_V: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
        raw_teacher_nV, teacher_bias_V, targets_n = others
        logits_nV = student(raw_nV, bias_V)
        teacher_nV = teacher(raw_teacher_nV, teacher_bias_V) if teacher else None
        by_term = [term.values(logits_nV, teacher_nV, targets_n).sum() for term in terms]
        total = sum((term.factor * value for term, value in zip(terms, by_term, strict=True)), torch.zeros(()))
        return total, torch.stack(by_term)

    function = grad_and_value(sums, has_aux=True) if with_gradient else sums
    return cast(Callable[..., Any], torch.compile(function, dynamic=True) if compiled else function)


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are taken chunk by chunk in `forward`, which has the logits at hand; `backward` only scales them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        student_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        teacher: tuple[Tensor, Head] | None,
        targets_N: Tensor,
        kernel: Callable[..., Callable[..., Any]],
    ) -> tuple[Tensor, Tensor]:
        arithmetic = _Arithmetic.of(student_ND)
        needed = ctx.needs_input_grad[:3]
        function = kernel(with_gradient=any(needed))
        weight, bias = arithmetic.widen(weight_VD), arithmetic.widen(bias_V)
        # A bfloat16 teacher's head is widened once a call: exact, and faster than once a chunk.
        teacher_weight = teacher and arithmetic.widen(teacher[1].weight_VD)
        teacher_bias = teacher and arithmetic.widen(teacher[1].bias_V)
        gradients = _Gradients.empty_for(student_ND, weight, bias, needed)
        results = []
        for rows in _chunks(targets_N.numel(), weight):
            hidden_nD = arithmetic.widen(student_ND[rows])
            raw_nV = arithmetic.product(hidden_nD, weight.T)
            raw_teacher_nV = teacher and arithmetic.product(arithmetic.widen(teacher[0][rows]), teacher_weight.T)
            result = function(raw_nV, bias, raw_teacher_nV, teacher_bias, targets_N[rows])
            if any(needed):
                gradient_nV, result = result
                gradients.add(arithmetic, rows, (gradient_nV, hidden_nD, weight))
            results.append(result)
        ctx.gradients = gradients
        ctx.dtypes = (student_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        total, sums = (torch.stack(parts).sum(0) for parts in zip(*results, strict=True))
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor, _sums: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("distillation_loss: backward ran twice through one call; call it again instead.")
        # In place and once: the buffers are this call's own, and the head's is as large as the head.
        parts = (ctx.gradients.hidden_ND, ctx.gradients.weight_VD, ctx.gradients.bias_V)
        ctx.gradients = None
        scaled = [
            None if part is None else part.mul_(scale).to(dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None)


@dataclass(frozen=True, slots=True)
class _Gradients:
    """Accumulators, None where no gradient is asked for (a frozen head costs nothing)."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None

    @staticmethod
    def empty_for(student_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, needed: Sequence[bool]) -> _Gradients:
        return _Gradients(
            torch.empty(student_ND.shape, dtype=weight_VD.dtype, device=student_ND.device) if needed[0] else None,
            torch.zeros_like(weight_VD) if needed[1] else None,
            torch.zeros_like(bias_V) if needed[2] and bias_V is not None else None,
        )

    def add(self, arithmetic: _Arithmetic, rows: slice, chunk: tuple[Tensor, Tensor, Tensor]) -> None:
        gradient_nV, hidden_nD, weight_VD = chunk
        if self.hidden_ND is not None:
            self.hidden_ND[rows] = arithmetic.product(gradient_nV, weight_VD)
        if self.weight_VD is not None:
            arithmetic.add_product(self.weight_VD, gradient_nV.T, hidden_nD)
        if self.bias_V is not None:
            self.bias_V.add_(gradient_nV.sum(0))


@dataclass(frozen=True, slots=True)
class _Arithmetic:
    """How products are computed: always with a wide result; on bfloat16 units where the rows came in bfloat16.

    On a CPU, float32 tensors multiplied in oneDNN's bf16 mode are rounded to bfloat16 on the way in (exact for what came
    in bfloat16) and accumulated in float32. It is as fast as bfloat16 tensors, whose results would be rounded.
    """

    dtype: torch.dtype
    bf16_units: bool

    @staticmethod
    def of(rows_ND: Tensor) -> _Arithmetic:
        return _Arithmetic(torch.promote_types(rows_ND.dtype, torch.float32), rows_ND.dtype is torch.bfloat16)

    @overload
    def widen(self, tensor: Tensor) -> Tensor: ...
    @overload
    def widen(self, tensor: None) -> None: ...
    def widen(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.dtype)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        if a.is_cuda and self.bf16_units:
            return torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=self.dtype)
        with self._units():
            return a @ b

    def add_product(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        if out.is_cuda and self.bf16_units:
            out += torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=self.dtype)
            return
        with self._units():
            torch.addmm(out, a, b, out=out)

    @contextmanager
    def _units(self) -> Iterator[None]:
        matmul = torch.backends.mkldnn.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16" if self.bf16_units else before
        try:
            yield
        finally:
            matmul.fp32_precision = before


def _chunks(count: int, weight_VD: Tensor) -> Iterator[slice]:
    """Slices of nearly equal size, none above the chunk's bytes (a short last chunk would waste a pass over the head)."""
    budget = CHUNK_BYTES.get(weight_VD.device.type, CHUNK_BYTES["cpu"])
    number = -(-count // max(1, budget // (weight_VD.shape[0] * weight_VD.element_size())))
    edges = [count * i // number for i in range(number + 1)]
    yield from itertools.starmap(slice, itertools.pairwise(edges))


def _teacher_for(
    terms: Sequence[HeadTerm], student_ND: Tensor, teacher_ND: Tensor | None, teacher_head: Head | None
) -> tuple[Tensor, Head] | None:
    """The teacher's part, if a term compares with it: hard labels alone must not pay for a teacher."""
    if not terms:
        raise ValueError("terms is empty: give at least one HeadTerm.")
    asking = [term.kind for term in terms if term.needs_teacher]
    if not asking:
        return None
    if teacher_ND is None or teacher_head is None:
        raise ValueError(f"terms {asking} compare with a teacher: pass teacher_ND and teacher_head.")
    if teacher_ND.shape != (student_ND.shape[0], teacher_head.weight_VD.shape[1]):
        raise ValueError(
            f"teacher_ND {tuple(teacher_ND.shape)} and its head {tuple(teacher_head.weight_VD.shape)} do not fit the "
            f"student's {student_ND.shape[0]} rows: needs [N, d_t] and [V, d_t]."
        )
    return teacher_ND, teacher_head


def _check(student_ND: Tensor, head: Head, targets_N: Tensor, teacher: tuple[Tensor, Head] | None) -> None:
    rows, width = student_ND.shape
    if head.weight_VD.shape[1] != width or targets_N.shape != (rows,):
        raise ValueError(
            f"student_ND {tuple(student_ND.shape)}, head {tuple(head.weight_VD.shape)} and targets "
            f"{tuple(targets_N.shape)} do not fit: needs [N, D], [V, D], [N]."
        )
    if teacher and teacher[1].vocabulary != head.vocabulary:
        raise ValueError(
            f"the heads have {head.vocabulary} and {teacher[1].vocabulary} tokens: slice both to the shared ones with "
            "Head.sliced."
        )
