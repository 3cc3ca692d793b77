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
from potstill.losses.feature import HiddenLoss, PooledLoss
from potstill.losses.structure import AttentionLoss, SimilarityLoss, VectorsLoss
from potstill.losses.terms import HeadTerm
from potstill.types import (
    Batch,
    Lesson,
    Logits,
    LossSum,
    Offer,
    States,
    StudentView,
    TeacherLogits,
    Wants,
)

__all__ = ["FeatureLoss", "HeadLoss", "Objective", "Ramp", "Schedule"]

FeatureLoss = HiddenLoss | PooledLoss | AttentionLoss | VectorsLoss | SimilarityLoss
"""A term over what lies behind a model's answers; at most one of each kind in an objective."""


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
    """Terms over a vocabulary, or over classes, in one pass over the same logits, summed over positions.

    Where the teacher speaks at other positions than the supervised ones (`Batch.taught_BT`), terms that compare with it
    are summed over these, and must not share a HeadLoss with hard labels: each has a count of its own.

    For several labels a document (`binary`) every score z is a distribution of its own, softmax over (0, z): class 1 is
    "has the label", with probability sigmoid(z). Rows of C scores are then C rows each, of two logits.
    """

    def __init__(self, terms: Sequence[HeadTerm], vocabulary: int, *, binary: bool = False) -> None:
        """`vocabulary` is the number of tokens that teacher and student share (padding rows of heads are cut off).

        Where there are classes or labels instead, it is their number.
        """
        super().__init__()
        self.terms, self.vocabulary, self.binary = tuple(terms), vocabulary, binary
        self.needs = frozenset({Offer.LOGITS}) if any(term.needs_teacher for term in terms) else frozenset()

    def count(self, batch: Batch) -> int:
        """Supervised positions; those where the teacher speaks, if the terms compare with it. Times C if `binary`."""
        return int(self._where(batch)[0].sum()) * (self.vocabulary if self.binary else 1)

    def forward(self, view: StudentView, lesson: Lesson, terms: Sequence[HeadTerm] | None = None) -> LossSum:
        """The weighted sum over positions; `terms` are its own with the weights and temperatures of now.

        Raises ValueError where scores are not of so many classes, or hard labels are asked for that the batch lacks.
        """
        said = lesson.signal.logits if self.needs else None
        return distillation_loss(
            self._student(view, lesson.batch),
            self._targets_N(lesson.batch),
            terms or self.terms,
            teacher=None if said is None else self._teacher(said, classes=view.head is None),
        )

    def _where(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Where the terms are summed over, bool [B, T]; which of the answers these are, bool [N], None for all."""
        if batch.taught_BT is None or not self.needs:
            return batch.supervised_BT, batch.supervised_N
        if not all(term.needs_teacher for term in self.terms):
            raise ValueError(
                f"terms {[term.name for term in self.terms]} mix hard labels with a teacher who speaks at some "
                "positions only: give each a HeadLoss of its own."
            )
        return batch.taught_BT, batch.taught_N

    def _student(self, view: StudentView, batch: Batch) -> States | Logits:
        """What the student says at the positions of the terms."""
        _, rows_N = self._where(batch)
        rows_ND = view.final_ND if rows_N is None else view.final_ND[rows_N]
        if view.head is not None and not self.binary:
            return States(rows_ND, view.head.sliced(self.vocabulary))
        if view.head is not None or rows_ND.ndim != 2 or rows_ND.shape[1] != self.vocabulary:
            got = "states and a head" if view.head is not None else f"scores {tuple(rows_ND.shape)}"
            raise ValueError(f"the student gives {got}: needs scores of {self.vocabulary} classes, [N, C].")
        return Logits(_pairs(rows_ND) if self.binary else rows_ND)

    def _teacher(self, said: TeacherLogits, *, classes: bool) -> TeacherLogits:
        """What the teacher says, on the shared tokens; classes are never cut, so that the loss tells of misfits."""
        if not self.binary:
            return said if classes else said.sliced(self.vocabulary)
        if not isinstance(said, Logits) or said.logits_NV.ndim != 2 or said.logits_NV.shape[1] != self.vocabulary:
            got = tuple(said.logits_NV.shape) if isinstance(said, Logits) else type(said).__name__
            raise ValueError(f"the teacher gives {got}: needs Logits of {self.vocabulary} labels, [N, C].")
        return Logits(_pairs(said.logits_NV))

    def _targets_N(self, batch: Batch) -> Tensor | None:
        """What hard labels say, None where no term asks for them. int64 [N]."""
        if all(term.needs_teacher for term in self.terms):
            return None
        if not self.binary:
            return batch.targets_N
        if batch.labels_BC is None or batch.labels_BC.shape[1] != self.vocabulary:
            got = None if batch.labels_BC is None else tuple(batch.labels_BC.shape)
            raise ValueError(f"labels_BC is {got}: hard labels need [B, {self.vocabulary}], one row a document.")
        return batch.labels_BC[batch.supervised_BT.nonzero()[:, 0]].flatten()


def _pairs(scores_NC: Tensor) -> Tensor:
    """Two logits for every score, (0, z): their softmax is (1 - sigmoid(z), sigmoid(z)). float [N * C, 2]."""
    return torch.stack([torch.zeros_like(scores_NC), scores_NC], -1).flatten(0, 1)


class Objective(nn.Module):
    """The sum of a recipe's losses. Holds whatever they learn along the way (projections)."""

    def __init__(
        self, losses: Sequence[HeadLoss | FeatureLoss], schedules: Mapping[str, Schedule] | None = None
    ) -> None:
        """At least one loss. `schedules` by the name of a term; all others keep their weight and temperature.

        Raises ValueError for a schedule whose term is in none of the losses, or has no such number.
        """
        super().__init__()
        self.losses = nn.ModuleList(losses)
        self.schedules = dict(schedules or {})
        head = [term for loss in losses if isinstance(loss, HeadLoss) for term in loss.terms]
        self._weights = {term.name: term.weight for term in head}
        self._weights |= {loss.kind: loss.weight for loss in losses if not isinstance(loss, HeadLoss)}
        if strangers := sorted(self.schedules.keys() - self._weights.keys()):
            raise ValueError(f"schedules {strangers} are of no term: use the names {sorted(self._weights)}.")
        soft = {term.name for term in head if term.needs_teacher}
        if cold := sorted(name for name, found in self.schedules.items() if found.temperature and name not in soft):
            raise ValueError(f"schedules {cold} move a temperature that these terms lack: move their weight only.")

    @property
    def needs(self) -> frozenset[Offer]:
        """What a teacher must offer."""
        return frozenset().union(*(loss.needs for loss in self._losses()))

    def wants(self) -> tuple[Wants, Wants]:
        """What to read from the student, which always answers, and from the teacher; layers ascending, each once."""
        pairs = [loss.wants() for loss in self._losses() if not isinstance(loss, HeadLoss)]
        student, teacher = (_joined([pair[side] for pair in pairs]) for side in (0, 1))
        return replace(student, final=True), replace(teacher, final=Offer.LOGITS in self.needs)

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

    def _ask(self, loss: HeadLoss | FeatureLoss, view: StudentView, lesson: Lesson, *, progress: float) -> LossSum:
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

    def _losses(self) -> list[HeadLoss | FeatureLoss]:
        return cast("list[HeadLoss | FeatureLoss]", list(self.losses))


def _joined(wants: Sequence[Wants]) -> Wants:
    """All that one of these wants."""

    def ascending(part: Literal["layers", "attentions", "vectors"]) -> tuple[int, ...]:
        return tuple(sorted({layer for one in wants for layer in getattr(one, part)}))

    pooled = any(one.pooled for one in wants)
    return Wants(False, ascending("layers"), ascending("attentions"), ascending("vectors"), pooled=pooled)
