"""Pieces of packed rows and the keys under which signals about them are kept.

A piece is a run of tokens of one document that is read without any other: a segment. Its key is a hash of what the
teacher's words depend on, so that the order of rows, their packing and the loader play no part. Refuses to look at
anything but content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from potstill.types import Batch

__all__ = ["KEY_BYTES", "Piece", "Salt", "pieces_of"]

KEY_BYTES = 16

Salt = Callable[[str], bytes]
"""From a document's source to what else the teacher's words depend on there (a mixture's weights)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Positions start..stop-1 of a row of a batch. `key` is 16 bytes: blake2b of the tokens, where they are supervised,
    and the salt.
    """

    key: bytes
    row: int
    start: int
    stop: int
    source: str = ""


def pieces_of(batch: Batch, salt: Salt | None = None) -> list[Piece]:
    """The pieces of a batch, row by row: in the order of its supervised positions.

    With `salt` the batch must know its sources: raises ValueError where it does not.
    """
    if salt is not None and len(batch.sources) != len(batch):
        raise ValueError(f"the batch has {len(batch)} rows and the sources of {len(batch.sources)}: needs them all.")
    ids_BT = batch.ids_BT.cpu().numpy().astype("<i4")
    supervised_BT = batch.supervised_BT.cpu().numpy()
    found = []
    for row, segments_T in enumerate(batch.segments_BT.cpu().numpy()):
        edges = np.flatnonzero(np.diff(segments_T)) + 1
        for start, stop in zip([0, *edges.tolist()], [*edges.tolist(), len(segments_T)], strict=True):
            if segment := int(segments_T[start]):
                source = batch.sources[row][segment - 1] if batch.sources else ""
                digest = hashlib.blake2b(salt(source) if salt else b"", digest_size=KEY_BYTES)
                digest.update(ids_BT[row, start:stop].tobytes())
                digest.update(np.packbits(supervised_BT[row, start:stop]).tobytes())
                found.append(Piece(digest.digest(), row, start, stop, source))
    return found
