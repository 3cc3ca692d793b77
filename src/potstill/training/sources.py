"""Where lessons come from: rows in a seeded order, with a teacher who is asked as they come, or with none.

Whether the teacher is a model or a store of what it said is not known here.
Refuses to remember anything but a position: the order is a function of the epoch, and what is done to a row one of its
number in the whole training, so that resuming is exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Protocol

import torch
from torch import Tensor

from potstill.errors import DataError, RecipeError
from potstill.types import Batch, Lesson, Reader, Signal, Wants

__all__ = ["RowSource", "Rows", "first_rows", "join_rows"]


class Rows(Protocol):
    """Packed rows, or texts, by number."""

    def __len__(self) -> int: ...

    def batch(self, row_numbers: Sequence[int]) -> Batch:
        """These rows as a batch."""
        ...


Order = Callable[[int], Tensor]
"""The order of all rows in an epoch, by its number: int64 [rows], every row once."""


def first_rows(rows: int, seed: int, count: int, *, order: Order | None = None) -> Sequence[int]:
    """Ascending numbers of the rows, of so many, that RowSource draws first, `count` of them, by this seed or order."""
    if count >= rows:
        return range(rows)
    return sorted((order(0) if order else _order(rows, seed, 0))[:count].tolist())


class RowSource:
    """Rows in a fresh order each epoch, `batch_rows` a step over all ranks, `rows_at_once` a micro-batch.

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
        order: Order | None = None,
        prepare: Callable[[Batch, int], Batch] | None = None,
        rank: tuple[int, int] = (0, 1),
    ) -> None:
        """`rank` is (this process, number of processes); without an `order`, every epoch has a random one of the seed.

        `prepare` is called with every row, as a batch of its own (padded as its micro-batch is), and the number of rows
        that all ranks drew before it: what is random in it must follow from that number, and is then the same whatever
        the micro-batches and ranks, and after a resumption. It gives a batch of the same shape.

        Raises RecipeError where some process would have no row in a step.
        """
        if batch_rows < rank[1]:
            raise RecipeError(
                f"training.batch_rows: {batch_rows} rows leave some of {rank[1]} processes without. "
                f"Use at least {rank[1]}."
            )
        self._rows, self._seed = rows, seed
        self._batch_rows, self._rows_at_once = batch_rows, rows_at_once
        self._teacher, self._wants, self._prepare = teacher, wants or Wants(), prepare
        self._rank, self._drawn = rank, 0
        self._order_of = order or (lambda epoch: _order(len(rows), seed, epoch))
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def draw(self) -> list[Batch]:
        """The micro-batches of the next optimiser step, this rank's share of them."""
        mine = list(range(self._drawn, self._drawn + self._batch_rows))[self._rank[0] :: self._rank[1]]
        self._drawn += self._batch_rows
        starts = range(0, len(mine), self._rows_at_once)
        return [self._batch(mine[start : start + self._rows_at_once]) for start in starts]

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

    def _batch(self, indices: Sequence[int]) -> Batch:
        """The rows that come at these places of the whole training."""
        batch = self._rows.batch([self._number(index) for index in indices])
        if self._prepare is None:
            return batch
        return join_rows([self._prepare(batch.rows(i, i + 1), index) for i, index in enumerate(indices)])

    def _number(self, index: int) -> int:
        """Row number of the index-th row ever drawn."""
        epoch, place = divmod(index, len(self._rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        return int(self._order[place])


def join_rows(rows: Sequence[Batch]) -> Batch:
    """One batch of these, all of one length."""
    joined: dict[str, Any] = {}
    for field in fields(Batch):
        parts = [getattr(row, field.name) for row in rows]
        if isinstance(parts[0], Tensor):
            joined[field.name] = torch.cat(parts)
        else:
            joined[field.name] = None if parts[0] is None else tuple(itertools.chain(*parts))
    return Batch(**joined)


def _order(rows: int, seed: int, epoch: int) -> Tensor:
    """The order of the rows in an epoch. int64 [rows]."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
