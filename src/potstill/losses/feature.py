"""Distances between hidden states, layer by layer. Padding never counts.

Suffixes: B rows, T positions, D width, M attended positions. Refuses to choose which layers: the recipe's map says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from potstill.types import Batch, Lesson, LossSum, Offer, StudentView

__all__ = ["HiddenLoss", "hidden_cosine", "hidden_mse"]


def hidden_mse(student_MD: Tensor, teacher_MD: Tensor) -> Tensor:
    """Mean over the width of the squared difference, one value per position [M], float32 (float64 for float64).

    Romero et al. (2014), arXiv:1412.6550, eq. 3, per position and divided by D so that widths compare.
    """
    return (_wide(student_MD) - _wide(teacher_MD)).square().mean(-1)


def hidden_cosine(student_MD: Tensor, teacher_MD: Tensor) -> Tensor:
    """1 - cosine of the angle, one value per position [M], in [0, 2], float32 (float64 for float64).

    Sanh et al. (2019), arXiv:1910.01108, section 3.
    """
    return 1.0 - nn.functional.cosine_similarity(_wide(student_MD), _wide(teacher_MD), dim=-1)


class HiddenLoss(nn.Module):
    """weight * distance, summed over attended positions and averaged over the pairs of a layer map.

    Where widths differ, a learned linear projection lifts the student's states; it trains along and is never exported.
    """

    needs: frozenset[Offer] = frozenset({Offer.HIDDEN})

    def __init__(
        self,
        kind: Literal["hidden_mse", "hidden_cosine"],
        layers: Mapping[int, int],
        widths: tuple[int, int],
        weight: float = 1.0,
    ) -> None:
        """`layers` maps student to teacher layers; `widths` are the student's and the teacher's hidden sizes."""
        super().__init__()
        self.kind, self.layers, self.weight = kind, dict(layers), weight
        same = widths[0] == widths[1]
        self.projections = nn.ModuleDict({} if same else {str(s): nn.Linear(*widths, bias=False) for s in layers})

    def count(self, batch: Batch) -> int:
        """Attended positions: all but padding."""
        return int((batch.segments_BT > 0).sum())

    def forward(self, view: StudentView, lesson: Lesson) -> LossSum:
        """The weighted sum over attended positions. Raises KeyError when a mapped layer was not read."""
        distance = hidden_mse if self.kind == "hidden_mse" else hidden_cosine
        attended_BT = lesson.batch.segments_BT > 0
        values = []
        for student, teacher in self.layers.items():
            student_MD = _wide(view.hidden[student][attended_BT])
            if str(student) in self.projections:
                student_MD = self.projections[str(student)](student_MD)
            values.append(distance(student_MD, lesson.signal.hidden[teacher][attended_BT]).sum())
        total = torch.stack(values).mean()
        return LossSum(self.weight * total, self.count(lesson.batch), {self.kind: total.detach()})


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
