"""Speed of answers whose times are planted, and quantiles whose intervals hold what they promise."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.evaluation import AT_ONCE, Latency, Round, cost_usd_per_1000, latency, measure_latency
from potstill.evaluation.latency import quantile_interval

TEXTS = [f"text {number} " * (1 + number % 5) for number in range(100)]


class Clock:
    """A clock that only answers move: so many seconds a call, and so many a text."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, tuple[str, ...]]] = []

    def perf_counter(self) -> float:
        return self.now

    def query(self, arm, call_s, text_s):
        def answer(texts):
            self.calls.append((arm, tuple(texts)))
            self.now += call_s + text_s * len(texts)

        return answer


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return clock


def values(found):
    return {one.name: one.value for one in found}


def test_single_texts_and_batches_take_what_they_take(clock):
    timed = measure_latency({"arm": clock.query("arm", 0.002, 0.001)}, TEXTS)
    found = values(timed["arm"].measurements("arm"))
    assert found["latency_p50_ms"] == pytest.approx(3.0)
    assert found["latency_p95_ms"] == pytest.approx(3.0)
    assert found["throughput_per_s"] == pytest.approx(AT_ONCE / (0.002 + 0.001 * AT_ONCE))


def test_against_a_teacher_that_is_four_times_as_slow(clock):
    queries = {"teacher": clock.query("teacher", 0.0, 0.004), "student": clock.query("student", 0.0, 0.001)}
    timed = measure_latency(queries, TEXTS)
    found = values(timed["student"].measurements("student", timed["teacher"]))
    assert found["latency_vs_teacher"] == pytest.approx(0.25)
    assert found["throughput_vs_teacher"] == pytest.approx(4.0)
    assert not [name for name in values(timed["teacher"].measurements("teacher")) if name.endswith("vs_teacher")]


def test_arms_take_turns_and_answer_the_same_texts(clock):
    queries = {arm: clock.query(arm, 0.001, 0.001 * (place + 1)) for place, arm in enumerate("abc")}
    measure_latency(queries, TEXTS)
    asked = {arm: [texts for name, texts in clock.calls if name == arm] for arm in queries}
    singles = {arm: [texts for texts in calls if len(texts) == 1] for arm, calls in asked.items()}
    assert singles["a"] == singles["b"] == singles["c"]
    assert len(singles["a"]) >= 100
    assert len({text for (text,) in singles["a"]}) >= 100 - 3 * AT_ONCE  # not one text again and again
    assert {frozenset(calls) - set(singles[arm]) for arm, calls in asked.items()} == {
        frozenset(texts for texts in asked["a"] if len(texts) == AT_ONCE)
    }
    turns = [name for name, _ in clock.calls]
    changes = sum(1 for before, after in pairwise(turns) if before != after)
    assert changes >= 3 * latency.ROUNDS - 1


def test_a_slow_moment_of_the_machine_spares_no_arm_and_so_leaves_the_ratio(clock):
    busy = {"factor": 1.0}

    def slow(arm, text_s):
        answer = clock.query(arm, 0.0, 0.0)

        def query(texts):
            answer(texts)
            clock.now += text_s * len(texts) * busy["factor"]
            busy["factor"] = 10.0 if len(clock.calls) > 2000 else 1.0

        return query

    timed = measure_latency({"teacher": slow("teacher", 0.002), "student": slow("student", 0.001)}, TEXTS)
    found = values(timed["student"].measurements("student", timed["teacher"]))
    assert found["throughput_vs_teacher"] == pytest.approx(2.0, rel=0.05)


def test_slow_arms_get_fewer_batches_but_one(clock):
    measure_latency({"fast": clock.query("fast", 0.0, 1e-3), "slow": clock.query("slow", 0.0, 2.0)}, TEXTS, seconds=100)
    batches = {texts for name, texts in clock.calls if name == "slow" and len(texts) == AT_ONCE}
    assert len(batches) == 1


def test_few_texts_are_taken_again_and_none_is_refused(clock):
    timed = measure_latency({"arm": clock.query("arm", 0.0, 0.001)}, ["a"])
    assert {len(texts) for _, texts in clock.calls} == {1, AT_ONCE}
    assert values(timed["arm"].measurements("arm"))["throughput_per_s"] == pytest.approx(1000)
    with pytest.raises(ValueError, match="no text"):
        measure_latency({"arm": clock.query("arm", 0.0, 0.001)}, [])


@given(st.integers(1, 200), st.sampled_from([0.5, 0.95]))
def test_the_places_of_a_quantile_bound_it_and_none_within_them_does(n, share):
    """Coverage: P(low < B <= high) for B binomial, the number of values below the quantile."""
    chances = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
    places = quantile_interval(n, share)
    if places is None:
        assert chances[n] > 0.025 or chances[0] > 0.025
        return
    low, high = places
    assert math.fsum(chances[: low + 1]) <= 0.025 < math.fsum(chances[: low + 2])
    assert math.fsum(chances[high + 1 :]) <= 0.025 < math.fsum(chances[high:])


@settings(max_examples=1)
@given(st.just(0))
def test_intervals_of_a_95th_percentile_cover_it_95_times_in_100(seed):
    generator, truth = np.random.default_rng(seed), -math.log(0.05)
    covered = 0
    for _ in range(600):
        rounds = tuple(Round(tuple(generator.exponential(size=20)), 1.0) for _ in range(7))
        found = {one.name: one for one in Latency(rounds).measurements("arm")}["latency_p95_ms"]
        covered += found.low <= truth <= found.high
    assert 0.93 <= covered / 600 <= 0.99


def test_the_range_of_seven_turns_bounds_the_median_rate():
    rounds = tuple(Round((1.0,), float(rate)) for rate in (3, 1, 4, 1, 5, 9, 2))
    found = {one.name: one for one in Latency(rounds).measurements("arm")}["throughput_per_s"]
    assert (found.low, found.value, found.high) == (1.0, 3.0, 9.0)


def test_a_thousand_queries_cost_what_the_machine_costs_while_it_answers_them():
    assert cost_usd_per_1000(3.6, 100.0) == pytest.approx(0.01)  # 10 s at 0.001 USD/s
