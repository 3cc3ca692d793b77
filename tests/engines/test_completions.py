"""Laws of what an answer says of itself: what it took is never read too low, and what broke off is no answer."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.engines.completions import BadAnswer, Reading, Unserved, read_completion, read_usage
from potstill.engines.ledger import Spend
from potstill.engines.prices import Price
from potstill.engines.replies import Allowance, Reply
from potstill.engines.spent import said_in, spent_on
from potstill.types import Request

CHAT = Request(messages=({"role": "user", "content": "two plus two"},))
WORST = Spend(100, 50, 7)
COUNTS = st.none() | st.booleans() | st.integers(-5, 2 * 10**9) | st.floats() | st.text(max_size=2)


def raw_of(usage: object, **choice: object) -> bytes:
    message = {"message": {"content": "four"}, "finish_reason": "stop"} | choice
    return json.dumps({"model": "teacher", "choices": [message], "usage": usage}).encode()


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}, (10, 5)),
        ({"prompt_tokens": 10, "completion_tokens": 5}, (10, 5)),
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 515}, (10, 505)),
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 12}, (10, 5)),
        ({"prompt_tokens": 10, "total_tokens": 510}, (10, 500)),
        ({"prompt_tokens": 10, "completion_tokens": None, "total_tokens": 10}, None),
        ({"prompt_tokens": 10, "completion_tokens": None}, None),
        ({"prompt_tokens": 10.0, "completion_tokens": 12}, None),
        ({"prompt_tokens": None, "completion_tokens": 12}, None),
        ({"prompt_tokens": 0, "completion_tokens": 0}, None),
        ({"prompt_tokens": True, "completion_tokens": 1}, None),
        ({"prompt_tokens": 10**30, "completion_tokens": 1}, None),
        ({}, None),
        (None, None),
    ],
)
def test_what_an_answer_took_is_never_read_too_low(usage, counts):
    found = read_usage(usage)
    assert (None if found is None else (found.input_tokens, found.output_tokens)) == counts


@given(st.dictionaries(st.sampled_from(["prompt_tokens", "completion_tokens", "total_tokens"]), COUNTS))
def test_the_answer_and_the_account_are_read_alike_and_what_is_not_said_is_the_worst_case(usage):
    raw = raw_of(usage)
    answer = read_completion(raw, CHAT, Reading("teacher"))
    assert said_in(raw)[1] == answer.usage
    spent = spent_on(Reply(200, raw, Allowance(), "", 0.0), WORST, Price(1, 2, 1))
    if answer.usage is None:
        assert spent == WORST
    else:
        assert spent.input_tokens + spent.output_tokens >= max(
            number for number in usage.values() if type(number) is int and number <= 10**9
        )


@pytest.mark.parametrize("choice", [{"finish_reason": "error"}, {"finish_reason": "abort"}, {"error": {"code": 502}}])
def test_what_broke_off_is_no_answer(choice):
    with pytest.raises(BadAnswer) as caught:
        read_completion(raw_of(None, **choice), CHAT, Reading("teacher"))
    assert (caught.value.reason, isinstance(caught.value, Unserved)) == ("unfinished", False)


def test_what_a_filter_ended_stays_an_answer():
    answer = read_completion(raw_of(None, finish_reason="content_filter"), CHAT, Reading("teacher"))
    assert (answer.text, answer.finish) == ("four", "content_filter")


def test_log_probabilities_that_are_missing_are_told_from_those_that_cannot_be_read():
    asked = Request(messages=CHAT.messages, top_logprobs=2)
    for logprobs, kind in ((None, Unserved), ({"content": [{}]}, BadAnswer)):
        with pytest.raises(BadAnswer) as caught:
            read_completion(raw_of(None, logprobs=logprobs), asked, Reading("teacher"))
        assert (type(caught.value), caught.value.reason) == (kind, "no_logprobs")
