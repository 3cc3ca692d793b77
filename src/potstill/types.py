"""The nouns of the house and the protocols between its rooms.

Suffixes: B rows of a batch, T positions, V vocabulary, D width, N supervised positions, K listed tokens, M teachers.
Log-probabilities are nats. Imports torch and the standard library only, and holds no algorithm beyond what a noun
knows about itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "IGNORE",
    "Batch",
    "Engine",
    "Example",
    "Head",
    "Lesson",
    "LessonSource",
    "Logits",
    "Loss",
    "LossSum",
    "Measurement",
    "Mixture",
    "Offer",
    "Reader",
    "Sampling",
    "Signal",
    "SparseLogits",
    "States",
    "StudentView",
    "TeacherLogits",
    "Wants",
]

IGNORE = -100
"""Target of a position where nothing is learned (padding, prompt, a document's last token)."""


class Offer(StrEnum):
    """A kind of signal: what a teacher can give, or what a loss needs."""

    TEXT = "text"
    TOP_LOGPROBS = "top_logprobs"
    LOGITS = "logits"
    HIDDEN = "hidden"
    ATTENTION = "attention"


@dataclass(frozen=True, slots=True)
class Example:
    """One document or conversation. Exactly one of `text` and `messages` is set.

    `messages` are dicts with at least `role` and `content`. `source` is the name of the file that it stands in, or the
    id of a hub's data set. `provenance` says who wrote it: `human`, or a model's id.
    """

    id: str
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    source: str = ""
    provenance: str = "human"


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows. `targets_BT[b, t]` is what position t must predict: the shift is already done.

    ids_BT       int64, token ids; padding holds any valid id
    targets_BT   int64, next-token id or IGNORE
    segments_BT  int64, 0 for padding, else 1, 2, ...: the number of the piece within the row. Attention and position
                 ids never cross a segment
    examples     per row, the example id of each segment: `examples[b][s - 1]`
    sources      per row, the source of each segment's example; empty where nobody recorded it
    taught_BT    bool, the supervised positions at which the teacher speaks; None for all of them
    """

    ids_BT: Tensor
    targets_BT: Tensor
    segments_BT: Tensor
    examples: tuple[tuple[str, ...], ...] = ()
    sources: tuple[tuple[str, ...], ...] = ()
    taught_BT: Tensor | None = None

    @property
    def positions_BT(self) -> Tensor:
        """Position ids that start again at 0 in every segment. int64 [B, T]."""
        index_T = torch.arange(self.segments_BT.shape[1], device=self.segments_BT.device)
        starts_BT = torch.zeros_like(self.segments_BT, dtype=torch.bool)
        starts_BT[:, 0] = True
        starts_BT[:, 1:] = self.segments_BT[:, 1:] != self.segments_BT[:, :-1]
        first_BT = torch.where(starts_BT, index_T, torch.zeros_like(index_T)).cummax(dim=1).values
        return index_T - first_BT

    @property
    def supervised_BT(self) -> Tensor:
        """True where something is learned. bool [B, T]."""
        return self.targets_BT != IGNORE

    @property
    def targets_N(self) -> Tensor:
        """Targets of the supervised positions, row by row. int64 [N]."""
        return self.targets_BT[self.supervised_BT]

    @property
    def taught_N(self) -> Tensor | None:
        """Of the supervised positions, row by row, those at which the teacher speaks; None for all. bool [N]."""
        return None if self.taught_BT is None else self.taught_BT[self.supervised_BT]

    @property
    def key(self) -> str:
        """Hash of the content: equal rows have equal keys, whatever the loader's order."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (self.ids_BT, self.targets_BT, self.segments_BT):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            ids_BT=self.ids_BT.to(device),
            targets_BT=self.targets_BT.to(device),
            segments_BT=self.segments_BT.to(device),
            taught_BT=None if self.taught_BT is None else self.taught_BT.to(device),
        )

    def rows(self, start: int, stop: int) -> Batch:
        """Rows start..stop-1 as a batch of their own."""
        return Batch(
            self.ids_BT[start:stop],
            self.targets_BT[start:stop],
            self.segments_BT[start:stop],
            self.examples[start:stop],
            self.sources[start:stop],
            None if self.taught_BT is None else self.taught_BT[start:stop],
        )

    def __len__(self) -> int:
        return self.ids_BT.shape[0]


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


TeacherLogits = States | Mixture | SparseLogits | Logits
"""The forms in which a teacher's next-token distributions come."""


@dataclass(frozen=True, slots=True)
class Wants:
    """What to read from a model besides text: final hidden states with the head, and hidden layers by number.

    Layer 0 is the embedding's output, layer i the output of block i (1-based), as in transformers' `hidden_states`.
    """

    final: bool = False
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Signal:
    """What a teacher said about a batch. Absent parts are None or empty.

    logits     next-token distributions at the supervised positions where the teacher speaks, in batch order
    hidden     {layer: [B, T, D]}
    """

    logits: TeacherLogits | None = None
    hidden: Mapping[int, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Signal:
        """The same signal on another device."""
        hidden = {layer: states.to(device) for layer, states in self.hidden.items()}
        return Signal(self.logits and self.logits.to(device), hidden)


@dataclass(frozen=True, slots=True)
class StudentView:
    """What the losses see of the student: never logits, so that no [N, V] is ever held. Shapes as in Signal."""

    final_ND: Tensor
    head: Head
    hidden: Mapping[int, Tensor] = field(default_factory=dict)


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


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to generate. temperature 0 is greedy; before `min_new_tokens` no end token is chosen."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    min_new_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured number of one arm, with its 95 % interval where there is one (else None)."""

    arm: str
    name: str
    slice: str
    value: float
    low: float | None
    high: float | None
    n: int
    unit: str


class Reader(Protocol):
    """Someone who reads a batch and says what they think of it."""

    def read(self, batch: Batch, wants: Wants) -> Signal:
        """What the model says about `batch`; no gradient."""
        ...


class Engine(Reader, Protocol):
    """A machine that runs a model. Teacher and student are roles; this is what plays them."""

    offers: frozenset[Offer]

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """One completion a prompt, in order."""
        ...


class LessonSource(Protocol):
    """An endless, resumable stream: first the step's batches (so that they can be counted), then lesson by lesson."""

    def draw(self) -> list[Batch]:
        """The micro-batches of the next optimiser step."""
        ...

    def lesson(self, batch: Batch) -> Lesson:
        """What there is to learn from one of them; asks the teacher only now, so that one signal is held at a time."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Enough to continue exactly after the last step drawn."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        ...


class Loss(Protocol):
    """A distance between a student's view and a lesson. Counting needs no model: it is done beforehand."""

    needs: frozenset[Offer]

    def count(self, batch: Batch) -> int:
        """Positions of `batch` that the loss sums over."""
        ...

    def __call__(self, view: StudentView, lesson: Lesson) -> LossSum:
        """The weighted sum over those positions."""
        ...
