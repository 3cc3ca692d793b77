"""How positions, or texts, relate to each other, as terms of an objective: attention maps, MiniLM, RKD, CKA.

The formulas are in `relation`; here they meet a lesson: which layers, over what, and how many values are summed.
Suffixes: B rows, T positions, D width, S segments. Refuses to relate positions of different documents, and the layer
below the first block where a term is about attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from potstill.losses.feature import pooled_pair
from potstill.losses.relation import (
    attention_kl,
    attention_mse,
    gram_mse,
    linear_cka,
    minilm,
    minilm_v2,
    rkd_angle,
    rkd_distance,
)
from potstill.types import Batch, Lesson, LossSum, Offer, StudentView, Wants

__all__ = ["AttentionLoss", "SimilarityLoss", "VectorsLoss"]

_MAPS = {"attention_mse": attention_mse, "attention_kl": attention_kl}
_SIMILARITIES = {"rkd_distance": rkd_distance, "rkd_angle": rkd_angle, "gram_mse": gram_mse, "linear_cka": linear_cka}


class AttentionLoss(nn.Module):
    """weight * distance of attention maps, summed over attended queries and averaged over the pairs of a layer map.

    `relation.attention_mse` or `relation.attention_kl`. Blocks are numbered from 1.
    """

    needs: frozenset[Offer] = frozenset({Offer.ATTENTION})

    def __init__(
        self,
        kind: Literal["attention_mse", "attention_kl"],
        layers: Mapping[int, int],
        *,
        causal: bool,
        heads: Literal["matched", "averaged"] = "matched",
        weight: float = 1.0,
    ) -> None:
        """`layers` maps the student's blocks to the teacher's; `causal` says that nobody attends to what comes later.

        Raises ValueError for a block 0.
        """
        super().__init__()
        _refuse_embeddings(kind, layers)
        self.kind, self.layers, self.weight = kind, dict(layers), weight
        self._distance = partial(_MAPS[kind], causal=causal, heads=heads)

    def wants(self) -> tuple[Wants, Wants]:
        """What to read from the student, and from the teacher."""
        return Wants(attentions=tuple(self.layers)), Wants(attentions=tuple(self.layers.values()))

    def count(self, batch: Batch) -> int:
        """Attended positions: all but padding."""
        return int((batch.segments_BT > 0).sum())

    def forward(self, view: StudentView, lesson: Lesson) -> LossSum:
        """The weighted sum over queries. Raises KeyError when a mapped block was not read, ValueError for misfits."""
        pairs = [(view.attentions[own], lesson.signal.attentions[its]) for own, its in self.layers.items()]
        return _add_up(self, self._distance, pairs, lesson.batch)


class VectorsLoss(nn.Module):
    """weight * KL of the relations between queries, keys and values, summed over attended positions; mean over pairs.

    `relation.minilm` or `relation.minilm_v2`. Blocks are numbered from 1.
    """

    needs: frozenset[Offer] = frozenset({Offer.VECTORS})

    def __init__(
        self,
        kind: Literal["minilm", "minilm_v2"],
        layers: Mapping[int, int],
        *,
        causal: bool,
        relation_heads: int | None = None,
        weight: float = 1.0,
    ) -> None:
        """`layers` maps the student's blocks to the teacher's; `relation_heads` are minilm_v2's, which needs them.

        Raises ValueError for a block 0, and for relation heads that are missing or have no part.
        """
        super().__init__()
        _refuse_embeddings(kind, layers)
        if (kind == "minilm_v2") != (relation_heads is not None):
            raise ValueError(f"{kind}: relation_heads={relation_heads}: minilm_v2 needs a number, minilm takes none.")
        self.kind, self.layers, self.weight = kind, dict(layers), weight
        self._distance: Callable[..., Tensor] = partial(minilm, causal=causal)
        if relation_heads is not None:
            self._distance = partial(minilm_v2, causal=causal, relation_heads=relation_heads)

    def wants(self) -> tuple[Wants, Wants]:
        """What to read from the student, and from the teacher."""
        return Wants(vectors=tuple(self.layers)), Wants(vectors=tuple(self.layers.values()))

    def count(self, batch: Batch) -> int:
        """Attended positions: all but padding."""
        return int((batch.segments_BT > 0).sum())

    def forward(self, view: StudentView, lesson: Lesson) -> LossSum:
        """The weighted sum over positions. Raises KeyError when a mapped block was not read, ValueError for misfits."""
        pairs = [(view.vectors[own], lesson.signal.vectors[its]) for own, its in self.layers.items()]
        return _add_up(self, self._distance, pairs, lesson.batch)


class SimilarityLoss(nn.Module):
    """weight * how differently two sets of points lie: positions of each document, or the texts of a batch.

    `relation.rkd_distance`, `rkd_angle`, `gram_mse` or `linear_cka`. Over positions: hidden states, summed over the
    positions (linear CKA: over documents) and averaged over the pairs of a layer map. Over texts: their vectors, summed
    over the texts (linear CKA: one value a set). One set are the texts that go through the models at once, so that here
    the size of a micro-batch matters.
    """

    def __init__(
        self,
        kind: Literal["rkd_distance", "rkd_angle", "gram_mse", "linear_cka"],
        layers: Mapping[int, int],
        *,
        over: Literal["positions", "texts"] = "positions",
        weight: float = 1.0,
    ) -> None:
        """`layers` maps student to teacher layers, 0 being the embeddings' output; empty for `over="texts"`.

        Raises ValueError where layers are missing, or have no part.
        """
        super().__init__()
        if bool(layers) != (over == "positions"):
            raise ValueError(
                f"{kind} over {over}: got layers {dict(layers)}: needs some for positions, none for texts."
            )
        self.kind, self.layers, self.weight, self.over = kind, dict(layers), weight, over
        self.needs = frozenset({Offer.HIDDEN if over == "positions" else Offer.POOLED})

    def wants(self) -> tuple[Wants, Wants]:
        """What to read from the student, and from the teacher."""
        if self.over == "texts":
            return Wants(pooled=True), Wants(pooled=True)
        return Wants(layers=tuple(self.layers)), Wants(layers=tuple(self.layers.values()))

    def count(self, batch: Batch) -> int:
        """Attended positions or texts; for linear CKA documents, or 1 for the texts of a batch."""
        if self.over == "texts":
            return min(len(batch), 1) if self.kind == "linear_cka" else len(batch)
        if self.kind == "linear_cka":
            return sum(len(row_T[row_T > 0].unique()) for row_T in batch.segments_BT)
        return int((batch.segments_BT > 0).sum())

    def forward(self, view: StudentView, lesson: Lesson) -> LossSum:
        """The weighted sum. Raises KeyError when a mapped layer was not read, ValueError where vectors are missing."""
        if self.over == "texts":
            student_BD, teacher_BD = pooled_pair(view, lesson)
            one_1B = torch.ones(1, len(student_BD), dtype=torch.long, device=student_BD.device)
            pairs = [(student_BD.unsqueeze(0), teacher_BD.unsqueeze(0))]
            return _add_up(self, _SIMILARITIES[self.kind], pairs, lesson.batch, segments_BT=one_1B)
        pairs = [(view.hidden[own], lesson.signal.hidden[its]) for own, its in self.layers.items()]
        return _add_up(self, _SIMILARITIES[self.kind], pairs, lesson.batch)


def _add_up(
    loss: AttentionLoss | VectorsLoss | SimilarityLoss,
    distance: Callable[..., Tensor],
    pairs: Sequence[tuple[Any, Any]],
    batch: Batch,
    *,
    segments_BT: Tensor | None = None,
) -> LossSum:
    """The loss's sum over the values of each pair of (student's, teacher's), averaged over the pairs."""
    segments_BT = batch.segments_BT if segments_BT is None else segments_BT
    total = torch.stack([distance(own, its, segments_BT).sum() for own, its in pairs]).mean()
    return LossSum(loss.weight * total, loss.count(batch), {loss.kind: total.detach()})


def _refuse_embeddings(kind: str, layers: Mapping[int, int]) -> None:
    if not layers or min(*layers, *layers.values()) < 1:
        raise ValueError(
            f"{kind}: got the layers {dict(layers)}, needs blocks, which begin with 1: layer 0 is the embeddings' "
            "output, where nothing attends. Name blocks in losses[].layers."
        )
