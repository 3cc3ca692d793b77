"""Packed rows: documents cut, shifted and laid side by side, on disk. The only place of the project that shifts.

A piece is a run of (input token, target) pairs of one document; a row holds pieces as its segments, then padding.
Refuses to open files that do not fit each other: training on half a file would look like training.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.chat import Encoded
from potstill.errors import DataError
from potstill.types import IGNORE, Batch

__all__ = ["PackedRows", "PackedStats", "plan_rows", "write_rows"]

_STATS = "rows.json"
_TOKENS = ("ids.npy", "targets.npy", "segments.npy")  # int32 [rows, sequence_length] each
_ROW_STARTS = "row_starts.npy"  # int64 [rows + 1], where a row's segments start in the next
_DOCUMENTS = "segment_documents.npy"  # int64 [segments], document numbers
_EXAMPLES = "documents.jsonl"  # id and source of each document
_EXAMPLE_STARTS = "example_starts.npy"  # int64 [documents + 1], where its line starts
_SPOOL = "spool.bin"
_ROWS_AT_ONCE = 256

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackedStats:
    """What was packed. Tokens are input positions without padding; supervised are those that have a target."""

    sequence_length: int
    documents: int
    """Documents read, whether or not anything of them was kept."""
    dropped_pieces: int
    """Pieces left out because nothing is learned in them."""
    segments: int
    rows: int
    tokens: int
    supervised: int

    @property
    def fill(self) -> float:
        """Share of the rows' positions that is not padding."""
        return self.tokens / (self.rows * self.sequence_length)


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The pieces in the spool, in order: an int32 run of inputs, then one of targets, piece by piece."""

    lengths: Int64s
    documents: Int64s
    example_starts: Int64s
    supervised: int
    dropped: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """Row r holds the pieces `order[row_starts[r] : row_starts[r + 1]]`."""

    row_starts: Int64s
    order: Int64s

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1


def write_rows(
    encoded: Iterable[Encoded], folder: Path, *, sequence_length: int, pad_id: int, seed: int = 0
) -> PackedStats:
    """Cut, shift and pack documents into rows of `sequence_length` positions, in an order shuffled by `seed`.

    A document of n tokens gives n - 1 pairs: input token i, target token i + 1, or IGNORE where that is not learned. A
    longer document is cut into pieces of `sequence_length` pairs, so that each learned token, a document's first
    excepted, is a target exactly once. Pairs after a piece's last target teach nothing and are left out. Successive
    encodings of one id are one document. Memory holds some bytes a piece; the tokens pass through a file.

    Raises:
        DataError: nothing is to be learned in any document.
        OSError: the folder cannot be written, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _STATS).unlink(missing_ok=True)  # written last: without it the folder does not open
    try:
        pieces = _spool_pieces(encoded, folder, sequence_length)
        layout = _lay_out(pieces, sequence_length, seed)
        blocks = _row_blocks(folder / _SPOOL, pieces, layout, pad_id=pad_id, sequence_length=sequence_length)
        _write_blocks(blocks, folder, (layout.num_rows, sequence_length))
    finally:
        (folder / _SPOOL).unlink(missing_ok=True)
    np.save(folder / _ROW_STARTS, layout.row_starts)
    np.save(folder / _DOCUMENTS, pieces.documents[layout.order])
    np.save(folder / _EXAMPLE_STARTS, pieces.example_starts)
    stats = PackedStats(
        sequence_length=sequence_length,
        documents=len(pieces.example_starts) - 1,
        dropped_pieces=pieces.dropped,
        segments=len(layout.order),
        rows=layout.num_rows,
        tokens=int(pieces.lengths.sum()),
        supervised=pieces.supervised,
    )
    (folder / _STATS).write_text(json.dumps(asdict(stats), indent=1), encoding="utf-8")
    return stats


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


class PackedRows:
    """Packed rows of a folder, memory-mapped: opening reads no token."""

    def __init__(self, folder: Path) -> None:
        """Open what `write_rows` wrote.

        Raises:
            DataError: a file is missing, cut short, or does not fit the others.
        """
        self.stats = _read_stats(folder)
        rows = self.stats.rows
        shape = (rows, self.stats.sequence_length)
        self._ids, self._targets, self._segments = (_open_array(folder / name, shape) for name in _TOKENS)
        self._row_starts = _open_array(folder / _ROW_STARTS, (rows + 1,))
        self._documents = _open_array(folder / _DOCUMENTS, (self.stats.segments,))
        self._example_starts = _open_array(folder / _EXAMPLE_STARTS, (self.stats.documents + 1,))
        self._examples = _open_examples(folder / _EXAMPLES, int(self._example_starts[-1]))
        if self._row_starts[-1] != self.stats.segments or self._documents.max() >= self.stats.documents:
            raise _damaged(folder / _ROW_STARTS, "its segments are not those of the other files")

    @property
    def sequence_length(self) -> int:
        """Positions of a row."""
        return self.stats.sequence_length

    @property
    def num_tokens(self) -> int:
        """Input positions of all rows, padding not counted."""
        return self.stats.tokens

    @property
    def num_supervised(self) -> int:
        """Positions of all rows that have a target."""
        return self.stats.supervised

    def __len__(self) -> int:
        return self.stats.rows

    def sources(self) -> set[str]:
        """The sources of all documents."""
        return {json.loads(line)[1] for line in self._examples.tobytes().splitlines()}

    def batch(self, row_numbers: Sequence[int]) -> Batch:
        """The rows of these numbers, in this order, as a batch of int64 tensors [B, T] that knows its examples.

        Raises:
            IndexError: there is no such row.
        """
        rows = [range(len(self))[number] for number in row_numbers]
        documents = [list(self._documents_of(row)) for row in rows]
        return Batch(
            ids_BT=_take(self._ids, rows),
            targets_BT=_take(self._targets, rows),
            segments_BT=_take(self._segments, rows),
            examples=tuple(tuple(name for name, _ in row) for row in documents),
            sources=tuple(tuple(source for _, source in row) for row in documents),
        )

    def _documents_of(self, row: int) -> Iterator[tuple[str, str]]:
        """Id and source of the document of each segment."""
        for document in self._documents[self._row_starts[row] : self._row_starts[row + 1]]:
            start, stop = self._example_starts[document : document + 2]
            name, source = json.loads(self._examples[start:stop].tobytes())
            yield name, source


def _spool_pieces(encoded: Iterable[Encoded], folder: Path, sequence_length: int) -> _Pieces:
    lengths, documents, starts = array("q"), array("q"), array("q", [0])
    supervised = dropped = 0
    last_id: str | None = None
    with (folder / _SPOOL).open("wb") as spool, (folder / _EXAMPLES).open("wb") as examples:
        for document in encoded:
            if document.id != last_id:
                line = json.dumps([document.id, document.source]).encode() + b"\n"
                starts.append(starts[-1] + examples.write(line))
                last_id = document.id
            for piece in _cut(document, sequence_length):
                targets = np.flatnonzero(piece[1] != IGNORE)
                if not targets.size:
                    dropped += 1
                    continue
                spool.write(piece[:, : targets[-1] + 1].tobytes())
                lengths.append(int(targets[-1]) + 1)
                documents.append(len(starts) - 2)
                supervised += targets.size
    if not lengths:
        raise DataError(
            f"data: nothing is to be learned in the {len(starts) - 1} documents of {folder.name}. "
            "Give more or longer documents, or change data.splits."
        )
    return _Pieces(_int64s(lengths), _int64s(documents), _int64s(starts), supervised, dropped)


def _cut(document: Encoded, sequence_length: int) -> Iterator[Int32s]:
    """The pieces of a document, int32 [2, at most sequence_length]: inputs and targets. Here is the shift."""
    ids = np.asarray(document.ids, dtype=np.int32)
    learn = np.asarray(document.learn, dtype=np.bool_)
    pairs = np.stack([ids[:-1], np.where(learn[1:], ids[1:], np.int32(IGNORE))])
    for start in range(0, pairs.shape[1], sequence_length):
        yield pairs[:, start : start + sequence_length]


def _int64s(numbers: array[int]) -> Int64s:
    return np.frombuffer(numbers, dtype=np.int64)


def _lay_out(pieces: _Pieces, sequence_length: int, seed: int) -> _Layout:
    row_of_piece = plan_rows(pieces.lengths, sequence_length)
    # The plan puts long pieces first. Shuffled, the first rows are a fair sample of all.
    row_of_piece = np.random.default_rng(seed).permutation(row_of_piece.max() + 1)[row_of_piece]
    row_starts = np.concatenate([[0], np.cumsum(np.bincount(row_of_piece))])
    return _Layout(row_starts, order=np.argsort(row_of_piece, kind="stable"))


def _row_blocks(
    spool: Path, pieces: _Pieces, layout: _Layout, *, sequence_length: int, pad_id: int
) -> Iterator[Int32s]:
    """Ids, targets and segments of successive rows, some rows at a time. int32 [3, rows, T]."""
    tokens = np.memmap(spool, dtype=np.int32, mode="r")
    offsets = 2 * (np.cumsum(pieces.lengths) - pieces.lengths)
    for first in range(0, layout.num_rows, _ROWS_AT_ONCE):
        edges = layout.row_starts[first : first + _ROWS_AT_ONCE + 1].tolist()
        block = np.empty((3, len(edges) - 1, sequence_length), dtype=np.int32)
        block[0], block[1], block[2] = pad_id, IGNORE, 0
        for row, (start, stop) in enumerate(pairwise(edges)):
            at = 0
            for segment, piece in enumerate(layout.order[start:stop].tolist(), start=1):
                length = int(pieces.lengths[piece])
                run = tokens[offsets[piece] : offsets[piece] + 2 * length]
                block[:2, row, at : at + length] = run.reshape(2, length)
                block[2, row, at : at + length] = segment
                at += length
        yield block


def _write_blocks(blocks: Iterable[Int32s], folder: Path, shape: tuple[int, int]) -> None:
    # Written as a stream, not through a memory map: there a full disk kills the process instead of raising.
    header = {"descr": "<i4", "fortran_order": False, "shape": shape}
    with ExitStack() as stack:
        files = [stack.enter_context((folder / name).open("wb")) for name in _TOKENS]
        for file in files:
            np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            for file, part in zip(files, block, strict=True):
                file.write(part.astype("<i4").tobytes())


def _read_stats(folder: Path) -> PackedStats:
    path = folder / _STATS
    try:
        return PackedStats(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(path, error) from None


def _open_array(path: Path, shape: tuple[int, ...]) -> NDArray[np.integer]:
    try:
        found: NDArray[np.integer] = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, error) from None
    if found.shape != shape:
        raise _damaged(path, f"shape {found.shape} instead of {shape}")
    return found


def _open_examples(path: Path, num_bytes: int) -> NDArray[np.uint8]:
    try:
        found = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if len(found) != num_bytes:
        raise _damaged(path, f"{len(found)} bytes instead of {num_bytes}")
    return found


def _take(array_RT: NDArray[np.integer], rows: list[int]) -> Tensor:
    return torch.from_numpy(array_RT[rows].astype(np.int64))


def _damaged(path: Path, found: object) -> DataError:
    return DataError(
        f"{path} is missing, cut short or does not fit its neighbours ({found}). Run the stage prepare again."
    )
