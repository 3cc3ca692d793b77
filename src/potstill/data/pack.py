"""Packed rows: documents cut, shifted and laid side by side, on disk. The only place of the project that shifts.

A piece is a run of (input token, target) pairs of one document; a row holds pieces as its segments, then padding. For
masked language models pieces are framed by two special tokens, and nothing is shifted.
Packing goes window by window, so that a corpus may be larger than memory and is read once. Refuses to open files that
do not fit each other: training on half a file would look like training.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.chat import Encoded
from potstill.data.layout import Int64s, Layout, lay_out
from potstill.errors import DataError
from potstill.types import IGNORE, Batch

__all__ = ["WINDOW_PIECES", "PackedRows", "PackedStats", "RowWriter", "write_rows"]

_STATS = "rows.json"
_TOKENS = ("ids.npy", "targets.npy", "segments.npy")  # int32 [rows, sequence_length] each
_ROW_STARTS = "row_starts.npy"  # int64 [rows + 1], where a row's segments start in the next
_DOCUMENTS = "segment_documents.npy"  # int64 [segments], document numbers
_EXAMPLES = "documents.jsonl"  # id and source of each document
_EXAMPLE_STARTS = "example_starts.npy"  # int64 [documents + 1], where its line starts
_SPOOL = "spool.bin"
_DTYPES = {**dict.fromkeys(_TOKENS, "<i4"), **dict.fromkeys((_ROW_STARTS, _DOCUMENTS, _EXAMPLE_STARTS), "<i8")}
_ROWS_AT_ONCE = 256
_OF_CONVERSATIONS = ("conversations", "overlong")

WINDOW_PIECES = 2**18
"""Pieces that are packed together: enough that rows are full and well mixed, few enough to be planned in memory."""

Int32s = NDArray[np.int32]


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
    conversations: int = 0
    """Encodings of conversations that were read: one of each, or one an answer."""
    overlong: int = 0
    """Those of them that were left out whole, since their answers end beyond a row."""

    @property
    def overlong_share(self) -> float:
        """Share of the encodings of conversations that was left out."""
        return self.overlong / max(1, self.conversations)

    @property
    def fill(self) -> float:
        """Share of the rows' positions that is not padding."""
        return self.tokens / (self.rows * self.sequence_length)


class RowWriter:
    """Packs documents into the rows of one folder as they come. The folder opens only once `finish` has returned.

    A document of n tokens gives n - 1 pairs: input token i, target token i + 1, or IGNORE where that is not learned. A
    longer document is cut into pieces of `sequence_length` pairs, so that each learned token, a document's first
    excepted, is a target exactly once. Pairs after a piece's last target teach nothing and are left out. Successive
    encodings of one id are one document.

    With a `frame` (the ids of [CLS] and [SEP], say) a piece is the one, up to sequence_length - 2 tokens and the other.
    Each token that is learned is its own target, once; those of the frame are none.

    With `overlong` drop, a conversation whose last learned token lies beyond one piece is left out whole, and counted:
    its pieces would teach to begin without an end, and to end without a beginning. Text is cut all the same.

    Every `window` pieces are packed into rows by best fit, and these are shuffled by `seed`; a row holds pieces of one
    window only. Memory holds some bytes for each piece of a window, whatever the corpus; tokens pass through a file.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sequence_length: int,
        pad_id: int,
        seed: int = 0,
        window: int = WINDOW_PIECES,
        frame: tuple[int, int] | None = None,
        overlong: Literal["split", "drop"] = "split",
    ) -> None:
        """Begin a folder, which stops being one that opens. Raises OSError where it cannot be written."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _STATS).unlink(missing_ok=True)  # written last: without it the folder does not open
        self._folder, self._length, self._pad_id, self._window = folder, sequence_length, pad_id, window
        self._random, self._frame, self._overlong = np.random.default_rng(seed), frame, overlong
        self._lengths, self._documents = array("q"), array("q")  # of the window's pieces
        self._last_id: str | None = None
        self._counts: Counter[str] = Counter()
        with ExitStack() as stack:
            stack.callback((folder / _SPOOL).unlink, missing_ok=True)
            # The window's pieces in order: an int32 run of inputs, then one of targets, piece by piece.
            self._spool = stack.enter_context((folder / _SPOOL).open("wb"))
            self._examples = stack.enter_context((folder / _EXAMPLES).open("wb"))
            self._arrays = {name: stack.enter_context((folder / name).open("wb")) for name in _DTYPES}
            for name, file in self._arrays.items():
                _write_header(file, name, self._shape(name))
            for name in (_ROW_STARTS, _EXAMPLE_STARTS):
                self._append(name, np.zeros(1))
            self._resources = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    @property
    def tokens(self) -> int:
        """Input positions taken up so far."""
        return self._counts["tokens"]

    def add(self, document: Encoded) -> None:
        """Take up one document. Raises OSError where the disk is full."""
        if document.id != self._last_id:
            self._name(document)
        if document.conversation:
            self._counts["conversations"] += 1
            if self._overlong == "drop" and any(document.learn[self._length + 1 :]):
                self._counts["overlong"] += 1
                return
        for piece in _cut(document, self._length, self._frame):
            targets = np.flatnonzero(piece[1] != IGNORE)
            if not targets.size:
                self._counts["dropped_pieces"] += 1
                continue
            length = piece.shape[1] if self._frame else int(targets[-1]) + 1
            self._spool.write(piece[:, :length].tobytes())
            self._lengths.append(length)
            self._documents.append(self._counts["documents"] - 1)
            self._counts.update(tokens=length, supervised=targets.size)
            if len(self._lengths) == self._window:
                self._pack_window()

    def finish(self) -> PackedStats:
        """Pack what is left and complete the folder.

        Raises:
            DataError: nothing is to be learned in any document.
            OSError: the disk is full.
        """
        if self._lengths:
            self._pack_window()
        if not self._counts["rows"] and self._counts["overlong"]:
            raise DataError(
                f"data.sequence_length: none of the {self._counts['overlong']} conversations of {self._folder.name} "
                f"fits into {self._length} tokens, and none is cut. Raise it."
            )
        if not self._counts["rows"]:
            raise DataError(
                f"data: nothing is to be learned in the {self._counts['documents']} documents of {self._folder.name}. "
                "Give more or longer documents, or change data.splits."
            )
        for name, file in self._arrays.items():
            file.seek(0)
            _write_header(file, name, self._shape(name))
        self._resources.close()
        counts = {name: self._counts[name] for name in PackedStats.__dataclass_fields__}
        stats = PackedStats(**counts | {"sequence_length": self._length})
        # Without conversations the file is that of every version, byte by byte.
        told = {name: count for name, count in asdict(stats).items() if count or name not in _OF_CONVERSATIONS}
        (self._folder / _STATS).write_text(json.dumps(told, indent=1), encoding="utf-8")
        return stats

    def _name(self, document: Encoded) -> None:
        line = json.dumps([document.id, document.source]).encode() + b"\n"
        self._counts.update(documents=1, example_bytes=self._examples.write(line))
        self._append(_EXAMPLE_STARTS, np.array([self._counts["example_bytes"]]))
        self._last_id = document.id

    def _pack_window(self) -> None:
        lengths, documents = _int64s(self._lengths), _int64s(self._documents)
        self._lengths, self._documents = array("q"), array("q")
        self._spool.flush()
        layout = lay_out(lengths, self._length, self._random)
        tokens = np.memmap(self._folder / _SPOOL, dtype=np.int32, mode="r")
        for block in _row_blocks(tokens, lengths, layout, pad_id=self._pad_id, sequence_length=self._length):
            for name, part in zip(_TOKENS, block, strict=True):
                self._append(name, part)
        self._append(_ROW_STARTS, layout.row_starts[1:] + self._counts["segments"])
        self._append(_DOCUMENTS, documents[layout.order])
        self._counts.update(rows=layout.num_rows, segments=len(lengths))
        self._spool.seek(0)
        self._spool.truncate()

    def _append(self, name: str, part: NDArray[np.generic]) -> None:
        # Written as a stream, not through a memory map: there a full disk kills the process instead of raising.
        self._arrays[name].write(part.astype(_DTYPES[name]).tobytes())

    def _shape(self, name: str) -> tuple[int, ...]:
        counts = self._counts
        if name in _TOKENS:
            return (counts["rows"], self._length)
        sizes = {_ROW_STARTS: counts["rows"] + 1, _DOCUMENTS: counts["segments"]}
        return (sizes.get(name, counts["documents"] + 1),)


def write_rows(
    encoded: Iterable[Encoded],
    folder: Path,
    *,
    sequence_length: int,
    pad_id: int,
    seed: int = 0,
    window: int = WINDOW_PIECES,
    frame: tuple[int, int] | None = None,
    overlong: Literal["split", "drop"] = "split",
) -> PackedStats:
    """Pack all documents into the rows of one folder, as `RowWriter` does.

    Raises:
        DataError: nothing is to be learned in any document.
        OSError: the folder cannot be written, or the disk is full.
    """
    options = {"sequence_length": sequence_length, "pad_id": pad_id, "seed": seed, "window": window}
    with RowWriter(folder, **options, frame=frame, overlong=overlong) as writer:
        for document in encoded:
            writer.add(document)
        return writer.finish()


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
        self._examples_file = folder / _EXAMPLES
        self._examples = _open_examples(self._examples_file, int(self._example_starts[-1]))
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
        """The sources of all documents. Reads the list of these, a line at a time."""
        with self._examples_file.open("rb") as lines:
            return {json.loads(line)[1] for line in lines}

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


def _cut(document: Encoded, sequence_length: int, frame: tuple[int, int] | None) -> Iterator[Int32s]:
    """The pieces of a document, int32 [2, at most sequence_length]: inputs and targets. Here is the shift."""
    ids = np.asarray(document.ids, dtype=np.int32)
    targets = np.where(np.asarray(document.learn, dtype=np.bool_), ids, np.int32(IGNORE))
    if frame is None:
        pairs, room = np.stack([ids[:-1], targets[1:]]), sequence_length
    else:
        pairs, room = np.stack([ids, targets]), sequence_length - 2
    for start in range(0, pairs.shape[1], room):
        piece = pairs[:, start : start + room]
        yield (
            piece
            if frame is None
            else np.hstack([[[frame[0]], [IGNORE]], piece, [[frame[1]], [IGNORE]]], dtype=np.int32)
        )


def _int64s(numbers: array[int]) -> Int64s:
    return np.frombuffer(numbers, dtype=np.int64)


def _row_blocks(
    tokens: Int32s, lengths: Int64s, layout: Layout, *, sequence_length: int, pad_id: int
) -> Iterator[Int32s]:
    """Ids, targets and segments of successive rows, some rows at a time. int32 [3, rows, T]."""
    offsets = 2 * (np.cumsum(lengths) - lengths)
    for first in range(0, layout.num_rows, _ROWS_AT_ONCE):
        edges = layout.row_starts[first : first + _ROWS_AT_ONCE + 1].tolist()
        block = np.empty((3, len(edges) - 1, sequence_length), dtype=np.int32)
        block[0], block[1], block[2] = pad_id, IGNORE, 0
        for row, (start, stop) in enumerate(pairwise(edges)):
            at = 0
            for segment, piece in enumerate(layout.order[start:stop].tolist(), start=1):
                length = int(lengths[piece])
                run = tokens[offsets[piece] : offsets[piece] + 2 * length]
                block[:2, row, at : at + length] = run.reshape(2, length)
                block[2, row, at : at + length] = segment
                at += length
        yield block


def _write_header(file: BinaryIO, name: str, shape: tuple[int, ...]) -> None:
    # As long for every number of rows: NumPy leaves room for it to grow.
    header = {"descr": _DTYPES[name], "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


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
