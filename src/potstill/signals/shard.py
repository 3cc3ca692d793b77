"""A shard: one immutable file with the records of many pieces, every byte of it under a checksum.

    header   64 bytes: magic, version, stride, counts, mark of the store, checksum of the index, checksum of the header
    index    starts int64 [E + 1] and note starts int64 [E + 1], keys [E, 16], checksums uint32 of the blocks, notes
    data     records uint8 [N, stride], in blocks of 64 KiB

Little endian; crc32. A record's place is an address computation. Refuses a file that is one byte shorter or longer than
its header says; knows bytes and keys, and nothing of what they mean.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.signals.places import write_part

__all__ = [
    "BLOCK_BYTES",
    "KEY_BYTES",
    "Contents",
    "Damage",
    "Shard",
    "block_span",
    "check_blocks",
    "open_shard",
    "still_whole",
    "write_shard",
]

BLOCK_BYTES = 1 << 16
KEY_BYTES = 16
MAGIC = b"potstill"
VERSION = 1

_HEADER = struct.Struct("<8sIIQQQ16sI")
_CHECK = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CHECK.size


@dataclass(frozen=True, slots=True)
class Damage:
    """Something of a store that is not as it was written.

    file     within the store, `shards/NAME.shard` for a shard
    what     header, index, block, size, missing, foreign (no part of this store), or content (of any other file)
    block    number of the damaged block; None for all other kinds, which condemn the whole file
    span     (first, last + 1) of the bytes in question, in the file; None where there are none
    pieces   keys of the pieces that are lost with it, as far as they can be known
    words    for people: what is wrong
    """

    file: str
    what: str
    words: str
    block: int | None = None
    span: tuple[int, int] | None = None
    pieces: tuple[bytes, ...] = ()

    def __str__(self) -> str:
        block = "" if self.block is None else f" {self.block}"
        span = f" (bytes {self.span[0]} to {self.span[1] - 1})" if self.span else ""
        pieces = f"; pieces affected: {len(self.pieces):,}" if self.pieces else ""
        return f"{self.file}: {self.what}{block}{span}: {self.words}{pieces}"


@dataclass(frozen=True, slots=True)
class Contents:
    """What becomes a shard: of each piece a key, a number of records and a note; and all records one after another."""

    keys: Sequence[bytes]
    counts: Sequence[int]
    notes: Sequence[bytes]
    data: bytes | bytearray


@dataclass(frozen=True, slots=True)
class Shard:
    """An open shard whose header and index are as written; its data is not looked at yet.

    keys S16 [E]; starts int64 [E + 1], in records; note_starts int64 [E + 1], in bytes; checks uint32, one a block;
    notes and data uint8 [N, stride], all of them views of the memory-mapped file.
    """

    file: str
    path: Path
    size: int
    keys: NDArray[np.bytes_]
    starts: NDArray[np.int64]
    note_starts: NDArray[np.int64]
    checks: NDArray[np.uint32]
    notes: NDArray[np.uint8]
    data: NDArray[np.uint8]

    def note(self, piece: int) -> bytes:
        """The note of a piece by number."""
        return self.notes[self.note_starts[piece] : self.note_starts[piece + 1]].tobytes()

    def pieces_in(self, block: int) -> NDArray[np.intp]:
        """Numbers of the pieces that have a byte in a block, intp [...]."""
        first, last = block_span(self.starts[:-1], self.starts[1:], self.data.shape[1])
        return np.flatnonzero((first <= block) & (block < last))


@dataclass(frozen=True, slots=True)
class _Header:
    version: int
    stride: int
    pieces: int
    records: int
    note_bytes: int
    mark: bytes
    index_check: int

    @property
    def blocks(self) -> int:
        return -(-self.records * self.stride // BLOCK_BYTES)

    @property
    def index_bytes(self) -> int:
        return 16 * (self.pieces + 1) + KEY_BYTES * self.pieces + 4 * self.blocks + self.note_bytes

    @property
    def file_bytes(self) -> int:
        return HEADER_BYTES + self.index_bytes + self.records * self.stride


def write_shard(path: Path, contents: Contents, *, stride: int, mark: bytes, place: str) -> None:
    """Writes and syncs a shard under a partial name; `mark` is the store's, 16 bytes, `place` its name for messages.

    Raises StoreError, and leaves nothing, where the disk is full or refuses.
    """
    data = memoryview(contents.data)
    checks = [zlib.crc32(data[start : start + BLOCK_BYTES]) for start in range(0, len(data), BLOCK_BYTES)]
    index = b"".join(
        (
            np.fromiter(accumulate(contents.counts, initial=0), "<i8").tobytes(),
            np.fromiter(accumulate(map(len, contents.notes), initial=0), "<i8").tobytes(),
            *contents.keys,
            np.array(checks, "<u4").tobytes(),
            *contents.notes,
        )
    )
    counts = (len(contents.keys), sum(contents.counts), sum(map(len, contents.notes)))
    header = _HEADER.pack(MAGIC, VERSION, stride, *counts, mark, zlib.crc32(index))
    write_part(path, [header, _CHECK.pack(zlib.crc32(header)), index, data], place)


def open_shard(path: Path, file: str, *, stride: int, mark: bytes) -> Shard | Damage:
    """Maps a shard and checks its header, its size and its index; `file` is its name for people.

    Returns what is wrong with it where it cannot be used. Raises OSError where the system refuses to read it.
    """
    try:
        size = path.stat().st_size
        if size < HEADER_BYTES:
            return Damage(file, "size", f"it has {size} bytes, a header alone has {HEADER_BYTES}", span=(0, size))
        raw = np.asarray(np.memmap(path, np.uint8, "r"))
    except FileNotFoundError:
        return Damage(file, "missing", "it is not there any more")
    header = _read_header(raw[:HEADER_BYTES].tobytes(), file)
    if isinstance(header, Damage):
        return header
    strange = _strangeness(header, stride, mark)
    if strange:
        return Damage(file, "foreign", strange)
    if len(raw) != header.file_bytes:
        return Damage(file, "size", f"it has {len(raw)} bytes, {header.file_bytes} were written", span=(0, len(raw)))
    end = HEADER_BYTES + header.index_bytes
    if zlib.crc32(raw[HEADER_BYTES:end].data) != header.index_check:
        return Damage(file, "index", "its bytes are not those that were written", span=(HEADER_BYTES, end))
    shard = _cut(raw, header, path, file)
    if not _rises(shard.starts, header.records) or not _rises(shard.note_starts, header.note_bytes):
        return Damage(file, "index", "it leads out of the file", span=(HEADER_BYTES, end))
    return shard


def check_blocks(shard: Shard, blocks: Iterable[int]) -> list[Damage]:
    """The damages among these blocks of the data: reads and compares every byte of them."""
    flat, offset = shard.data.reshape(-1), shard.size - shard.data.size
    found = []
    for block in blocks:
        start, stop = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, flat.size)
        if zlib.crc32(flat[start:stop].data) != shard.checks[block]:
            keys = tuple(shard.keys[piece : piece + 1].tobytes() for piece in shard.pieces_in(block))
            span = (offset + start, offset + stop)
            found.append(Damage(shard.file, "block", "its bytes are not those that were written", block, span, keys))
    return found


def still_whole(shard: Shard) -> Damage | None:
    """What happened to the file since it was mapped: reading a mapping beyond the end of its file kills the process."""
    try:
        size = os.stat(shard.path).st_size  # noqa: PTH116  (a step asks some forty times)
    except FileNotFoundError:
        return Damage(shard.file, "missing", "it is not there any more", pieces=())
    if size != shard.size:
        return Damage(shard.file, "size", f"it has {size} bytes, {shard.size} were written", span=(0, size))
    return None


def block_span(starts: NDArray[Any], stops: NDArray[Any], stride: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """(first, last + 1) of the blocks that records `starts` to `stops` touch; first = last + 1 where there are none."""
    first = starts * stride // BLOCK_BYTES
    return first, np.where(stops > starts, -(-stops * stride // BLOCK_BYTES), first)


def _read_header(raw: bytes, file: str) -> _Header | Damage:
    magic, *fields = _HEADER.unpack(raw[: _HEADER.size])
    if magic == MAGIC and raw[_HEADER.size :] == _CHECK.pack(zlib.crc32(raw[: _HEADER.size])):
        return _Header(*fields)
    return Damage(file, "header", "its bytes are not those that were written", span=(0, HEADER_BYTES))


def _strangeness(header: _Header, stride: int, mark: bytes) -> str | None:
    """Why a shard is not of this store, None where it is: it is then left alone, and not set aside."""
    if header.version != VERSION:
        return f"it is of version {header.version}, this potstill reads {VERSION}"
    same = header.stride == stride and header.mark == mark
    return None if same else "it belongs to another store, by the mark that it bears"


def _cut(raw: NDArray[np.uint8], header: _Header, path: Path, file: str) -> Shard:
    """Views of the mapped file."""
    sizes = (8 * (header.pieces + 1),) * 2 + (KEY_BYTES * header.pieces, 4 * header.blocks, header.note_bytes)
    stops = list(accumulate(sizes, initial=HEADER_BYTES))
    starts, note_starts, keys, checks, notes = (raw[a:b] for a, b in pairwise(stops))
    return Shard(
        file,
        path,
        len(raw),
        keys.view(f"S{KEY_BYTES}"),
        starts.view("<i8"),
        note_starts.view("<i8"),
        checks.view("<u4"),
        notes,
        raw[stops[-1] :].reshape(header.records, header.stride),
    )


def _rises(starts: NDArray[np.int64], last: int) -> bool:
    return bool(starts[0] == 0 and starts[-1] == last and (starts[1:] >= starts[:-1]).all())
