"""Laws of given text that an endpoint scores: what is asked, and that no list is read at another token's place."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.servers.answers import answer_to

from potstill.engines.asking import Terms, job_of
from potstill.engines.completions import BadAnswer, Reading, Unserved, read_completion
from potstill.engines.ledger import Budget
from potstill.engines.openai import Endpoint
from potstill.engines.prices import price_of
from potstill.engines.scoring import answer_bytes, read_scores, score_request
from potstill.types import Completion, Request

TEXT = (7, 3, 11, 5)


def endpoint() -> Endpoint:
    return Endpoint("teacher", base_url="http://127.0.0.1:1/v1", key=None, api="completion")


def answered(request: Request) -> dict:
    return answer_to(endpoint().body(request), chat=False)


def parse(said: dict, request: Request) -> Completion:
    return read_completion(json.dumps(said).encode(), request, Reading("teacher"))


def entry(logprob: float) -> dict:
    return {"logprob": logprob, "rank": 1, "decoded_token": "x"}


def test_what_is_sent_are_token_numbers_and_one_token_is_asked_for_greedily():
    body = endpoint().body(score_request(TEXT, 9, 4))
    assert body["prompt"] == [7, 3, 11, 5, 9]
    assert (body["max_tokens"], body["temperature"], body["prompt_logprobs"]) == (1, 0.0, 4)
    assert "logprobs" not in body
    assert endpoint().body(score_request(TEXT, None, 4))["prompt"] == list(TEXT)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(0, 60), st.integers(1, 6))
def test_position_t_is_told_by_the_list_of_token_t_plus_1(ids, following, k):
    """The server's likeliest token of a place is the sum of all before it: any other shift reads another one."""
    request = score_request(ids, following, k)
    answer = parse(answered(request), request)
    assert len(answer.prompt_logprobs) == len(ids) + 1
    ids_NK, logprobs_NK = read_scores(answer, range(len(ids)), k=k, vocabulary=1000)
    for position, (first, *_) in enumerate(ids_NK.tolist()):
        assert first == sum(ids[: position + 1]) % 50
    assert torch.equal(logprobs_NK, (-1.0 - torch.arange(k)).double().expand(len(ids), k))


def test_the_budget_sets_aside_the_tokens_of_the_prompt_and_no_more():
    terms = Terms("run", price_of(2.0, 10.0), Budget(), 1)
    worst = job_of(endpoint(), score_request(TEXT, 9, 4), terms).worst
    assert (worst.input_tokens, worst.output_tokens, worst.picousd) == (5, 1, 5 * 2_000_000 + 10_000_000)


def test_the_last_position_is_told_by_the_token_that_follows_and_without_it_refused():
    scored = score_request(TEXT, None, 3)
    answer = parse(answered(scored), scored)
    read_scores(answer, [0, 2], k=3, vocabulary=100)
    with pytest.raises(ValueError, match="positions up to 3: 4 tokens were scored"):
        read_scores(answer, [3], k=3, vocabulary=100)
    scored = score_request(TEXT, 2, 3)
    assert read_scores(parse(answered(scored), scored), [3], k=3, vocabulary=100)[0][0, 0] == sum(TEXT)


def test_the_token_of_the_prompt_is_no_part_of_the_k_likeliest():
    request = score_request([1], 40, 2)
    said = answered(request)
    said["choices"][0]["prompt_logprobs"] = [None, {"40": entry(-9.0), "3": entry(-1.0), "8": entry(-0.5)}]
    assert parse(said, request).prompt_logprobs == ((), ((8, -0.5), (3, -1.0)))


def test_tokens_of_a_padded_head_are_left_out_and_their_places_filled_with_nothing():
    answer = Completion("", prompt_logprobs=((), ((64, -0.1), (0, -3.0), (70, -4.0))))
    ids_NK, logprobs_NK = read_scores(answer, [0], k=3, vocabulary=64)
    assert ids_NK.tolist() == [[0, 1, 2]]
    assert logprobs_NK.tolist() == [[-3.0, -math.inf, -math.inf]]


def test_no_positions_are_no_rows():
    ids_NK, logprobs_NK = read_scores(Completion("", prompt_logprobs=((),)), [], k=3, vocabulary=9)
    assert ids_NK.shape == logprobs_NK.shape == (0, 3)


def test_an_answer_whose_one_token_is_the_end_is_read_all_the_same():
    request = score_request(TEXT, 2, 3)
    said = answered(request)
    said["choices"][0] |= {"text": "", "finish_reason": "stop"}
    assert len(parse(said, request).prompt_logprobs) == 5


def test_an_endpoint_without_the_field_is_told_from_a_bad_answer():
    request = score_request(TEXT, 2, 3)
    said = answered(request)
    del said["choices"][0]["prompt_logprobs"]
    with pytest.raises(Unserved) as caught:
        parse(said, request)
    assert caught.value.reason == "no_prompt_logprobs"


LISTED = {"3": entry(-0.5), "8": entry(-1.5)}
WRONG = {
    "shorter": [None, LISTED],
    "shifted": [LISTED, LISTED, None],
    "no list": {"0": None},
    "another token's place": [None, {"8": entry(-0.5), "5": entry(-1.0)}, LISTED],
    "too few": [None, {"3": entry(-0.5)}, LISTED],
    "no number": [None, {"3": entry(-0.5), "eight": entry(-1.0)}, LISTED],
    "a number below 0": [None, {"3": entry(-0.5), "-8": entry(-1.0)}, LISTED],
    "one number twice": [None, {"3": entry(-0.5), "03": entry(-1.0)}, LISTED],
    "not a number": [None, {"3": entry(math.nan), "8": entry(-1.0)}, LISTED],
    "more than certain": [None, {"3": entry(-0.01), "8": entry(-0.01)}, LISTED],
    "infinite": [None, {"3": entry(math.inf), "8": entry(-1.0)}, LISTED],
    "impossible": [None, {"3": entry(-math.inf), "8": entry(-math.inf)}, LISTED],
    "no logprob": [None, {"3": {}, "8": entry(-1.0)}, LISTED],
    "plain": [None, {"3": -0.5, "8": -1.0}, LISTED],
}


@pytest.mark.parametrize("name", WRONG)
def test_lists_that_are_not_the_prompts_are_refused(name):
    request = score_request((1, 3), 3, 2)
    said = answered(request)
    said["choices"][0]["prompt_logprobs"] = WRONG[name]
    with pytest.raises(BadAnswer) as caught:
        parse(said, request)
    assert caught.value.reason == "not_the_prompt"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["3", "8", "logprob", ""]), inner),
    max_leaves=12,
)


@settings(max_examples=200)
@given(JSON)
def test_whatever_stands_in_the_field_is_read_or_refused(value):
    request = score_request((1, 3), 3, 2)
    said = answered(request)
    said["choices"][0]["prompt_logprobs"] = value
    with contextlib.suppress(BadAnswer):
        assert len(parse(said, request).prompt_logprobs) == 3


def test_the_bound_on_an_answer_holds_for_real_entries():
    request = score_request(range(100, 400), 5, 20)
    said = answered(request)
    said["choices"][0]["prompt_logprobs"] = [
        None,
        *(
            {str(100_000 + n): {"logprob": -12.345678901234567, "rank": 100_000, "decoded_token": "\u1234" * 12}
             for n in range(21)}
            for _ in range(300)
        ),
    ]  # fmt: skip
    assert len(json.dumps(said)) <= answer_bytes(301, 20)


@pytest.mark.parametrize(
    "given_keys",
    [{}, {"prompt": "a", "prompt_ids": (1,)}, {"prompt": "a", "prompt_logprobs": 3}],
)
def test_a_request_has_one_prompt_and_scores_belong_to_token_numbers(given_keys):
    with pytest.raises(ValueError, match="needs"):
        Request(**given_keys)
