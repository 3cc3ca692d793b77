"""Laws of the look around before anything is paid: good endpoints pass, whatever their list of models says."""

from __future__ import annotations

import asyncio
import json

import pytest
from tests.servers import api
from tests.servers.api import serve
from tests.servers.faults import Settings

from potstill.engines.openai import Endpoint
from potstill.engines.preflight import look_around
from potstill.engines.replies import Allowance, Reply
from potstill.errors import TeacherError
from potstill.types import Request

BOTH = {"messages": ({"role": "user", "content": "Which?"},), "choices": ("good", "bad")}


class Place:
    """An endpoint that answers as it is told."""

    base_url, path, has_key = "https://api.example.com/v1", "/chat/completions", True

    def __init__(self, model: str, listed: Reply, empty: Reply) -> None:
        self.model, self.listed, self.empty, self.sent = model, listed, empty, []

    async def get(self, _path: str) -> Reply:
        return self.listed

    async def send(self, body: dict) -> Reply:
        self.sent.append(body)
        return self.empty


def reply(status: int, said: object) -> Reply:
    raw = json.dumps(said).encode()
    return Reply(status, raw, Allowance(), "" if status == 200 else f"http_{status}", 0.0)


def refused(status: int, message: str, **error: object) -> Reply:
    return reply(status, {"error": {"message": message, **error}})


def models(*names: str, owner: str = "someone") -> Reply:
    return reply(200, {"data": [{"id": name, "owned_by": owner} for name in names]})


NO_MESSAGES = refused(400, "Missing required parameter: 'messages'.")


def look(place: Place):
    return asyncio.run(look_around(place))


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_may_ask_but_not_list_models_passes(status):
    place = Place("m", refused(status, "Missing scopes: api.model.read."), NO_MESSAGES)
    assert look(place).models == ()
    assert place.sent == [{"model": "m"}]


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_may_not_ask_is_refused(status):
    with pytest.raises(TeacherError, match=r"^teacher\.api_key: "):
        look(Place("m", refused(403, "no"), refused(status, "no")))


@pytest.mark.parametrize("model", ["meta/llama-3-8b:nitro", "meta/llama-3-8b:free", "llama-3-8b:fastest"])
def test_a_way_of_serving_behind_a_listed_name_is_listed(model):
    place = Place(model, models("meta/llama-3-8b"), NO_MESSAGES)
    assert look(place).models == ("meta/llama-3-8b",)
    assert place.sent == []


UNKNOWN = [
    refused(404, "The model `m` does not exist or you do not have access to it.", code="model_not_found"),
    refused(404, 'model "m" not found, try pulling it first'),
    refused(400, "m is not a valid model ID"),
    refused(400, "Invalid model name passed in model=m. Call `/v1/models` to view available models"),
    refused(400, "Model not found: m"),
]


@pytest.mark.parametrize("answer", UNKNOWN)
def test_a_model_that_is_neither_listed_nor_taken_is_refused_with_what_is_listed(answer):
    with pytest.raises(TeacherError, match=r"^teacher\.model: 'm' is not served at .* which serves other, third\."):
        look(Place("m", models("third", "other"), answer))


@pytest.mark.parametrize(
    "answer",
    [
        NO_MESSAGES,
        refused(422, "[{'type': 'missing', 'loc': ('body', 'messages'), 'msg': 'Field required'}]"),
        refused(400, "messages: field required", code=None),
        refused(429, "slow down"),
    ],
)
def test_a_model_that_is_taken_needs_no_list(answer):
    assert look(Place("m", models("other"), answer)).models == ("other",)


def test_vllm_lists_all_that_it_serves():
    place = Place("m", models("other", owner="vllm"), NO_MESSAGES)
    with pytest.raises(TeacherError, match=r"^teacher\.model: 'm' is not served"):
        look(place)
    assert place.sent == []


@pytest.mark.parametrize("listed", [{"data": [{"id": 1}, 5]}, {"data": {"id": "m"}}, [], None, {"data": [[]]}])
def test_a_list_that_is_none_is_no_list(listed):
    assert look(Place("m", reply(200, listed), NO_MESSAGES)).models == ()


@pytest.mark.parametrize(("owner", "is_plain"), [("vllm", True), ("someone", False)])
def test_vllm_is_sent_choices_without_json_and_the_request_stays_the_same(monkeypatch, owner, is_plain):
    listed = {"object": "list", "data": [{"id": "teacher", "object": "model", "owned_by": owner}]}
    monkeypatch.setattr(api, "models", lambda _names: listed)
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    requests = [Request(**BOTH), Request(messages=BOTH["messages"], schema=schema)]

    async def ask(url: str):
        async with Endpoint("teacher", base_url=url, key=None) as endpoint:
            bodies = [endpoint.body(request) for request in requests]
            await endpoint.preflight()
            assert [endpoint.body(request) for request in requests] == bodies
            sent = [await endpoint.send(body) for body in bodies]
            return [endpoint.parse(got.raw, request).text for got, request in zip(sent, requests, strict=True)]

    with serve(Settings()) as server:
        texts = asyncio.run(ask(server.url))
        choice, other = (json.loads(body) for body in server.bodies[-2:])
    assert texts[0] in BOTH["choices"]
    assert (choice.get("structured_outputs") == {"choice": ["good", "bad"]}) is is_plain
    assert ("response_format" in choice) is not is_plain
    assert "response_format" in other
