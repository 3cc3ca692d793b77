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
import logging
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.func import grad_and_value

from potstill.losses.arithmetic import Arithmetic
from potstill.losses.divergence import cross_entropy, forward_kl, reverse_kl
from potstill.types import Head, LossSum

__all__ = ["HeadTerm", "can_compile", "distillation_loss", "head_logits", "position_scores"]

_log = logging.getLogger(__name__)

CHUNK_BYTES = {"cpu": 50 << 20, "cuda": 512 << 20}
"""Size of one block of logits. On a CPU small blocks stay near the cores; a GPU wants large products."""

TILE_BYTES = {"cpu": 3 << 19}
"""Size of the part of a block that the element-wise work takes at once, so that its passes find it in the cache."""

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
        """The unweighted value at each position, [N]. Raises ValueError where a teacher is needed and missing."""
        if self.kind == "cross_entropy":
            return cross_entropy(student_logits_NV, targets_N)
        if teacher_logits_NV is None:
            raise ValueError(f"{self.kind} compares with a teacher: pass teacher_logits_NV.")
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
    give a total of 0 that still has a graph; `backward` runs once a call. Raises ValueError where shapes disagree, a
    kind of term is there twice, or a teacher is missing.
    """
    teacher = _teacher_for(terms, teacher_ND, teacher_head)
    _check(student_ND, student_head, targets_N, teacher)
    if compiled is None:
        large = targets_N.numel() * student_head.vocabulary >= WORTH_COMPILING
        compiled = large and can_compile(student_ND.device.type)
    learned: tuple[Tensor | None, ...] = (student_ND, student_head.weight_VD, student_head.bias_V)
    if not torch.is_grad_enabled():  # an autograd.Function hears of requires_grad, but not of no_grad
        learned = tuple(None if part is None else part.detach() for part in learned)
    finishes = _Finish.of(student_head), teacher and _Finish.of(teacher[1])
    total, sums = cast(
        tuple[Tensor, Tensor],
        _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            *learned,
            teacher,
            targets_N,
            functools.partial(_kernel, tuple(terms), *finishes, compiled),
        ),
    )
    return LossSum(total, targets_N.numel(), {term.kind: sums[i] for i, term in enumerate(terms)})


@torch.no_grad()
def position_scores(student: tuple[Tensor, Head], teacher: tuple[Tensor, Head], targets_N: Tensor) -> dict[str, Tensor]:
    """What evaluation asks at every position, [N] each: `nll`, `kl_to_teacher` (forward, T = 1), `agreement` of top-1.

    Both sides as (final states, head); no gradient. Ties go to the lower token number on both sides. Raises ValueError
    where shapes disagree.
    """
    (rows_ND, head), (teacher_ND, teacher_head) = student, teacher
    _check(rows_ND, head, targets_N, teacher)
    arithmetic = Arithmetic.of(rows_ND)
    head, teacher = arithmetic.widen_head(head), (teacher_ND, Arithmetic.of(teacher_ND).widen_head(teacher_head))
    compiled = targets_N.numel() * head.vocabulary >= WORTH_COMPILING and can_compile(rows_ND.device.type)
    score = _scores(_Finish.of(head), _Finish.of(teacher_head), compiled)
    parts = [
        score(raw_nV[tile], head.bias_V, cast(Tensor, raw_teacher_nV)[tile], teacher[1].bias_V, targets_N[rows][tile])
        for rows, raw_nV, raw_teacher_nV in _blocks(arithmetic, (rows_ND, head.weight_VD), teacher)
        for tile in _tiles(raw_nV)
    ]
    names = ("nll", "kl_to_teacher", "agreement")
    return {name: torch.cat(values) for name, values in zip(names, zip(*parts, strict=True), strict=True)}


def head_logits(rows_nD: Tensor, head: Head) -> Tensor:
    """Logits of some rows, [n, V], float32 (float64 for float64 rows). Holds all of [n, V]: call it on chunks."""
    arithmetic = Arithmetic.of(rows_nD)
    raw_nV = arithmetic.product(arithmetic.widen(rows_nD), arithmetic.widen(head.weight_VD).T)
    return _Finish.of(head)(raw_nV, arithmetic.widen(head.bias_V))


@functools.cache
def _scores(student: _Finish, teacher: _Finish, compiled: bool) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def scores(raw_nV: Tensor, bias_V: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        raw_teacher_nV, teacher_bias_V, targets_n = others
        logits_nV, teacher_nV = student(raw_nV, bias_V), teacher(raw_teacher_nV, teacher_bias_V)
        agreement = (logits_nV.argmax(-1) == teacher_nV.argmax(-1)).to(logits_nV.dtype)
        return cross_entropy(logits_nV, targets_n), forward_kl(logits_nV, teacher_nV), agreement

    return cast(Callable[..., Any], torch.compile(scores, dynamic=True) if compiled else scores)


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile works here, tried once on a trivial function.

    It wants a C++ compiler with Python's headers for a CPU, and Triton for a GPU; names on the path prove neither.
    Where it fails one log line says why, and all runs uncompiled, with the same numbers to float32 rounding.
    """
    try:
        torch.compile(lambda x: x + 1.0)(torch.zeros(4, device=device_type))
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _log.info("torch.compile does not work here (%s): running uncompiled, which is slower", reason[:200])
        return False
    return True


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

    f(raw_student_nV, bias_V, raw_teacher_nV, teacher_bias_V, targets_n) gives (total, sums of the terms); if a gradient
    is asked for, it takes the place of raw_student_nV (a block of memory less to touch). Both come from one plain
    definition: `HeadTerm.values`.
    """

    def sums(raw_nV: Tensor, bias_V: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
        raw_teacher_nV, teacher_bias_V, targets_n = others
        logits_nV = student(raw_nV, bias_V)
        teacher_nV = teacher(raw_teacher_nV, teacher_bias_V) if teacher else None
        by_term = [term.values(logits_nV, teacher_nV, targets_n).sum() for term in terms]
        total = sum((term.factor * value for term, value in zip(terms, by_term, strict=True)), torch.zeros(()))
        return total, torch.stack(by_term)

    def sums_and_gradient(raw_nV: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        gradient_nV, result = grad_and_value(sums, has_aux=True)(raw_nV, *others)
        raw_nV.copy_(gradient_nV)
        return cast(tuple[Tensor, Tensor], result)

    function = sums_and_gradient if with_gradient else sums
    return cast(Callable[..., Any], torch.compile(function, dynamic=True) if compiled else function)


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are taken chunk by chunk in `forward`, which has the logits at hand; `backward` only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        teacher: tuple[Tensor, Head] | None,
        targets_N: Tensor,
        kernel: Callable[..., Callable[..., Any]],
    ) -> tuple[Tensor, Tensor]:
        arithmetic = Arithmetic.of(student_ND)
        needed = ctx.needs_input_grad[:3]
        function = kernel(with_gradient=any(needed))
        weight, bias = arithmetic.widen(weight_VD), arithmetic.widen(bias_V)
        teacher = teacher and (teacher[0], Arithmetic.of(teacher[0]).widen_head(teacher[1]))
        gradients = _Gradients.empty_for(student_ND, weight, bias, needed)
        results = []
        for rows, raw_nV, raw_teacher_nV in _blocks(arithmetic, (student_ND, weight), teacher):
            for tile in _tiles(raw_nV):
                others = (
                    None if raw_teacher_nV is None else raw_teacher_nV[tile],
                    teacher and teacher[1].bias_V,
                    targets_N[rows][tile],
                )
                results.append(function(raw_nV[tile], bias, *others))
            if any(needed):
                gradients.add(arithmetic, rows, (raw_nV, arithmetic.widen(student_ND[rows]), weight))
        ctx.gradients = gradients
        ctx.dtypes = (student_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        total, sums = (torch.stack(parts).sum(0) for parts in zip(*results, strict=True))
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor, _sums: Tensor) -> tuple[Tensor | None, ...]:
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

    def add(self, arithmetic: Arithmetic, rows: slice, chunk: tuple[Tensor, Tensor, Tensor]) -> None:
        gradient_nV, hidden_nD, weight_VD = chunk
        if self.hidden_ND is not None:
            self.hidden_ND[rows] = arithmetic.product(gradient_nV, weight_VD)
        if self.weight_VD is not None:
            arithmetic.add_product(self.weight_VD, gradient_nV.T, hidden_nD)
        if self.bias_V is not None:
            self.bias_V.add_(gradient_nV.sum(0))


def _blocks(
    arithmetic: Arithmetic, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Head] | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """(rows, student's raw products [n, V], teacher's or None) chunk by chunk; the next chunk overwrites the buffers.

    Fresh memory for every block would cost more page faults than the product takes.
    """
    rows_ND, weight_VD = student
    chunks = list(_chunks(rows_ND.shape[0], weight_VD))
    most = max(rows.stop - rows.start for rows in chunks)
    dtypes = [weight_VD.dtype, *([Arithmetic.of(teacher[0]).dtype] if teacher else [])]
    buffers = [torch.empty(most, weight_VD.shape[0], dtype=dtype, device=weight_VD.device) for dtype in dtypes]
    for rows in chunks:
        size = rows.stop - rows.start
        raw_nV = arithmetic.product(arithmetic.widen(rows_ND[rows]), weight_VD.T, buffers[0][:size])
        raw_teacher_nV = None
        if teacher:
            hidden_nD, own = teacher[0][rows], Arithmetic.of(teacher[0])
            raw_teacher_nV = own.product(own.widen(hidden_nD), own.widen(teacher[1].weight_VD).T, buffers[1][:size])
        yield rows, raw_nV, raw_teacher_nV


def _tiles(raw_nV: Tensor) -> Iterator[slice]:
    """Slices of a block whose element-wise work stays in the cache; the whole block on a GPU."""
    row_bytes = raw_nV.shape[1] * raw_nV.element_size()
    return _slices(len(raw_nV), row_bytes, TILE_BYTES.get(raw_nV.device.type, len(raw_nV) * row_bytes))


def _chunks(count: int, weight_VD: Tensor) -> Iterator[slice]:
    """Slices whose logits, in the dtype of `weight_VD`, fit the chunk's bytes."""
    row_bytes = weight_VD.shape[0] * weight_VD.element_size()
    return _slices(count, row_bytes, CHUNK_BYTES.get(weight_VD.device.type, CHUNK_BYTES["cpu"]))


def _slices(count: int, row_bytes: int, budget: int) -> Iterator[slice]:
    """At least one slice, all of nearly equal size and within the budget, or of one row where that is too much.

    Equal, because a short last one would waste a pass over the head, and one of a single row a compilation.
    """
    number = max(1, -(-count // max(1, budget // row_bytes)))
    edges = [count * i // number for i in range(number + 1)]
    yield from itertools.starmap(slice, itertools.pairwise(edges))


def _teacher_for(
    terms: Sequence[HeadTerm], teacher_ND: Tensor | None, teacher_head: Head | None
) -> tuple[Tensor, Head] | None:
    """The teacher's part, if a term compares with it: hard labels alone must not pay for a teacher."""
    if not terms:
        raise ValueError("terms is empty: give at least one HeadTerm.")
    kinds = [term.kind for term in terms]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"terms {kinds} have a kind twice: merge the two into one weight.")
    asking = [term.kind for term in terms if term.needs_teacher]
    if not asking:
        return None
    if teacher_ND is None or teacher_head is None:
        raise ValueError(f"terms {asking} compare with a teacher: pass teacher_ND and teacher_head.")
    return teacher_ND, teacher_head


def _check(student_ND: Tensor, head: Head, targets_N: Tensor, teacher: tuple[Tensor, Head] | None) -> None:
    if student_ND.ndim != 2 or student_ND.shape != (*targets_N.shape, head.weight_VD.shape[1]):
        raise ValueError(
            f"student_ND {tuple(student_ND.shape)}, head {tuple(head.weight_VD.shape)} and targets "
            f"{tuple(targets_N.shape)} do not fit: needs [N, D], [V, D], [N]."
        )
    if teacher is None:
        return
    teacher_ND, teacher_head = teacher
    if teacher_ND.shape != (student_ND.shape[0], teacher_head.weight_VD.shape[1]):
        raise ValueError(
            f"teacher_ND {tuple(teacher_ND.shape)} and its head {tuple(teacher_head.weight_VD.shape)} do not fit the "
            f"student's {student_ND.shape[0]} rows: needs [N, d_t] and [V, d_t]."
        )
    if teacher_head.vocabulary != head.vocabulary:
        raise ValueError(
            f"the heads have {head.vocabulary} and {teacher_head.vocabulary} tokens: slice both to the shared ones "
            "with Head.sliced."
        )
