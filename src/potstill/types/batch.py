"""What is read: examples, and batches of their tokens. Refuses to hold more than what one step needs.

Suffixes: B rows of a batch, T positions, N answers, C labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "IGNORE",
    "Batch",
    "Example",
]

IGNORE = -100
"""Target of a position where nothing is learned (padding, prompt, a document's last token)."""


@dataclass(frozen=True, slots=True)
class Example:
    """One document or conversation. Exactly one of `text` and `messages` is set.

    `messages` are dicts with at least `role` and `content`. `source` is the name of the file that it stands in, or the
    id of a hub's data set. `provenance` says who wrote it: `human`, or a model's id.
    """

    id: str
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    source: str = ""
    provenance: str = "human"


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows. `targets_BT[b, t]` is what position t must predict: the shift is already done.

    ids_BT       int64, token ids; padding holds any valid id
    targets_BT   int64, next-token id or IGNORE
    segments_BT  int64, 0 for padding, else 1, 2, ...: the number of the piece within the row. Attention and position
                 ids never cross a segment
    examples     per row, the example id of each segment: `examples[b][s - 1]`
    sources      per row, the source of each segment's example; empty where nobody recorded it
    taught_BT    bool, the positions at which the teacher speaks, whether or not they are supervised; None for exactly
                 the supervised ones
    types_BT     int64, 1 at the tokens of the second of two texts; None where no row has two
    labels_BC    int64 [B, C], for several labels a document (a row): 1, 0, or IGNORE where nobody labelled it
    keys         per row, 16 bytes that name the document by its content; empty where nobody recorded them

    A batch of documents with labels has one document a row, and its answer stands at position 0: `targets_BT[b, 0]` is
    the class of row b, IGNORE where it is unlabelled. Where each word has a label, it stands at the word's first token.
    """

    ids_BT: Tensor
    targets_BT: Tensor
    segments_BT: Tensor
    examples: tuple[tuple[str, ...], ...] = ()
    sources: tuple[tuple[str, ...], ...] = ()
    taught_BT: Tensor | None = None
    types_BT: Tensor | None = None
    labels_BC: Tensor | None = None
    keys: tuple[bytes, ...] = ()

    @property
    def positions_BT(self) -> Tensor:
        """Position ids that start again at 0 in every segment. int64 [B, T]."""
        index_T = torch.arange(self.segments_BT.shape[1], device=self.segments_BT.device)
        starts_BT = torch.zeros_like(self.segments_BT, dtype=torch.bool)
        starts_BT[:, 0] = True
        starts_BT[:, 1:] = self.segments_BT[:, 1:] != self.segments_BT[:, :-1]
        first_BT = torch.where(starts_BT, index_T, torch.zeros_like(index_T)).cummax(dim=1).values
        return index_T - first_BT

    @property
    def supervised_BT(self) -> Tensor:
        """True where something is learned. bool [B, T]."""
        return self.targets_BT != IGNORE

    @property
    def spoken_BT(self) -> Tensor:
        """Where something is learned, or the teacher speaks: positions of the answers of a view. bool [B, T]."""
        return self.supervised_BT if self.taught_BT is None else self.supervised_BT | self.taught_BT

    @property
    def supervised_N(self) -> Tensor | None:
        """Of the answers (`spoken_BT`), row by row, those that are supervised; None for all. bool [N]."""
        return None if self.taught_BT is None else self.supervised_BT[self.spoken_BT]

    @property
    def targets_N(self) -> Tensor:
        """Targets of the supervised positions, row by row. int64 [N]."""
        return self.targets_BT[self.supervised_BT]

    @property
    def taught_N(self) -> Tensor | None:
        """Of the answers (`spoken_BT`), row by row, those at which the teacher speaks; None for all. bool [N]."""
        return None if self.taught_BT is None else self.taught_BT[self.spoken_BT]

    @property
    def key(self) -> str:
        """Hash of the content: equal rows have equal keys, whatever the loader's order."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (self.ids_BT, self.targets_BT, self.segments_BT):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            ids_BT=self.ids_BT.to(device),
            targets_BT=self.targets_BT.to(device),
            segments_BT=self.segments_BT.to(device),
            taught_BT=None if self.taught_BT is None else self.taught_BT.to(device),
            types_BT=None if self.types_BT is None else self.types_BT.to(device),
            labels_BC=None if self.labels_BC is None else self.labels_BC.to(device),
        )

    def rows(self, start: int, stop: int) -> Batch:
        """Rows start..stop-1 as a batch of their own."""
        return Batch(
            self.ids_BT[start:stop],
            self.targets_BT[start:stop],
            self.segments_BT[start:stop],
            self.examples[start:stop],
            self.sources[start:stop],
            None if self.taught_BT is None else self.taught_BT[start:stop],
            None if self.types_BT is None else self.types_BT[start:stop],
            None if self.labels_BC is None else self.labels_BC[start:stop],
            self.keys[start:stop],
        )

    def __len__(self) -> int:
        return self.ids_BT.shape[0]
