"""Exact intervals against their definition, and draws that are the same for all who ask alike."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.evaluation import Quantity, exact_interval, intervals

shares = st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
MEAN = Quantity("arm", "mean", 9)


def tail(hits: int, n: int, share: float) -> float:
    """P(X >= hits), term by term."""
    return math.fsum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(hits, n + 1))


@given(shares)
def test_at_the_ends_of_an_exact_interval_what_was_seen_has_a_tail_of_two_and_a_half_percent(share):
    hits, n = share
    low, high = exact_interval(hits, n)
    assert low == 0.0 if hits == 0 else tail(hits, n, low) == pytest.approx(0.025, abs=1e-9)
    assert high == 1.0 if hits == n else 1 - tail(hits + 1, n, high) == pytest.approx(0.025, abs=1e-9)
    assert low <= hits / n <= high


@given(shares)
def test_hits_and_misses_have_mirrored_intervals(share):
    hits, n = share
    low, high = exact_interval(hits, n)
    assert exact_interval(n - hits, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_an_interval_of_many_texts_is_no_wider_than_the_normal_one_and_a_bit():
    low, high = exact_interval(45_000, 50_000)
    deviation = math.sqrt(0.09 / 50_000)
    assert (low, high) == pytest.approx((0.9 - 1.96 * deviation, 0.9 + 1.96 * deviation), abs=5e-5)


@pytest.mark.parametrize(("hits", "n"), [(-1, 3), (4, 3), (0, 0)])
def test_what_is_no_share_is_refused(hits, n):
    with pytest.raises(ValueError, match="no share"):
        exact_interval(hits, n)


def means(values_D):
    return lambda weights_RD: {MEAN: weights_RD @ values_D / weights_RD.sum(-1)}


@pytest.mark.parametrize("block", [1, 7, 64, 10_000])
def test_how_many_draws_are_made_at_once_changes_nothing(monkeypatch, block):
    values_D = np.random.default_rng(0).normal(size=9)
    whole = intervals.resample(means(values_D), texts=9, resamples=50, seed=3)[MEAN]
    monkeypatch.setattr(intervals, "BLOCK", block)
    again = intervals.resample(means(values_D), texts=9, resamples=50, seed=3)[MEAN]
    np.testing.assert_allclose(again, whole, rtol=0, atol=1e-14)
    crowded = intervals.resample(means(values_D), texts=9, resamples=50, seed=3, cells=5000)[MEAN]
    np.testing.assert_allclose(crowded, whole, rtol=0, atol=1e-14)


def test_every_draw_has_as_many_texts_as_the_sample_and_the_first_is_the_sample():
    seen = []

    def statistic(weights_RD):
        seen.append(weights_RD)
        return {MEAN: weights_RD.sum(-1)}

    counts_R = intervals.resample(statistic, texts=12, resamples=300, seed=0)[MEAN]
    np.testing.assert_array_equal(counts_R, np.full(301, 12.0))
    np.testing.assert_array_equal(seen[0], np.ones((1, 12)))
    drawn = np.concatenate(seen[1:])
    assert drawn.mean(0) == pytest.approx(np.ones(12), abs=0.25)  # no text is preferred
    assert drawn.var() == pytest.approx(11 / 12, rel=0.1)  # as of a multinomial


def test_the_spread_of_a_mean_is_the_analytic_one():
    values_D = np.random.default_rng(1).normal(size=200)
    (found,) = intervals.measure(means(values_D), texts=200, resamples=4000, seed=0)
    deviation = values_D.std() / math.sqrt(200)
    assert found.value == pytest.approx(values_D.mean())
    assert (found.low, found.high) == pytest.approx(
        (found.value - 1.96 * deviation, found.value + 1.96 * deviation), abs=0.1 * deviation
    )


def test_no_value_is_no_measurement_and_one_text_has_no_interval():
    alone = Quantity("arm", "alone", 1)
    values = {MEAN: lambda rows: np.full(rows, np.nan), alone: lambda rows: np.ones(rows)}
    found = intervals.measure(
        lambda weights_RD: {quantity: make(len(weights_RD)) for quantity, make in values.items()},
        texts=3,
        resamples=100,
        seed=0,
    )
    assert [(one.name, one.value, one.low, one.high) for one in found] == [("alone", 1.0, None, None)]
    assert intervals.measure(means(np.zeros(0)), texts=0, resamples=10, seed=0) == []
