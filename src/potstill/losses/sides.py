"""The two sides of a comparison, chunk by chunk, in whatever form they come.

A side is opened once a call and gives a few tensors a chunk (`parts`); its hashable `form` knows how to compare them
with a block of the student's logits, so that one compiled kernel serves all chunks and calls. Refuses to hold more than
one chunk: the next one overwrites its buffers.

Suffixes: N positions, n rows of one chunk or block, V vocabulary, D width, K listed tokens, M teachers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.losses.arithmetic import Arithmetic
from potstill.losses.sparse import buckets, tail_bucket_kl
from potstill.losses.terms import HeadTerm
from potstill.types import Head, Logits, Mixture, States, TeacherLogits

__all__ = ["DenseForm", "Finish", "Form", "Opened", "Parts", "Side", "open_logits"]

Parts = tuple[Tensor, ...]
"""Tensors with one row a position of the chunk."""

Shared = tuple[Tensor | None, ...]
"""What belongs to all positions: the biases of the heads."""


@dataclass(frozen=True, slots=True)
class Finish:
    """From raw products to logits: bias, scale, soft-cap. Hashable, so that a kernel is compiled once for each kind."""

    scale: float
    softcap: float | None

    @staticmethod
    def of(head: Head) -> Finish:
        """What this head does after its product."""
        return Finish(head.scale, head.softcap)

    def __call__(self, raw_nV: Tensor, bias_V: Tensor | None) -> Tensor:
        """Logits, [n, V]."""
        logits_nV = raw_nV if bias_V is None else raw_nV + bias_V
        if self.scale != 1.0:
            logits_nV = logits_nV * self.scale
        return logits_nV if self.softcap is None else self.softcap * (logits_nV / self.softcap).tanh()


@dataclass(frozen=True, slots=True)
class Side:
    """One model's states and head, ready for products."""

    arithmetic: Arithmetic
    rows_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    finish: Finish

    @staticmethod
    def of(states: States) -> Side:
        """Prepared once a call: casting a head for every chunk would cost more than some products."""
        arithmetic, head = Arithmetic.of(states.rows_ND), states.head
        weight_VD = arithmetic.prepare(head.weight_VD)
        return Side(arithmetic, states.rows_ND, weight_VD, arithmetic.widen(head.bias_V), Finish.of(head))

    def buffer(self, rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for so many rows of raw products. Fresh memory for every chunk would cost many page faults."""
        size = (rows, self.weight_VD.shape[0])
        return torch.empty(size, dtype=dtype or self.arithmetic.wide, device=self.rows_ND.device)

    def raw(self, rows: slice, buffer: Tensor) -> Tensor:
        """Raw products of these rows, [n, V], in the first rows of `buffer`."""
        rows_nD = self.rows_ND[rows]
        return self.arithmetic.logits(rows_nD, self.weight_VD, buffer[: len(rows_nD)])


@dataclass(frozen=True, slots=True)
class Given:
    """Logits that are there already: nothing to multiply."""

    logits_NV: Tensor
    wide: torch.dtype
    finish: Finish = Finish(1.0, None)
    bias_V: None = None

    def buffer(self, _rows: int) -> Tensor:
        """None is needed."""
        return self.logits_NV[:0]

    def raw(self, rows: slice, _buffer: Tensor) -> Tensor:
        """The logits of these rows, [n, V]."""
        return self.logits_NV[rows].to(self.wide)


@dataclass(frozen=True, slots=True)
class DenseForm:
    """Raw products of one teacher, or of several and the log of their weights."""

    finishes: tuple[Finish, ...]
    mixed: bool

    def logits(self, said: tuple[Parts, Shared], temperature: float | Tensor) -> Tensor:
        """Logits [n, V] that, softened by the temperature, are the teacher's distribution.

        Of several: log sum_m w_m p_m, with every p_m softened first, times the temperature.
        """
        parts, shared = said
        raw = parts[: len(self.finishes)]
        sides = [finish(raw_nV, bias_V) for finish, raw_nV, bias_V in zip(self.finishes, raw, shared, strict=True)]
        if not self.mixed:
            return sides[0]
        log_weights_nM = parts[-1]
        softened = [(side_nV / temperature).log_softmax(-1) for side_nV in sides]
        weighted = [log_p_nV + log_weights_nM[:, i : i + 1] for i, log_p_nV in enumerate(softened)]
        return temperature * functools.reduce(torch.logaddexp, weighted)

    def compare(
        self, term: HeadTerm, student_nV: Tensor, said: tuple[Parts, Shared], temperature: float | Tensor
    ) -> Tensor:
        """The term's value at each position, [n]."""
        return term.soft(student_nV, self.logits(said, temperature), temperature)


@dataclass(frozen=True, slots=True)
class Dense:
    """One model, or several whose probabilities are averaged with weights [N, M]."""

    sides: tuple[Side | Given, ...]
    log_weights_NM: Tensor | None = None

    @property
    def form(self) -> DenseForm:
        """Everything about the heads that is not a tensor."""
        return DenseForm(tuple(side.finish for side in self.sides), self.log_weights_NM is not None)

    @property
    def shared(self) -> Shared:
        """The biases."""
        return tuple(side.bias_V for side in self.sides)

    def buffers(self, rows: int) -> Parts:
        """One block of raw products a model."""
        return tuple(side.buffer(rows) for side in self.sides)

    def parts(self, rows: slice, buffers: Parts) -> Parts:
        """Raw products of every model, then the log-weights of these rows."""
        raw = tuple(side.raw(rows, buffer) for side, buffer in zip(self.sides, buffers, strict=True))
        return raw if self.log_weights_NM is None else (*raw, self.log_weights_NM[rows])


@dataclass(frozen=True, slots=True)
class SparseForm:
    """Listed tokens, their log-probabilities, and perhaps the tail's."""

    def compare(
        self, term: HeadTerm, student_nV: Tensor, said: tuple[Parts, Shared], temperature: float | Tensor
    ) -> Tensor:
        """The term's value at each position, [n]; the list is at the term's temperature already."""
        ids_nK, logprobs_nK, *tail = said[0]
        tail_n = tail[0] if tail else None
        softened_nV = student_nV / temperature if isinstance(temperature, Tensor) else student_nV
        if term.kind == "forward_kl":
            return tail_bucket_kl(softened_nV, ids_nK, logprobs_nK, tail_n)
        return term.soft(*buckets(softened_nV, ids_nK, logprobs_nK, tail_n))


@dataclass(frozen=True, slots=True)
class Sparse:
    """A list a position; nothing is computed."""

    said: Parts
    form: SparseForm = SparseForm()
    shared: Shared = ()

    def buffers(self, _rows: int) -> Parts:
        """None are needed."""
        return ()

    def parts(self, rows: slice, _buffers: Parts) -> Parts:
        """The lists of these rows."""
        return tuple(part[rows] for part in self.said)


Form = DenseForm | SparseForm
Opened = Dense | Sparse


def open_logits(logits: TeacherLogits, wide: torch.dtype = torch.float32) -> Opened:
    """A side in whatever form it comes, ready for chunks; a list in the dtype `wide`."""
    if isinstance(logits, States):
        return Dense((Side.of(logits),))
    if isinstance(logits, Logits):
        return Dense((Given(logits.logits_NV, torch.promote_types(logits.logits_NV.dtype, wide)),))
    if isinstance(logits, Mixture):
        sides = tuple(map(Side.of, logits.members))
        widest = functools.reduce(torch.promote_types, (side.arithmetic.wide for side in sides))
        return Dense(sides, logits.weights_NM.to(widest).log())
    tail = () if logits.tail_N is None else (logits.tail_N.to(wide),)
    return Sparse((logits.ids_NK, logits.logprobs_NK.to(wide), *tail))
