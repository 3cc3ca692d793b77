from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.verify import Difficulty, Verdict, choose, pass_at_k

RIGHT, WRONG, UNKNOWN = Verdict(True), Verdict(False), Verdict(None)
verdicts = st.sampled_from([RIGHT, WRONG, UNKNOWN])
samples = st.lists(st.tuples(st.text("ab \n", max_size=6), verdicts), max_size=8)
rules = st.sampled_from(["all", "shortest", "distinct"])


@given(samples, rules, st.none() | st.integers(1, 4))
def test_only_right_samples_are_kept_each_text_once_and_no_more_than_asked(given_, rule, most):
    kept = choose(given_, rule=rule, most=most)
    texts = [" ".join(given_[index][0].split()) for index in kept]
    right = {" ".join(text.split()) for text, verdict in given_ if verdict.right}
    assert all(given_[index][1].right for index in kept)
    assert len(set(texts)) == len(texts) == min(len(right), most or len(right))
    assert kept == choose(given_, rule=rule, most=most)


def test_shortest_keeps_the_shortest_and_ties_go_to_the_earlier():
    given_ = [("three", RIGHT), ("ab", WRONG), ("xy", RIGHT), ("zz", RIGHT), ("one more", RIGHT)]
    assert choose(given_, rule="shortest", most=3) == (2, 3, 0)


def test_distinct_takes_the_one_that_is_least_like_those_taken():
    base = "we add the two numbers and then we divide by three"
    given_ = [(base, RIGHT), (base + " again", RIGHT), ("a table of all cases shows the result", RIGHT)]
    assert choose(given_, rule="distinct", most=2) == (0, 2)
    assert choose(given_, rule="distinct") == (0, 2, 1)


def test_less_than_one_sample_is_refused():
    with pytest.raises(ValueError, match="most=0"):
        choose([], most=0)


@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_draws_of_k_that_hold_a_right_one(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert math.isclose(pass_at_k(n, c, k), sum(map(any, draws)) / len(draws), abs_tol=1e-12)


def test_pass_at_k_is_unbiased():
    draw = random.Random(0)
    rate, n, k = 0.3, 8, 4
    values = [pass_at_k(n, sum(draw.random() < rate for _ in range(n)), k) for _ in range(20_000)]
    assert abs(sum(values) / len(values) - (1 - (1 - rate) ** k)) < 0.01


@pytest.mark.parametrize("numbers", [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_impossible_counts_are_refused(numbers):
    with pytest.raises(ValueError, match="needs"):
        pass_at_k(*numbers)


def told_of(prompts):
    told = Difficulty()
    for name, found in prompts.items():
        told.add(name, found)
    return told


def test_unknown_is_neither_right_nor_wrong():
    told = told_of({"a": [RIGHT, UNKNOWN], "b": [WRONG, WRONG], "c": [UNKNOWN], "d": [RIGHT, WRONG, WRONG, WRONG]})
    assert told.never_solved == ["b"]
    assert told.never_known == ["c"]
    assert (told.right, told.wrong, told.unknown) == (2, 5, 2)
    assert told.histogram == [1, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert told.pass_at() == {1: pytest.approx(1.25 / 3), 2: pytest.approx(0.25), 4: 1.0}


def test_who_answered_nothing_has_no_chances():
    assert told_of({}).pass_at() == told_of({"a": [UNKNOWN], "b": []}).pass_at() == {}


@given(st.dictionaries(st.text(max_size=3), st.lists(verdicts, max_size=9), max_size=6))
def test_every_prompt_and_sample_is_counted_once(given_):
    told = told_of(given_)
    assert told.right + told.wrong + told.unknown == sum(map(len, given_.values()))
    assert sum(told.histogram) + len(told.never_known) == len(given_)
    known = {name: [v.right for v in found if v.right is not None] for name, found in given_.items()}
    assert set(told.never_known) == {name for name, found in known.items() if not found}
    assert set(told.never_solved) == {name for name, found in known.items() if found and not any(found)}


@given(st.dictionaries(st.integers(), st.lists(verdicts, min_size=1, max_size=6), min_size=1, max_size=6))
def test_the_chance_of_k_is_the_mean_over_prompts_with_k_known_samples(given_):
    counts = [
        ([v.right for v in found].count(True), sum(v.right is not None for v in found)) for found in given_.values()
    ]
    told = told_of({str(name): found for name, found in given_.items()}).pass_at()
    assert set(told) == {k for k in (1, 2, 4) if any(n >= k for _, n in counts)}
    for k, share in told.items():
        values = [pass_at_k(n, c, k) for c, n in counts if n >= k]
        assert math.isclose(share, sum(values) / len(values), abs_tol=1e-12)
