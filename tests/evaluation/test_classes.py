"""Measures of classifiers against loops over answers, and what must not change them."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.errors import NonFiniteError
from potstill.evaluation import (
    Truth,
    added_confusions,
    compare_classes,
    exact_interval,
    mark,
    tabulate_classes,
)

ARMS = ("teacher", "untrained", "control", "student")


def make(seed, *, texts=25, classes=4, multi_label=False, words=1, unlabelled=0.2):
    """Random logits of every arm, and a truth with unlabelled answers, slices, and a class that never is true."""
    generator = np.random.default_rng(seed)
    text_N = np.repeat(np.arange(texts), generator.integers(1, words + 1, texts))
    known_N = generator.random(len(text_N)) >= unlabelled
    if multi_label:
        true_NC = generator.random((len(text_N), classes)) < 0.4
    else:
        true_NC = generator.integers(0, classes, len(text_N))[:, None] == np.arange(classes)
    true_NC[:, -1] &= multi_label
    known_N &= multi_label | true_NC.any(-1)
    slices = [("", "web", "phone")[number % 3] for number in range(texts)]
    truth = Truth([f"c{c}" for c in range(classes)], true_NC & known_N[:, None], known_N, text_N, slices, multi_label)
    logits = {arm: (2 * generator.normal(size=true_NC.shape)).astype(np.float32) for arm in ARMS}
    return logits, truth


def compared(logits, truth, **changes):
    marks = {arm: mark(one, logits["teacher"], truth) for arm, one in logits.items()}
    found = compare_classes(marks, truth, **{"resamples": 100, "seed": 0, **changes})
    keys = [(one.arm, one.name, one.slice) for one in found]
    assert len(keys) == len(set(keys))
    return dict(zip(keys, found, strict=True))


def value(found, arm, name, where="test"):
    return found[arm, name, where].value if (arm, name, where) in found else None


def softmax(row):
    top = max(row)
    total = math.fsum(math.exp(z - top) for z in row)
    return [math.exp(z - top) / total for z in row]


def f1(said, true):
    hits = sum(a and b for a, b in zip(said, true, strict=True))
    return 2 * hits / (sum(said) + sum(true))


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([1, 3]))
def test_measures_of_one_class_are_those_of_a_loop_over_answers(seed, words):
    logits, truth = make(seed, words=words)
    found = compared(logits, truth)
    known = np.flatnonzero(truth.labelled_N)
    true = {n: int(truth.true_NC[n].argmax()) for n in known}
    said = {arm: [int(row.argmax()) for row in one] for arm, one in logits.items()}
    for arm, one in logits.items():
        rows = [softmax(row.astype(float).tolist()) for row in one]
        if len(known):
            right = sum(said[arm][n] == true[n] for n in known) / len(known)
            nll = -math.fsum(math.log(rows[n][true[n]]) for n in known) / len(known)
            assert value(found, arm, "accuracy") == pytest.approx(right)
            assert value(found, arm, "nll") == pytest.approx(nll)
            named = sorted(set(true.values()))
            scores = [f1([said[arm][n] == c for n in known], [true[n] == c for n in known]) for c in named]
            assert value(found, arm, "macro_f1") == pytest.approx(sum(scores) / len(scores))
            for c, score in zip(named, scores, strict=True):
                assert value(found, arm, "f1", f"class:c{c}") == pytest.approx(score)
        if arm != "teacher":
            agree = sum(a == b for a, b in zip(said[arm], said["teacher"], strict=True)) / len(one)
            teacher = [softmax(row.astype(float).tolist()) for row in logits["teacher"]]
            kls = [
                sum(p * math.log(p / q) for p, q in zip(*pair, strict=True)) for pair in zip(teacher, rows, strict=True)
            ]
            assert value(found, arm, "agreement") == pytest.approx(agree)
            assert value(found, arm, "kl_to_teacher") == pytest.approx(math.fsum(kls) / len(kls), abs=1e-9)


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_measures_of_several_labels_are_those_of_a_loop_over_texts_and_labels(seed):
    logits, truth = make(seed, multi_label=True)
    found = compared(logits, truth)
    known = np.flatnonzero(truth.labelled_N).tolist()
    for arm, one in logits.items() if known else ():
        said = {n: [z >= 0 for z in one[n]] for n in known}
        true = {n: truth.true_NC[n].tolist() for n in known}
        chance = {n: [1 / (1 + math.exp(-z)) for z in one[n].astype(float)] for n in known}
        cells = [(p if t else 1 - p) for n in known for p, t in zip(chance[n], true[n], strict=True)]
        assert value(found, arm, "accuracy") == pytest.approx(sum(said[n] == true[n] for n in known) / len(known))
        assert value(found, arm, "nll") == pytest.approx(-sum(map(math.log, cells)) / len(cells))
        flat = [[cell for n in known for cell in table[n]] for table in (said, true)]
        if any(flat[0]) or any(flat[1]):
            assert value(found, arm, "micro_f1") == pytest.approx(f1(*flat))
        columns = [([said[n][c] for n in known], [true[n][c] for n in known]) for c in range(4)]
        scores = [f1(*column) for column in columns if any(column[1])]
        if scores:
            assert value(found, arm, "macro_f1") == pytest.approx(sum(scores) / len(scores))


@given(st.integers(0, 10**6), st.booleans())
def test_the_teachers_own_logits_are_at_no_distance_and_keep_everything(seed, multi_label):
    logits, truth = make(seed, multi_label=multi_label, unlabelled=0.0)
    found = compared({"teacher": logits["teacher"], "student": logits["teacher"]}, truth)
    assert value(found, "student", "kl_to_teacher") == pytest.approx(0.0, abs=1e-12)
    assert value(found, "student", "agreement") == 1.0
    assert value(found, "student", "retention") in (None, 1.0)


def test_shares_of_texts_are_exact_and_shares_of_words_are_not():
    logits, truth = make(3, texts=200)
    one = compared(logits, truth)["student", "accuracy", "test"]
    assert (one.low, one.high) == exact_interval(round(one.value * one.n), one.n)
    logits, truth = make(3, texts=200, words=4)
    one = compared(logits, truth)["student", "accuracy", "test"]
    assert one.n < truth.labelled_N.sum()
    assert (one.low, one.high) != exact_interval(round(one.value * one.n), one.n)
    assert one.low < one.value < one.high


def test_repeating_the_words_of_every_text_is_no_evidence():
    logits, truth = make(5, texts=60, words=3)
    twice = Truth(
        truth.names,
        truth.true_NC.repeat(2, 0),
        truth.labelled_N.repeat(2),
        truth.text_N.repeat(2),
        truth.slices,
    )
    one, two = compared(logits, truth), compared({arm: z.repeat(2, 0) for arm, z in logits.items()}, twice)
    for name in ("accuracy", "nll", "macro_f1", "kl_to_teacher"):
        first, second = one["student", name, "test"], two["student", name, "test"]
        assert (first.value, first.low, first.high) == pytest.approx((second.value, second.low, second.high))


def test_an_unlabelled_text_counts_for_agreement_alone():
    logits, truth = make(7, texts=40, unlabelled=0.5)
    other = {arm: z.copy() for arm, z in logits.items()}
    unknown = ~truth.labelled_N
    other["student"][unknown] = other["teacher"][unknown]
    before, after = compared(logits, truth), compared(other, truth)
    for name in ("accuracy", "nll", "macro_f1", "ece", "retention"):
        assert value(before, "student", name) == value(after, "student", name)
    assert value(after, "student", "agreement") > value(before, "student", "agreement")
    assert value(after, "student", "kl_to_teacher") < value(before, "student", "kl_to_teacher")


def test_gains_are_paired_differences_and_positive_where_the_student_is_better():
    logits, truth = make(11, texts=300, unlabelled=0.0)
    better = {**logits, "student": logits["control"] + 4.0 * truth.true_NC.astype(np.float32)}
    found = compared(better, truth, resamples=400)
    for name in ("accuracy", "macro_f1", "agreement"):
        gain = value(found, "student", name) - value(found, "control", name)
        assert value(found, "student", f"{name}_gain_over_control") == pytest.approx(gain)
    for short, name in (("kl", "kl_to_teacher"), ("nll", "nll")):
        gain = value(found, "control", name) - value(found, "student", name)
        assert value(found, "student", f"{short}_gain_over_control") == pytest.approx(gain)
    assert found["student", "accuracy_gain_over_control", "test"].low > 0
    same = compared({**logits, "student": logits["control"]}, truth)["student", "accuracy_gain_over_control", "test"]
    assert (same.low, same.value, same.high) == (0.0, 0.0, 0.0)


def test_what_all_arms_find_easy_or_hard_does_not_widen_a_gain():
    generator = np.random.default_rng(0)
    texts = 400
    true_NC = generator.integers(0, 2, texts)[:, None] == np.arange(2)
    easy_N = generator.random(texts) < 0.5
    right_NC = np.where(true_NC == easy_N[:, None], 3.0, -3.0)  # every arm is right on the same half
    truth = Truth(["a", "b"], true_NC, np.ones(texts, np.bool_), np.arange(texts), [""] * texts)
    student = right_NC.copy()
    student[:8] = np.where(true_NC[:8], 3.0, -3.0)
    found = compared({"teacher": right_NC, "control": right_NC, "student": student}, truth, resamples=1000)
    gain, accuracy = found["student", "accuracy_gain_over_control", "test"], found["student", "accuracy", "test"]
    assert gain.high - gain.low < 0.4 * (accuracy.high - accuracy.low)


def test_classes_and_slices_are_told_apart_by_name():
    true = [0, 0, 1, 1, 2]
    said = [0, 1, 1, 1, 0]
    truth = Truth(
        ["a", "b", "c", "unseen"],
        np.array(true)[:, None] == np.arange(4),
        np.ones(5, np.bool_),
        np.arange(5),
        ["web", "web", "", "phone", "phone"],
    )
    logits = 5.0 * (np.array(said)[:, None] == np.arange(4))
    rows = tabulate_classes(mark(logits, logits, truth), truth)
    assert [(row.label, row.precision, row.recall, row.n) for row in rows] == [
        ("a", 0.5, 0.5, 2),
        ("b", pytest.approx(2 / 3), 1.0, 2),
        ("c", 0.0, 0.0, 1),
    ]
    found = compared({"teacher": logits}, truth)
    assert value(found, "teacher", "recall", "class:b") == 1.0
    assert found["teacher", "precision", "class:b"].n == 3
    assert ("teacher", "precision", "class:c") not in found
    assert (value(found, "teacher", "accuracy", "slice:web"), value(found, "teacher", "accuracy", "slice:phone")) == (
        0.5,
        0.5,
    )


def test_confusions_are_those_that_the_student_adds_the_most_added_first():
    true = np.array([0, 0, 0, 1, 1, 2])
    truth = Truth(["a", "b", "c"], true[:, None] == np.arange(3), np.ones(6, np.bool_), np.arange(6), [""] * 6)
    student, teacher = (
        mark(5.0 * (np.array(said)[:, None] == np.arange(3)), np.zeros((6, 3)), truth)
        for said in ([1, 1, 2, 0, 1, 2], [1, 0, 2, 1, 1, 0])
    )
    found = [(one.true, one.predicted, one.student, one.teacher) for one in added_confusions(student, teacher, truth)]
    assert found == [("a", "b", 2, 1), ("b", "a", 1, 0)]


def test_the_calibration_error_of_divided_logits_changes_and_no_answer_does():
    logits, truth = make(13, texts=200, unlabelled=0.0)
    one, other = (mark(logits["student"], logits["teacher"], truth, temperature=t) for t in (1.0, 5.0))
    np.testing.assert_array_equal(one.said_NC, other.said_NC)
    assert other.bins_DM3[..., 1].sum() < one.bins_DM3[..., 1].sum()


def test_the_order_of_texts_changes_nothing_but_the_draws():
    logits, truth = make(17, texts=80)
    order = np.random.default_rng(0).permutation(80)
    turned = Truth(
        truth.names, truth.true_NC[order], truth.labelled_N[order], np.arange(80), [truth.slices[i] for i in order]
    )
    one, two = compared(logits, truth), compared({arm: z[order] for arm, z in logits.items()}, turned)
    assert one.keys() == two.keys()
    assert [one[key].value for key in one] == pytest.approx([two[key].value for key in one])


def test_without_any_label_only_the_distance_to_the_teacher_is_measured():
    logits, truth = make(19, unlabelled=1.1)
    names = {name for _, name, _ in compared(logits, truth)}
    assert {"agreement", "kl_to_teacher"} <= names
    assert not names & {"accuracy", "macro_f1", "nll", "retention", "ece", "accuracy_gain_over_control"}


def test_scores_that_are_no_numbers_or_of_another_shape_are_refused():
    logits, truth = make(23)
    broken = logits["student"].copy()
    broken[4, 1] = np.inf
    with pytest.raises(NonFiniteError, match="text 4 of the test split"):
        mark(broken, logits["teacher"], truth)
    with pytest.raises(ValueError, match="asked for"):
        mark(logits["student"][:-1], logits["teacher"], truth)


def test_4500_texts_of_150_classes_take_seconds():
    logits, truth = make(29, texts=4500, classes=150, unlabelled=0.0)
    began = time.process_time()
    compared({arm: logits[arm] for arm in ("teacher", "student")}, truth, resamples=1000)
    assert time.process_time() - began < 20
