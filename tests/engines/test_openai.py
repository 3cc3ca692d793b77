"""Laws of the endpoint, held against a server on loopback that misbehaves."""

from __future__ import annotations

import asyncio
import json
import logging
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.servers.api import serve
from tests.servers.faults import FAULTS, Settings

from potstill.engines.completions import Reading, read_completion, same_model
from potstill.engines.openai import BadAnswer, Endpoint, Reply, delay_s, judge, load_of, reason_of
from potstill.engines.replies import Allowance, read_allowance
from potstill.errors import TeacherError
from potstill.types import Request

KEY = "sk-test-0123456789abcdef"
CHAT = Request(messages=({"role": "user", "content": "How many?"},))


def endpoint_at(url: str, **given) -> Endpoint:
    return Endpoint(**{"model": "teacher", "base_url": url, "key": None, "timeout_s": 10.0} | given)


def send(server, request=CHAT, **given) -> Reply:
    async def once():
        async with endpoint_at(server.url, **given) as endpoint:
            return await endpoint.send(endpoint.body(request))

    return asyncio.run(once())


def look(url: str, **given):
    async def once():
        async with endpoint_at(url, **given) as endpoint:
            return await endpoint.preflight()

    return asyncio.run(once())


def outcome(server, **given) -> tuple[str, str]:
    """The verdict on one request, and the problem: of the answer, where the reply has none."""
    reply = send(server, **given)
    try:
        if judge(reply) == "answer":
            endpoint_at(server.url).parse(reply.raw, CHAT)
    except BadAnswer as error:
        return "answer", error.reason
    return judge(reply), reply.problem


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


EXPECTED = {
    "http_500": ("retry", "http_500"),
    "http_502": ("retry", "http_502"),
    "http_503": ("retry", "http_503"),
    "http_429": ("retry", "http_429"),
    "http_429_after": ("retry", "http_429"),
    "http_400": ("give_up", "http_400"),
    "http_401": ("stop", "http_401"),
    "http_403": ("stop", "http_403"),
    "http_404": ("stop", "http_404"),
    "no_quota": ("stop", "http_429"),
    "hang": ("retry", "timeout"),
    "reset": ("retry", "connection"),
    "slow_drip": ("retry", "timeout"),
    "truncated_json": ("answer", "not_json"),
    "no_choices": ("answer", "no_choices"),
    "wrong_model": ("answer", "wrong_model"),
    "invalid_utf8": ("answer", "not_utf8"),
    "too_large": ("retry", "too_large"),
    "empty": ("answer", "empty"),
    "content_filter": ("answer", "content_filter"),
    "gzip": ("retry", "encoded"),
    "error_in_200": ("answer", "server_error"),
    "endless_error": ("retry", "too_large"),
}


def test_every_fault_is_expected():
    assert set(EXPECTED) == set(FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_never_taken_for_an_answer(fault):
    timeout_s = 0.5 if fault in ("hang", "slow_drip") else 10.0
    with serve(Settings(schedule={0: fault})) as running:
        started = time.monotonic()
        assert outcome(running, timeout_s=timeout_s) == EXPECTED[fault]
        assert time.monotonic() - started < timeout_s + 2.0
        assert outcome(running) == ("answer", "")


def test_an_answer_comes_back_with_its_usage_and_model(server):
    reply = send(server)
    answer = endpoint_at(server.url).parse(reply.raw, CHAT)
    assert (reply.status, reply.problem, judge(reply), load_of(reply)) == (200, "", "answer", "ok")
    assert answer.text.startswith("The answer number")
    assert (answer.model, answer.finish, answer.reasoning_kind) == ("teacher", "stop", "absent")
    assert answer.usage is not None
    assert answer.usage.output_tokens > 0


def test_a_prompt_goes_to_the_other_api_and_brings_log_probabilities(server):
    request = Request(prompt="Once", top_logprobs=3)
    reply = send(server, request, api="completion")
    answer = endpoint_at(server.url).parse(reply.raw, request)
    assert "".join(top[0][0] for top in answer.top_logprobs) == answer.text
    assert {len(top) for top in answer.top_logprobs} == {3}


@pytest.mark.parametrize("api", ["chat", "completion"])
def test_a_choice_comes_back_word_for_word(server, api):
    asked = {"messages": CHAT.messages} if api == "chat" else {"prompt": "x"}
    request = Request(**asked, choices=("very good", "bad"), top_logprobs=2)
    answer = endpoint_at(server.url).parse(send(server, request, api=api).raw, request)
    assert answer.text in request.choices


def test_json_of_a_schema_comes_back_as_text(server):
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    request = Request(messages=CHAT.messages, schema=schema)
    assert set(json.loads(endpoint_at(server.url).parse(send(server, request).raw, request).text)) == {"age"}


@given(st.integers(0, 99), st.text(max_size=5))
def test_the_body_does_not_depend_on_sample_and_user(sample, user):
    endpoint = endpoint_at("http://h/v1")
    other = Request(messages=CHAT.messages, sample=sample, user=user)
    assert json.dumps(endpoint.body(other)) == json.dumps(endpoint.body(CHAT))


def test_a_request_of_the_other_api_is_refused():
    with pytest.raises(ValueError, match=r"teacher\.api=chat"):
        endpoint_at("http://h/v1").body(Request(prompt="x"))


def test_openai_is_asked_as_its_reasoning_models_need():
    body = endpoint_at("https://api.openai.com/v1").body(CHAT)
    assert (body["max_completion_tokens"], set(body)) == (1024, {"model", "messages", "max_completion_tokens"})
    assert {"max_tokens", "temperature", "top_p"} <= set(endpoint_at("http://h/v1").body(CHAT))


def test_half_a_surrogate_pair_can_be_sent(server):
    assert judge(send(server, Request(messages=({"role": "user", "content": "\ud800 \x00"},)))) == "answer"


# Preflight


def test_a_served_model_passes_and_others_are_listed_nearest_first():
    with serve(Settings(models=("aaa", "teacher-7b", "zzz"))) as running:
        assert look(running.url, model="teacher-7b").models == ("aaa", "teacher-7b", "zzz")
        with pytest.raises(TeacherError, match=r"^teacher\.model: 'teacher-8b' .* which serves teacher-7b, aaa, zzz\."):
            look(running.url, model="teacher-8b")
        assert running.stats()["answered"] == 0


def test_a_server_without_a_list_of_models_is_fine():
    with serve(Settings(models=None)) as running:
        assert look(running.url).models == ()


def test_a_wrong_address_is_told_from_a_missing_list(server):
    for wrong in (server.url.removesuffix("/v1"), server.url + "/chat/completions", server.url + "/nowhere"):
        with pytest.raises(TeacherError, match=r"^teacher\.base_url: .* has no /chat/completions"):
            look(wrong)


def test_nobody_there_is_one_line():
    with serve() as running:
        url = running.url
    with pytest.raises(
        TeacherError, match=r"^teacher\.base_url: nothing answers at http://127\.0\.0\.1:\d+/v1 \("
    ) as got:
        look(url)
    assert "\n" not in str(got.value)


def test_tls_where_there_is_none_is_a_broken_connection(server):
    reply = asyncio.run(once_at(server.url.replace("http://", "https://")))
    assert (judge(reply), reply.problem, load_of(reply)) == ("retry", "connection", "error")
    assert "SSL" in reason_of(reply)


async def once_at(url: str) -> Reply:
    async with endpoint_at(url) as endpoint:
        return await endpoint.send(endpoint.body(CHAT))


def test_requests_go_through_the_environments_proxy_and_past_it_where_it_says(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
    reply = asyncio.run(once_at("http://nowhere.invalid/v1"))
    assert reply.status == 404  # the server, as a proxy, is asked for a whole address that it does not know
    monkeypatch.setenv("no_proxy", "nowhere.invalid")
    assert asyncio.run(once_at("http://nowhere.invalid/v1")).problem == "connection"


@pytest.mark.parametrize(("key", "message"), [(None, "none is given"), ("sk-wrong-key-9876543210", "refuses the key")])
def test_a_refused_key_is_named_by_its_place_and_never_shown(key, message):
    with serve(Settings(key=KEY)) as running, pytest.raises(TeacherError, match=message) as got:
        look(running.url, key=key)
    assert str(got.value).startswith("teacher.api_key: ")
    assert key is None or key not in str(got.value)


def test_the_environments_key_goes_to_no_other_server(server, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, KEY)
    send(server)
    look(server.url)
    assert KEY not in json.dumps(server.headers)
    assert {headers["authorization"] for headers in server.headers[-2:]} == {"Bearer none"}


@pytest.mark.parametrize("key", ["", "  ", "two words", "line\nbreak", "schlüssel"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(key):
    with pytest.raises(TeacherError, match=r"^teacher\.api_key") as got:
        endpoint_at("http://h/v1", key=key)
    assert not key.strip() or key not in str(got.value)


@pytest.mark.parametrize(
    "url", ["http://user:pass-word-123@h/v1", "http://h/v1?key=pass-word-123", "http://", "file:///v1"]
)
def test_an_address_with_a_secret_or_without_a_host_is_refused(url):
    with pytest.raises(TeacherError, match=r"^teacher\.base_url") as got:
        endpoint_at(url)
    assert "pass-word-123" not in str(got.value)


def test_the_key_is_in_the_header_and_nowhere_else(caplog):
    caplog.set_level(logging.DEBUG)
    with serve(Settings(key=KEY)) as running:
        endpoint = endpoint_at(running.url, key=KEY + "\n")
        good, bad = send(running, key=KEY), send(running, key=KEY + "x")
        with pytest.raises(TeacherError) as got:
            look(running.url, key=KEY + "x")
        assert running.headers[0]["authorization"] == f"Bearer {KEY}"
        assert all(KEY.encode() not in body for body in running.bodies)
    assert (good.status, bad.status) == (200, 401)
    shown = [repr(endpoint), str(endpoint.body(CHAT)), repr(good), repr(bad), reason_of(bad), endpoint.refusal(bad)]
    assert KEY not in "\n".join([*shown, str(got.value), repr(got.value), caplog.text])


# Verdicts


def reply_of(status=0, raw=b"", problem=None, **said) -> Reply:
    return Reply(status, raw, Allowance(**said), f"http_{status}" if problem is None else problem, 0.0)


@pytest.mark.parametrize(
    ("status", "raw", "verdict"),
    [
        (301, b"", "stop"),
        (400, b"", "give_up"),
        (402, b"", "stop"),
        (403, b'{"error": {"message": "Your input was flagged"}}', "give_up"),
        (408, b"", "retry"),
        (413, b"", "give_up"),
        (422, b"", "give_up"),
        (429, b'{"error": {"code": "rate_limit_exceeded"}}', "retry"),
        (429, b'{"error": {"type": "insufficient_quota"}}', "stop"),
        (529, b"", "retry"),
    ],
)
def test_a_status_has_its_verdict(status, raw, verdict):
    assert judge(reply_of(status, raw)) == verdict


def test_a_wait_of_hours_stops_the_run():
    assert judge(reply_of(429, retry_after_s=7200.0)) == "stop"
    assert "2.0 hours" in endpoint_at("http://h/v1").refusal(reply_of(429, retry_after_s=7200.0))


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_backing_off_doubles_at_most_up_to_a_minute(attempt, draw):
    assert 0.0 <= delay_s(attempt, reply_of(500), lambda: draw) <= min(60.0, 2.0 ** min(attempt - 1, 10))


@given(st.integers(1, 20), st.floats(0, 3600), st.floats(0, 1, exclude_max=True))
def test_nobody_comes_back_before_the_server_wants(attempt, wait_s, draw):
    for said in ({"retry_after_s": wait_s}, {"requests_left": 0, "requests_reset_s": wait_s}):
        assert wait_s <= delay_s(attempt, reply_of(429, **said), lambda: draw) <= 1.1 * wait_s + 0.1 + 1e-9


@pytest.mark.parametrize(
    ("header", "value", "field", "expected"),
    [
        ("retry-after", "3", "retry_after_s", 3.0),
        ("retry-after", "Thu, 01 Jan 1970 00:16:45 GMT", "retry_after_s", 5.0),
        ("retry-after", "Thu, 01 Jan 1970 00:00:00 GMT", "retry_after_s", 0.0),
        ("retry-after-ms", "250", "retry_after_s", 0.25),
        ("x-ratelimit-reset-requests", "6m0s", "requests_reset_s", 360.0),
        ("x-ratelimit-reset-tokens", "2m59.56s", "tokens_reset_s", 179.56),
        ("x-ratelimit-reset-tokens", "20ms", "tokens_reset_s", 0.02),
        ("x-ratelimit-remaining-tokens", "149984", "tokens_left", 149984),
        ("x-ratelimit-remaining-requests", "0", "requests_left", 0),
        ("retry-after", "-5", "retry_after_s", 0.0),
        ("retry-after", "nan", "retry_after_s", None),
        ("retry-after", "soon", "retry_after_s", None),
    ],
)
def test_headers_are_read(header, value, field, expected):
    assert getattr(read_allowance({header: value}, now=1000.0), field) == pytest.approx(expected)


@given(st.text(max_size=40))
def test_no_header_breaks_the_reader(value):
    names = ("retry-after", "retry-after-ms", "x-ratelimit-reset-requests", "x-ratelimit-remaining-tokens")
    read_allowance(dict.fromkeys(names, value), now=1000.0)


# Reading


def read(message, request=CHAT, model="teacher", **choice):
    whole = {"model": model, "choices": [{"message": message, "finish_reason": "stop"} | choice]}
    return read_completion(json.dumps(whole).encode(), request, Reading("teacher"))


@pytest.mark.parametrize(
    ("message", "reasoning", "text"),
    [
        ({"content": "four", "reasoning_content": "2+2"}, "2+2", "four"),
        ({"content": "four", "reasoning": "2+2"}, "2+2", "four"),
        ({"content": "<think>\n2+2\n</think>\n\nfour"}, "2+2", "four"),
        ({"content": "2+2\n</think>\n\nfour"}, "2+2", "four"),
        ({"content": "say <think> and </think>"}, "", "say <think> and </think>"),
        ({"content": [{"type": "text", "text": "four"}]}, "", "four"),
    ],
)
def test_reasoning_is_parted_from_the_answer(message, reasoning, text):
    answer = read(message)
    assert (answer.reasoning, answer.text) == (reasoning, text)
    assert answer.reasoning_kind == ("raw" if reasoning else "absent")


def test_reasoning_that_max_tokens_cut_off_is_no_answer():
    answer = read({"content": "<think>so far"}, finish_reason="length")
    assert (answer.reasoning, answer.text, answer.finish) == ("so far", "", "length")
    with pytest.raises(BadAnswer, match="no text"):
        read({"content": "<think>so far"})


def test_what_a_provider_sums_up_is_marked():
    raw = json.dumps({"choices": [{"message": {"content": "a", "reasoning": "b"}}]}).encode()
    assert read_completion(raw, CHAT, Reading(None, "summary")).reasoning_kind == "summary"


@pytest.mark.parametrize(
    ("message", "given", "reason"),
    [
        ({"content": "maybe"}, {"choices": ("yes", "no")}, "not_a_choice"),
        ({"content": '{"label": ["yes"]}'}, {"choices": ("yes", "no")}, "not_a_choice"),
        ({"content": '{"label": "YES"}'}, {"choices": ("yes", "no")}, "not_a_choice"),
        ({"content": "[" * 100_000}, {"choices": ("yes", "no")}, "not_a_choice"),
        ({"content": "{}"}, {"schema": {"type": "object", "required": ["a"]}}, "not_the_schema"),
        ({"content": "[" * 100_000}, {"schema": {"type": "object"}}, "not_the_schema"),
        ({"content": "yes"}, {"top_logprobs": 2}, "no_logprobs"),
        ({"content": None, "refusal": "I cannot"}, {}, "refused"),
        ({"content": "\ud800"}, {}, "not_utf8"),
    ],
)
def test_what_was_not_asked_for_is_no_answer(message, given, reason):
    with pytest.raises(BadAnswer) as got:
        read(message, Request(messages=CHAT.messages, **given))
    assert got.value.reason == reason
    assert "\n" not in str(got.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "usage", "model", "logprobs", "error", "text", "prompt_tokens"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=15,
)


@settings(max_examples=300, deadline=None)
@given(JSON | st.binary(max_size=50), st.integers(0, 2))
def test_whatever_is_answered_is_read_or_refused(said, top_logprobs):
    raw = said if isinstance(said, bytes) else json.dumps(said).encode()
    choice = raw if isinstance(said, bytes) else json.dumps({"choices": [said], "usage": said}).encode()
    for each in (raw, choice, b"[" * 100_000):
        try:
            read_completion(each, Request(prompt="x", top_logprobs=top_logprobs), Reading("teacher"))
        except BadAnswer:
            continue


@pytest.mark.parametrize(
    ("asked", "served", "same"),
    [
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("gpt-4o-2024-05-13", "gpt-4o-2024-08-06", False),
        ("deepseek/deepseek-r1", "DeepSeek-R1:free", True),
        ("llama3:8b", "llama3:70b", False),
        ("llama3", "llama3:latest", True),
        ("mistral-small-latest", "mistral-small-2409", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct", False),
        ("claude-3", "claude-3-5", False),
    ],
)
def test_a_model_goes_by_its_name_with_or_without_a_version(asked, served, same):
    assert same_model(asked, served) is same
    assert same_model(served, asked) is same
