"""Numbers in few bits: flags, codes, ascending token numbers, and the records of truncated distributions made of them.

Refuses to round in a way that changes what is kept on average: sampled probabilities go up or down by chance, so that
they stay unbiased, and sum to 1 whatever was rounded. Little-endian throughout: bit j of a row is bit j % 8 of byte
j // 8. NumPy only, no state, fit for any thread. Suffixes: n positions, K numbers of a row, S bytes of a row, m other
heads of all positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.errors import StoreError

__all__ = ["Bytes", "EliasFano", "Estimate", "Listing", "pack_bits", "pack_codes", "unpack_bits", "unpack_codes"]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]
Integers = NDArray[np.integer[Any]]
Arrays = Sequence[NDArray[Any]]

WIDEST = 24
"""Bits of a number: with 7 bits of a neighbour before it, it still lies within a window of 32."""

HEAD_BITS = 2
"""Bits for every kept token of a record, which those of them that are heads share. With more, fewer tokens would fit
into the same bytes, and the mean squared error at real positions would be larger."""

SLICE_IDS = 1 << 15
"""Token numbers that are read at once: what lies between the steps stays near the core."""

SCALES = 0.5 * 2.0 ** (-np.arange(256) / 8)
"""Bounds of the second largest head, which is 1/2 at most: eight steps an octave."""

CODE_BITS = 6
HIGHEST_CODE = (1 << CODE_BITS) - 1
with np.errstate(divide="ignore"):
    GAPS = 4 * np.log(np.arange(HIGHEST_CODE + 1) / HIGHEST_CODE)
"""Log-probability less the row's largest, of every code: even steps of (p / p_max)^(1/4), 0 to 16.6 nats, then nothing.

Fine where the mass is, and fine enough further out that a list softened later is right too.
"""

LOWEST_ODDS, ODDS_STEP = -46.0, 64.0 / 65534
"""Log-odds of the unlisted mass, codes 1 to 65535: 1e-20 of it to all but 1e-8; code 0 says that there is none."""


def _bytes_of(bits: int) -> int:
    """Whole bytes that hold so many bits."""
    return -(-bits // 8)


def pack_bits(bits_nB: NDArray[np.bool_]) -> Bytes:
    """Flags as bits, uint8 [n, ceil(B / 8)]; what fills the last byte is 0."""
    return np.packbits(bits_nB, axis=-1, bitorder="little")


def unpack_bits(packed_nS: Bytes, count: int) -> NDArray[np.bool_]:
    """The first `count` bits of every row, bool [n, count]."""
    return np.unpackbits(packed_nS, axis=-1, count=count, bitorder="little").view(np.bool_)


def pack_codes(codes_nK: Integers, widths_n: Integers, bits: int) -> Bytes:
    """Rows of numbers below 2^width, each row with a width of its own, uint8 [n, ceil(bits / 8)].

    What lies beyond `bits` is dropped: numbers that are not meant must come last. widths_n [n], 1 to 24.
    """
    place_nB = np.arange(bits)
    index_nB = place_nB // widths_n[:, None]
    shift_nB = (place_nB - index_nB * widths_n[:, None]).astype(np.uint32)
    inside_nB = index_nB < codes_nK.shape[1]
    values_nB = np.take_along_axis(codes_nK.astype(np.uint32), np.where(inside_nB, index_nB, 0), axis=1)
    return pack_bits((values_nB >> shift_nB & 1).astype(np.bool_) & inside_nB)


def unpack_codes(packed_nS: Bytes, starts: Integers, widths: Integers) -> NDArray[np.uint32]:
    """Numbers of `widths` bits (0 to 24) that begin at bit `starts` of all rows laid end to end, uint32, any shape."""
    padded = np.zeros(packed_nS.size + 4, np.uint8)
    padded[: packed_nS.size].reshape(packed_nS.shape)[:] = packed_nS
    windows = np.ndarray((packed_nS.size + 1,), "<u4", padded, strides=(1,))
    mask = np.left_shift(np.uint32(1), widths.astype(np.uint32)) - np.uint32(1)
    found: NDArray[np.uint32] = windows[starts >> 3] >> (starts & 7).astype(np.uint32) & mask
    return found


@dataclass(frozen=True, slots=True)
class EliasFano:
    """K distinct ascending numbers below V in a constant number of bits, whatever they are.

        low = floor(log2(V / K)) bits of each as they are; the rest in unary: bit (id >> low) + j is set for the j-th id

    K * low + K + ((V - 1) >> low) bits, each part in whole bytes: within 2 bits a number of the least,
    log2 C(V, K) / K.
    Elias (1974), JACM 21(2); Fano (1971), MIT Project MAC Memo 61.
    """

    vocabulary: int
    count: int

    @property
    def low(self) -> int:
        """Bits of a number that are stored as they are."""
        return (self.vocabulary // self.count).bit_length() - 1

    @property
    def low_bytes(self) -> int:
        """Bytes of the low parts of a row."""
        return _bytes_of(self.count * self.low)

    @property
    def unary_bits(self) -> int:
        """Bits of the unary part of a row."""
        return self.count + (self.vocabulary - 1 >> self.low)

    @property
    def stride(self) -> int:
        """Bytes of a row."""
        return self.low_bytes + _bytes_of(self.unary_bits)

    def pack(self, ids_nK: Integers) -> Bytes:
        """uint8 [n, stride] of ids [n, K], distinct, ascending and below V."""
        unary_nB = np.zeros((len(ids_nK), self.unary_bits), np.bool_)
        np.put_along_axis(unary_nB, (ids_nK >> self.low) + np.arange(self.count), True, axis=1)
        width_n = np.full(len(ids_nK), max(self.low, 1))
        low_nS = pack_codes(ids_nK & (1 << self.low) - 1, width_n, self.count * self.low)
        return np.concatenate([low_nS, pack_bits(unary_nB)], axis=1)

    def unpack(self, packed_nS: Bytes) -> NDArray[np.int64]:
        """The ids, int64 [n, K], ascending. Raises StoreError where a row does not hold K of them."""
        rows = len(packed_nS)
        set_m = np.flatnonzero(unpack_bits(packed_nS[:, self.low_bytes :], self.unary_bits))
        first_n1 = np.arange(rows)[:, None] * self.unary_bits
        if set_m.size != rows * self.count:
            raise _damaged(self.count)
        ids_nK = set_m.reshape(rows, self.count) - first_n1
        if rows and not (ids_nK[:, 0].min() >= 0 and ids_nK[:, -1].max() < self.unary_bits):
            raise _damaged(self.count)
        ids_nK -= np.arange(self.count)
        if not self.low:
            return ids_nK
        starts_nK = np.arange(rows)[:, None] * (8 * self.low_bytes) + np.arange(self.count) * self.low
        ids_nK <<= self.low
        ids_nK |= unpack_codes(packed_nS[:, : self.low_bytes], starts_nK, np.array(self.low))
        return ids_nK


@dataclass(frozen=True, slots=True)
class Estimate:
    """A record of `sparse.sample`: ids, which of them are heads, tau, and the heads' probabilities.

        drawn    tau = (t / t_max)^2 / K                       t in 16 bits
        heads    p = bound * (c / c_max)^2                     c in min(24, floor(HEAD_BITS K / (h - 1))) bits
        largest  1 - all others, exactly; its slot is stored   bound in 8 bits

    Even steps of the square root spread the chi-square error evenly. Rounding is up or down by chance, unbiased; for
    the heads of a row systematically from the largest down, so that its sum stays within one step and the largest head,
    at least 1 / K, stays positive. For K > 256 slot and t have 32 bits. A tau below half a step becomes 0 or a step,
    by chance too.
    """

    vocabulary: int
    k: int

    @property
    def stride(self) -> int:
        """Bytes of a record."""
        return self._code_start + _bytes_of(HEAD_BITS * self.k)

    @property
    def _ids(self) -> EliasFano:
        return EliasFano(self.vocabulary, self.k)

    @property
    def _number(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.k <= 256 else "<u4")

    @property
    def _slot(self) -> np.dtype[Any]:
        return np.dtype("<u1" if self.k <= 256 else "<u4")

    @property
    def _slot_start(self) -> int:
        return self._ids.stride + _bytes_of(self.k)

    @property
    def _tau_start(self) -> int:
        return self._slot_start + self._slot.itemsize

    @property
    def _code_start(self) -> int:
        return self._tau_start + self._number.itemsize + 1

    @property
    def _highest_tau(self) -> int:
        return int(np.iinfo(self._number).max)

    def pack(self, parts: Arrays) -> Bytes:
        """uint8 [n, stride] of what `sparse.sample` returns and two uniform numbers a position, [n, 2]."""
        ids_nK, heads_nK, tau_n, uniforms_n2 = parts
        head_nK = heads_nK > 0
        slot_n1 = heads_nK.argmax(-1)[:, None]
        others_nK = heads_nK.copy()
        np.put_along_axis(others_nK, slot_n1, 0.0, axis=1)
        steps_n = np.where(head_nK.any(-1), np.minimum(tau_n * self.k, 1.0), 1.0)
        tau_code_n = _round_root(steps_n, self._highest_tau, uniforms_n2[:, 0])
        bound_n = np.floor(-8 * np.log2(2 * np.maximum(others_nK.max(-1), SCALES[-1]))).clip(0, 255).astype(np.uint8)
        widths_n = self._widths(head_nK.sum(-1))
        codes_nK = _round_heads(others_nK / SCALES[bound_n, None], (1 << widths_n) - 1, uniforms_n2[:, 1])
        order_nK = np.argsort(others_nK == 0, axis=1, kind="stable")
        fields = [
            self._ids.pack(ids_nK),
            pack_bits(head_nK),
            _raw(slot_n1[:, 0], self._slot),
            _raw(tau_code_n, self._number),
            bound_n[:, None],
            pack_codes(np.take_along_axis(codes_nK, order_nK, axis=1), widths_n, HEAD_BITS * self.k),
        ]
        return np.concatenate(fields, axis=1)

    def unpack(self, section_nS: Bytes) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids int64 [n, K], ascending, and log-probabilities float32 [n, K], -inf for 0."""
        ids_nK = np.empty((len(section_nS), self.k), np.int64)
        logprobs_nK = np.empty((len(section_nS), self.k), np.float32)
        for rows in _slices(len(section_nS), self.k):
            ids_nK[rows] = self._ids.unpack(section_nS[rows, : self._ids.stride])
            with np.errstate(divide="ignore"):
                np.log(self.probabilities(section_nS[rows]).astype(np.float32), out=logprobs_nK[rows])
        return ids_nK, logprobs_nK

    def probabilities(self, section_nS: Bytes) -> Floats:
        """Probabilities of the ids, float64 [n, K]; every row sums to 1."""
        head_nK = unpack_bits(section_nS[:, self._ids.stride : self._slot_start], self.k)
        slot_n = _number(section_nS[:, self._slot_start :], self._slot)
        tau_n = (_number(section_nS[:, self._tau_start :], self._number) / self._highest_tau) ** 2 / self.k
        count_n = head_nK.sum(-1)
        p_nK = np.repeat(tau_n, self.k).reshape(head_nK.shape)
        headed = np.flatnonzero(count_n)
        head_nK[headed, slot_n[headed]] = False
        self._place_heads(section_nS, p_nK, np.flatnonzero(head_nK), count_n)
        p_nK[headed, slot_n[headed]] = 0.0
        p_nK[headed, slot_n[headed]] = 1.0 - p_nK[headed].sum(-1)
        return p_nK

    def _place_heads(self, section_nS: Bytes, p_nK: Floats, place_m: Integers, count_n: Integers) -> None:
        """Write the probabilities of all heads but the largest to their flat places."""
        widths_n = self._widths(count_n)
        others_n = np.maximum(count_n - 1, 0)
        first_n = others_n.cumsum() - others_n
        rank_m = np.arange(place_m.size) - np.repeat(first_n, others_n)
        code_bits = 8 * _bytes_of(HEAD_BITS * self.k)
        starts_m = np.repeat(np.arange(len(p_nK)) * code_bits, others_n) + rank_m * np.repeat(widths_n, others_n)
        code_m = unpack_codes(section_nS[:, self._code_start :], starts_m, np.repeat(widths_n, others_n))
        unit_n = SCALES[section_nS[:, self._code_start - 1]] / ((1 << widths_n) - 1.0) ** 2
        p_nK.reshape(-1)[place_m] = np.square(code_m, dtype=np.float64) * np.repeat(unit_n, others_n)

    def _widths(self, count_n: Integers) -> Integers:
        """Bits of each head but the largest, from the number of heads."""
        widths_n: Integers = np.minimum(HEAD_BITS * self.k // np.maximum(count_n - 1, 1), WIDEST)
        return widths_n


@dataclass(frozen=True, slots=True)
class Listing:
    """A record of `sparse.likeliest`: ids, log-probabilities in 6 bits each, the unlisted mass at `tails` temperatures.

        log p_T,i = g_i / T - log sum_listed exp(g / T) + log(1 - rest_T),   g = GAPS[code]

    Listed and unlisted mass sum to 1 after rounding, at every temperature.
    """

    vocabulary: int
    k: int
    tails: int

    @property
    def stride(self) -> int:
        """Bytes of a record."""
        return self._tail_start + 2 * self.tails

    @property
    def _ids(self) -> EliasFano:
        return EliasFano(self.vocabulary, self.k)

    @property
    def _tail_start(self) -> int:
        return self._ids.stride + _bytes_of(CODE_BITS * self.k)

    def pack(self, parts: Arrays) -> Bytes:
        """uint8 [n, stride] of what `sparse.likeliest` returns."""
        ids_nK, gaps_nK, odds_nT = parts
        codes_nK = np.rint(HIGHEST_CODE * np.exp(gaps_nK / 4)).astype(np.int64)
        widths_n = np.full(len(ids_nK), CODE_BITS)
        with np.errstate(invalid="ignore"):
            steps_nT = np.rint((odds_nT - LOWEST_ODDS) / ODDS_STEP).clip(0, 65534) + 1
        tails_nT = np.where(np.isneginf(odds_nT), 0, steps_nT).astype("<u2")
        fields = [self._ids.pack(ids_nK), pack_codes(codes_nK, widths_n, CODE_BITS * self.k)]
        return np.concatenate([*fields, tails_nT.view(np.uint8).reshape(len(ids_nK), 2 * self.tails)], axis=1)

    def unpack(
        self, records_nS: Bytes, place: int, temperature: float
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32] | None]:
        """Ids int64 [n, K], log-probabilities float32 [n, K], and log-mass of the others float32 [n] (None: no tails).

        `place` is that of the temperature among those whose unlisted mass was stored.
        """
        ids_nK = np.empty((len(records_nS), self.k), np.int64)
        logprobs_nK = np.empty((len(records_nS), self.k), np.float32)
        tail_n = np.empty(len(records_nS), np.float32) if self.tails else None
        for rows in _slices(len(records_nS), self.k):
            part_nS = records_nS[rows]
            ids_nK[rows] = self._ids.unpack(part_nS[:, : self._ids.stride])
            gaps_nK = self._gaps(part_nS) / temperature
            total_n = np.log(np.exp(gaps_nK).sum(-1))
            if tail_n is not None:
                odds_n = _odds(_number(part_nS[:, self._tail_start + 2 * place :], np.dtype("<u2")))
                tail_n[rows] = -np.logaddexp(0, -odds_n)
                total_n += np.logaddexp(0, odds_n)
            logprobs_nK[rows] = gaps_nK - total_n[:, None]
        return ids_nK, logprobs_nK, tail_n

    def _gaps(self, records_nS: Bytes) -> Floats:
        code_bytes = _bytes_of(CODE_BITS * self.k)
        starts_nK = np.arange(len(records_nS))[:, None] * (8 * code_bytes) + np.arange(self.k) * CODE_BITS
        codes_nS = records_nS[:, self._ids.stride : self._tail_start]
        gaps_nK: Floats = GAPS[unpack_codes(codes_nS, starts_nK, np.array(CODE_BITS))]
        return gaps_nK


def _round_root(share_n: Floats, highest: int, uniform_n: Floats) -> NDArray[np.int64]:
    """Codes c with E[(c / highest)^2] = share, [n]: rounded up with the probability that makes it so."""
    code_n, fraction_n = _root(share_n, highest)
    return code_n + (uniform_n < fraction_n)


def _round_heads(shares_nK: Floats, highest_n: NDArray[Any], uniform_n: Floats) -> NDArray[np.int64]:
    """The same for all heads of a row with one uniform number, by a running sum of fractions from the largest down."""
    order_nK = np.argsort(-shares_nK, axis=1, kind="stable")
    code_nK, fraction_nK = _root(np.take_along_axis(shares_nK, order_nK, axis=1), highest_n[:, None])
    counts_nK = np.floor(fraction_nK.cumsum(-1) + uniform_n[:, None])
    code_nK += np.diff(counts_nK, axis=1, prepend=0.0).astype(np.int64)
    rounded_nK = np.empty_like(code_nK)
    np.put_along_axis(rounded_nK, order_nK, code_nK, axis=1)
    return rounded_nK


def _root(share: Floats, highest: int | NDArray[Any]) -> tuple[NDArray[np.int64], Floats]:
    """The code at or below a share of 0 to 1, at most highest - 1, and how far the share is to the next: 0 to 1."""
    code = np.minimum(np.floor(np.sqrt(share) * highest), highest - 1)
    fraction = (share * (1.0 * highest) ** 2 - code**2) / (2 * code + 1)
    return code.astype(np.int64), np.clip(fraction, 0.0, 1.0)


def _odds(code_n: NDArray[Any]) -> Floats:
    """Log-odds of the unlisted mass; -inf where there is none."""
    return np.where(code_n == 0, -np.inf, LOWEST_ODDS + (code_n - 1.0) * ODDS_STEP)


def _raw(numbers_n: NDArray[Any], dtype: np.dtype[Any]) -> Bytes:
    """One number a row as its bytes, [n, itemsize]."""
    return numbers_n.astype(dtype)[:, None].view(np.uint8)


def _number(bytes_nS: Bytes, dtype: np.dtype[Any]) -> NDArray[np.int64]:
    """The number at the beginning of every row, [n]."""
    raw_nS = np.ascontiguousarray(bytes_nS[:, : dtype.itemsize])
    return raw_nS.view(dtype)[:, 0].astype(np.int64)


def _slices(rows: int, k: int) -> Iterator[slice]:
    step = max(1, SLICE_IDS // k)
    return (slice(start, start + step) for start in range(0, rows, step))


def _damaged(count: int) -> StoreError:
    return StoreError(
        f"signals.store: a record does not hold {count} token numbers. It was written with other settings, or "
        f"its bytes have changed: run `potstill signals verify` on the store."
    )
