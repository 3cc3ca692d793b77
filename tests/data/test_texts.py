from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.data import LabelledText, content_key, read_texts, write_texts
from potstill.errors import DataError

HOSTILE = st.text(alphabet=st.one_of(st.characters(), st.sampled_from('\n\r\x00\u2028\x85\ud800"\\')), max_size=20)
WORDS = st.lists(HOSTILE, max_size=4).map(tuple)
LABELLED = st.builds(
    LabelledText,
    id=HOSTILE,
    text=st.one_of(HOSTILE, WORDS),
    pair=st.none() | HOSTILE,
    label=st.none() | HOSTILE | WORDS,
    split=st.none() | st.sampled_from(["train", "validation", "test"]),
    slice=HOSTILE,
    source=HOSTILE,
    origin=st.none() | st.binary(min_size=16, max_size=16),
)


@given(st.lists(LABELLED, max_size=5))
def test_texts_come_back_from_disk_as_they_were(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("texts") / "train.jsonl"
    assert write_texts(path, texts) == len(texts)
    assert read_texts(path) == texts


def test_a_key_is_of_text_and_pair_and_of_nothing_else():
    text = LabelledText("1", "a b", label="x", source="f")
    assert text.key == LabelledText("2", "a b", label="y", split="test").key == content_key("a b")
    others = [
        LabelledText("1", "a  b").key,
        LabelledText("1", "A b").key,
        LabelledText("1", ("a", "b")).key,
        LabelledText("1", "a b", pair="").key,
        LabelledText("1", "a", pair="b").key,
        LabelledText("1", ("a b",)).key,
    ]
    assert len({text.key, *others}) == 7
    assert all(len(key) == 16 for key in others)


def test_a_key_is_the_same_before_and_after_mending():
    assert content_key("a\x00b\ud800") == content_key("ab\ufffd")


@pytest.mark.parametrize("damage", ["", '{"id": "1"}\n', '{"id": "1", "text": "a", "more": 1}\n', "[1]\n", '{"id'])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "test.jsonl"
    if damage:
        path.write_text(damage, encoding="utf-8")
    with pytest.raises(DataError, match=r"test\.jsonl is missing or damaged .* Run the stage prepare again"):
        read_texts(path)


@pytest.mark.parametrize(
    ("label", "names"), [(None, ()), ("a", ("a",)), (("a", "b"), ("a", "b")), (("", "b"), ("b",)), ((), ())]
)
def test_labels_are_those_that_have_a_name(label, names):
    assert LabelledText("1", "x", label=label).labels == names
