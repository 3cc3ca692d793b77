"""From what a teacher said to records of a constant number of bytes, and back.

Refuses to soften what was listed at other temperatures, and to make logits of hidden states without a head.

An encoding has three steps. `select` runs where the logits are and makes them small; `pack` makes bytes, in NumPy, in
any thread; `unpack` reads records in any order and number. Suffixes: n positions, V vocabulary, D width, K listed
tokens, S bytes of a record, U uniform numbers of a position, X the vocabulary or, of `hidden`, the width.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from potstill.errors import ModelError, RecipeError, StoreError
from potstill.signals.bits import Bytes, Estimate, Listing
from potstill.signals.sparse import check_rows, likeliest, relist, sample
from potstill.signals.spec import SignalSpec
from potstill.types import Head, Logits, SparseLogits, States

__all__ = ["Encoding", "draw_uniforms", "encoding_of", "select_listed"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Encoding(Protocol):
    """What turns a teacher's words into records, and back."""

    @property
    def spec(self) -> SignalSpec:
        """What it was made for."""
        ...

    @property
    def stride(self) -> int:
        """Bytes of a record."""
        ...

    @property
    def randoms(self) -> int:
        """Uniform numbers that a position needs."""
        ...

    def select(self, said_nX: Tensor, uniforms_nU: Tensor) -> tuple[Tensor, ...]:
        """What is to be kept, on the device: of logits [n, V], or for `hidden` of final states [n, D]."""
        ...

    def pack(self, selected: tuple[Tensor, ...]) -> Bytes:
        """Its records, uint8 [n, stride]."""
        ...

    def unpack(self, records_nS: Bytes, temperature: float = 1.0) -> SparseLogits | Logits | States:
        """What the teacher said, as losses take it, on the CPU."""
        ...


def encoding_of(spec: SignalSpec, head: Head | None = None) -> Encoding:
    """The encoding that a spec asks for. `head` turns hidden states into logits; only reading them needs it."""
    if spec.kind == "hidden":
        return _Hidden(spec, head)
    if spec.kind == "dense":
        return _Dense(spec)
    return _Sampled(spec) if spec.kind == "sampled" else _Top(spec)


def select_listed(spec: SignalSpec, ids_nK: Tensor, logprobs_nK: Tensor) -> tuple[Tensor, ...]:
    """What an encoding of `topk` or `topk_renormalised` would have selected, of a teacher that lists its likeliest.

    ids_nK int64 [n, K], distinct, below the vocabulary; logprobs_nK float64 [n, K] at T = 1, -inf to fill up a row. The
    encoding's `pack` takes it. Raises RecipeError for another kind of signals, and for `topk` at other temperatures, as
    the mass of the others is known at 1 alone; ModelError for tokens that the store does not know, NonFiniteError.
    """
    if spec.kind not in ("topk", "topk_renormalised"):
        raise RecipeError(f"signals.kind: {spec.kind} is not made of the likeliest tokens alone. Use topk.")
    if spec.kind == "topk" and spec.temperatures != (1.0,):
        raise RecipeError(
            f"signals.temperatures={list(spec.temperatures)}: what the other tokens have together is known at "
            "temperature 1 alone. Use 1 here and in the losses, or kind=topk_renormalised."
        )
    if ids_nK.shape[1] != spec.k or bool(((ids_nK < 0) | (ids_nK >= spec.vocabulary)).any()):
        raise ModelError(
            f"teacher: it lists {ids_nK.shape[1]} tokens a position, the store keeps {spec.k} below {spec.vocabulary}. "
            "Use its own tokenizer as teacher.tokenizer, or another signals.store."
        )
    ids_nK, gaps_nK, odds_n1 = relist(ids_nK, logprobs_nK, exhaustive=spec.k == spec.vocabulary)
    if bool((ids_nK.diff(dim=-1) == 0).any()):
        raise ModelError("teacher: it lists a token twice at one position. Use another server.")
    return ids_nK, gaps_nK, odds_n1[:, : len(spec.temperatures) if spec.kind == "topk" else 0]


def draw_uniforms(key: bytes, count: int, columns: int) -> Tensor:
    """Uniform numbers in [0, 1) that depend on `key` alone, float64 [count, columns]: batching changes nothing.

    The Philox generator's raw numbers, whose stream is fixed for all versions of NumPy. Position i gets the same ones
    however many follow it. Salmon et al. (2011), SC '11.
    """
    seed = int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little")
    raw = np.random.Philox(key=seed).random_raw(count * columns)
    return torch.from_numpy(((raw >> np.uint64(11)) * 2.0**-53).reshape(count, columns))


@dataclass(frozen=True, slots=True)
class _Hidden:
    """The final hidden states bit for bit: exact at every temperature and for every divergence."""

    spec: SignalSpec
    head: Head | None
    randoms: int = 0

    @property
    def stride(self) -> int:
        return self.spec.width * self._dtype.itemsize

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[str(self.spec.dtype)]

    def select(self, said_nX: Tensor, _uniforms_nU: Tensor) -> tuple[Tensor, ...]:
        if said_nX.dtype != self._dtype or said_nX.shape[1] != self.spec.width:
            raise ModelError(
                f"teacher: its final states are {said_nX.dtype} of width {said_nX.shape[1]}, the store keeps "
                f"{self._dtype} of width {self.spec.width}. Use the teacher and teacher.dtype of the store, or another "
                f"signals.store."
            )
        check_rows(said_nX.isfinite().all(-1))
        return (said_nX,)

    def pack(self, selected: tuple[Tensor, ...]) -> Bytes:
        return _bytes(selected[0])

    def unpack(self, records_nS: Bytes, temperature: float = 1.0) -> States:
        del temperature  # exact at every one
        if self.head is None:
            raise ModelError("signals.kind=hidden: states make logits with the teacher's head only. Pass it as `head`.")
        return States(_tensor(_checked(records_nS, self.stride), self._dtype), self.head)


@dataclass(frozen=True, slots=True)
class _Dense:
    """All logits in float32: exact, and for small vocabularies."""

    spec: SignalSpec
    randoms: int = 0

    @property
    def stride(self) -> int:
        return 4 * self.spec.vocabulary

    def select(self, said_nX: Tensor, _uniforms_nU: Tensor) -> tuple[Tensor, ...]:
        _check_vocabulary(said_nX, self.spec)
        check_rows(said_nX.amax(-1).isfinite())
        return (said_nX.to(torch.float32, copy=True),)

    def pack(self, selected: tuple[Tensor, ...]) -> Bytes:
        return _bytes(selected[0])

    def unpack(self, records_nS: Bytes, temperature: float = 1.0) -> Logits:
        del temperature  # exact at every one
        return Logits(_tensor(_checked(records_nS, self.stride), torch.float32))


@dataclass(frozen=True, slots=True)
class _Sampled:
    """Exactly K tokens whose mass is 1: an unbiased estimate, also after rounding. See `sparse.sample`.

    One section a temperature, each with ids of its own. Three uniform numbers each: the draw, and two roundings.
    """

    spec: SignalSpec

    @property
    def stride(self) -> int:
        return len(self.spec.temperatures) * self._section.stride

    @property
    def randoms(self) -> int:
        return 3 * len(self.spec.temperatures)

    @property
    def _section(self) -> Estimate:
        return Estimate(self.spec.vocabulary, self.spec.k)

    def select(self, said_nX: Tensor, uniforms_nU: Tensor) -> tuple[Tensor, ...]:
        _check_vocabulary(said_nX, self.spec)
        selected: list[Tensor] = []
        for index, temperature in enumerate(self.spec.temperatures):
            draw_n, rounding_n2 = uniforms_nU[:, 3 * index], uniforms_nU[:, 3 * index + 1 : 3 * index + 3]
            selected += [*sample(said_nX, draw_n, self.spec.k, temperature), rounding_n2]
        return tuple(selected)

    def pack(self, selected: tuple[Tensor, ...]) -> Bytes:
        parts = [part.cpu().numpy() for part in selected]
        sections = [self._section.pack(parts[place : place + 4]) for place in range(0, len(parts), 4)]
        return np.concatenate(sections, axis=1)

    def unpack(self, records_nS: Bytes, temperature: float = 1.0) -> SparseLogits:
        start = _place_of(temperature, self.spec) * self._section.stride
        section_nS = _checked(records_nS, self.stride)[:, start : start + self._section.stride]
        ids_nK, logprobs_nK = self._section.unpack(section_nS)
        return SparseLogits(torch.from_numpy(ids_nK), torch.from_numpy(logprobs_nK), None, temperature)


@dataclass(frozen=True, slots=True)
class _Top:
    """The K likeliest tokens with the mass of all others at each temperature, or renormalised as if there were none.

    Biased; with the mass of the others the loss over K + 1 classes is a lower bound. `topk_renormalised` says that the
    others do not exist, and makes students too sure: arXiv:2503.16870.
    """

    spec: SignalSpec
    randoms: int = 0

    @property
    def stride(self) -> int:
        return self._list.stride

    @property
    def _list(self) -> Listing:
        tails = len(self.spec.temperatures) if self.spec.kind == "topk" else 0
        return Listing(self.spec.vocabulary, self.spec.k, tails)

    def select(self, said_nX: Tensor, _uniforms_nU: Tensor) -> tuple[Tensor, ...]:
        _check_vocabulary(said_nX, self.spec)
        return likeliest(said_nX, self.spec.k, self.spec.temperatures if self._list.tails else ())

    def pack(self, selected: tuple[Tensor, ...]) -> Bytes:
        return self._list.pack([part.cpu().numpy() for part in selected])

    def unpack(self, records_nS: Bytes, temperature: float = 1.0) -> SparseLogits:
        place = _place_of(temperature, self.spec)
        ids_nK, logprobs_nK, tail_n = self._list.unpack(_checked(records_nS, self.stride), place, temperature)
        tail = None if tail_n is None else torch.from_numpy(tail_n)
        return SparseLogits(torch.from_numpy(ids_nK), torch.from_numpy(logprobs_nK), tail, temperature)


def _bytes(rows_nX: Tensor) -> Bytes:
    """The memory of every row, little-endian as on every machine that torch runs on."""
    raw_nS: Bytes = rows_nX.cpu().contiguous().view(torch.uint8).numpy()
    return raw_nS


def _tensor(records_nS: Bytes, dtype: torch.dtype) -> Tensor:
    """A copy: records may be a read-only view of a file, and not aligned."""
    flat = torch.from_numpy(np.array(records_nS).reshape(-1)).view(dtype)
    return flat.view(len(records_nS), records_nS.shape[1] // dtype.itemsize)


def _checked(records_nS: Bytes, stride: int) -> Bytes:
    if records_nS.dtype != np.uint8 or records_nS.ndim != 2 or records_nS.shape[1] != stride:
        raise StoreError(
            f"signals.store: its records are {records_nS.dtype} {list(records_nS.shape)}, this encoding reads uint8 "
            f"[n, {stride}]. Use the settings with which the store was written, or another signals.store."
        )
    return records_nS


def _check_vocabulary(logits_nV: Tensor, spec: SignalSpec) -> None:
    if logits_nV.shape[1] != spec.vocabulary:
        raise ModelError(
            f"teacher: it has logits of {logits_nV.shape[1]} tokens, the store keeps {spec.vocabulary}. Cut padded "
            f"heads to the shared vocabulary, or use another signals.store."
        )


def _place_of(temperature: float, spec: SignalSpec) -> int:
    if temperature not in spec.temperatures:
        raise RecipeError(
            f"signals.temperatures={list(spec.temperatures)}: a loss asks for {temperature}, at which a truncated list "
            f"cannot be read. Add it there (the teacher is then asked again), or use kind=hidden."
        )
    return spec.temperatures.index(temperature)
