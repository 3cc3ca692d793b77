"""Distances between vectors: of hidden states, layer by layer, and of whole texts. Padding never counts.

Suffixes: B rows, T positions, D width, M attended positions, N positions or texts. Refuses to choose which layers: the
recipe's map says it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from potstill.types import Batch, Lesson, LossSum, Offer, StudentView, Wants

__all__ = ["HiddenLoss", "PooledLoss", "hidden_cosine", "hidden_mse", "pooled_pair"]


def hidden_mse(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean over the width of the squared difference, one value per vector [N], float32 (float64 for float64).

    Romero et al. (2014), arXiv:1412.6550, eq. 3, per position and divided by D so that widths compare.
    """
    return (_wide(student_ND) - _wide(teacher_ND)).square().mean(-1)


def hidden_cosine(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """1 - cosine of the angle, one value per vector [N], in [0, 2], float32 (float64 for float64).

    Sanh et al. (2019), arXiv:1910.01108, section 3.
    """
    return 1.0 - nn.functional.cosine_similarity(_wide(student_ND), _wide(teacher_ND), dim=-1)


_DISTANCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hidden_mse": hidden_mse,
    "hidden_cosine": hidden_cosine,
    "vector_mse": hidden_mse,
    "vector_cosine": hidden_cosine,
}


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

    def wants(self) -> tuple[Wants, Wants]:
        """What to read from the student, and from the teacher."""
        return Wants(layers=tuple(self.layers)), Wants(layers=tuple(self.layers.values()))

    def count(self, batch: Batch) -> int:
        """Attended positions: all but padding."""
        return int((batch.segments_BT > 0).sum())

    def forward(self, view: StudentView, lesson: Lesson) -> LossSum:
        """The weighted sum over attended positions. Raises KeyError when a mapped layer was not read."""
        attended_BT = lesson.batch.segments_BT > 0
        values = []
        for student, teacher in self.layers.items():
            student_MD = _wide(view.hidden[student][attended_BT])
            if str(student) in self.projections:
                student_MD = self.projections[str(student)](student_MD)
            values.append(_DISTANCES[self.kind](student_MD, lesson.signal.hidden[teacher][attended_BT]).sum())
        total = torch.stack(values).mean()
        return LossSum(self.weight * total, self.count(lesson.batch), {self.kind: total.detach()})


class PooledLoss(nn.Module):
    """weight * distance of the vectors of whole texts, summed over the texts (rows) of the batch.

    Where widths differ, a learned linear projection lifts the student's vectors; it trains along and is never exported.
    """

    needs: frozenset[Offer] = frozenset({Offer.POOLED})

    def __init__(
        self, kind: Literal["vector_mse", "vector_cosine"], widths: tuple[int, int], weight: float = 1.0
    ) -> None:
        """`widths` are those of the student's and the teacher's vectors."""
        super().__init__()
        self.kind, self.weight = kind, weight
        self.projection = None if widths[0] == widths[1] else nn.Linear(*widths, bias=False)

    def wants(self) -> tuple[Wants, Wants]:
        """What to read from the student, and from the teacher."""
        return Wants(pooled=True), Wants(pooled=True)

    def count(self, batch: Batch) -> int:
        """Texts, one a row."""
        return len(batch)

    def forward(self, view: StudentView, lesson: Lesson) -> LossSum:
        """The weighted sum over texts. Raises ValueError where a side gave no vectors, or not one a row."""
        student_BD, teacher_BD = pooled_pair(view, lesson)
        lifted_BD = _wide(student_BD) if self.projection is None else self.projection(_wide(student_BD))
        total = _DISTANCES[self.kind](lifted_BD, teacher_BD).sum()
        return LossSum(self.weight * total, self.count(lesson.batch), {self.kind: total.detach()})


def pooled_pair(view: StudentView, lesson: Lesson) -> tuple[Tensor, Tensor]:
    """The vectors of the batch's texts, float [B, D] on both sides. Raises ValueError where they are not that."""
    for role, vectors_BD in (("student", view.pooled_BD), ("teacher", lesson.signal.pooled_BD)):
        if vectors_BD is None or vectors_BD.ndim != 2 or len(vectors_BD) != len(lesson.batch):
            got = "none" if vectors_BD is None else tuple(vectors_BD.shape)
            raise ValueError(
                f"the {role}'s vectors of texts: got {got}, needs [{len(lesson.batch)}, D], one a row. Read them with "
                "Wants(pooled=True)."
            )
    assert view.pooled_BD is not None
    assert lesson.signal.pooled_BD is not None
    return view.pooled_BD, lesson.signal.pooled_BD


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
