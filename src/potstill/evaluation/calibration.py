"""Is a model as often right as it says? Confidence against accuracy, in bins, position by position.

Refuses to keep the positions: sums per document and bin say all, for any resampling of documents.

Suffixes: N positions, G documents, M bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potstill.evaluation.bootstrap import Floats

__all__ = ["BINS", "ReliabilityBin", "bin_sums", "calibration_error", "reliability"]

BINS = 15
"""Of equal width, as Guo et al. (2017) have it: errors with another number of bins do not compare."""


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The n positions with low < confidence <= high: their mean confidence, and the share that was right."""

    low: float
    high: float
    confidence: float
    accuracy: float
    n: int


def bin_sums(confidence_N: Floats, correct_N: Floats, group_N: NDArray[np.int64], groups: int) -> Floats:
    """Number of positions, sum of confidence and sum of correct, per document and bin; float64 [G, M, 3].

    Bin m holds (m / M, (m + 1) / M], the first one also 0; a confidence beyond 1 by rounding is in the last. group_N
    is the document of each position, within [0, G). Sums of several calls add up.
    """
    edges = np.arange(1, BINS) / BINS
    place_N = group_N * BINS + np.searchsorted(edges, confidence_N, side="left")
    columns = [np.bincount(place_N, weights, groups * BINS) for weights in (None, confidence_N, correct_N)]
    return np.stack(columns, axis=-1).astype(np.float64).reshape(groups, BINS, 3)


def calibration_error(sums_M3: Floats) -> float:
    """ECE = sum_m (n_m / N) abs(accuracy_m - confidence_m) = (1 / N) sum_m abs(sum correct - sum confidence).

    From the sums of `bin_sums`, added over documents; a share, 0 to 1. NaN for no position. Finite samples make it
    larger than it is: a perfectly calibrated model is above 0 by chance. Naeini et al. (2015),
    doi:10.1609/aaai.v29i1.9602; Guo et al. (2017), arXiv:1706.04599, eq. 3.
    """
    count = sums_M3[:, 0].sum()
    return float(np.abs(sums_M3[:, 2] - sums_M3[:, 1]).sum() / count) if count else float("nan")


def reliability(sums_M3: Floats) -> tuple[ReliabilityBin, ...]:
    """The reliability table: one row a bin that has a position, the least confident first."""
    return tuple(
        ReliabilityBin(m / BINS, (m + 1) / BINS, float(confidence / n), float(correct / n), int(n))
        for m, (n, confidence, correct) in enumerate(sums_M3)
        if n
    )
