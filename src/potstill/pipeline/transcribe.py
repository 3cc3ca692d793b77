"""What the teacher says about texts that a store lacks, read in batches of like length and kept.

Packing and writing happen behind the reading, in a thread of their own. Refuses to hold more than a window of rows.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.losses import logit_blocks
from potstill.pipeline.progress import Meter
from potstill.recipes.signals import HighestEntropyPositions, Positions, RandomPositions
from potstill.signals import Encoding, Piece, Salt, Store, Writer, draw_uniforms, entropy_of, pieces_of
from potstill.types import IGNORE, Batch, Mixture, Reader, States, Wants

__all__ = ["Captured", "Text", "Transcript", "capture_rows", "choose_at_random", "piece_windows", "texts_to_read"]

WINDOW_ROWS = 2048
"""Rows whose missing pieces are sorted by length together: enough for batches of equal lengths, few to hold."""

BEHIND = 2
"""Batches that may wait to be packed and written while the teacher reads the next."""

CHOOSING = b"positions"
"""Sets the random numbers that choose positions apart from those that choose tokens."""


Mask = NDArray[np.bool_]


class Rows(Protocol):
    """Packed rows by number."""

    def batch(self, row_numbers: Sequence[int]) -> Batch:
        """These rows as a batch."""
        ...


@dataclass(frozen=True, slots=True)
class Transcript:
    """Who speaks, about what, and how it is kept.

    vocabulary    tokens of the distributions: those that teacher and student share
    batch_tokens  positions that the teacher reads at once, padding included
    salt          as the pieces are looked up later
    """

    teacher: Reader
    encoding: Encoding
    vocabulary: int
    positions: Positions
    batch_tokens: int = 4096
    salt: Salt | None = None


@dataclass(frozen=True, slots=True)
class Captured:
    """What a capture did: pieces; positions that were stored; tokens that were read, without padding."""

    pieces: int = 0
    positions: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def plus(self, other: Captured) -> Captured:
        """Both together."""
        return Captured(
            self.pieces + other.pieces,
            self.positions + other.positions,
            self.tokens + other.tokens,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True, slots=True)
class Text:
    """A piece that the store lacks: its tokens, and what each must predict."""

    key: bytes
    ids_T: Tensor
    targets_T: Tensor
    source: str

    def __len__(self) -> int:
        return len(self.ids_T)


@dataclass(frozen=True, slots=True)
class _Selected:
    """Of some texts: what `select` gave, supervised positions by text, and which of these are stored (None: all)."""

    parts: tuple[Tensor, ...]
    counts: Sequence[int]
    keep_N: Tensor | None


def capture_rows(
    transcript: Transcript,
    rows: Rows,
    numbers: Sequence[int],
    *,
    store: Store,
    planned: Mask | None = None,
    part: tuple[int, int] = (0, 1),
    meter: Meter | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Captured:
    """Have the teacher read those pieces of these rows that `store` lacks, and store what it says.

    `planned` and `part` as in `texts_to_read`: with the same plan, a capture that was interrupted reads on in the same
    batches, so that it ends in the same bits. Stops early, with all that was read committed, when `stopping()` turns
    true. Raises StoreError where the store cannot be written.
    """
    began, done = time.monotonic(), Captured()
    with store.writer() as writer, ThreadPoolExecutor(1) as packer:
        for texts in texts_to_read(rows, numbers, store, salt=transcript.salt, planned=planned, part=part):
            for kept in _run_behind(packer, _jobs(transcript, store, writer, texts, stopping=stopping)):
                done = done.plus(kept)
                if meter:
                    meter.advance(kept.tokens)
            # Before the next window is compared with the store: equal pieces are read once.
            writer.commit()
            store.refresh()
            if stopping():
                break
    return replace(done, seconds=time.monotonic() - began)


def piece_windows(
    rows: Rows, numbers: Sequence[int], salt: Salt | None = None
) -> Iterator[tuple[Batch, Mapping[bytes, Piece]]]:
    """Some rows at a time, with their pieces by key: equal pieces once."""
    for start in range(0, len(numbers), WINDOW_ROWS):
        batch = rows.batch(numbers[start : start + WINDOW_ROWS])
        yield batch, {piece.key: piece for piece in pieces_of(batch, salt)}


def texts_to_read(
    rows: Rows,
    numbers: Sequence[int],
    store: Store,
    *,
    salt: Salt | None = None,
    planned: Mask | None = None,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Sequence[Text]]:
    """The pieces of these rows that `store` lacks, each once, window by window.

    planned  of all pieces, in the order of `piece_windows`, those that it lacked when the capture began: they are given
             in place of those that it lacks now. bool [pieces]
    part     (i, n) leaves only the i-th of n parts of the pieces, by key, so that n processes can share the work
    """
    place = 0
    for batch, pieces in piece_windows(rows, numbers, salt):
        if planned is None:
            absent = [pieces[key] for key in store.missing(list(pieces))]
        else:
            absent = list(itertools.compress(pieces.values(), planned[place : place + len(pieces)]))
        place += len(pieces)
        yield [
            Text(
                piece.key,
                batch.ids_BT[piece.row, piece.start : piece.stop],
                batch.targets_BT[piece.row, piece.start : piece.stop],
                piece.source,
            )
            for piece in absent
            if int.from_bytes(piece.key[:8], "little") % part[1] == part[0]
        ]


def _jobs(
    transcript: Transcript, store: Store, writer: Writer, texts: Sequence[Text], *, stopping: Callable[[], bool]
) -> Iterator[Callable[[], Captured]]:
    """Reads batch by batch, those that have something missing; what comes out is the rest of the work on each."""
    for batch in _batches(texts, transcript.batch_tokens):
        if stopping():
            return
        if absent := frozenset(store.missing([text.key for text in batch])):
            selected = _select(transcript, batch)
            yield functools.partial(_keep, transcript.encoding, writer, batch, selected, absent=absent)


def _run_behind(packer: Executor, jobs: Iterable[Callable[[], Captured]]) -> Iterator[Captured]:
    """Results of the jobs, in order, each done in the packer's thread while the next one comes about."""
    waiting: deque[Future[Captured]] = deque()
    for job in jobs:
        waiting.append(packer.submit(job))
        if len(waiting) > BEHIND:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()


def _batches(texts: Sequence[Text], batch_tokens: int) -> Iterator[list[Text]]:
    """Texts of nearly equal length together, the longest first: what does not fit into memory shows at once."""
    batch: list[Text] = []
    for text in sorted(texts, key=len, reverse=True):
        if batch and len(batch[0]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


@torch.inference_mode()
def _select(transcript: Transcript, texts: Sequence[Text]) -> _Selected:
    """What the teacher says about these texts, reduced on its device to what will be stored."""
    said = transcript.teacher.read(_batch_of(texts), Wants(final=True)).logits
    if not isinstance(said, States | Mixture):
        raise ValueError(f"the teacher gave {type(said).__name__}: a capture needs its final hidden states and head")
    said = said.sliced(transcript.vocabulary)
    counts = [int((text.targets_T != IGNORE).sum()) for text in texts]
    keep_N = choose_at_random(transcript.positions, texts, counts)
    if keep_N is not None:
        said = said.at(keep_N.to(_device(said)))
    columns = transcript.encoding.randoms
    uniforms_NU = torch.cat([draw_uniforms(text.key, n, columns) for text, n in zip(texts, counts, strict=True)])
    uniforms_NU = (uniforms_NU if keep_N is None else uniforms_NU[keep_N]).to(_device(said))
    if transcript.encoding.spec.kind == "hidden":
        if isinstance(said, Mixture):
            raise ValueError("signals.kind: hidden keeps the states of one model, a mixture has those of several")
        return _Selected(transcript.encoding.select(said.rows_ND, uniforms_NU), counts, keep_N)
    rule, entropies, parts = transcript.positions, [], []
    for rows, logits_nV in logit_blocks(said):
        parts.append(transcript.encoding.select(logits_nV, uniforms_NU[rows]))
        if isinstance(rule, HighestEntropyPositions):
            entropies.append(entropy_of(logits_nV))
    kept = tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
    if isinstance(rule, HighestEntropyPositions):
        keep_N = _choose_highest(torch.cat(entropies).cpu(), counts, rule.share)
        kept = tuple(part[keep_N.to(part.device)] for part in kept)
    return _Selected(kept, counts, keep_N)


def _batch_of(texts: Sequence[Text]) -> Batch:
    """A row a text, padded on the right, where no causal model looks; so that no mask is needed and none is slow."""
    shape = (len(texts), len(texts[0]))
    ids_BT, targets_BT = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE)
    for row, text in enumerate(texts):
        ids_BT[row, : len(text)], targets_BT[row, : len(text)] = text.ids_T, text.targets_T
    # One segment, padding included: positions that start again would make the model build a mask.
    return Batch(ids_BT, targets_BT, torch.ones_like(ids_BT), sources=tuple((text.source,) for text in texts))


def choose_at_random(positions: Positions, texts: Sequence[Text], counts: Sequence[int]) -> Tensor | None:
    """Which supervised positions are stored, bool [N]; None for all. The same for equal texts."""
    if not isinstance(positions, RandomPositions):
        return None
    scores = [draw_uniforms(CHOOSING + text.key, n, 1)[:, 0] for text, n in zip(texts, counts, strict=True)]
    return _choose_highest(torch.cat(scores), counts, positions.share)


def _choose_highest(scores_N: Tensor, counts: Sequence[int], share: float) -> Tensor:
    """The `share` of each text's positions that have the highest scores, at least one. bool [N]."""
    keep_N = torch.zeros(len(scores_N), dtype=torch.bool)
    start = 0
    for count in counts:
        best = scores_N[start : start + count].argsort(descending=True, stable=True)[: math.ceil(share * count)]
        keep_N[start + best] = True
        start += count
    return keep_N


def _keep(
    encoding: Encoding, writer: Writer, texts: Sequence[Text], selected: _Selected, *, absent: frozenset[bytes]
) -> Captured:
    """Pack what was selected of these texts, and store what is absent."""
    records_NS = encoding.pack(tuple(part.cpu() for part in selected.parts))
    start, place, done = 0, 0, Captured()
    for text, count in zip(texts, selected.counts, strict=True):
        note, stored = b"", count
        if selected.keep_N is not None:
            kept_n = selected.keep_N[place : place + count].numpy()
            note, stored = np.packbits(kept_n).tobytes(), int(kept_n.sum())
        if text.key in absent:
            writer.append(text.key, records_NS[start : start + stored], note)
            done = done.plus(Captured(1, stored, len(text)))
        start, place = start + stored, place + count
    return done


def _device(said: States | Mixture) -> torch.device:
    return (said if isinstance(said, States) else said.members[0]).rows_ND.device
