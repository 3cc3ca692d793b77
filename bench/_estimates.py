"""How far stored distributions are from the teacher's, at real positions: potstill's `sampled` and random sampling.

At temperature 1 the gradient of the forward KL with respect to the student's logits is q - p^, whoever the student is:
the error of the gradient is p^ - p, and E ||p^ - p||^2 needs no student. The peer is random-sampling KD (Anshumann et
al. (2025), arXiv:2503.16870): tokens drawn from p with replacement, stored as unique ids and counts. Its bytes are
counted in its favour: records as long as each needs, without anything to find them by, in two forms. Plain: 2 bytes an
id and 1 a count. Coded: the fewest bits for a set of ids, and 6 bits a count.
Refuses to skip rounding: potstill's estimates go through its bytes and back.

Suffixes: N positions, n positions of a tile, V vocabulary, D the teacher's width.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from _stand import Stand
from _table import Row
from torch import Tensor

from potstill.losses import logit_blocks
from potstill.signals import Encoding, SignalSpec, draw_uniforms, encoding_of
from potstill.types import SparseLogits, States, Wants

__all__ = ["estimate_rows"]

PEER_DRAWS = 50
COUNT_BITS = 6
PLAIN_BYTES = 3
ROWS_AT_ONCE, ROWS_READ = 8, 64
TILE_ROWS = 16

Draw = Callable[[Tensor, Tensor, int], Tensor]
"""From logits and probabilities of a tile to an estimate [n, V], by the number of the draw."""


def estimate_rows(stand: Stand, positions: int, draws: int) -> list[Row]:
    """Mean squared errors over the positions and draws, and their ratios with the range over draws.

    The first ratio is at the mean bytes of the peer's plain form, `.fewest_bits` at those of its coded one,
    `.equal_tokens` at as many tokens as the peer has unique ones in the mean, `.constant_stride` at the bytes of 50
    coded tokens, which all records of the peer must have for their place to be an address computation, as ours is;
    `.k16` is at 16 tokens.
    """
    said = draw_positions(stand, positions)
    vocabulary = stand.vocabulary
    uniques: list[Tensor] = []

    def draw_randomly(_logits_nV: Tensor, p_nV: Tensor, _draw: int) -> Tensor:
        ids_nD = torch.multinomial(p_nV, PEER_DRAWS, replacement=True, generator=chance)
        estimate_nV = torch.zeros_like(p_nV).scatter_add_(1, ids_nD, torch.full_like(p_nV[:, :PEER_DRAWS], 1.0))
        uniques.append((estimate_nV > 0).sum(-1))
        return estimate_nV / PEER_DRAWS

    chance = torch.Generator().manual_seed(0)
    peer = squared_errors(said, draw_randomly, draws)
    unique = float(torch.cat(uniques).double().mean())
    coded_bytes = statistics.fmean(stored_bits(int(count), vocabulary) for count in torch.cat(uniques)) / 8
    plain_bytes = PLAIN_BYTES * unique
    sizes = {
        "": largest_k(vocabulary, plain_bytes),
        ".fewest_bits": largest_k(vocabulary, coded_bytes),
        ".equal_tokens": round(unique),
        ".constant_stride": largest_k(vocabulary, stored_bits(PEER_DRAWS, vocabulary) / 8),
        ".k16": 16,
    }
    found = {k: squared_errors(said, through_bytes(vocabulary, k), draws) for k in set(sizes.values())}
    return [
        *(ratio_row(f"store.grad_mse_vs_random{name}", found[k], peer) for name, k in sizes.items()),
        *(Row(f"store.grad_mse_k{name}", float(k), "tokens") for name, k in sizes.items()),
        *(Row(f"store.grad_mse_bytes{name}", float(stride_of(vocabulary, k)), "bytes") for name, k in sizes.items()),
        Row("store.grad_mse_bytes.random50", plain_bytes, "bytes"),
        Row("store.grad_mse_bytes.random50.fewest_bits", coded_bytes, "bytes"),
        Row("store.grad_mse_tokens.random50", unique, "tokens"),
        Row("store.grad_mse.random50", statistics.fmean(peer), "", min(peer), max(peer), len(peer)),
        Row("store.grad_mse_positions", float(len(said.rows_ND)), "positions"),
    ]


def draw_positions(stand: Stand, positions: int) -> States:
    """What the teacher says at random positions of real packed rows."""
    numbers = stand.numbers(ROWS_READ)
    parts = []
    for start in range(0, len(numbers), ROWS_AT_ONCE):
        said = stand.teacher.read(stand.rows.batch(numbers[start : start + ROWS_AT_ONCE]), Wants(final=True)).logits
        if not isinstance(said, States):
            raise SystemExit(f"the teacher gave {type(said).__name__}: this needs its final hidden states")
        parts.append(said)
    rows_ND = torch.cat([part.rows_ND for part in parts])
    order_N = torch.randperm(len(rows_ND), generator=torch.Generator().manual_seed(0))[:positions]
    return replace(parts[0], rows_ND=rows_ND[order_N]).sliced(stand.vocabulary)


def squared_errors(said: States, draw: Draw, draws: int) -> list[float]:
    """||p^ - p||^2, the mean over positions, of every draw."""
    totals = [0.0] * draws
    for logits_nV, p_nV in distributions(said):
        for number in range(draws):
            totals[number] += float((draw(logits_nV, p_nV, number) - p_nV).square().sum())
    return [total / len(said.rows_ND) for total in totals]


def distributions(said: States) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits float32 and probabilities float64 [n, V], a few positions at a time."""
    for _, block_NV in logit_blocks(said):
        for logits_nV in torch.split(block_NV, TILE_ROWS):
            yield logits_nV, logits_nV.double().softmax(-1)


def through_bytes(vocabulary: int, k: int) -> Draw:
    """Estimates of `sampled`, packed into records and unpacked; every tile and draw with random numbers of its own."""
    encoding = sampled(vocabulary, k)
    tile = iter(range(1 << 62))

    def draw(logits_nV: Tensor, p_nV: Tensor, _draw: int) -> Tensor:
        uniforms_nU = draw_uniforms(f"{k} {next(tile)}".encode(), len(logits_nV), encoding.randoms)
        listed = encoding.unpack(encoding.pack(encoding.select(logits_nV, uniforms_nU)))
        if not isinstance(listed, SparseLogits):
            raise SystemExit(f"sampled gave {type(listed).__name__}: this needs a list of tokens")
        return torch.zeros_like(p_nV).scatter_add_(1, listed.ids_NK, listed.logprobs_NK.double().exp())

    return draw


def ratio_row(name: str, ours: Sequence[float], theirs: Sequence[float]) -> Row:
    """The ratio of the means, with the range of the ratios draw by draw."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Row(name, statistics.fmean(ours) / statistics.fmean(theirs), "x", min(ratios), max(ratios), len(ratios))


def stored_bits(unique: int, vocabulary: int) -> float:
    """log2 C(V, unique) + 6 unique: the least that unique ids and counts of up to 50 take."""
    sets = math.lgamma(vocabulary + 1) - math.lgamma(unique + 1) - math.lgamma(vocabulary - unique + 1)
    return sets / math.log(2) + COUNT_BITS * unique


def largest_k(vocabulary: int, most_bytes: float) -> int:
    """The largest K whose record is not larger. Exits where none is as small."""
    fitting = [k for k in range(1, 2 * PEER_DRAWS) if stride_of(vocabulary, k) <= most_bytes]
    if not fitting:
        raise SystemExit(f"no record of {most_bytes:.1f} bytes or less: nothing to compare with the peer")
    return max(fitting)


def stride_of(vocabulary: int, k: int) -> int:
    """Bytes of a record of `sampled`."""
    return sampled(vocabulary, k).stride


def sampled(vocabulary: int, k: int) -> Encoding:
    """The encoding of K tokens at temperature 1."""
    return encoding_of(SignalSpec("sampled", vocabulary, k=k))
