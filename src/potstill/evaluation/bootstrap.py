"""Paired bootstrap over documents: tokens of one document are not independent, documents nearly are.

Refuses to resample tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from potstill.errors import DataError

__all__ = ["Resampling"]

Floats = NDArray[np.float64]


class Resampling:
    """One set of resamples for all arms, so that differences between arms are paired. D documents, R resamples.

    Efron (1979), doi:10.1214/aos/1176344552; percentile intervals. Row 0 of every result is the sample itself.
    """

    def __init__(self, counts_D: Floats, resamples: int, seed: int) -> None:
        """`counts_D` are the scored positions of each document. Raises DataError when there is none."""
        if counts_D.sum() <= 0:
            raise DataError(
                "data.splits.test: no document has a supervised position, so nothing can be measured. Raise "
                "data.splits.test, or give more documents."
            )
        generator = np.random.default_rng(seed)
        documents = len(counts_D)
        drawn = generator.multinomial(documents, np.full(documents, 1.0 / documents), size=resamples)
        self._weights_RD = np.concatenate([np.ones((1, documents)), drawn])
        self._counts_R = self._weights_RD @ counts_D

    def means(self, sums_D: Floats) -> Floats:
        """Mean per position in the sample and in every resample, [1 + R], from each document's sum."""
        # A resample may miss all documents with positions when documents are few; it says nothing and is left out.
        with np.errstate(invalid="ignore"):
            means_R: Floats = (self._weights_RD @ sums_D) / self._counts_R
        return means_R

    @staticmethod
    def interval(values_R: Floats) -> tuple[float, float, float]:
        """(value of the sample, 2.5th percentile, 97.5th percentile) of a statistic computed for every resample.

        The percentiles are NaN when more than 2.5 % of the resamples have no value: a bound could lie anywhere.
        """
        rest = values_R[1:][np.isfinite(values_R[1:])]
        enough = len(rest) >= max(1.0, 0.975 * (len(values_R) - 1))
        low, high = np.percentile(rest, [2.5, 97.5]) if enough else (np.nan, np.nan)
        return float(values_R[0]), float(low), float(high)
