"""Out of scope: the AUROC against all pairs, thresholds against all thresholds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.errors import DataError
from potstill.evaluation import (
    Confidences,
    Threshold,
    choose_threshold,
    exact_interval,
    measure_scope,
    score_confidence,
)
from potstill.evaluation.scope import auroc

levels = st.lists(st.sampled_from([0.1, 0.2, 0.35, 0.5, 0.9, 1.0]), min_size=1, max_size=12)
weights = st.lists(st.integers(0, 3), min_size=24, max_size=24)


def confidences(within, outside):
    return Confidences(np.array(within), np.array(outside))


@given(levels, levels, weights)
def test_the_auroc_is_the_share_of_pairs_in_order_ties_counted_half(within, outside, drawn):
    one = confidences(within, outside)
    within_I, outside_O = np.array(drawn[: len(within)], float), np.array(drawn[12 : 12 + len(outside)], float)
    found = auroc(one, within_I[None], outside_O[None])[0]
    pairs = [
        (i * o, 1.0 if b < a else 0.5 if b == a else 0.0)
        for a, i in zip(within, within_I, strict=True)
        for b, o in zip(outside, outside_O, strict=True)
    ]
    total = sum(weight for weight, _ in pairs)
    if total == 0:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(sum(weight * won for weight, won in pairs) / total)


def judge(one, line):
    caught, lost = (one.outside_O < line).sum(), (one.within_I < line).sum()
    return (caught / (caught + lost) if caught + lost else 0.0), caught / len(one.outside_O)


@given(levels, levels, st.sampled_from([0.3, 0.5, 0.9, 1.0]))
def test_no_threshold_of_the_asked_precision_catches_more(within, outside, asked):
    one = confidences(within, outside)
    chosen = choose_threshold(one, asked)
    assert (chosen.precision, chosen.recall) == pytest.approx(judge(one, chosen.confidence))
    others = [judge(one, line) for line in (*within, *outside, 2.0)]
    able = [recall for precision, recall in others if precision >= asked]
    assert chosen.reached == bool(able)
    if able:
        assert chosen.precision >= asked
        assert chosen.recall == pytest.approx(max(able))
    else:
        assert chosen.precision == pytest.approx(max(precision for precision, _ in others))


def test_of_equally_good_thresholds_the_one_that_turns_fewer_away_is_taken():
    assert choose_threshold(confidences([0.2, 0.8], [0.1]), 0.1).confidence == 0.2


@pytest.mark.parametrize(("within", "outside", "what"), [([0.5], [], "out of scope"), ([], [0.5], "of a class")])
def test_where_a_kind_of_text_is_missing_the_split_is_named(within, outside, what):
    with pytest.raises(DataError, match=rf"^task\.out_of_scope: the validation split .*{what}.* leave task\.out"):
        choose_threshold(confidences(within, outside), 0.9)
    with pytest.raises(DataError, match=rf"the test split .*{what}"):
        measure_scope({"arm": confidences(within, outside)}, {}, resamples=10, seed=0)


def test_on_test_texts_the_threshold_is_applied_as_it_was_chosen():
    test = confidences([0.9, 0.8, 0.3, 0.7], [0.2, 0.6, 0.1])
    found = {
        one.name: one
        for one in measure_scope({"arm": test}, {"arm": Threshold(0.5, 1.0, 1.0, True)}, resamples=400, seed=0)
    }
    assert (found["oos_recall"].value, found["oos_recall"].n) == (2 / 3, 3)
    assert (found["oos_precision"].value, found["oos_precision"].n) == (2 / 3, 3)
    assert (found["oos_recall"].low, found["oos_recall"].high) == exact_interval(2, 3)
    assert (found["oos_threshold"].value, found["oos_threshold"].low) == (0.5, None)
    assert found["oos_auroc"].value == pytest.approx(11 / 12)
    assert found["oos_auroc"].low <= found["oos_auroc"].value <= found["oos_auroc"].high


def test_where_no_text_is_below_the_threshold_there_is_no_precision():
    test = confidences([0.9], [0.8])
    found = measure_scope({"arm": test}, {"arm": Threshold(0.5, 1.0, 1.0, True)}, resamples=100, seed=0)
    assert {one.name for one in found} == {"oos_auroc", "oos_threshold", "oos_recall"}


def test_confidence_is_the_largest_probability_and_falls_with_temperature():
    logits_NC = np.log(np.array([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]))
    assert score_confidence(logits_NC) == pytest.approx([0.7, 0.5])
    assert (score_confidence(logits_NC, 2.0) < score_confidence(logits_NC)).all()


def test_with_several_labels_confidence_is_that_of_the_likeliest_label_alone():
    logits_NC = np.array([[-3.0, -3.0], [0.0, -3.0], [3.0, 3.0]])
    assert score_confidence(logits_NC, multi_label=True) == pytest.approx(1 / (1 + np.exp([3.0, 0.0, -3.0])))
