"""Laws of the learning rate, whatever the length and the shares."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.training import learning_rate_factor

SHARE = st.floats(0.0, 1.0)
STEPS = st.integers(1, 400)


def curve(steps, kind, **shares):
    return [learning_rate_factor(step, steps, kind, **shares) for step in range(steps)]


def falls(values):
    return all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(values))


@given(STEPS, st.sampled_from(["cosine", "linear", "constant", "wsd"]), SHARE, SHARE, SHARE)
def test_factors_stay_within_0_and_1(steps, kind, warmup, decay, final):
    assert all(0.0 <= factor <= 1.0 for factor in curve(steps, kind, warmup=warmup, decay=decay, final=final))


@given(STEPS, st.sampled_from(["cosine", "linear", "constant", "wsd"]), st.floats(0.0, 0.99), SHARE)
def test_warm_up_rises_evenly_from_above_0_to_the_peak(steps, kind, warmup, final):
    factors = curve(steps, kind, warmup=warmup, decay=0.01, final=final)
    warm = round(warmup * steps)
    for step in range(min(warm, steps)):
        assert factors[step] == pytest.approx((step + 1) / (warm + 1))
        assert factors[step] > 0.0


@given(STEPS, st.floats(0.0, 0.9), SHARE)
def test_a_cosine_falls_from_the_peak_and_reaches_final_just_after_the_end(steps, warmup, final):
    factors = curve(steps, "cosine", warmup=warmup, final=final)
    warm = round(warmup * steps)
    if warm < steps:
        assert falls(factors[warm:])
        rest = 0.5 * (1.0 - math.cos(math.pi / (steps - warm + 1)))
        assert factors[-1] == pytest.approx(final + (1.0 - final) * rest)


def test_a_cosine_is_half_way_in_the_middle():
    factors = curve(99, "cosine", warmup=0.0, final=0.2)
    assert factors[49] == pytest.approx(0.6)
    assert factors[24] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + 2**-0.5))


@given(STEPS, st.floats(0.0, 0.9), SHARE)
def test_a_line_falls_evenly_from_the_peak_and_reaches_final_just_after_the_end(steps, warmup, final):
    factors = curve(steps, "linear", warmup=warmup, final=final)
    fall = factors[round(warmup * steps) :]
    drop = (1.0 - final) / (len(fall) + 1)
    assert fall == pytest.approx([1.0 - drop * (step + 1) for step in range(len(fall))])


@given(STEPS, SHARE)
def test_constant_stays_at_the_peak(steps, warmup):
    warm = round(warmup * steps)
    assert set(curve(steps, "constant", warmup=warmup, final=0.3)[warm:]) <= {1.0}


@given(st.integers(10, 400), st.floats(0.0, 0.5), st.floats(0.01, 0.5), SHARE)
def test_wsd_warms_up_stays_and_decays_evenly_to_final(steps, warmup, decay, final):
    factors = curve(steps, "wsd", warmup=warmup, decay=decay, final=final)
    last = max(1, round(decay * steps))
    warm = round(warmup * steps)
    assert set(factors[warm : steps - last]) <= {1.0}
    if warm < steps:
        assert factors[-1] == pytest.approx(final + (1.0 - final) / (last + 1))
    drops = [earlier - later for earlier, later in itertools.pairwise(factors[max(warm, steps - last) :])]
    assert all(drop == pytest.approx((1.0 - final) / (last + 1)) for drop in drops)


@given(STEPS, st.sampled_from(["cosine", "linear", "constant", "wsd"]), SHARE, SHARE)
def test_no_step_is_wasted_on_a_rate_of_0(steps, kind, warmup, decay):
    assert min(curve(steps, kind, warmup=warmup, decay=decay, final=0.0)) > 0.0


@given(STEPS, st.integers(), st.sampled_from(["cosine", "linear", "constant", "wsd"]))
def test_steps_outside_the_run_are_refused(steps, step, kind):
    if 0 <= step < steps:
        assert learning_rate_factor(step, steps, kind, warmup=0.1, decay=0.1) >= 0.0
    else:
        with pytest.raises(ValueError, match=rf"step {step} is outside of the run's 0\.\.{steps - 1}"):
            learning_rate_factor(step, steps, kind, warmup=0.1, decay=0.1)
