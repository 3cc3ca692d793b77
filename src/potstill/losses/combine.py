"""The whole objective of a recipe: its losses, added, each divided once by its own global count.

Refuses to average: a mean of means weighs short micro-batches more than long ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from potstill.losses.chunked import HeadTerm, distillation_loss
from potstill.losses.feature import HiddenLoss
from potstill.types import Batch, Lesson, LossSum, Offer, StudentView

__all__ = ["HeadLoss", "Objective"]


class HeadLoss(nn.Module):
    """All terms over the vocabulary in one pass over the same logits, summed over supervised positions."""

    def __init__(self, terms: Sequence[HeadTerm], vocabulary: int) -> None:
        """`vocabulary` is the number of tokens that teacher and student share: padding rows of heads are cut off."""
        super().__init__()
        self.terms, self.vocabulary = tuple(terms), vocabulary
        self.needs = frozenset({Offer.LOGITS}) if any(term.needs_teacher for term in terms) else frozenset()

    def count(self, batch: Batch) -> int:
        """Supervised positions."""
        return int(batch.supervised_BT.sum())

    def forward(self, view: StudentView, lesson: Lesson) -> LossSum:
        """The weighted sum over supervised positions."""
        signal = lesson.signal
        return distillation_loss(
            view.final_ND,
            view.head.sliced(self.vocabulary),
            lesson.batch.targets_N,
            self.terms,
            teacher_ND=signal.final_ND,
            teacher_head=signal.head and signal.head.sliced(self.vocabulary),
        )


class Objective(nn.Module):
    """The sum of a recipe's losses. Holds whatever they learn along the way (projections)."""

    def __init__(self, losses: Sequence[HeadLoss | HiddenLoss]) -> None:
        """At least one loss."""
        super().__init__()
        self.losses = nn.ModuleList(losses)

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

    def forward(self, view: StudentView, lesson: Lesson, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """This lesson's share of the step's loss, and of every unweighted term; both add up over lessons.

        `counts` are the global ones: of all micro-batches and ranks of the step. A count of 0 gives a loss of 0.
        """
        share, terms = torch.zeros((), device=view.final_ND.device), {}
        for loss, count in zip(self._losses(), counts.tolist(), strict=True):
            result = cast(LossSum, loss(view, lesson))
            share = share + result.total / max(count, 1.0)
            terms.update({name: value / max(count, 1.0) for name, value in result.terms.items()})
        return share, terms

    def _losses(self) -> list[HeadLoss | HiddenLoss]:
        return cast("list[HeadLoss | HiddenLoss]", list(self.losses))
