"""The whole objective of a recipe: its losses, added, each divided once by its own global count.

Refuses to average: a mean of means weighs short micro-batches more than long ones. Refuses to remember where a training
is: numbers that move are functions of its progress, so that one that continues meets the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from potstill.losses.chunked import distillation_loss
from potstill.losses.feature import HiddenLoss
from potstill.losses.terms import HeadTerm
from potstill.types import Batch, Lesson, LossSum, Offer, States, StudentView

__all__ = ["HeadLoss", "Objective", "Ramp", "Schedule"]


@dataclass(frozen=True, slots=True)
class Ramp:
    """A number that goes from `start` to `end` over a training, in a straight line or along half a cosine."""

    start: float
    end: float
    kind: Literal["linear", "cosine"] = "linear"

    def at(self, progress: float) -> float:
        """(1 - s) start + s end with s = progress, or s = (1 - cos(pi progress)) / 2 for a cosine.

        `progress` is the share of the training that is done: 0 in its first step, 1 in its last; at both the result is
        exact. Raises ValueError for a progress outside [0, 1] and an unknown kind.
        """
        if self.kind not in ("linear", "cosine"):
            raise ValueError(f"kind {self.kind} is not a way to go: use linear or cosine.")
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress {progress} is no share of a training: needs a number within [0, 1].")
        share = progress if self.kind == "linear" else (1.0 - math.cos(math.pi * progress)) / 2.0
        return (1.0 - share) * self.start + share * self.end


@dataclass(frozen=True, slots=True)
class Schedule:
    """What moves in a term: a factor on its weight, which may begin or end at 0; a temperature in place of its own."""

    weight: Ramp | None = None
    temperature: Ramp | None = None


class HeadLoss(nn.Module):
    """Terms over the vocabulary in one pass over the same logits, summed over supervised positions.

    Where the teacher speaks at some positions only (`Batch.taught_BT`), terms that compare with it are summed over
    these, and must not share a HeadLoss with hard labels: each has a count of its own.
    """

    def __init__(self, terms: Sequence[HeadTerm], vocabulary: int) -> None:
        """`vocabulary` is the number of tokens that teacher and student share: padding rows of heads are cut off."""
        super().__init__()
        self.terms, self.vocabulary = tuple(terms), vocabulary
        self.needs = frozenset({Offer.LOGITS}) if any(term.needs_teacher for term in terms) else frozenset()

    def count(self, batch: Batch) -> int:
        """Supervised positions; those where the teacher speaks, if the terms compare with it."""
        return int(self._positions_BT(batch).sum())

    def forward(self, view: StudentView, lesson: Lesson, terms: Sequence[HeadTerm] | None = None) -> LossSum:
        """The weighted sum over supervised positions; `terms` are its own with the weights and temperatures of now."""
        said, batch, rows_ND = lesson.signal.logits, lesson.batch, view.final_ND
        if batch.taught_BT is not None and self.needs:
            rows_ND = rows_ND[batch.taught_N]
        return distillation_loss(
            States(rows_ND, view.head.sliced(self.vocabulary)),
            batch.targets_BT[self._positions_BT(batch)],
            terms or self.terms,
            teacher=said.sliced(self.vocabulary) if said and self.needs else None,
        )

    def _positions_BT(self, batch: Batch) -> Tensor:
        """Where the terms are summed over. bool [B, T]."""
        if batch.taught_BT is None or not self.needs:
            return batch.supervised_BT
        if not all(term.needs_teacher for term in self.terms):
            raise ValueError(
                f"terms {[term.name for term in self.terms]} mix hard labels with a teacher who speaks at some "
                "positions only: give each a HeadLoss of its own."
            )
        return batch.taught_BT


class Objective(nn.Module):
    """The sum of a recipe's losses. Holds whatever they learn along the way (projections)."""

    def __init__(
        self, losses: Sequence[HeadLoss | HiddenLoss], schedules: Mapping[str, Schedule] | None = None
    ) -> None:
        """At least one loss. `schedules` by the name of a term; all others keep their weight and temperature.

        Raises ValueError for a schedule whose term is in none of the losses, or has no such number.
        """
        super().__init__()
        self.losses = nn.ModuleList(losses)
        self.schedules = dict(schedules or {})
        head = [term for loss in losses if isinstance(loss, HeadLoss) for term in loss.terms]
        self._weights = {term.name: term.weight for term in head}
        self._weights |= {loss.kind: loss.weight for loss in losses if isinstance(loss, HiddenLoss)}
        if strangers := sorted(self.schedules.keys() - self._weights.keys()):
            raise ValueError(f"schedules {strangers} are of no term: use the names {sorted(self._weights)}.")
        soft = {term.name for term in head if term.needs_teacher}
        if cold := sorted(name for name, found in self.schedules.items() if found.temperature and name not in soft):
            raise ValueError(f"schedules {cold} move a temperature that these terms lack: move their weight only.")

    @property
    def needs(self) -> frozenset[Offer]:
        """What a teacher must offer."""
        return frozenset().union(*(loss.needs for loss in self._losses()))

    def layers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Hidden layers to read: the student's, the teacher's; ascending."""
        maps = [loss.layers for loss in self._losses() if isinstance(loss, HiddenLoss)]
        student = sorted({layer for pairs in maps for layer in pairs})
        teacher = sorted({layer for pairs in maps for layer in pairs.values()})
        return tuple(student), tuple(teacher)

    def counts(self, batches: Sequence[Batch]) -> Tensor:
        """How many positions each loss sums over in all of `batches` together; float64 [number of losses]."""
        by_loss = [sum(loss.count(batch) for batch in batches) for loss in self._losses()]
        return torch.tensor(by_loss, dtype=torch.float64)

    def scheduled(self, progress: float) -> dict[str, float]:
        """What moves, as it is at this share of the training: `weight_NAME` and `temperature_NAME`, for the log."""
        values = {}
        for name, schedule in self.schedules.items():
            if schedule.weight:
                values[f"weight_{name}"] = self._weights[name] * schedule.weight.at(progress)
            if schedule.temperature:
                values[f"temperature_{name}"] = schedule.temperature.at(progress)
        return values

    def forward(
        self, view: StudentView, lesson: Lesson, counts: Tensor, progress: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This lesson's share of the step's loss, and of every unweighted term; both add up over lessons.

        `counts` are the global ones: of all micro-batches and ranks of the step. A count of 0 gives a loss of 0.
        `progress` is the share of the training that is done, alike for all lessons of a step.
        """
        share, terms = torch.zeros((), device=view.final_ND.device), {}
        for loss, count in zip(self._losses(), counts.tolist(), strict=True):
            result = self._ask(loss, view, lesson, progress=progress)
            share = share + result.total / max(count, 1.0)
            terms.update({name: value / max(count, 1.0) for name, value in result.terms.items()})
        return share, terms

    def _ask(self, loss: HeadLoss | HiddenLoss, view: StudentView, lesson: Lesson, *, progress: float) -> LossSum:
        if isinstance(loss, HeadLoss):
            now = [self._moved(term, progress) for term in loss.terms]
            return cast(LossSum, loss(view, lesson, now))
        result = cast(LossSum, loss(view, lesson))
        schedule = self.schedules.get(loss.kind, Schedule())
        # Also where the factor is 0: the graph stays, so that projections get a gradient, which other ranks wait for.
        return replace(result, total=result.total * schedule.weight.at(progress)) if schedule.weight else result

    def _moved(self, term: HeadTerm, progress: float) -> HeadTerm:
        schedule = self.schedules.get(term.name)
        if schedule is None:
            return term
        weight = term.weight * schedule.weight.at(progress) if schedule.weight else term.weight
        temperature = schedule.temperature.at(progress) if schedule.temperature else term.temperature
        if schedule.temperature and temperature == 1.0:
            # The same float32, but not the T = 1 that has a kernel of its own, compiled for one step.
            temperature = math.nextafter(1.0, 2.0)
        return replace(term, weight=weight, temperature=temperature)

    def _losses(self) -> list[HeadLoss | HiddenLoss]:
        return cast("list[HeadLoss | HiddenLoss]", list(self.losses))
