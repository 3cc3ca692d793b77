"""Splits: a document's content alone decides, and shares are kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.data import split_of
from potstill.data.split import split_named
from potstill.errors import DataError
from potstill.types import Example

words = st.text(st.characters(codec="utf-8"))
turns = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": words}), min_size=1)
documents = st.builds(Example, id=words, text=words) | st.builds(Example, id=words, messages=turns.map(tuple))
shares = st.tuples(st.floats(0, 0.49), st.floats(0, 0.49))
seeds = st.integers(0, 2**32 - 1)


@given(documents, seeds, shares, words)
def test_equal_documents_share_a_split_whatever_they_are_called(document, seed, shares, other):
    validation, test = shares
    messages = document.messages and tuple(dict(reversed(message.items())) for message in document.messages)
    double = replace(document, id=other, source=other, provenance="some-model", messages=messages)
    assert split_of(document, seed=seed, validation=validation, test=test) == split_of(
        double, seed=seed, validation=validation, test=test
    )


@given(documents, seeds, st.floats(0, 0.49), st.floats(0, 0.49), st.floats(0, 0.49))
def test_changing_a_share_moves_a_document_only_into_or_out_of_that_split(document, seed, validation, test, other):
    before = split_of(document, seed=seed, validation=validation, test=test)
    after = split_of(document, seed=seed, validation=validation, test=other)
    assert before == after or {before, after} == {"train", "test"}


@given(documents, seeds)
def test_without_shares_everything_is_for_training(document, seed):
    assert split_of(document, seed=seed, validation=0.0, test=0.0) == "train"


def test_shares_are_kept_and_the_seed_matters():
    examples = [Example(id="same", text=f"document {index}") for index in range(5000)]
    first = [split_of(example, seed=0, validation=0.1, test=0.2) for example in examples]
    second = [split_of(example, seed=1, validation=0.1, test=0.2) for example in examples]
    counts = Counter(first)
    assert abs(counts["validation"] - 500) < 5 * (5000 * 0.1 * 0.9) ** 0.5
    assert abs(counts["test"] - 1000) < 5 * (5000 * 0.2 * 0.8) ** 0.5
    assert first != second


@pytest.mark.parametrize(("validation", "test"), [(0.5, 0.5), (0.9, 0.2), (-0.1, 0.2)])
def test_shares_that_leave_nothing_are_refused(validation, test):
    with pytest.raises(DataError, match=r"data\.splits: "):
        split_of(Example(id="x", text="x"), seed=0, validation=validation, test=test)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("train", "train"), ("Training", "train"), ("train-00000-of-00001", "train"), ("unsupervised", "train")),
        *(
            ("val", "validation"),
            ("oos_val", "validation"),
            ("dev", "validation"),
            ("validation_matched", "validation"),
        ),
        *(("test", "test"), ("is_test", "test"), ("TEST.2", "test")),
        *(("other", None), ("train_test", None), ("contest", None), ("", None), ("trainer", None)),
    ],
)
def test_a_name_means_a_split_by_one_of_its_words(name, split):
    assert split_named(name) == split
