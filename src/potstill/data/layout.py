"""Which piece goes into which row, so that rows are full. Refuses to move tokens: only numbers of pieces pass here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Int64s", "Layout", "lay_out", "plan_rows"]

Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Layout:
    """Row r holds the pieces `order[row_starts[r] : row_starts[r + 1]]`."""

    row_starts: Int64s
    order: Int64s

    @property
    def num_rows(self) -> int:
        """Rows of it."""
        return len(self.row_starts) - 1


def lay_out(lengths: Int64s, sequence_length: int, random: np.random.Generator) -> Layout:
    """Rows for pieces of these lengths, which are in 1..sequence_length, shuffled."""
    row_of_piece = plan_rows(lengths, sequence_length)
    # The plan puts long pieces first. Shuffled, the first rows are a fair sample of the window.
    row_of_piece = random.permutation(row_of_piece.max() + 1)[row_of_piece]
    row_starts = np.concatenate([[0], np.cumsum(np.bincount(row_of_piece))])
    return Layout(row_starts, order=np.argsort(row_of_piece, kind="stable"))


def plan_rows(lengths: Int64s, sequence_length: int) -> Int64s:
    """The row of each piece: best fit, the longest first. int64 [pieces]; rows are numbered 0, 1, ... without gaps.

    Every length is in 1..sequence_length. Each piece goes to a row with the least room that takes it: O(n log n).
    """
    row_of_piece = np.empty(len(lengths), dtype=np.int64)
    rows_with_room: list[list[int]] = [[] for _ in range(sequence_length)]
    open_rooms = 0  # bit r is set while some row has room for exactly r more positions
    num_rows = 0
    sizes = lengths.tolist()
    for piece in np.argsort(-lengths, kind="stable").tolist():
        fitting = open_rooms >> sizes[piece]
        if fitting:
            left = (fitting & -fitting).bit_length() - 1  # the lowest bit: the tightest fit
            room = sizes[piece] + left
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                open_rooms ^= 1 << room
        else:
            row, left = num_rows, sequence_length - sizes[piece]
            num_rows += 1
        row_of_piece[piece] = row
        if left:
            rows_with_room[left].append(row)
            open_rooms |= 1 << left
    return row_of_piece
