"""What the engines assume of a server, asked of a real one: the forms of answers, and of refusals."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Literal

import pytest
from tests.vllm.conftest import MakeEndpoint, send

from potstill.engines.openai import Endpoint, judge, reason_of
from potstill.errors import TeacherError
from potstill.types import Completion, Request

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

Api = Literal["chat", "completion"]
LABELS = ("animal", "plant", "number")


def chat(text: str, **options) -> Request:
    return Request(messages=({"role": "user", "content": text},), **({"max_tokens": 8, "temperature": 0.0} | options))


def plain(text: str, **options) -> Request:
    return Request(prompt=text, **({"max_tokens": 8, "temperature": 0.0} | options))


def asked(api: Api, text: str, **options) -> Request:
    return chat(text, **options) if api == "chat" else plain(text, **options)


def answer(endpoint: Endpoint, request: Request) -> Completion:
    reply = send(endpoint, endpoint.body(request))
    assert judge(reply) == "answer", reason_of(reply)
    return endpoint.parse(reply.raw, request)


def preflight(endpoint: Endpoint) -> tuple[str, ...]:
    async def look() -> tuple[str, ...]:
        async with endpoint:
            return (await endpoint.preflight()).models

    return asyncio.run(look())


@pytest.mark.parametrize("api", ["chat", "completion"])
def test_an_answer_says_who_wrote_it_and_what_it_took(make_endpoint: MakeEndpoint, model: str, api: Api):
    said = answer(make_endpoint(api), asked(api, "The capital of France is"))
    assert said.text
    assert said.model == model
    assert said.reasoning_kind == "absent"
    assert said.usage is not None
    assert said.usage.input_tokens >= 5
    assert 1 <= said.usage.output_tokens <= 8


@pytest.mark.parametrize("api", ["chat", "completion"])
def test_what_is_cut_off_says_so_and_has_the_tokens_it_was_given(make_endpoint: MakeEndpoint, api: Api):
    said = answer(make_endpoint(api), asked(api, "Once upon a time, in a land far away, there was", max_tokens=5))
    assert said.finish == "length"
    assert said.usage is not None
    assert said.usage.output_tokens == 5


def test_an_answer_ends_before_a_stop_word(make_endpoint: MakeEndpoint):
    counting = "one, two, three, four, one, two, three, four, one, two,"
    said = answer(make_endpoint("completion"), plain(counting, max_tokens=32, stop=("four",)))
    assert said.finish == "stop"
    assert "three" in said.text
    assert "four" not in said.text


@pytest.mark.parametrize("api", ["chat", "completion"])
@pytest.mark.parametrize("count", [1, 5, 20])
def test_top_logprobs_are_a_part_of_a_distribution_at_every_token(make_endpoint: MakeEndpoint, api: Api, count: int):
    said = answer(make_endpoint(api), asked(api, "The sky is", max_tokens=4, top_logprobs=count))
    assert said.usage is not None
    assert len(said.top_logprobs) == said.usage.output_tokens
    for top in said.top_logprobs:
        values = [value for _, value in top]
        assert len(values) == count
        assert values == sorted(values, reverse=True)
        assert 0.0 < sum(map(math.exp, values)) <= 1.001


@pytest.mark.parametrize("api", ["chat", "completion"])
def test_a_greedy_answer_is_made_of_the_likeliest_tokens(make_endpoint: MakeEndpoint, api: Api):
    said = answer(make_endpoint(api), asked(api, "The sky is", max_tokens=4, top_logprobs=1))
    assert "".join(top[0][0] for top in said.top_logprobs).startswith(said.text)


@pytest.mark.parametrize("api", ["chat", "completion"])
def test_an_answer_is_one_of_the_choices_however_hot(make_endpoint: MakeEndpoint, api: Api):
    request = asked(api, "What is a beech? A", max_tokens=64, temperature=2.0, choices=LABELS)
    assert answer(make_endpoint(api), request).text in LABELS


@pytest.mark.parametrize("api", ["chat", "completion"])
def test_an_answer_fits_a_schema(make_endpoint: MakeEndpoint, api: Api):
    kinds = {"name": {"type": "string", "maxLength": 20}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}}
    schema = {"type": "object", "properties": kinds, "required": ["name", "legs"], "additionalProperties": False}
    said = answer(make_endpoint(api), asked(api, "A dog as JSON:", max_tokens=200, temperature=0.7, schema=schema))
    found = json.loads(said.text)
    assert set(found) == {"name", "legs"}
    assert 0 <= found["legs"] <= 9


def test_given_text_is_scored_a_token_at_a_time_with_none_for_the_first(make_endpoint: MakeEndpoint):
    endpoint = make_endpoint("completion")
    body = endpoint.body(plain("The sky is blue", max_tokens=1)) | {"prompt_logprobs": 2}
    raw = json.loads(send(endpoint, body).raw)
    first, *rest = raw["choices"][0]["prompt_logprobs"]
    assert first is None
    assert len(rest) == raw["usage"]["prompt_tokens"] - 1
    for listed in rest:  # by token number: the text's own token, and the two likeliest
        assert 2 <= len(listed) <= 3
        assert all(token.isdecimal() and each["logprob"] <= 0.0 for token, each in listed.items())
        assert {1, 2} <= {each["rank"] for each in listed.values()}
    assert "".join(next(iter(listed.values()))["decoded_token"] for listed in rest).endswith("sky is blue")


def test_the_models_that_are_served_are_listed(make_endpoint: MakeEndpoint, model: str):
    assert preflight(make_endpoint()) == (model,)


def test_a_model_that_is_not_served_is_named_with_those_that_are(make_endpoint: MakeEndpoint, model: str):
    with pytest.raises(TeacherError, match=rf"^teacher\.model: 'no-such' is not served .*{model}"):
        preflight(make_endpoint(name="no-such"))


def test_asked_for_such_a_model_the_server_refuses_once_for_all(make_endpoint: MakeEndpoint):
    endpoint = make_endpoint(name="no-such")
    reply = send(endpoint, endpoint.body(chat("Hello")))
    assert (reply.status, judge(reply)) == (404, "stop")
    assert endpoint.refusal(reply).startswith("teacher.model: 'no-such' is not served")


def test_an_address_without_its_last_part_is_named(make_endpoint: MakeEndpoint, url: str):
    with pytest.raises(TeacherError, match=r"^teacher\.base_url: .*/v1"):
        preflight(make_endpoint(address=url.removesuffix("/v1")))


@pytest.mark.parametrize(
    ("options", "word"),
    [({"text": "word " * 40_000}, "context length"), ({"max_tokens": 10**7}, "max_tokens")],
    ids=["prompt", "answer"],
)
def test_what_is_too_long_is_given_up_and_nothing_else_with_it(make_endpoint: MakeEndpoint, options, word: str):
    endpoint = make_endpoint()
    reply = send(endpoint, endpoint.body(chat(**({"text": "Hello"} | options))))
    assert (reply.status, judge(reply)) == (400, "give_up")
    assert word in reason_of(reply)
