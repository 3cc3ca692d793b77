"""Head and divergence in one: the loss over a vocabulary without ever holding all its logits; over classes, with them.

Rows go through the head in chunks of a fixed number of bytes; each chunk's gradient is taken at once, in the forward
pass, so that only a few blocks of logits live at a time. Logits and softmax are float32 (float64 for float64 inputs),
also where the products run on bfloat16 units: in bfloat16 the softmax of nearly equal distributions loses 4-23 % of the
gradient. Refuses masks: callers pass supervised rows only.

Suffixes: N supervised positions, n rows of one chunk, V vocabulary, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import grad_and_value

from potstill.losses.arithmetic import slices
from potstill.losses.blocks import blocks, most_rows, tiles
from potstill.losses.compiling import KERNELS, compile_varying, worth_compiling
from potstill.losses.fitting import refuse_misfits
from potstill.losses.sides import Dense, Finish, Form, Side, open_logits
from potstill.losses.terms import HeadTerm
from potstill.types import Head, Logits, LossSum, States, TeacherLogits

__all__ = ["distillation_loss"]

HOOKED = (
    "distillation_loss inside torch.utils.checkpoint, save_on_cpu or other saved-tensor hooks: its gradient is taken "
    "in the forward pass, where hooks cannot be. Call it outside of them; it keeps no logits that they could save."
)

SCALED_BYTES = 4 << 20
"""Part of a gradient that is scaled and cast at once."""


def distillation_loss(
    student: States | Logits,
    targets_N: Tensor | None,
    terms: Sequence[HeadTerm],
    *,
    teacher: TeacherLogits | None = None,
    weights_N: Tensor | None = None,
    compiled: bool | None = None,
) -> LossSum:
    """Weighted sum of `terms` over all rows, with gradients for the student's hidden states, head weight and bias.

        sum_n weights_n sum_terms weight T^2 divergence(teacher_n, student_n)

    student    final hidden states [N, d_s] of the supervised positions, any float dtype, and the head [V, d_s]. With
               bfloat16 states the products run on bfloat16 units, with float32 results. Or Logits [N, C] of few
               classes: the same values, with torch's own gradient through all of them at once, never compiled
    targets_N  int64 [N], the tokens that came; None where no term asks for them
    teacher    States of any width d_t whose head has as many rows (slice padded heads first: `Head.sliced`), a Mixture
               of several, SparseLogits at the terms' temperature, or Logits
    weights_N  float [N], a factor a row; no gradient. For a weighted mean, divide by their sum instead of the count
    compiled   None compiles where a compiler exists and the problem is large; the numbers agree to float32 rounding

    All terms share one pass over the same logits. The head's gradient is accumulated in float32; frozen parts cost
    nothing. A head that is a function of others (W + B A) passes its gradient on to them.

    The result's total is the weighted sum, `terms` the detached sums by name without the terms' weights (but with the
    rows'), count is N. Zero rows give a total of 0 that still has a graph; `backward` runs once a call, and its result
    has no graph of its own. Raises ValueError where shapes disagree, a name is there twice, something a term needs is
    missing, or a term has no unbiased form for a sparse teacher.
    """
    refuse_misfits(student, targets_N, terms, teacher=teacher, weights_N=weights_N)
    teacher = teacher if any(term.needs_teacher for term in terms) else None  # hard labels must not pay for one
    if isinstance(student, Logits):
        return _dense(student, _Job(Finish(1.0, None), targets_N, tuple(terms), teacher, weights_N, False))
    rows_ND, head = student.rows_ND, student.head
    if compiled is None:
        compiled = worth_compiling(rows_ND.shape[0] * head.vocabulary, rows_ND.device.type)
    learned: tuple[Tensor | None, ...] = (rows_ND, head.weight_VD, head.bias_V)
    if not torch.is_grad_enabled():  # an autograd.Function hears of requires_grad, but not of no_grad
        learned = tuple(None if part is None else part.detach() for part in learned)
    job = _Job(Finish.of(head), targets_N, tuple(terms), teacher, weights_N, compiled)
    with torch.autograd.graph.disable_saved_tensors_hooks(HOOKED):
        total, sums = cast(tuple[Tensor, Tensor], _ChunkedLoss.apply(*learned, job))  # type: ignore[no-untyped-call]
    return LossSum(total, rows_ND.shape[0], {term.name: sums[i] for i, term in enumerate(terms)})


def _dense(student: Logits, job: _Job) -> LossSum:
    """The same definition on all logits at once, with torch's own gradient."""
    wide = torch.promote_types(student.logits_NV.dtype, torch.float32)
    rows_NV, everything = student.logits_NV.to(wide), slice(None)
    with torch.no_grad():
        teacher = None if job.teacher is None else open_logits(job.teacher, wide)
        parts = () if teacher is None else teacher.parts(everything, teacher.buffers(len(rows_NV)))
    kernel = job.kernel(teacher.form if teacher else None, with_gradient=False, in_place=False)
    said, hard = (parts, teacher.shared if teacher else ()), (job.targets_N, job.weights_N)
    total, sums = kernel(rows_NV, None, said, hard, job.numbers(rows_NV), ())
    return LossSum(total, len(rows_NV), {term.name: sums[i].detach() for i, term in enumerate(job.terms)})


@dataclass(frozen=True, slots=True)
class _Job:
    """All of a call that no gradient flows to."""

    finish: Finish
    targets_N: Tensor | None
    terms: tuple[HeadTerm, ...]
    teacher: TeacherLogits | None
    weights_N: Tensor | None
    compiled: bool

    def kernel(self, form: Form | None, *, with_gradient: bool, in_place: bool) -> Callable[..., tuple[Tensor, Tensor]]:
        """The compiled or plain function for this kind of call; other weights and temperatures share it."""
        patterns = tuple(term.pattern for term in self.terms)
        return _kernel(patterns, (self.finish, form), self.compiled, with_gradient=with_gradient, in_place=in_place)

    def numbers(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Factors and temperatures of the terms, as tensors: as numbers, every new one would be compiled in."""
        columns = [[term.factor for term in self.terms], [term.temperature for term in self.terms]]
        both = torch.tensor(columns, dtype=like.dtype, device=like.device)
        return both[0], both[1]


@functools.lru_cache(KERNELS)
def _kernel(
    terms: tuple[HeadTerm, ...],
    sides: tuple[Finish, Form | None],
    compiling: bool,
    *,
    with_gradient: bool,
    in_place: bool,
) -> Callable[..., Any]:
    """The element-wise part: a block of raw products -> (total, sums of the terms), and the gradient of the block.

    f(raw_nV, bias_V, said, hard, numbers, into): `said` are the teacher's parts and what they share, `hard` the targets
    and the rows' weights, `numbers` the terms' factors and temperatures. The gradient is written into the tensors
    `into`, and if `in_place` over raw_nV. Both come from one plain definition: the functions of `divergence`.
    """
    student, teacher = sides

    def sums(raw_nV: Tensor, bias_V: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
        said, (targets_n, weights_n), (factors, temperatures) = others
        logits_nV, by_term = student(raw_nV, bias_V), []
        for i, term in enumerate(terms):
            # What has no weight must not spoil the rest where it is infinite: no gradient passes, not even 0 * inf.
            counts_n1 = factors[i] != 0 if weights_n is None else ((weights_n != 0) & (factors[i] != 0)).unsqueeze(-1)
            own_nV = torch.where(counts_n1, logits_nV, logits_nV.detach())
            if teacher is None or not term.needs_teacher:
                values_n = term.hard(own_nV, targets_n)
            else:
                softness = 1.0 if term.temperature == 1.0 else temperatures[i]
                values_n = teacher.compare(term, own_nV, said, softness)
            if weights_n is not None:
                values_n = (values_n * weights_n).where(weights_n != 0, 0.0)
            by_term.append(values_n.sum())
        sums = torch.stack(by_term)
        return (sums * factors).where(factors != 0, 0.0).sum(), sums

    def sums_and_gradient(raw_nV: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        gradient_nV, result = grad_and_value(sums, has_aux=True)(raw_nV, *others[:-1])
        # A second view of raw_nV would be compiled as if it began where the first one did.
        for copy_nV in (raw_nV, *others[-1]) if in_place else others[-1]:
            copy_nV.copy_(gradient_nV)
        return cast(tuple[Tensor, Tensor], result)

    def sums_alone(*arguments: Any) -> tuple[Tensor, Tensor]:
        return sums(*arguments[:-1])

    function = sums_and_gradient if with_gradient else sums_alone
    return compile_varying(function, "_".join(term.name for term in terms)) if compiling else function


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are taken chunk by chunk in `forward`, which has the logits at hand; `backward` only scales them."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor]:
        head = Head(weight_VD, bias_V, job.finish.scale, job.finish.softcap)
        side, needed = Side.of(States(rows_ND, head)), ctx.needs_input_grad[:3]
        teacher = None if job.teacher is None else open_logits(job.teacher, side.arithmetic.wide)
        kernel = job.kernel(
            teacher.form if teacher else None,
            with_gradient=any(needed),
            in_place=side.arithmetic.in_place,
        )
        gradients = _Gradients.of(side, head, needed)
        numbers = job.numbers(torch.empty(0, dtype=side.arithmetic.wide, device=rows_ND.device))
        results = []
        for rows, (own, *its) in blocks(Dense((side,)), *([teacher] if teacher else [])):
            raw_nV, copies = own[0], gradients.copies(side, own[0])
            per_row = (job.targets_N, job.weights_N)
            hard = [None if values_N is None else values_N[rows] for values_N in per_row]
            for tile in tiles(raw_nV):
                said = tuple(part[tile] for parts in its for part in parts), teacher.shared if teacher else ()
                hard_tile = [None if values_n is None else values_n[tile] for values_n in hard]
                into = [copy_nV[tile] for copy_nV in copies if copy_nV is not raw_nV]
                results.append(kernel(raw_nV[tile], side.bias_V, said, hard_tile, numbers, into))
            gradients.add(side, rows, copies)
        ctx.gradients = gradients
        ctx.dtypes = (rows_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        total, sums = (torch.stack(parts).sum(0) for parts in zip(*results, strict=True))
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor, _sums: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("distillation_loss: backward ran twice through one call; call it again instead.")
        # In place and once: the buffers are this call's own, and the head's is as large as the head.
        parts = (ctx.gradients.rows_ND, ctx.gradients.weight_VD, ctx.gradients.bias_V)
        ctx.gradients = None
        return (*(_scaled(part, scale, dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True)), None)


def _scaled(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """Gradient times scale, rounded once, to `dtype`; the gradient is written over."""
    if gradient is None or dtype is None or gradient.dtype is dtype:
        return None if gradient is None else gradient.mul_(scale)
    narrow = torch.empty_like(gradient, dtype=dtype)
    row_bytes = gradient[:1].nbytes
    for rows in slices(len(gradient), row_bytes, SCALED_BYTES):  # what was scaled is still in the cache when it is cast
        narrow[rows] = gradient[rows].mul_(scale)
    return narrow


@dataclass(frozen=True, slots=True)
class _Gradients:
    """Wide accumulators, None where no gradient is asked for: a frozen head costs nothing.

    operand_VD  the head as the product for the rows' gradient wants it
    narrow_nV   where a chunk's gradient is also written for bfloat16 units, None where there are none
    """

    rows_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None
    operand_VD: Tensor | None
    narrow_nV: Tensor | None

    @staticmethod
    def of(side: Side, head: Head, needed: Sequence[bool]) -> _Gradients:
        """`head` as it came: its weight is narrowed from there, in one rounding."""
        arithmetic, device = side.arithmetic, side.rows_ND.device
        narrow = any(needed) and arithmetic.narrow is not arithmetic.wide
        most = most_rows(Dense((side,)))
        return _Gradients(
            torch.empty(side.rows_ND.shape, dtype=arithmetic.wide, device=device) if needed[0] else None,
            torch.empty(head.weight_VD.shape, dtype=arithmetic.wide, device=device) if needed[1] else None,
            torch.zeros_like(side.bias_V) if needed[2] and side.bias_V is not None else None,
            (side if side.weight_VD.dtype is arithmetic.narrow else head).weight_VD.to(arithmetic.narrow)
            if needed[0]
            else None,
            side.buffer(most, arithmetic.narrow) if narrow else None,
        )

    def copies(self, side: Side, raw_nV: Tensor) -> tuple[Tensor, ...]:
        """Where a chunk's gradient goes: over the logits it came from, a block of memory less to touch, or beside."""
        wide = (raw_nV,) if side.arithmetic.in_place else ()
        return wide if self.narrow_nV is None else (*wide, self.narrow_nV[: len(raw_nV)])

    def add(self, side: Side, rows: slice, copies: tuple[Tensor, ...]) -> None:
        """A chunk's gradient, from the first of the copies for the head and the last for the rows."""
        if self.rows_ND is not None and self.operand_VD is not None:
            self.rows_ND[rows] = side.arithmetic.rows_gradient(copies[-1], self.operand_VD)
        if self.weight_VD is not None:
            side.arithmetic.head_gradient(copies[0], side.rows_ND[rows], self.weight_VD, add=rows.start > 0)
        if self.bias_V is not None:
            self.bias_V.add_(copies[0].sum(0, dtype=self.bias_V.dtype))
