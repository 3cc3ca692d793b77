"""How good a sentence encoder is: whether an arm holds the same texts for alike as its teacher does, and as people do.

Refuses to compare coordinates where widths differ: there only likeness between texts is compared.

Suffixes: N texts, D width, P pairs of texts, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potstill.errors import NonFiniteError
from potstill.evaluation.bootstrap import Floats
from potstill.evaluation.intervals import Quantity, measure, ratio
from potstill.evaluation.temperature import Scores
from potstill.types import Measurement

__all__ = ["NEIGHBOURS", "compare_embeddings", "compare_likeness", "likeness", "rank"]

NEIGHBOURS = 10

MOST_PAIRS = 10_000
"""Pairs of texts whose likeness is compared. More would tell little more: it is texts that are resampled, not pairs."""

MOST_TEXTS = 4000
"""Texts among which neighbours are looked for: their number is squared."""

Numbers = NDArray[np.int64]
Pairs = tuple[Numbers, Numbers]


def compare_embeddings(vectors: Mapping[str, Scores], *, resamples: int, seed: int) -> list[Measurement]:
    """What each arm's vectors [N, D] keep of the teacher's, of the same texts; 95 % percentiles of draws of texts.

    cosine_to_teacher    mean cosine with the teacher's vector; left out where the widths differ
    spearman_to_teacher  Spearman's rank correlation, over a seeded sample of pairs of texts, of an arm's cosine of a
                         pair with the teacher's; in a resample a pair counts as often as both texts are drawn
                         together, and keeps its rank
    neighbours_kept      share of the teacher's NEIGHBOURS nearest texts that are among the arm's

    Raises NonFiniteError for a vector that is not finite, ValueError where arms have different texts.
    """
    rows = {arm: _unit_rows(vectors_ND, arm) for arm, vectors_ND in vectors.items()}
    teacher_ND = rows.pop("teacher")
    texts = len(teacher_ND)
    if any(len(arm_ND) != texts for arm_ND in rows.values()):
        raise ValueError("the arms gave vectors of different texts and cannot be compared")
    pairs = _draw_pairs(texts, seed)
    kept = {arm: _Kept.of(arm_ND, teacher_ND, pairs, seed) for arm, arm_ND in rows.items()}

    def statistic(weights_RN: Floats) -> Mapping[Quantity, Floats]:
        return {quantity: values_R for arm, one in kept.items() for quantity, values_R in one.values(arm, weights_RN)}

    return measure(statistic, texts=texts, resamples=resamples, seed=seed, cells=len(pairs[0]))


def compare_likeness(
    cosines: Mapping[str, Floats], judged_N: Floats, *, resamples: int, seed: int
) -> list[Measurement]:
    """sts_spearman of every arm: rank correlation of its cosine of two texts with the number that people gave them.

    `cosines` holds one value [N] a text pair. 95 % percentiles of draws of pairs; ranks are those of the sample.
    Left out where either side is constant. Reimers and Gurevych (2019), arXiv:1908.10084, section 4.1.
    """
    moments = {arm: _moments(rank(cosines_N), rank(judged_N)) for arm, cosines_N in cosines.items()}

    def statistic(weights_RN: Floats) -> Mapping[Quantity, Floats]:
        n = len(judged_N)
        return {Quantity(arm, "sts_spearman", n, ""): _correlation(weights_RN @ one) for arm, one in moments.items()}

    return measure(statistic, texts=len(judged_N), resamples=resamples, seed=seed)


def likeness(ones_ND: Scores, others_ND: Scores, arm: str) -> Floats:
    """The cosine of each row with the row beside it, [N]; 0 for a vector of zeros. Raises NonFiniteError."""
    cosines_N: Floats = (_unit_rows(ones_ND, arm) * _unit_rows(others_ND, arm)).sum(-1)
    return cosines_N


def rank(values_N: Floats) -> Floats:
    """Place of each value in rising order, from 1; equal ones share the mean of their places."""
    _, level_N, count_L = np.unique(values_N, return_inverse=True, return_counts=True)
    last_L = np.cumsum(count_L)
    ranks_N: Floats = (last_L - (count_L - 1) / 2.0)[level_N]
    return ranks_N


@dataclass(frozen=True, slots=True)
class _Kept:
    """What one arm kept: of each text, its cosine with the teacher's and its neighbours; of each pair, its likeness.

    cosines_N None where widths differ; near_N NaN for texts among which no neighbours were looked for.
    """

    cosines_N: Floats | None
    near_N: Floats
    pairs: Pairs
    moments_P6: Floats

    @classmethod
    def of(cls, arm_ND: Floats, teacher_ND: Floats, pairs: Pairs, seed: int) -> _Kept:
        arm_P, teacher_P = ((rows_ND[pairs[0]] * rows_ND[pairs[1]]).sum(-1) for rows_ND in (arm_ND, teacher_ND))
        few = np.random.default_rng(seed).permutation(len(teacher_ND))[:MOST_TEXTS]
        near_N = np.full(len(teacher_ND), np.nan)
        near_N[few] = _neighbours_kept(arm_ND[few], teacher_ND[few])
        cosines_N = (arm_ND * teacher_ND).sum(-1) if arm_ND.shape == teacher_ND.shape else None
        return cls(cosines_N, near_N, pairs, _moments(rank(arm_P), rank(teacher_P)))

    def values(self, arm: str, weights_RN: Floats) -> Iterator[tuple[Quantity, Floats]]:
        """Every statistic of the arm in every resample, [R]."""
        texts = weights_RN.shape[1]
        if self.cosines_N is not None:
            yield Quantity(arm, "cosine_to_teacher", texts, ""), weights_RN @ self.cosines_N / texts
        drawn_RP = weights_RN[:, self.pairs[0]] * weights_RN[:, self.pairs[1]]
        yield Quantity(arm, "spearman_to_teacher", texts, ""), _correlation(drawn_RP @ self.moments_P6)
        asked_N = np.isfinite(self.near_N)
        kept_R, asked_R = weights_RN @ np.where(asked_N, self.near_N, 0.0), weights_RN @ asked_N
        yield Quantity(arm, "neighbours_kept", int(asked_N.sum())), ratio(kept_R, asked_R)


def _unit_rows(vectors_ND: Scores, arm: str) -> Floats:
    """The vectors at length 1, float64; a vector of zeros stays."""
    bad = np.flatnonzero(~np.isfinite(vectors_ND).all(-1))
    if len(bad):
        raise NonFiniteError(
            f"evaluation: the vector that {arm} gives text {bad[0]} of the test split (and {len(bad) - 1} more) is not "
            "finite. Look at these texts, or read the model in fp32."
        )
    wide_ND = vectors_ND.astype(np.float64)
    lengths_N1 = np.linalg.norm(wide_ND, axis=-1, keepdims=True)
    unit_ND: Floats = wide_ND / np.where(lengths_N1 > 0, lengths_N1, 1.0)
    return unit_ND


def _draw_pairs(texts: int, seed: int) -> Pairs:
    """Numbers of two different texts: all pairs, or MOST_PAIRS of them."""
    if texts * (texts - 1) // 2 <= MOST_PAIRS:
        return np.triu_indices(texts, 1)
    generator = np.random.default_rng(seed)
    first = generator.integers(0, texts, MOST_PAIRS)
    return first, (first + generator.integers(1, texts, MOST_PAIRS)) % texts


def _neighbours_kept(arm_ND: Floats, teacher_ND: Floats) -> Floats:
    """Share of each text's nearest by the teacher that are its nearest by the arm, [N]; NaN for a single text."""
    count = min(NEIGHBOURS, len(teacher_ND) - 1)
    if count < 1:
        return np.full(len(teacher_ND), np.nan)
    theirs_NK, ours_NK = _nearest(teacher_ND, count), _nearest(arm_ND, count)
    shared = [len(np.intersect1d(ours, theirs)) for ours, theirs in zip(ours_NK, theirs_NK, strict=True)]
    return np.array(shared) / count


def _nearest(rows_ND: Floats, count: int) -> Numbers:
    """Numbers of the `count` rows of the highest cosine with each row, itself left out, [N, count]."""
    found = []
    for begin in range(0, len(rows_ND), 512):
        cosines = rows_ND[begin : begin + 512] @ rows_ND.T
        own = np.arange(len(cosines))
        cosines[own, begin + own] = -np.inf
        found.append(np.argpartition(-cosines, count - 1, axis=-1)[:, :count])
    return np.concatenate(found)


def _moments(ones_P: Floats, others_P: Floats) -> Floats:
    """1, x, y, x^2, y^2, xy of the values, centred for the sake of rounding, [P, 6]."""
    x_P, y_P = (values_P - (values_P.mean() if len(values_P) else 0.0) for values_P in (ones_P, others_P))
    return np.stack([np.ones_like(x_P), x_P, y_P, x_P * x_P, y_P * y_P, x_P * y_P], axis=1)


def _correlation(sums_R6: Floats) -> Floats:
    """Pearson's correlation from weighted sums of `_moments`, [R]; NaN where a side is constant."""
    weight, x, y, xx, yy, xy = sums_R6.T
    varies_x, varies_y = xx * weight - x * x, yy * weight - y * y
    apart = (varies_x > 1e-9 * xx * weight) & (varies_y > 1e-9 * yy * weight)
    return ratio(xy * weight - x * y, np.where(apart, np.sqrt(np.abs(varies_x * varies_y)), 0.0))
