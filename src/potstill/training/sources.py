"""Where lessons come from: packed rows in a seeded order, with a teacher who is asked as they come, or with none.

Whether the teacher is a model or a store of what it said is not known here.
Refuses to remember anything but a position: the order is a function of seed and epoch, so resuming is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from potstill.errors import DataError, RecipeError
from potstill.types import Batch, Lesson, Reader, Signal, Wants

__all__ = ["RowSource", "Rows", "first_rows"]


class Rows(Protocol):
    """Packed rows by number."""

    def __len__(self) -> int: ...

    def batch(self, row_numbers: Sequence[int]) -> Batch:
        """These rows as a batch."""
        ...


def first_rows(rows: int, seed: int, count: int) -> Sequence[int]:
    """Ascending numbers of the rows, of so many, that a RowSource of this seed draws among its first `count`."""
    return range(rows) if count >= rows else sorted(_order(rows, seed, 0)[:count].tolist())


class RowSource:
    """Rows in a fresh seeded order each epoch, `batch_rows` a step over all ranks, `rows_at_once` a micro-batch.

    With a teacher the lessons are online ones; without, their signals are empty (hard labels).
    """

    def __init__(
        self,
        rows: Rows,
        *,
        seed: int,
        batch_rows: int,
        rows_at_once: int,
        teacher: Reader | None = None,
        wants: Wants | None = None,
        mark: Callable[[Batch], Batch] | None = None,
        rank: tuple[int, int] = (0, 1),
    ) -> None:
        """`rank` is (this process, number of processes); `mark` says where a teacher speaks who does not everywhere.

        Raises RecipeError where some process would have no row in a step.
        """
        if batch_rows < rank[1]:
            raise RecipeError(
                f"training.batch_rows: {batch_rows} rows leave some of {rank[1]} processes without. "
                f"Use at least {rank[1]}."
            )
        self._rows, self._seed = rows, seed
        self._batch_rows, self._rows_at_once = batch_rows, rows_at_once
        self._teacher, self._wants, self._mark = teacher, wants or Wants(), mark
        self._rank, self._drawn = rank, 0
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def draw(self) -> list[Batch]:
        """The micro-batches of the next optimiser step, this rank's share of them."""
        numbers = [self._number(i) for i in range(self._drawn, self._drawn + self._batch_rows)]
        self._drawn += self._batch_rows
        mine = numbers[self._rank[0] :: self._rank[1]]
        starts = range(0, len(mine), self._rows_at_once)
        batches = [self._rows.batch(mine[start : start + self._rows_at_once]) for start in starts]
        return list(map(self._mark, batches)) if self._mark else batches

    def lesson(self, batch: Batch) -> Lesson:
        """The batch with what the teacher says of it."""
        signal = self._teacher.read(batch, self._wants) if self._teacher else Signal()
        return Lesson(batch, signal.to(batch.ids_BT.device))

    def state_dict(self) -> dict[str, Any]:
        """How many rows were drawn, and from what: another order or data set is not continued silently."""
        return {"drawn": self._drawn, "rows": len(self._rows), "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the rows drawn. Raises DataError when the state is of other data or of another seed."""
        for name, ours in (("rows", len(self._rows)), ("seed", self._seed)):
            if state[name] != ours:
                raise DataError(
                    f"training.checkpoint: it was saved with {name}={state[name]}, the run now has {name}={ours}. "
                    "Restore the recipe and data, or use another run_dir."
                )
        self._drawn = state["drawn"]

    def _number(self, index: int) -> int:
        """Row number of the index-th row ever drawn."""
        epoch, place = divmod(index, len(self._rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, _order(len(self._rows), self._seed, epoch)
        return int(self._order[place])


def _order(rows: int, seed: int, epoch: int) -> Tensor:
    """The order of the rows in an epoch. int64 [rows]."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
