"""Intervals that hold what they promise: 95 % of the time, over documents, paired."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.errors import DataError
from potstill.evaluation import Resampling

documents = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 100)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=50)
@given(documents, st.integers(0, 99))
def test_row_0_is_the_mean_over_positions_and_lies_among_the_documents(table, seed):
    counts_D, means_D = (np.array(column, dtype=np.float64) for column in zip(*table, strict=True))
    means_R = Resampling(counts_D, 50, seed).means(counts_D * means_D)
    assert means_R.shape == (51,)
    by_hand = math.fsum(c * m for c, m in table) / math.fsum(c for c, _ in table)
    assert means_R[0] == pytest.approx(by_hand, rel=1e-12, abs=1e-12)
    assert (means_R >= means_D.min() - 1e-9).all()
    assert (means_R <= means_D.max() + 1e-9).all()


def test_the_spread_of_a_mean_is_the_analytic_one():
    """With equal counts the bootstrap of a mean has the variance sum (x - mean)^2 / D^2."""
    values_D = np.random.default_rng(0).normal(size=80)
    resampling = Resampling(np.ones(80), 20_000, seed=1)
    means_R = resampling.means(values_D)
    deviation = values_D.std() / math.sqrt(80)
    assert means_R[1:].std() == pytest.approx(deviation, rel=0.03)
    value, low, high = resampling.interval(means_R)
    assert value == pytest.approx(values_D.mean())
    assert (low, high) == pytest.approx((value - 1.96 * deviation, value + 1.96 * deviation), abs=0.1 * deviation)


def test_documents_of_unequal_length_spread_as_a_ratio_of_sums():
    """Delta method: var = sum (s_d - mean c_d)^2 / (sum c_d)^2."""
    generator = np.random.default_rng(0)
    counts_D = generator.integers(1, 100, size=300).astype(np.float64)
    sums_D = counts_D * (2.0 + generator.normal(size=300))
    means_R = Resampling(counts_D, 10_000, seed=2).means(sums_D)
    mean = sums_D.sum() / counts_D.sum()
    deviation = math.sqrt(((sums_D - mean * counts_D) ** 2).sum()) / counts_D.sum()
    assert means_R[1:].std() == pytest.approx(deviation, rel=0.05)


def test_intervals_cover_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(5)
    covered = 0
    for trial in range(300):
        counts_D = generator.integers(5, 60, size=60).astype(np.float64)
        sums_D = counts_D * generator.gamma(4.0, 0.25, size=60)
        resampling = Resampling(counts_D, 400, seed=trial)
        _, low, high = resampling.interval(resampling.means(sums_D))
        covered += low <= 1.0 <= high
    assert 0.91 <= covered / 300 <= 0.98


def test_the_difference_of_correlated_arms_is_known_better_than_either():
    generator = np.random.default_rng(3)
    counts_D = generator.integers(5, 60, size=50).astype(np.float64)
    difficulty_D = generator.normal(3.0, 1.0, size=50)
    one, other = (counts_D * (difficulty_D + generator.normal(gain, 0.05, size=50)) for gain in (0.1, 0.0))
    resampling = Resampling(counts_D, 2000, seed=0)
    _, low, high = resampling.interval(resampling.means(one) - resampling.means(other))
    apart = resampling.means(one) - Resampling(counts_D, 2000, seed=1).means(other)
    _, apart_low, apart_high = resampling.interval(apart)
    assert low > 0.0
    assert apart_low < 0.0
    assert high - low < 0.2 * (apart_high - apart_low)


def test_more_tokens_of_the_same_documents_are_no_more_evidence():
    generator = np.random.default_rng(4)
    counts_D = generator.integers(1, 9, size=20).astype(np.float64)
    sums_D = counts_D * generator.normal(size=20)
    few, many = Resampling(counts_D, 300, seed=0), Resampling(1000 * counts_D, 300, seed=0)
    assert few.interval(few.means(sums_D)) == pytest.approx(many.interval(many.means(1000 * sums_D)))


def test_the_seed_decides_the_resamples():
    counts_D, sums_D = np.arange(1.0, 9.0), np.arange(8.0) ** 2
    first, again, other = (Resampling(counts_D, 30, seed).means(sums_D) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first[1:] != other[1:]).any()


def test_a_single_document_is_always_itself():
    resampling = Resampling(np.array([7.0]), 20, seed=0)
    assert (resampling.means(np.array([21.0])) == 3.0).all()


@pytest.mark.parametrize("counts", [[], [0.0, 0.0]])
def test_nothing_scored_is_an_error_with_a_way_out(counts):
    with pytest.raises(DataError, match=r"^data\.splits\.test: .* Raise data\.splits\.test"):
        Resampling(np.array(counts), 10, seed=0)


@pytest.mark.parametrize(("lost", "bounded"), [(0, True), (25, True), (26, False), (1000, False)])
def test_a_statistic_that_many_resamples_lack_has_no_interval(lost, bounded):
    values_R = np.linspace(0.0, 1.0, 1001)
    values_R[1 : 1 + lost] = np.nan
    value, low, high = Resampling.interval(values_R)
    assert value == 0.0
    assert np.isfinite([low, high]).all() == bounded
