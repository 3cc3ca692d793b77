"""Where every piece of a store lies: sorted columns, 36 bytes a piece, however many millions there are.

Refuses keys that are not 16 bytes. Knows numbers of shards, and no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from potstill.signals.shard import KEY_BYTES, Shard

__all__ = ["Index", "check_key", "columns_of", "empty_index", "grown"]

_KEY = f"S{KEY_BYTES}"


@dataclass(frozen=True, slots=True)
class Index:
    """A row a piece, sorted by key, each key once.

    keys S16 [E]; shards int32 [E], number of the shard; pieces int32 [E], number within it; starts int64 [E], number of
    its first record in the shard; counts int32 [E], its records.
    """

    keys: NDArray[np.bytes_]
    shards: NDArray[np.int32]
    pieces: NDArray[np.int32]
    starts: NDArray[np.int64]
    counts: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: Sequence[bytes]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """(row, whether it is there) of each key: intp [K], bool [K]."""
        for key in keys:
            check_key(key)
        return self.place(np.frombuffer(b"".join(keys), _KEY))

    def place(self, keys: NDArray[np.bytes_]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """(row at which it stands or belongs, whether it is there) of each key S16 [K]: intp [K], bool [K]."""
        rows = np.searchsorted(self.keys, keys)
        found = np.zeros(len(keys), np.bool_)
        inside = rows < len(self)
        found[inside] = self.keys[rows[inside]] == keys[inside]
        return rows, found

    def in_stored_order(self) -> Iterator[bytes]:
        """All keys, as their records lie in the shards."""
        for row in np.lexsort((self.pieces, self.shards)):
            yield self.keys[row : row + 1].tobytes()


def check_key(key: bytes) -> None:
    """Raises ValueError unless it has 16 bytes."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a piece's key has {KEY_BYTES} bytes; got {len(key)}: {key.hex()}")


def empty_index() -> Index:
    """An index of nothing."""
    return Index(*(np.empty(0, kind) for kind in (_KEY, np.int32, np.int32, np.int64, np.int32)))


def columns_of(shard: Shard, number: int, damaged: Sequence[int] = ()) -> Index:
    """The pieces of a shard in its own order, without those that have a byte in a damaged block."""
    live = np.ones(len(shard.keys), np.bool_)
    for block in damaged:
        live[shard.pieces_in(block)] = False
    pieces = np.flatnonzero(live).astype(np.int32)
    counts = np.diff(shard.starts)[pieces].astype(np.int32)
    return Index(shard.keys[pieces], np.full(len(pieces), number, np.int32), pieces, shard.starts[pieces], counts)


def grown(index: Index, parts: Sequence[Index]) -> Index:
    """The index with the rows of all parts; of equal keys the one that was there, else the first part's."""
    new = _sorted(parts)
    rows, known = index.place(new.keys)
    fresh = np.flatnonzero(~known)
    # Inserted, not sorted again: a capture grows an index of millions many times, by some thousands.
    columns = (column.name for column in fields(Index))
    return Index(*(np.insert(getattr(index, name), rows[fresh], getattr(new, name)[fresh]) for name in columns))


def _sorted(parts: Sequence[Index]) -> Index:
    columns = [column.name for column in fields(Index)]
    whole = Index(*(np.concatenate([getattr(part, name) for part in parts]) for name in columns))
    order = np.argsort(whole.keys, kind="stable")
    ordered = whole.keys[order]
    first = np.ones(len(order), np.bool_)
    first[1:] = ordered[1:] != ordered[:-1]
    return Index(*(getattr(whole, name)[order[first]] for name in columns))
