"""The calibration error against a loop over positions, and what it must say of models that can be seen through."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.evaluation import BINS, DocumentScores, bin_sums, calibration_error, compare_arms, reliability

EDGES = [m / BINS for m in range(BINS + 1)]

confidences = st.one_of(st.floats(0.0, 1.0, exclude_min=True), st.sampled_from(EDGES[1:]))
positions = st.lists(st.tuples(confidences, st.booleans(), st.integers(0, 3)), min_size=1, max_size=60)


def sums_of(rows, groups=4):
    confidence_N, correct_N, group_N = (np.array(column) for column in zip(*rows, strict=True))
    return bin_sums(confidence_N.astype(np.float64), correct_N.astype(np.float64), group_N, groups)


def oracle(rows):
    """Guo et al. (2017), eq. 3, as it is written: bin m holds (m / M, (m + 1) / M]."""
    error = 0.0
    for low, high in pairwise(EDGES):
        inside = [(sure, right) for sure, right, _ in rows if low < sure <= high]
        if inside:
            accuracy = sum(right for _, right in inside) / len(inside)
            confidence = sum(sure for sure, _ in inside) / len(inside)
            error += len(inside) / len(rows) * abs(accuracy - confidence)
    return error


@settings(deadline=None)
@given(positions)
def test_the_error_is_that_of_its_definition(rows):
    assert calibration_error(sums_of(rows).sum(0)) == pytest.approx(oracle(rows), abs=1e-12)


@settings(deadline=None)
@given(positions, st.randoms(use_true_random=False))
def test_neither_order_nor_grouping_of_positions_changes_the_error(rows, random):
    whole = sums_of(rows)
    shuffled = random.sample(rows, len(rows))
    apart = sum(sums_of([row]) for row in shuffled)
    regrouped = sums_of([(sure, right, 3 - group) for sure, right, group in rows])
    assert np.allclose(whole, apart, rtol=0, atol=1e-12)
    assert np.array_equal(whole[::-1], regrouped)
    errors = [calibration_error(sums.sum(0)) for sums in (whole, apart, regrouped)]
    assert errors == pytest.approx([errors[0]] * 3, abs=1e-12)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below_it():
    for m in range(BINS):
        assert sums_of([(EDGES[m + 1], True, 0)])[0, :, 0].argmax() == m
    assert sums_of([(0.0, True, 0)])[0, 0, 0] == 1
    assert sums_of([(1.0 + 1e-7, True, 0)])[0, -1, 0] == 1


def test_sure_and_always_wrong_is_as_bad_as_it_gets_and_sure_and_right_is_perfect():
    assert calibration_error(sums_of([(1.0, False, 0)] * 5).sum(0)) == 1.0
    assert calibration_error(sums_of([(1.0, True, 0)] * 5).sum(0)) == 0.0


def test_a_model_that_is_right_as_often_as_it_says_has_an_error_near_zero_and_a_surer_one_has_not():
    generator = np.random.default_rng(0)
    sure_N = generator.uniform(0.02, 1.0, size=200_000)
    right_N = (generator.uniform(size=sure_N.size) < sure_N).astype(np.float64)
    group_N = np.zeros(sure_N.size, dtype=np.int64)
    assert calibration_error(bin_sums(sure_N, right_N, group_N, 1).sum(0)) < 0.006
    too_sure = calibration_error(bin_sums(sure_N**0.5, right_N, group_N, 1).sum(0))
    assert too_sure == pytest.approx(float((sure_N**0.5 - sure_N).mean()), abs=0.01)


def test_no_position_has_no_error():
    assert math.isnan(calibration_error(np.zeros((BINS, 3))))
    assert reliability(np.zeros((BINS, 3))) == ()


@settings(deadline=None)
@given(positions)
def test_the_reliability_table_holds_every_position_and_gives_the_error_back(rows):
    table = reliability(sums_of(rows).sum(0))
    assert sum(row.n for row in table) == len(rows)
    assert all(row.low - 1e-12 <= row.confidence <= row.high + 1e-12 and 0 <= row.accuracy <= 1 for row in table)
    error = sum(row.n * abs(row.accuracy - row.confidence) for row in table) / len(rows)
    assert error == pytest.approx(oracle(rows), abs=1e-12)


# ----------------------------------------------------------------------------------------------------- over documents


def documents(seed, number=30, sure=0.7, right=0.6):
    """Documents that differ in how often the model is right."""
    generator = np.random.default_rng(seed)
    counts = generator.integers(20, 60, size=number)
    group_N = np.repeat(np.arange(number), counts)
    share_N = np.clip(generator.normal(right, 0.15, size=number), 0, 1)[group_N]
    sure_N = np.clip(generator.normal(sure, 0.1, size=group_N.size), 0.01, 1.0)
    right_N = (generator.uniform(size=group_N.size) < share_N).astype(np.float64)
    flat = {name: np.ones(number) for name in ("nll", "kl_to_teacher", "agreement")}
    bins_DM3 = bin_sums(sure_N, right_N, group_N, number)
    return DocumentScores(tuple(map(str, range(number))), counts.astype(np.float64), flat, bins_DM3)


def ece_of(scores, resamples=300, seed=1):
    (found,) = [m for m in compare_arms({"teacher": scores}, resamples, seed) if m.name == "ece"]
    return found


def test_the_error_of_an_arm_has_no_interval():
    """Resampling documents adds noise to every bin, which lifts the error: the quantiles would bound nothing."""
    scores = documents(0)
    found = ece_of(scores)
    assert found.value == pytest.approx(calibration_error(scores.bins_DM3.sum(0)))
    assert (found.low, found.high) == (None, None)
    assert (found.n, found.unit, found.slice) == (30, "share", "test")


def test_one_document_has_an_error_without_an_interval():
    found = ece_of(documents(0, number=1))
    assert found.value > 0
    assert (found.low, found.high) == (None, None)
