"""What a training reads, by task: packed rows as they are, packed rows with masks, or texts of like length together.

Refuses to draw masks from anything but the seed and a row's place in the training, so that continuing is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.data import MaskRule, PackedRows, TextRows, bucketed_order, mask_tokens
from potstill.data.tokens import POOLED_BATCHES
from potstill.pipeline.cast import Cast
from potstill.recipes import Recipe
from potstill.recipes.schema import MaskedLM, Training
from potstill.training import join_rows
from potstill.types import Batch, Lesson, Reader, Role, Signal, Wants

__all__ = [
    "CONTROL",
    "Silent",
    "TaskRows",
    "batches_by_length",
    "held_out_batches",
    "held_out_lessons",
    "mask_rule",
    "masked",
    "open_rows",
]

CONTROL = "control"
"""Folder of the rows that the control arm alone learns, where they are others than the student's."""

HELD_OUT_SEED = 0x5EED
"""Of the masks and of the choice of held-out rows: the same in every step and for every arm."""


class Silent:
    """A teacher that says nothing of a row, because it has written it."""

    def read(self, batch: Batch, wants: Wants) -> Signal:  # noqa: ARG002
        """Nothing."""
        return Signal()


@dataclass(frozen=True, slots=True)
class TaskRows:
    """Rows by number, with the order in which they are drawn and what is done to a batch (both None: nothing)."""

    rows: PackedRows | TextRows
    order: Callable[[int], Tensor] | None = None
    prepare: Callable[[Batch, int], Batch] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def facts(self) -> dict[str, int]:
        """What is to be told of them: texts that are longer than they may be, and words that were lost with that."""
        if not isinstance(self.rows, TextRows):
            return {}
        lost = {"lost_words": self.rows.lost_words} if self.rows.lost_words else {}
        return {"overlong": self.rows.overlong_count, **lost}

    def labelled(self, training: Training, seed: int) -> TaskRows:
        """Those that hard labels can teach: of texts the labelled ones, else all."""
        if not isinstance(self.rows, TextRows) or len(self.rows.labelled) == len(self.rows):
            return self
        found = self.rows.subset(self.rows.labelled)
        return replace(self, rows=found, order=_order(found, training, seed))


def open_rows(recipe: Recipe, cast: Cast, prepared: Path, *, tokenizer: Any, training: Training) -> TaskRows:
    """The rows of this recipe's task for a training of a model with this tokenizer."""
    if cast.role is Role.CAUSAL:
        return TaskRows(PackedRows(prepared / "train"))
    if cast.role is Role.MASKED:
        rule = mask_rule(recipe, tokenizer)
        return TaskRows(
            PackedRows(prepared / "train"), None, lambda batch, drawn: masked(batch, rule, cast.seed, drawn)
        )
    rows = cast.rows(prepared, "train", tokenizer)
    return TaskRows(rows, _order(rows, training, cast.seed))


def _order(rows: TextRows, training: Training, seed: int) -> Callable[[int], Tensor]:
    pooled = POOLED_BATCHES if training.group_by_length else 1
    return bucketed_order(rows.lengths, batch_rows=training.batch_rows, seed=seed, pooled=pooled)


def mask_rule(recipe: Recipe, tokenizer: Any) -> MaskRule:
    """How tokens are hidden."""
    task = recipe.task
    if not isinstance(task, MaskedLM):
        raise ValueError(f"task.kind={task.kind} hides no tokens")
    return MaskRule(
        masked=task.masked,
        by_mask=task.by_mask,
        by_random=task.by_random,
        mask_id=tokenizer.mask_token_id,
        vocabulary=1 + max(tokenizer.get_vocab().values()),
        special_ids=tuple(tokenizer.all_special_ids),
    )


def masked(batch: Batch, rule: MaskRule, seed: int, drawn: int) -> Batch:
    """The batch with masks that follow from the seed and the number of rows drawn before it."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + drawn) % 2**63)
    return mask_tokens(batch, rule, generator)


def held_out_batches(
    recipe: Recipe, cast: Cast, prepared: Path, *, tokenizer: Any, most: int | None, at_once: int, split: str
) -> Iterator[Batch]:
    """Held-out rows, at most so many, as batches: packed ones from the first on, masked once and for all; or texts."""
    if cast.role in (Role.CAUSAL, Role.MASKED):
        packed = PackedRows(prepared / split)
        count = min(len(packed), most or len(packed))
        rule = mask_rule(recipe, tokenizer) if cast.role is Role.MASKED else None
        for start in range(0, count, at_once):
            batch = packed.batch(range(start, min(start + at_once, count)))
            # Row by row: what is hidden must not depend on how many are read together.
            yield (
                join_rows([masked(batch.rows(i, i + 1), rule, HELD_OUT_SEED, start + i) for i in range(len(batch))])
                if rule
                else batch
            )
        return
    rows = cast.rows(prepared, split, tokenizer)
    for numbers in _some(rows, most, at_once):
        yield rows.batch(numbers)


def held_out_lessons(batches: Iterable[Batch], teacher: Reader, wants: Wants) -> list[Lesson]:
    """The batches with what the teacher says of them."""
    return [Lesson(batch, teacher.read(batch, wants)) for batch in batches]


def _some(rows: TextRows, most: int | None, at_once: int) -> Iterator[Sequence[int]]:
    """Numbers of some texts, drawn once (files are often sorted by class), the short ones together."""
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(HELD_OUT_SEED))[: most or len(rows)]
    numbers = sorted(drawn.tolist(), key=lambda number: int(rows.lengths[number]))
    for start in range(0, len(numbers), at_once):
        yield numbers[start : start + at_once]


def batches_by_length(lengths: NDArray[np.int64], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of texts of nearly equal length together, the longest first: `batch_tokens` with padding at most."""
    batch: list[int] = []
    for number in np.argsort(-lengths, kind="stable").tolist():
        if batch and int(lengths[batch[0]]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
