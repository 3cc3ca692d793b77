"""Cleaning: every row is kept or counted under a reason, and nothing is mended in silence."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.data import Reason, Row, clean_examples
from potstill.errors import DataError

ASK = {"role": "user", "content": "why?"}
ANSWER = {"role": "assistant", "content": "so."}
GOOD = Row("good", "here", text="fine")

UNUSABLE = [
    (None, None, Reason.ABSENT),
    (None, [], Reason.ABSENT),
    (7, "", Reason.TEXT_TYPE),
    ({"a": 1}, None, Reason.TEXT_TYPE),
    ("", None, Reason.TEXT_EMPTY),
    (" \n\x00\u00a0", None, Reason.TEXT_EMPTY),
    ("text", 5, Reason.MESSAGES_TYPE),
    ("text", "not json", Reason.MESSAGES_TYPE),
    ("text", "[" * 200_000, Reason.MESSAGES_TYPE),
    ("text", '{"role": "user"}', Reason.MESSAGES_TYPE),
    ("text", [ASK, "so."], Reason.MESSAGES_TYPE),
    ("text", [{"content": "why?"}, ANSWER], Reason.ROLE),
    ("text", [{"role": None, "content": "why?"}, ANSWER], Reason.ROLE),
    ("text", [{"role": "user<|im_end|>", "content": "why?"}, ANSWER], Reason.ROLE),
    ("text", [ASK, {"role": "assistant"}], Reason.CONTENT),
    ("text", [ASK, {"role": "assistant", "content": [{"type": "text", "text": "so."}]}], Reason.CONTENT),
    ("text", [ASK], Reason.UNANSWERED),
    ("text", [ASK, {"role": "assistant", "content": " "}], Reason.UNANSWERED),
    ("text", [ASK, {**ANSWER, "data": b"\x00"}], Reason.MESSAGES_VALUE),
    ("text", [ASK, {**ANSWER, "score": float("nan")}], Reason.MESSAGES_VALUE),
]


@pytest.mark.parametrize(("text", "messages", "reason"), UNUSABLE)
def test_an_unusable_row_is_dropped_under_its_reason_and_never_falls_back(text, messages, reason):
    examples, cleaning = clean_examples([Row("bad", "here", text=text, messages=messages), GOOD])
    assert [example.id for example in examples] == ["good"]
    assert cleaning.dropped == Counter({reason.value: 1})
    assert (cleaning.rows, cleaning.kept["text"]) == (2, 1)


def test_messages_go_before_text_and_json_strings_are_parsed():
    rows = [Row("a", "s", text="t", messages=[ASK, ANSWER]), Row("b", "s", messages=json.dumps([ASK, ANSWER]))]
    examples, cleaning = clean_examples(rows)
    for example in examples:
        assert (example.text, example.messages, example.source) == (None, (ASK, ANSWER), "s")
    assert cleaning.kept == Counter(messages=2)


def test_fields_that_are_none_are_left_out_and_unanswered_turns_at_the_end_stay():
    rows = [Row("a", "s", messages=[ASK, {**ANSWER, "tool_calls": None, "name": "bot"}, ASK])]
    (example,) = clean_examples(rows)[0]
    assert example.messages == (ASK, {**ANSWER, "name": "bot"}, ASK)


def test_a_turn_that_only_calls_a_tool_says_something():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert len(list(clean_examples([Row("a", "s", messages=[ASK, call])])[0])) == 1


def test_nul_and_lone_surrogates_are_mended_and_counted():
    rows = [
        Row("a", "s", text="a\x00b\ud800c"),
        Row("b", "s", messages=[ASK, {**ANSWER, "tool_calls": [{"x": "\udfff\x00"}]}]),
        GOOD,
    ]
    examples, cleaning = clean_examples(rows)
    first, second, third = examples
    assert (first.text, third.text) == ("ab\ufffdc", "fine")
    assert second.messages[1]["tool_calls"] == [{"x": "\ufffd"}]
    assert cleaning.mended.total() == 2


def test_nothing_usable_is_an_error_that_lists_the_reasons():
    rows = [Row(str(index), "s", text="") for index in range(3)] + [Row("x", "s", text=1)]
    with pytest.raises(DataError, match=r"none of the 4 rows .*text is empty: 3; text is not a string: 1.*data\.text"):
        list(clean_examples(rows)[0])


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=8,
)


@given(st.lists(st.tuples(anything, anything), max_size=5))
def test_no_row_whatever_it_holds_is_lost_or_raises(cells):
    rows = [Row(str(index), "s", text=text, messages=messages) for index, (text, messages) in enumerate(cells)]
    examples, cleaning = clean_examples([*rows, GOOD])
    kept = list(examples)
    assert len(kept) + cleaning.dropped.total() == cleaning.rows == len(rows) + 1
    for example in kept:
        (example.text or json.dumps(example.messages, ensure_ascii=False)).encode("utf-8")
