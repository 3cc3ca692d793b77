"""Entities against the reading of their definition, and F1 by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.evaluation import Truth, marks_entities, measure_entities
from potstill.evaluation.words import find_spans

NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
labels = st.lists(st.sampled_from(NAMES), max_size=8)


@pytest.mark.parametrize(
    ("words", "spans"),
    [
        ("B-PER I-PER O", {(0, 2, "PER")}),
        ("B-PER B-PER", {(0, 1, "PER"), (1, 2, "PER")}),
        ("I-PER I-PER", {(0, 2, "PER")}),
        ("B-PER I-LOC I-LOC", {(0, 1, "PER"), (1, 3, "LOC")}),
        ("O O", set()),
        ("O I-LOC", {(1, 2, "LOC")}),
    ],
)
def test_entities_by_hand(words, spans):
    assert find_spans(words.split()) == spans


@given(labels)
def test_entities_cover_the_words_that_are_not_outside_once_and_begin_at_a_b_or_at_a_break(words):
    spans = find_spans(words)
    covered = [place for begin, end, _ in spans for place in range(begin, end)]
    assert sorted(covered) == [place for place, label in enumerate(words) if label != "O"]
    for begin, end, kind in spans:
        assert words[begin] in (f"B-{kind}", f"I-{kind}")
        assert all(label == f"I-{kind}" for label in words[begin + 1 : end])
        if words[begin] == f"I-{kind}" and begin:
            assert words[begin - 1] not in (f"B-{kind}", f"I-{kind}")


@pytest.mark.parametrize(
    ("names", "marked"), [(NAMES, True), (("O", "PER"), False), (("O", "I-PER"), False), (("B-X", "NOUN"), False)]
)
def test_only_labels_of_the_b_i_o_kind_mark_entities(names, marked):
    assert marks_entities(names) == marked


def truth_of(texts):
    class_N = np.array([NAMES.index(word) if word else -1 for text in texts for word in text], dtype=np.int64)
    text_N = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    return Truth(NAMES, class_N[:, None] == np.arange(len(NAMES)), class_N >= 0, text_N, [""] * len(texts))


def classes(texts):
    return np.array([NAMES.index(word) for text in texts for word in text], dtype=np.int64)


def test_an_entity_counts_as_a_whole_and_a_text_with_an_unlabelled_word_not_at_all():
    true = [["B-PER", "I-PER", "O"], ["B-LOC", "O"], ["B-PER", ""]]
    said = [["B-PER", "O", "O"], ["B-LOC", "B-PER"], ["B-PER", "O"]]
    found = measure_entities({"student": classes(said)}, truth_of(true), resamples=200, seed=0)
    (score,) = found
    assert (score.name, score.n) == ("entity_f1", 2)
    assert score.value == pytest.approx(2 * 1 / (3 + 2))
    assert score.low <= score.value <= score.high


def test_who_says_what_is_true_has_it_all_and_the_student_gains_what_it_has_more():
    true = [["B-PER", "O"], ["B-LOC", "I-LOC"], ["O", "B-PER"]]
    none = [["O", "O"]] * 3
    said = {"student": classes(true), "control": classes(none)}
    found = {(one.arm, one.name): one.value for one in measure_entities(said, truth_of(true), resamples=100, seed=0)}
    assert found == {
        ("student", "entity_f1"): 1.0,
        ("control", "entity_f1"): 0.0,
        ("student", "entity_f1_gain_over_control"): 1.0,
    }
