"""The forms in which a model says what it expects: spelled out, listed in part, or as states and a head.

Suffixes: V vocabulary or classes, D width, N answers, K listed tokens, M teachers. Log-probabilities are nats. Refuses
to compute: no logit is made here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = [
    "Head",
    "Logits",
    "Mixture",
    "SparseLogits",
    "States",
    "TeacherLogits",
]


@dataclass(frozen=True, slots=True)
class Head:
    """A language model's output layer: logits = softcap(scale * (hidden @ weight^T + bias)).

    weight_VD float [V, D]; bias_V float [V] or None; softcap c means c * tanh(x / c), which no logit of -inf survives:
    cut off padding with `sliced`.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocabulary(self) -> int:
        """Number of rows of the head, which may exceed the tokenizer's (padded heads)."""
        return self.weight_VD.shape[0]

    def sliced(self, vocabulary: int) -> Head:
        """The head of the first `vocabulary` tokens: padding rows never enter a softmax."""
        if vocabulary == self.vocabulary:
            return self
        bias_V = None if self.bias_V is None else self.bias_V[:vocabulary]
        return replace(self, weight_VD=self.weight_VD[:vocabulary], bias_V=bias_V)


@dataclass(frozen=True, slots=True)
class States:
    """What a model thinks of the next token, not yet spelled out: final hidden states and the head that makes logits.

    rows_ND float [N, D], one row a supervised position.
    """

    rows_ND: Tensor
    head: Head

    def sliced(self, vocabulary: int) -> States:
        """The same thoughts on the first `vocabulary` tokens only."""
        return replace(self, head=self.head.sliced(vocabulary))

    def to(self, device: torch.device | str) -> States:
        """The same on another device."""
        bias_V = None if self.head.bias_V is None else self.head.bias_V.to(device)
        head = replace(self.head, weight_VD=self.head.weight_VD.to(device), bias_V=bias_V)
        return States(self.rows_ND.to(device), head)

    def at(self, rows: slice | Tensor) -> States:
        """The same at some positions only."""
        return replace(self, rows_ND=self.rows_ND[rows])


@dataclass(frozen=True, slots=True)
class Mixture:
    """Several teachers with one vocabulary; what they say together is the weighted mean of their probabilities.

    weights_NM float [N, M]: every row sums to 1, so that each position may trust other members.
    """

    members: tuple[States, ...]
    weights_NM: Tensor

    def sliced(self, vocabulary: int) -> Mixture:
        """The same on the first `vocabulary` tokens only."""
        return replace(self, members=tuple(member.sliced(vocabulary) for member in self.members))

    def to(self, device: torch.device | str) -> Mixture:
        """The same on another device."""
        return Mixture(tuple(member.to(device) for member in self.members), self.weights_NM.to(device))

    def at(self, rows: slice | Tensor) -> Mixture:
        """The same at some positions only."""
        return Mixture(tuple(member.at(rows) for member in self.members), self.weights_NM[rows])


@dataclass(frozen=True, slots=True)
class SparseLogits:
    """Log-probabilities of some tokens at each position, and of all the others together.

    ids_NK       int64 [N, K], distinct within a row
    logprobs_NK  float [N, K]; -inf fills up a row that lists fewer
    tail_N       float [N], log-mass of all unlisted tokens; None where the listed ones stand for all (a sampled
                 teacher: their probabilities sum to 1)
    temperature  at which these log-probabilities hold: softened ones cannot be had from a truncated list
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_N: Tensor | None = None
    temperature: float = 1.0

    def sliced(self, _vocabulary: int) -> SparseLogits:
        """Itself: whoever listed the tokens knew the vocabulary."""
        return self

    def to(self, device: torch.device | str) -> SparseLogits:
        """The same on another device."""
        tail_N = None if self.tail_N is None else self.tail_N.to(device)
        return replace(self, ids_NK=self.ids_NK.to(device), logprobs_NK=self.logprobs_NK.to(device), tail_N=tail_N)


@dataclass(frozen=True, slots=True)
class Logits:
    """Next-token distributions spelled out, for vocabularies small enough: float [N, V], up to a constant a row."""

    logits_NV: Tensor

    def sliced(self, vocabulary: int) -> Logits:
        """The same on the first `vocabulary` tokens only."""
        return Logits(self.logits_NV[:, :vocabulary])

    def to(self, device: torch.device | str) -> Logits:
        """The same on another device."""
        return Logits(self.logits_NV.to(device))

    def at(self, rows: slice | Tensor) -> Logits:
        """The same at some positions only."""
        return Logits(self.logits_NV[rows])


TeacherLogits = States | Mixture | SparseLogits | Logits
"""The forms in which a teacher's next-token distributions come."""
