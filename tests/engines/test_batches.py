"""Laws of the batch API."""

from __future__ import annotations

import asyncio
import json

import pytest
from tests.servers.api import serve
from tests.servers.faults import Settings

from potstill.engines import batches
from potstill.engines.openai import Endpoint
from potstill.errors import TeacherError
from potstill.types import Request

KEY = "sk-test-0123456789abcdef"


def endpoint_at(url: str, key: str | None = None) -> Endpoint:
    return Endpoint("teacher", base_url=url, key=key)


def items_for(endpoint: Endpoint, count: int) -> list[batches.Item]:
    asked = [Request(messages=({"role": "user", "content": f"Question {number} \ud800 ü"},)) for number in range(count)]
    return [(f"{number:04x}", endpoint.body(request)) for number, request in enumerate(asked)]


async def started(endpoint: Endpoint, items: list[batches.Item], nonce: str = "n") -> str:
    return await batches.create(endpoint, await batches.upload(endpoint, items), nonce)


async def complete(endpoint: Endpoint, batch_id: str) -> list[tuple[str, int, bytes]]:
    while not (await batches.poll(endpoint, batch_id)).done:
        pass
    return [result async for result in batches.collect(endpoint, batch_id)]


def test_every_request_of_a_batch_is_answered_as_it_would_be_alone():
    async def ask(endpoint, items):
        batch_id = await started(endpoint, items)
        async with endpoint:
            alone = [json.loads((await endpoint.send(body)).raw) for _, body in items]
        return await complete(endpoint, batch_id), alone, await batches.poll(endpoint, batch_id)

    with serve() as running:
        endpoint = endpoint_at(running.url)
        results, alone, state = asyncio.run(ask(endpoint, items_for(endpoint, 25)))
    assert [name for name, _, _ in results] == [f"{number:04x}" for number in range(25)]
    assert [json.loads(raw) for _, _, raw in results] == alone
    assert (state.status, state.done, state.total, state.completed, state.failed) == ("completed", True, 25, 25, 0)


def test_what_failed_in_a_batch_comes_with_its_status():
    with serve(Settings(schedule={1: "http_500"})) as running:
        endpoint = endpoint_at(running.url)

        async def ask():
            return await complete(endpoint, await started(endpoint, items_for(endpoint, 3)))

        assert sorted((name, status) for name, status, _ in asyncio.run(ask())) == [
            ("0000", 200),
            ("0001", 500),
            ("0002", 200),
        ]


def test_a_batch_can_be_stopped():
    with serve() as running:
        endpoint = endpoint_at(running.url)

        async def ask():
            batch_id = await started(endpoint, items_for(endpoint, 3))
            await batches.cancel(endpoint, batch_id)
            return await batches.poll(endpoint, batch_id), await complete(endpoint, batch_id)

        state, results = asyncio.run(ask())
    assert (state.status, state.done, results) == ("cancelled", True, [])


def test_parts_hold_everything_in_order_and_no_more_than_a_provider_takes(monkeypatch):
    monkeypatch.setattr(batches, "MOST_REQUESTS", 7)
    monkeypatch.setattr(batches, "MOST_BYTES", 1_000)
    items = items_for(endpoint_at("http://h/v1"), 40)
    parts = list(batches.split(iter(items)))
    assert [item for part in parts for item in part] == items
    assert all(len(part) <= 7 for part in parts)
    assert all(sum(len(batches._line(*item, "/v1/chat/completions")) for item in part) <= 1_000 for part in parts)
    with pytest.raises(ValueError, match="request big has"):
        list(batches.split([("big", {"prompt": "x" * 2_000})]))


def test_a_batch_that_nobody_knows_and_a_refused_key_are_one_line_without_the_key():
    with serve(Settings(key=KEY)) as running:
        with pytest.raises(TeacherError, match=r"^teacher\.batch: .*HTTP 404"):
            asyncio.run(batches.poll(endpoint_at(running.url, KEY), "batch-99"))
        with pytest.raises(TeacherError, match=r"^teacher\.api_key: ") as got:
            asyncio.run(batches.poll(endpoint_at(running.url, KEY + "x"), "batch-99"))
    assert KEY not in str(got.value)


@pytest.mark.parametrize("line", ["", "[]", "{}", "null", '{"custom_id": "a", "response": {}}', "[" * 100_000])
def test_a_line_that_is_none_of_a_batch_is_refused(line):
    with pytest.raises(TeacherError, match=r"^teacher\.batch"):
        batches._result(line, endpoint_at("http://h/v1"))


def test_a_request_that_expired_was_not_sent():
    line = '{"custom_id": "a", "response": null, "error": {"code": "batch_expired", "message": "too late"}}'
    name, status, raw = batches._result(line, endpoint_at("http://h/v1"))
    assert (name, status, json.loads(raw)["error"]["code"]) == ("a", 0, "batch_expired")


def test_a_batch_is_found_by_what_was_sent_with_it():
    with serve() as running:
        endpoint = endpoint_at(running.url)

        async def ask():
            names = [await started(endpoint, items_for(endpoint, 1), nonce) for nonce in ("first", "second")]
            return names, [await batches.find(endpoint, nonce) for nonce in ("first", "second", "third")]

        names, found = asyncio.run(ask())
    assert found == [*names, None]


@pytest.mark.parametrize("reply", [(500, {"error": {"message": "lost"}}), (200, {}), (200, b"<html>"), (408, {})])
def test_whether_a_batch_was_started_is_asked_once_and_not_taken_for_a_refusal(reply):
    with serve() as running:
        endpoint, real, asked = endpoint_at(running.url), running.batches.route, []

        def route(method, path, sent):
            if (method, path) == ("POST", "/batches"):
                asked.append(path)
                return reply
            return real(method, path, sent)

        running.batches.route = route
        with pytest.raises(batches.LostReply, match=r"^teacher\.batch: "):
            asyncio.run(started(endpoint, items_for(endpoint, 1)))
    assert len(asked) == 1
