"""How often arms are right: against plain arithmetic and the exact binomial interval."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.evaluation import PASS, compare_likelihoods, compare_solvers, exact_interval

SHARES = st.lists(st.tuples(*[st.integers(0, 4)] * 4), min_size=2, max_size=30)
ARMS = ("teacher", "untrained", "control", "student")


def values(rows, slice="test"):
    return {(row.arm, row.name): row for row in rows if row.slice == slice}


@given(SHARES)
def test_means_gains_and_retention_are_those_of_plain_arithmetic(counts):
    right = dict(zip(ARMS, np.array(counts, np.float64).T / 4, strict=True))
    found = values(compare_solvers(right, resamples=100, seed=0))
    for arm, right_P in right.items():
        one = found[arm, PASS]
        assert one.value == pytest.approx(right_P.mean())
        assert one.low is not None
        assert one.low - 1e-12 <= one.value <= one.high + 1e-12
        assert one.n == len(counts)
    gain = found["student", "pass_gain_over_control"]
    assert gain.value == pytest.approx(right["student"].mean() - right["control"].mean())
    if right["teacher"].any():
        kept = found["student", "retention"].value
        assert kept == pytest.approx(right["student"].mean() / right["teacher"].mean())
    else:
        assert ("student", "retention") not in found


def test_of_one_answer_a_prompt_the_interval_is_exact():
    right = {"student": np.zeros(12), "untrained": np.eye(12)[0]}
    found = values(compare_solvers(right, resamples=100, seed=0))
    assert (found["student", PASS].low, found["student", PASS].high) == exact_interval(0, 12)
    assert found["student", PASS].high > 0.2
    assert (found["untrained", PASS].low, found["untrained", PASS].high) == exact_interval(1, 12)


def test_a_gain_is_paired_prompt_by_prompt():
    before = np.array([0.0, 1.0] * 50)
    right = {"student": np.minimum(before + np.eye(100)[0], 1.0), "untrained": before}
    gain = values(compare_solvers(right, resamples=500, seed=0))["student", "pass_gain_over_untrained"]
    assert gain.value == pytest.approx(0.01)
    assert gain.low >= 0.0  # unpaired, it would reach far below
    assert gain.high <= 0.05


def test_slices_hold_their_prompts_alone():
    right = {"student": np.array([1.0, 0.0, 1.0, 0.0])}
    rows = compare_solvers(right, resamples=100, seed=0, within={"leaked": np.array([1.0, 0.0, 1.0, 0.0])})
    assert values(rows, "leaked")["student", PASS].value == 1.0
    assert values(rows, "leaked")["student", PASS].n == 2
    assert values(rows)["student", PASS].value == 0.5


def test_arms_that_were_asked_other_prompts_are_refused():
    with pytest.raises(ValueError, match="2, 3"):
        compare_solvers({"student": np.zeros(3), "control": np.zeros(2)}, resamples=100, seed=0)


def test_likelihoods_are_per_token_and_gains_positive_where_the_student_is_better():
    tokens_D = np.array([10.0, 30.0])
    nll = {"untrained": np.array([20.0, 90.0]), "student": np.array([10.0, 60.0])}
    found = values(compare_likelihoods(nll, tokens_D, resamples=200, seed=0))
    assert found["untrained", "nll"].value == pytest.approx(110 / 40)
    assert found["student", "nll"].value == pytest.approx(70 / 40)
    assert found["student", "nll_gain_over_untrained"].value == pytest.approx(1.0)
    assert found["student", "nll_gain_over_untrained"].low > 0
