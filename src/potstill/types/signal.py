"""What is asked of a model, what it says, and what a lesson and a loss are. Refuses to know who asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from potstill.types.batch import Batch
from potstill.types.logits import Head, TeacherLogits

__all__ = [
    "AttentionVectors",
    "Lesson",
    "LossSum",
    "Offer",
    "Role",
    "Signal",
    "StudentView",
    "Wants",
]


class Offer(StrEnum):
    """A kind of signal: what a teacher can give, or what a loss needs."""

    TEXT = "text"
    TOP_LOGPROBS = "top_logprobs"
    LOGITS = "logits"
    HIDDEN = "hidden"
    ATTENTION = "attention"
    VECTORS = "vectors"
    POOLED = "pooled"


class Role(StrEnum):
    """What a model is made for: which class of it is loaded, and what its answers are.

    CAUSAL            the next token, at every position
    MASKED            the token that a mask hides
    CLASSIFIER        a class, or several labels, for a document
    TOKEN_CLASSIFIER  a class for every word
    ENCODER           a vector for a document
    """

    CAUSAL = "language_model"
    MASKED = "masked_lm"
    CLASSIFIER = "classification"
    TOKEN_CLASSIFIER = "token_classification"
    ENCODER = "embedding"


@dataclass(frozen=True, slots=True)
class Wants:
    """What to read from a model: its answers (`final`), and what lies behind them, layers by number.

    layers      hidden states: layer 0 is the embedding's output, layer i that of block i (1-based), as in transformers'
                `hidden_states`
    attentions  attention maps of block i (1-based)
    vectors     queries, keys and values of block i (1-based)
    pooled      one vector a document
    """

    final: bool = False
    layers: tuple[int, ...] = ()
    attentions: tuple[int, ...] = ()
    vectors: tuple[int, ...] = ()
    pooled: bool = False


@dataclass(frozen=True, slots=True)
class AttentionVectors:
    """What an attention layer makes of its input, as its products use them (after any rotary embedding).

    queries_BHTE float [B, H, T, E]; keys_BGTE and values_BGTE float [B, G, T, E], where G divides H (grouped queries).
    """

    queries_BHTE: Tensor
    keys_BGTE: Tensor
    values_BGTE: Tensor

    def to(self, device: torch.device | str) -> AttentionVectors:
        """The same on another device."""
        return AttentionVectors(self.queries_BHTE.to(device), self.keys_BGTE.to(device), self.values_BGTE.to(device))


@dataclass(frozen=True, slots=True)
class Signal:
    """What a teacher said about a batch. Absent parts are None or empty.

    logits      next-token distributions, or scores of classes, at the positions where the teacher speaks (the
                supervised ones, where `Batch.taught_BT` does not say otherwise), in batch order
    hidden      {layer: [B, T, D]}
    attentions  {layer: [B, H, T, T]}, probabilities, float32
    vectors     {layer: AttentionVectors}
    pooled_BD   one vector a document (a row)
    """

    logits: TeacherLogits | None = None
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    attentions: Mapping[int, Tensor] = field(default_factory=dict)
    vectors: Mapping[int, AttentionVectors] = field(default_factory=dict)
    pooled_BD: Tensor | None = None

    def to(self, device: torch.device | str) -> Signal:
        """The same signal on another device."""
        return Signal(
            self.logits and self.logits.to(device),
            {layer: states.to(device) for layer, states in self.hidden.items()},
            {layer: maps.to(device) for layer, maps in self.attentions.items()},
            {layer: vectors.to(device) for layer, vectors in self.vectors.items()},
            None if self.pooled_BD is None else self.pooled_BD.to(device),
        )


@dataclass(frozen=True, slots=True)
class StudentView:
    """What the losses see of the student; over a vocabulary never logits, so that no [N, V] is ever held.

    final_ND    at the positions of the answers (`Batch.spoken_BT`), in batch order: final hidden states. Where `head`
                is None, the scores of the classes themselves, [N, C]
    head        turns final states into logits; None where there are few classes and nothing to be saved
    hidden, attentions, vectors, pooled_BD  as in Signal
    """

    final_ND: Tensor
    head: Head | None
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    attentions: Mapping[int, Tensor] = field(default_factory=dict)
    vectors: Mapping[int, AttentionVectors] = field(default_factory=dict)
    pooled_BD: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Lesson:
    """A batch and what the teacher said about it (an empty Signal when nobody was asked)."""

    batch: Batch
    signal: Signal = field(default_factory=Signal)


@dataclass(frozen=True, slots=True)
class LossSum:
    """A sum and a count, never a mean: whoever divides knows the global count.

    total is 0-d, weighted, with a graph; `terms` holds the detached, unweighted sum of every part.
    """

    total: Tensor
    count: int
    terms: Mapping[str, Tensor] = field(default_factory=dict)
