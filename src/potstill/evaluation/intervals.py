"""Intervals of what is counted over texts: exact for shares, by paired bootstrap for all else.

Refuses to bound what resampling would shift, such as a calibration error: such numbers come without an interval.

Suffixes: R resamples (row 0 of a result is the sample itself), D texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np

from potstill.evaluation.bootstrap import Floats, Resampling
from potstill.types import Measurement

__all__ = ["Quantity", "exact_interval", "measure", "ratio", "resample"]

BLOCK = 2**18
"""Numbers that are made at once of draws: 2 MB, which the cache of a processor holds."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """What is measured: of which arm, over which slice, from n texts (or answers of theirs)."""

    arm: str
    name: str
    n: int
    unit: str = "share"
    slice: str = "test"

    def measured(self, value: float, bounds: tuple[float, float] | None = None) -> Measurement:
        """As a row of measurements.json; bounds that are no numbers are none."""
        low, high = bounds if bounds is not None and np.isfinite(bounds).all() else (None, None)
        return Measurement(self.arm, self.name, self.slice, value, low, high, self.n, self.unit)

    def counted(self, hits: int) -> list[Measurement]:
        """A share of n independent texts, with its exact interval; nothing where there is no text."""
        return [self.measured(hits / self.n, exact_interval(hits, self.n))] if self.n else []


Statistic = Callable[[Floats], Mapping[Quantity, Floats]]
"""(how often each text was drawn [R, D]) -> the value of every quantity in each of these resamples, [R]."""


def resample(statistic: Statistic, *, texts: int, resamples: int, seed: int, cells: int = 0) -> dict[Quantity, Floats]:
    """Every quantity in the sample and in each of `resamples` draws of as many texts with replacement, [1 + R].

    Who calls with equal texts, resamples and seed gets the same draws, so that results are paired. Memory does not
    grow with resamples times texts: `statistic` gets some draws at a time, fewer where it makes many numbers (`cells`)
    of each. Efron (1979), doi:10.1214/aos/1176344552.
    """
    generator = np.random.default_rng(seed)
    found = {quantity: [values] for quantity, values in statistic(np.ones((1, texts))).items()}
    rows = max(1, BLOCK // max(1, texts, cells))
    for begin in range(0, resamples, rows):
        count = min(rows, resamples - begin)
        drawn = generator.integers(0, texts, (count, texts)) + texts * np.arange(count)[:, None]
        weights_RD = np.bincount(drawn.ravel(), minlength=count * texts).reshape(count, texts)
        for quantity, values in statistic(weights_RD.astype(np.float64)).items():
            found[quantity].append(values)
    return {quantity: np.concatenate(values) for quantity, values in found.items()}


def measure(statistic: Statistic, *, texts: int, resamples: int, seed: int, cells: int = 0) -> list[Measurement]:
    """The quantities of `statistic` with 95 % percentile intervals; those without a finite value are left out.

    A quantity of a single text has no interval.
    """
    if not texts:
        return []
    found = resample(statistic, texts=texts, resamples=resamples, seed=seed, cells=cells)
    return list(chain.from_iterable(_bounded(quantity, values_R) for quantity, values_R in found.items()))


def ratio(above_R: Floats, below_R: Floats) -> Floats:
    """The quotient, NaN where below is 0: such a resample says nothing."""
    nothing_R: Floats = np.full(np.broadcast(above_R, below_R).shape, np.nan)
    return np.divide(above_R, below_R, out=nothing_R, where=below_R != 0)


@lru_cache(maxsize=4096)
def exact_interval(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share of which `hits` of n independent trials were seen.

    P(X >= hits | low) = P(X <= hits | high) = 0.025 for X binomial of n trials. Raises ValueError where hits is not
    within 0..n or n is 0. Clopper and Pearson (1934), doi:10.1093/biomet/26.4.404.
    """
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"{hits} hits of {n} trials are no share")
    low = 0.0 if hits == 0 else _solve(lambda share: _at_most(n - hits, n, 1.0 - share) - 0.025)
    high = 1.0 if hits == n else _solve(lambda share: 0.025 - _at_most(hits, n, share))
    return low, high


def _bounded(quantity: Quantity, values_R: Floats) -> list[Measurement]:
    value, low, high = Resampling.interval(values_R)
    if not np.isfinite(value):
        return []
    return [quantity.measured(value, (low, high) if quantity.n > 1 else None)]


def _at_most(hits: int, n: int, share: float) -> float:
    """P(X <= hits) for X binomial of n trials, summed in log space."""
    counts = np.arange(1, n + 1)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(counts))])
    k = np.arange(hits + 1)
    logs = (
        log_factorials[n] - log_factorials[k] - log_factorials[n - k] + k * np.log(share) + (n - k) * np.log1p(-share)
    )
    return float(np.exp(logs).sum())


def _solve(rising: Callable[[float], float]) -> float:
    """Where a function that rises over (0, 1) passes 0, by bisection to the last bits of a share."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2
