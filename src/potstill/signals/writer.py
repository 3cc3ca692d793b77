"""Who fills a store: gathers pieces in memory, and commits them as a shard by size, by time and when leaving.

Refuses to leave half a shard: what was committed survives any crash, what was not leaves no trace.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from potstill.errors import StoreError
from potstill.signals.index import check_key
from potstill.signals.places import Place
from potstill.signals.shard import Contents, write_shard
from potstill.signals.stamp import Manifest

__all__ = ["SECONDS", "SHARD_BYTES", "Writer"]

SHARD_BYTES = 64 << 20
SECONDS = 30.0

_ROW_BYTES = 33
"""What a piece takes in the index of a shard, so that pieces without records fill one, too."""


class Writer:
    """A context; one thread at a time. Any number of writers, of any number of processes, may fill one store."""

    def __init__(
        self, place: Place, manifest: Manifest, leave: Callable[[], None], *, shard_bytes: int, seconds: float
    ) -> None:
        """`leave` is called after the last commit; a shard is written at `shard_bytes`, or after `seconds`."""
        self._place, self._manifest, self._leave = place, manifest, leave
        self._shard_bytes, self._seconds = shard_bytes, seconds
        self._clear()

    def __enter__(self) -> Self:
        self._place.sweep()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, StoreError):  # the store refused already: it would refuse again, and hide why
            return
        self.commit()
        self._leave()

    def append(self, key: bytes, records_nS: NDArray[np.uint8], note: bytes = b"") -> None:
        """Adds a piece: its key of 16 bytes, its records uint8 [n, stride], n >= 0, and a note of any bytes.

        Commits where the shard is large or old enough. Raises ValueError for a piece that does not fit, StoreError
        where the place is full or refuses; the piece is then still held, and the next commit tries again.
        """
        check_key(key)
        if records_nS.dtype != np.uint8 or records_nS.shape[1:] != (self._manifest.stride,):
            raise ValueError(
                f"records must be uint8 [n, {self._manifest.stride}]; got {records_nS.dtype} {list(records_nS.shape)}"
            )
        if not self._keys:
            self._since = time.monotonic()
        self._keys.append(bytes(key))
        self._counts.append(len(records_nS))
        self._notes.append(bytes(note))
        self._data += np.ascontiguousarray(records_nS).reshape(-1).data
        self._row_bytes += _ROW_BYTES + len(note)
        large = len(self._data) + self._row_bytes >= self._shard_bytes
        if large or time.monotonic() - self._since >= self._seconds:
            self.commit()

    def commit(self) -> None:
        """Writes what was appended since the last commit as one shard; on the disk when this returns.

        Raises StoreError where the place is full or refuses.
        """
        if not self._keys:
            return
        name = f"shards/{time.time_ns():016x}-{secrets.token_hex(8)}.shard"
        part = self._place.part(name)
        contents = Contents(self._keys, self._counts, self._notes, self._data)
        try:
            write_shard(part, contents, stride=self._manifest.stride, mark=self._manifest.mark, place=self._place.name)
            self._place.publish(part, name)
        finally:
            part.unlink(missing_ok=True)
        self._clear()

    def _clear(self) -> None:
        self._keys: list[bytes] = []
        self._counts: list[int] = []
        self._notes: list[bytes] = []
        self._data = bytearray()
        self._row_bytes, self._since = 0, 0.0
