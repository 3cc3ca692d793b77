from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.data import LabelledText, normal_form, partition_texts
from potstill.errors import DataError

WRITTEN = st.sampled_from(["a", "A", " a", "b c", "B  C", "b\tc\n", "d", "e", "f", "\u00df", "SS"])
TEXTS = st.lists(
    st.builds(
        LabelledText,
        id=st.just("x"),
        text=WRITTEN,
        pair=st.none() | st.sampled_from(["p", "P"]),
        label=st.none() | st.sampled_from(["x", "y"]),
        split=st.none() | st.sampled_from(["train", "validation", "test"]),
    ),
    max_size=30,
)


def many(count, **cells):
    return [LabelledText(str(number), f"text {number}", **cells) for number in range(count)]


@given(TEXTS, st.integers(0, 5))
def test_equal_texts_never_straddle_a_split_and_none_goes_uncounted(texts, seed):
    found = partition_texts(texts, seed=seed, validation=0.3, test=0.3)
    forms = {split: {normal_form(text) for text in rows} for split, rows in found.texts.items()}
    assert not forms["train"] & forms["test"]
    assert not forms["train"] & forms["validation"]
    assert not forms["validation"] & forms["test"]
    assert len(forms["train"]) == len(found.texts["train"])
    assert sum(map(len, found.texts.values())) + found.removed.total() == len(texts)


@given(TEXTS)
def test_every_text_of_the_given_test_split_stays_in_it(texts):
    given = [text for text in texts if text.split == "test"]
    # Unless nobody tells their labels, where those of others are told.
    told = any(text.label is not None for text in given)
    known = any(text.label is not None for text in texts if text.split in (None, "train"))
    given = given if told or not known else []
    found = partition_texts(texts, seed=0, validation=0.3, test=0.3)
    assert not given or list(found.texts["test"]) == given


def test_copies_scattered_by_a_source_without_splits_fall_into_one():
    texts = [LabelledText(f"{number}-{copy}", f"Q {number}" + " " * copy) for number in range(400) for copy in range(3)]
    found = partition_texts(texts, seed=1, validation=0.2, test=0.2)
    assert sum(map(len, found.texts.values())) == 400
    assert found.removed == {"train text is repeated": 800}


def test_what_the_source_lacks_is_carved_from_train_by_content_and_seed():
    texts = many(2000)
    whole = partition_texts(texts, seed=3, validation=0.1, test=0.2)
    assert {split: len(rows) for split, rows in whole.texts.items()} == pytest.approx(
        {"train": 1400, "validation": 200, "test": 400}, rel=0.2
    )
    again = partition_texts(reversed(texts), seed=3, validation=0.1, test=0.2)
    other = partition_texts(texts, seed=4, validation=0.1, test=0.2)
    assert set(again.texts["test"]) == set(whole.texts["test"]) != set(other.texts["test"])
    some = partition_texts(texts[:1000], seed=3, validation=0.1, test=0.2)
    assert set(some.texts["test"]) == set(whole.texts["test"]) & set(texts[:1000])


def test_a_split_that_is_there_is_not_carved_and_rows_without_one_are_for_training():
    texts = [*many(500), LabelledText("t", "held", split="test"), LabelledText("v", "shown", split="validation")]
    found = partition_texts(texts, seed=0, validation=0.3, test=0.3)
    assert {split: len(rows) for split, rows in found.texts.items()} == {"train": 500, "validation": 1, "test": 1}
    without = partition_texts(texts[:-1], seed=0, validation=0.3, test=0.3)
    assert len(without.texts["test"]) == 1
    assert 100 < len(without.texts["validation"]) < 200


def test_only_labelled_texts_are_held_out_where_there_are_any():
    texts = [*many(300, label="x"), *(LabelledText(f"u{n}", f"log {n}") for n in range(300))]
    found = partition_texts(texts, seed=0, validation=0.2, test=0.2)
    assert all(text.label for split in ("validation", "test") for text in found.texts[split])
    assert sum(text.label is None for text in found.texts["train"]) == 300


def test_of_repeated_texts_the_first_label_counts_and_contradictions_are_counted():
    written = [("1", None), ("1", "x"), (" 1", "y"), ("1 ", "x"), ("2", "x"), ("2", None)]
    texts = [LabelledText(str(n), text, label=label, split="train") for n, (text, label) in enumerate(written)]
    held = [LabelledText(one, one, label="x", split=split) for one, split in (("v", "validation"), ("t", "test"))]
    found = partition_texts([*texts, *held], seed=0, validation=0.1, test=0.1)
    assert [(text.id, text.label) for text in found.texts["train"]] == [("1", "x"), ("4", "x")]
    assert found.removed == Counter({"train text is repeated": 3, "train text is repeated with another label": 1})


def test_several_labels_contradict_as_sets_and_those_of_words_in_their_order():
    held = [LabelledText(one, one, label="x", split=split) for one, split in (("v", "validation"), ("t", "test"))]
    sets = [LabelledText("1", "a", label=("x", "y")), LabelledText("2", "a", label=("y", "x"))]
    words = [LabelledText("3", ("b", "c"), label=("x", "y")), LabelledText("4", ("b", "c"), label=("y", "x"))]
    found = partition_texts([*sets, *words, *held], seed=0, validation=0.1, test=0.1)
    assert found.removed == {"train text is repeated": 1, "train text is repeated with another label": 1}


def test_words_and_the_text_that_they_make_are_equal_and_pairs_tell_texts_apart():
    assert normal_form(LabelledText("1", ("The", "FOX"))) == normal_form(LabelledText("2", "the  fox"))
    assert normal_form(LabelledText("1", "a", pair="b")) != normal_form(LabelledText("2", "a b"))


def test_shares_that_leave_nothing_are_refused():
    with pytest.raises(DataError, match=r"^data\.splits: validation 0\.5 and test 0\.5"):
        partition_texts(many(3), seed=0, validation=0.5, test=0.5)


def test_a_held_out_part_that_keeps_its_labels_to_itself_is_left_out_and_counted():
    train = [LabelledText(f"t{n}", f"train {n}", label="ab"[n % 2], split="train") for n in range(40)]
    hidden = [LabelledText(f"h{n}", f"hidden {n}", split="test") for n in range(5)]
    validation = [LabelledText("v", "validation", label="a", split="validation")]
    found = partition_texts([*train, *hidden, *validation], seed=0, validation=0.1, test=0.2)
    assert found.removed["held-out text of a part of which nobody published the labels"] == 5
    assert found.texts["test"]
    assert {text.id for text in found.texts["test"]} <= {text.id for text in train}
    assert [text.id for text in found.texts["validation"]] == ["v"]
    unlabelled = partition_texts([LabelledText("u", "train", split="train"), *hidden], seed=0, validation=0.1, test=0.2)
    assert len(unlabelled.texts["test"]) == 5
