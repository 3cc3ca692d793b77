"""How soon an answer comes, how many come in a second, and what they cost: end to end, tokenisation included.

Refuses to time arms at different times: all that are given take turns, so that a busy moment befalls them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np

from potstill.evaluation.bootstrap import Floats
from potstill.evaluation.intervals import Quantity
from potstill.types import Measurement

__all__ = ["AT_ONCE", "ROUNDS", "Latency", "Round", "cost_usd_per_1000", "measure_latency", "quantile_interval"]

AT_ONCE = 32
"""Texts in a batch, for throughput."""

ROUNDS = 7
"""Turns of every arm; odd, so that a median is one turn's, and enough for their range to be a 95 % interval of it."""

SINGLES = 20
"""Single texts a turn: 140 in all, enough for the interval of a 95th percentile to have an upper end."""

MOST, SHORTEST_S = 8 * AT_ONCE, 0.2
"""Texts that are answered AT_ONCE at a time in a turn, at most; how long a turn does so at least, again and again."""

Query = Callable[[Sequence[str]], object]
"""Answers texts and returns when the answers are there."""


@dataclass(frozen=True, slots=True)
class Round:
    """One turn of one arm: how long each single text took, and texts/s at AT_ONCE."""

    latencies_ms: tuple[float, ...]
    throughput_per_s: float


@dataclass(frozen=True, slots=True)
class Latency:
    """All turns of one arm; turn i of one arm followed upon turn i of another."""

    rounds: tuple[Round, ...]

    @property
    def latencies_ms(self) -> Floats:
        """Of all single texts."""
        return np.concatenate([np.array(one.latencies_ms) for one in self.rounds])

    @property
    def throughputs_per_s(self) -> Floats:
        """One a turn."""
        return np.array([one.throughput_per_s for one in self.rounds])

    def measurements(self, arm: str, teacher: Latency | None = None) -> list[Measurement]:
        """latency_p50_ms, latency_p95_ms, throughput_per_s; beside a teacher latency_vs_teacher, throughput_vs_teacher.

        These two are medians over turns of arm / teacher in the same turn. Intervals are order statistics.
        """
        latencies_ms, rates = self.latencies_ms, self.throughputs_per_s
        found = [
            _quantile(Quantity(arm, "latency_p50_ms", len(latencies_ms), "ms"), latencies_ms, 0.5),
            _quantile(Quantity(arm, "latency_p95_ms", len(latencies_ms), "ms"), latencies_ms, 0.95),
            _quantile(Quantity(arm, "throughput_per_s", len(rates), "texts/s"), rates, 0.5),
        ]
        if teacher is None:
            return found
        slower = _medians_ms(self) / _medians_ms(teacher)
        return [
            *found,
            _quantile(Quantity(arm, "latency_vs_teacher", len(slower), "times"), slower, 0.5),
            _quantile(
                Quantity(arm, "throughput_vs_teacher", len(rates), "times"), rates / teacher.throughputs_per_s, 0.5
            ),
        ]


def measure_latency(queries: Mapping[str, Query], texts: Sequence[str], *, seconds: float = 10.0) -> dict[str, Latency]:
    """Time every arm, turn by turn: SINGLES texts one at a time, then texts AT_ONCE at a time, for all arms the same.

    Before its first turn an arm answers both ways untimed. Where some arm would be at its batches for longer than
    about `seconds` a turn, all get fewer of them, but one at least. Few texts are taken again and again. Raises
    ValueError where there is none.
    """
    if not texts:
        raise ValueError("there is no text to time an answer with")
    endless = cycle(texts)
    turns = [list(islice(endless, SINGLES)) for _ in range(ROUNDS)]
    batches = [list(islice(endless, AT_ONCE)) for _ in range(max(1, min(len(texts), MOST) // AT_ONCE))]
    slowest_s = max((_warm_up(query, turns[0], batches[0]) for query in queries.values()), default=0.0)
    batches = batches[: max(1, int(seconds / slowest_s))]
    rounds: dict[str, list[Round]] = {arm: [] for arm in queries}
    for singles in turns:
        for arm, query in queries.items():
            rounds[arm].append(Round(_time_singles(query, singles), _time_batches(query, batches)))
    return {arm: Latency(tuple(one)) for arm, one in rounds.items()}


def quantile_interval(n: int, share: float) -> tuple[int, int] | None:
    """Places (from 0, in rising order) of the two of n values between which the quantile lies with 95 % confidence.

    The tails of the binomial distribution of how many values lie below it are at most 0.025 each; None where n is too
    small for that. Hahn and Meeker (1991), Statistical Intervals, section 5.2.
    """
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(n + 1)
    logs = log_factorials[n] - log_factorials - log_factorials[::-1] + k * np.log(share) + (n - k) * np.log1p(-share)
    below = np.cumsum(np.exp(logs))  # below[k] = P(at most k values lie below the quantile)
    lows, highs = np.flatnonzero(below <= 0.025), np.flatnonzero(below >= 0.975)
    # The value at place i lies above the quantile where at most i values lie below it: seldom, for the low end.
    low, high = (int(lows[-1]) if len(lows) else -1), int(highs[0]) if len(highs) else n
    return (low, high) if low >= 0 and high < n else None


def cost_usd_per_1000(usd_per_hour: float, throughput_per_s: float) -> float:
    """USD for 1,000 queries on a machine that is kept busy: usd_per_hour / 3600 / throughput * 1000."""
    return usd_per_hour / 3600.0 / throughput_per_s * 1000.0


def _quantile(quantity: Quantity, values: Floats, share: float) -> Measurement:
    rising, places = np.sort(values), quantile_interval(len(values), share)
    bounds = (float(rising[places[0]]), float(rising[places[1]])) if places else None
    return quantity.measured(float(np.quantile(rising, share)), bounds)


def _medians_ms(latency: Latency) -> Floats:
    return np.array([np.median(one.latencies_ms) for one in latency.rounds])


def _warm_up(query: Query, singles: Sequence[str], batch: Sequence[str]) -> float:
    """Seconds for a batch, once everything has been used."""
    for text in singles[:3]:
        query([text])
    query(batch)
    began = time.perf_counter()
    query(batch)
    return max(time.perf_counter() - began, 1e-9)


def _time_singles(query: Query, singles: Sequence[str]) -> tuple[float, ...]:
    """Milliseconds of each."""
    found = []
    for text in singles:
        began = time.perf_counter()
        query([text])
        found.append(1000.0 * (time.perf_counter() - began))
    return tuple(found)


def _time_batches(query: Query, batches: Sequence[Sequence[str]]) -> float:
    """Texts a second, over one pass or, where that is short, several."""
    passes, began = 0, time.perf_counter()
    while passes == 0 or time.perf_counter() - began < SHORTEST_S:
        for batch in batches:
            query(batch)
        passes += 1
    return passes * sum(map(len, batches)) / (time.perf_counter() - began)
