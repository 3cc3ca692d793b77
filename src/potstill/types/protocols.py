"""The protocols between the rooms, and the small nouns that they speak of. Refuses to implement any of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from potstill.types.batch import Batch
from potstill.types.signal import Lesson, LossSum, Offer, Signal, StudentView, Wants

__all__ = [
    "Engine",
    "LessonSource",
    "Loss",
    "Measurement",
    "Reader",
    "Sampling",
]


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
