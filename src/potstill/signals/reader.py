"""The teacher's words, read back: a `Reader` that runs no model.

Refuses a batch of which the store has nothing: silence would train on noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from potstill.errors import StoreError
from potstill.signals.encodings import Encoding
from potstill.signals.pieces import Piece, Salt, pieces_of
from potstill.signals.store import Records, Store
from potstill.types import Batch, Signal, Wants

__all__ = ["StoredReader"]


class StoredReader:
    """What a store knows of packed batches, at one temperature."""

    def __init__(self, store: Store, encoding: Encoding, *, temperature: float = 1.0, salt: Salt | None = None) -> None:
        """`temperature` is the distillation temperature of the losses; `salt` as when the pieces were stored."""
        self._store, self._encoding = store, encoding
        self._temperature, self._salt = temperature, salt

    def mark(self, batch: Batch) -> Batch:
        """The batch with the positions at which the teacher speaks, where these are not all. Raises StoreError."""
        pieces = pieces_of(batch, self._salt)
        notes = self._records(pieces).notes
        if not any(notes):
            return batch
        taught_BT = torch.zeros_like(batch.supervised_BT)
        taught_BT[batch.supervised_BT] = _taught(batch, pieces, notes).to(batch.ids_BT.device)
        return replace(batch, taught_BT=taught_BT)

    def read(self, batch: Batch, wants: Wants) -> Signal:
        """What the teacher said at the positions that `mark` marks, in batch order.

        Raises StoreError where a piece is not there or is damaged, ValueError for hidden layers, which are not kept.
        """
        if wants.layers:
            raise ValueError(f"layers {wants.layers} are not in a store of signals: ask the teacher itself.")
        if not wants.final:
            return Signal()
        return Signal(self._encoding.unpack(self._records(pieces_of(batch, self._salt)).records_NS, self._temperature))

    def _records(self, pieces: Sequence[Piece]) -> Records:
        absent = self._store.missing([piece.key for piece in pieces])
        if absent:
            raise StoreError(
                f"signals.store: {self._store.place} lacks {len(absent)} of {len(pieces)} pieces of a batch (the first "
                f"is {absent[0].hex()}). Run the same command again: what is missing is captured first."
            )
        return self._store.read([piece.key for piece in pieces])


def _taught(batch: Batch, pieces: Sequence[Piece], notes: Sequence[bytes]) -> Tensor:
    """Which supervised positions are stored, bool [N]: a piece's note is a bitmap of its own; none means all."""
    found = []
    for piece, note in zip(pieces, notes, strict=True):
        count = int(batch.supervised_BT[piece.row, piece.start : piece.stop].sum())
        bits = np.unpackbits(np.frombuffer(note, np.uint8), count=count) if note else np.ones(count, np.uint8)
        found.append(torch.from_numpy(bits.astype(bool)))
    return torch.cat(found)
