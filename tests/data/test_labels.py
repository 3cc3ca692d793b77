from __future__ import annotations

import pytest

from potstill.data import LabelledText, LabelMap, count_labels, fit_labels
from potstill.errors import DataError
from potstill.types import IGNORE


def splits(train, validation=(), test=()):
    groups = {"train": train, "validation": validation, "test": test}
    return {
        name: [LabelledText(f"{name}-{number}", f"t{number}", label=label) for number, label in enumerate(labels)]
        for name, labels in groups.items()
    }


def test_classes_are_in_alphabetical_order_unless_given():
    texts = splits(["b", "a", None, "c"], ["a"], ["b"])
    assert fit_labels(texts, None).names == ("a", "b", "c")
    assert fit_labels(texts, ["c", "a", "b"]).names == ("c", "a", "b")


def test_several_labels_count_each_and_words_without_one_do_not():
    texts = splits([("a", "b"), (), ("", "b"), None])["train"]
    assert count_labels(texts) == {"a": 1, "b": 2}


def test_names_and_numbers_are_inverse():
    labels = LabelMap(("x", "y"), "oos")
    assert [labels.index(name) for name in labels.names] == [0, 1] == [labels.target(name) for name in labels.names]
    assert labels.target("oos") == IGNORE
    assert len(labels) == 2
    with pytest.raises(DataError, match=r"task\.labels: there is no class 'z' among the 2 \('x', 'y'\)"):
        labels.target("z")


def test_what_is_out_of_scope_is_no_class_and_may_stand_anywhere():
    texts = splits(["a", "b"], ["oos"], ["oos", "a"])
    assert fit_labels(texts, None, out_of_scope="oos") == LabelMap(("a", "b"), "oos")
    assert fit_labels(texts, ["b", "a"], out_of_scope="oos").names == ("b", "a")


def test_classes_that_are_given_need_no_labelled_text_where_nothing_is_labelled():
    assert fit_labels(splits([None, None], ["a"], ["b"]), ["a", "b"]).names == ("a", "b")


@pytest.mark.parametrize(
    ("texts", "given", "outside", "words"),
    [
        (splits([None], ["a"]), None, None, r"^data\.label: no training text is labelled\. Name the column"),
        (splits(["a", "b"], ["c"]), None, None, r"^data\.label: .* differ: no training text has 'c', which validation"),
        (splits(["a", "b"], [], ["d", "c"]), None, None, r"no training text has 'c', 'd', which test texts have"),
        (splits(["a", "b"], ["c"]), ["a", "b", "c"], None, r"no training text has 'c', which validation texts have"),
        (splits(["a", "b"]), ["a", "b", "c"], None, r"^task\.labels: no training text is of 'c'"),
        (splits(["a", "b", "z"]), ["a", "b"], None, r"^task\.labels: .* not listed: 'z' \(row train-2\); listed are"),
        (splits(["0", "1"]), ["no", "yes"], None, r"'0', '1' \(row train-0\).* The data numbers its labels: write"),
        (splits(["a", "a"]), None, None, r"^data\.label: .* one class only \('a'\), and 2 are needed"),
        (splits(["a", "b"]), ["a", "a", "b"], None, r"^task\.labels: 'a' is there twice"),
        (splits(["a", "b"]), None, "oos", r"^task\.out_of_scope: no text is labelled 'oos'; the labels are: 'a', 'b'"),
        (splits(["a", "b"]), ["a", "b"], "a", r"^task\.out_of_scope: 'a' is no class, but task\.labels lists it"),
        (splits(["oos"], ["oos"]), None, "oos", r"^data\.label: no training text is labelled"),
        (splits(["a", "b"]), [f"l{n}" for n in range(9)], None, r"'l0', 'l1', 'l2', 'l3', 'l4' and 4 more"),
    ],
)
def test_labels_that_do_not_fit_are_named(texts, given, outside, words):
    with pytest.raises(DataError, match=words):
        fit_labels(texts, given, out_of_scope=outside)
