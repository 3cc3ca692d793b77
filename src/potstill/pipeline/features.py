"""What lies behind a teacher's answers, kept: hidden states, queries, keys and values of every token of every text.

They are kept in 2 bytes a number, under a key of the tokens, so that teacher and student must read the same ones.
Refuses attention maps, whose size grows with the square of a text: queries and keys say the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.data import TextRows
from potstill.errors import StoreError
from potstill.pipeline.progress import Meter
from potstill.pipeline.rows import batches_by_length
from potstill.pipeline.stopping import Stopping
from potstill.signals import Store
from potstill.types import AttentionVectors, Batch, Reader, Signal, Wants

__all__ = ["FeatureReader", "Features", "capture_features", "features_of"]

COMMITTED_ROWS = 1024
"""Texts whose features are committed together."""


@dataclass(frozen=True, slots=True)
class Features:
    """What is kept of a position, one after another: the hidden states of `layers`, q, k and v of `vectors`.

    width  of a hidden state; heads, key_heads, head_width  of the attention
    first  whether the first position alone is kept, of which a text's vector is made
    """

    layers: tuple[int, ...]
    vectors: tuple[int, ...]
    width: int
    heads: int
    key_heads: int
    head_width: int
    first: bool = False

    @property
    def numbers(self) -> int:
        """Of one position."""
        return len(self.layers) * self.width + len(self.vectors) * sum(self._parts)

    @property
    def wants(self) -> Wants:
        """What to ask a teacher for."""
        return Wants(layers=self.layers, vectors=self.vectors)

    @property
    def _parts(self) -> tuple[int, int, int]:
        return self.heads * self.head_width, self.key_heads * self.head_width, self.key_heads * self.head_width

    def join(self, said: Signal) -> Tensor:
        """One row of numbers a position, bfloat16 [B, T, numbers]."""
        parts = [said.hidden[layer] for layer in self.layers]
        for block in self.vectors:
            found = said.vectors[block]
            each = (found.queries_BHTE, found.keys_BGTE, found.values_BGTE)
            parts += [part.transpose(1, 2).flatten(2) for part in each]
        return torch.cat([part.bfloat16() for part in parts], dim=-1)

    def part(self, rows_BTX: Tensor) -> Signal:
        """What was joined."""
        sizes = [*[self.width] * len(self.layers), *self._parts * len(self.vectors)]
        parts = iter(torch.split(rows_BTX, sizes, dim=-1))
        hidden = {layer: next(parts) for layer in self.layers}
        return Signal(hidden=hidden, vectors={block: self._attention(parts) for block in self.vectors})

    def _attention(self, parts: Iterator[Tensor]) -> AttentionVectors:
        heads = (self.heads, self.key_heads, self.key_heads)
        split = [_heads(next(parts), count) for count in heads]
        return AttentionVectors(*split)


def _heads(rows_BTX: Tensor, count: int) -> Tensor:
    """As attention has them, [B, heads, T, width of a head]."""
    return rows_BTX.reshape(*rows_BTX.shape[:2], count, -1).transpose(1, 2)


def features_of(config: Any, wants: Wants) -> Features | None:
    """What of a teacher with this config is to be kept for a student who wants this; None where that is nothing."""
    text = config.get_text_config()
    layers = tuple(sorted({*wants.layers, *((text.num_hidden_layers,) if wants.pooled else ())}))
    if not layers and not wants.vectors:
        return None
    heads = text.num_attention_heads
    own = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    first = not wants.layers and not wants.vectors
    return Features(layers, wants.vectors, text.hidden_size, heads, key_heads, own, first)


def capture_features(
    features: Features,
    store: Store,
    teacher: Reader,
    rows: TextRows,
    *,
    salt: bytes,
    batch_tokens: int,
    meter: Meter,
    stopping: Stopping,
) -> list[bytes]:
    """Have the teacher read those of these texts that the store lacks, and keep what lies behind; returns all keys."""
    numbers = [int(number) for number in np.argsort(-rows.lengths, kind="stable")]
    keys: list[bytes] = []
    with store.writer() as writer:
        for start in range(0, len(numbers), COMMITTED_ROWS):
            window = {
                _keys(rows.batch([number]), salt)[0]: number for number in numbers[start : start + COMMITTED_ROWS]
            }
            keys += window
            absent = [window[key] for key in store.missing(list(window))]
            for places in batches_by_length(rows.lengths[absent], batch_tokens):
                batch = rows.batch([absent[place] for place in places])
                kept_BTX = features.join(teacher.read(batch, features.wants)).cpu().view(torch.int16)
                for row, key in enumerate(_keys(batch, salt)):
                    length = 1 if features.first else int((batch.segments_BT[row] > 0).sum())
                    writer.append(key, kept_BTX[row, :length].contiguous().numpy().view(np.uint8))
            writer.commit()
            meter.advance(len(window))
            if stopping.asked():
                break
    store.refresh()
    return keys


class FeatureReader:
    """A store of what lies behind the answers, with a reader of the answers themselves, as one teacher."""

    def __init__(self, answers: Reader, store: Store, features: Features, *, salt: bytes, pools: bool) -> None:
        """`pools` says that a text's vector is the last state of its first token, and is found here."""
        self._answers, self._store, self._features = answers, store, features
        self._salt, self._pools = salt, pools

    def read(self, batch: Batch, wants: Wants) -> Signal:
        """What the teacher said, and what lay behind it. Raises StoreError where something is not there or damaged."""
        said = self._answers.read(batch, Wants(final=wants.final, pooled=wants.pooled and not self._pools))
        if not (wants.layers or wants.vectors or (wants.pooled and self._pools)):
            return said
        rows_BTX = self._rows(batch).to(batch.ids_BT.device)
        behind = self._features.part(rows_BTX)
        pooled_BD = said.pooled_BD
        if wants.pooled and self._pools:
            pooled_BD = behind.hidden[max(self._features.layers)][:, 0].float()
        return Signal(said.logits, behind.hidden, {}, behind.vectors, pooled_BD)

    def _rows(self, batch: Batch) -> Tensor:
        """bfloat16 [B, T, numbers], zeros at padding."""
        keys = _keys(batch, self._salt)
        absent = self._store.missing(keys)
        if absent:
            raise StoreError(
                f"signals.store: {self._store.place} lacks what lies behind the answers to {len(absent)} of "
                f"{len(keys)} texts of a batch. Run the same command again: what is missing is captured first."
            )
        found = self._store.read(keys)
        rows = torch.from_numpy(found.records_NS.copy()).view(torch.bfloat16)
        shape = (*batch.ids_BT.shape, self._features.numbers)
        whole_BTX = torch.zeros(shape, dtype=torch.bfloat16)
        kept_BT = batch.segments_BT.cpu() > 0
        if self._features.first:
            kept_BT[:, 0], kept_BT[:, 1:] = True, False
        whole_BTX[kept_BT] = rows
        return whole_BTX


def _keys(batch: Batch, salt: bytes) -> list[bytes]:
    """Of every row: a hash of its tokens, and of what else the teacher's reading of them depends on."""
    types_BT = torch.zeros_like(batch.ids_BT) if batch.types_BT is None else batch.types_BT
    both_BT: NDArray[np.int32] = torch.stack([batch.ids_BT, types_BT], dim=-1).cpu().numpy().astype(np.int32)
    lengths: Sequence[int] = (batch.segments_BT > 0).sum(1).tolist()
    return [
        hashlib.blake2b(salt + row_T2[:length].tobytes(), digest_size=16).digest()
        for row_T2, length in zip(both_BT, lengths, strict=True)
    ]
