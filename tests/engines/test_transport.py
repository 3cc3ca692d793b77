"""Laws of the proxy: its password reaches it, and is shown nowhere."""

from __future__ import annotations

import asyncio
import base64
import logging

import pytest
from tests.servers.api import serve
from tests.servers.faults import Settings

from potstill.engines.openai import Endpoint, Reply, reason_of
from potstill.engines.transport import find_proxy
from potstill.errors import TeacherError

PASSWORD = "hunter2 secret"
PAIR = base64.b64encode(f"bob:{PASSWORD}".encode()).decode()
SECRETS = (PASSWORD, "hunter2%20secret", "hunter2", PAIR)


async def sent_to(url: str) -> tuple[Endpoint, Reply, str]:
    async with Endpoint("teacher", base_url=url, key="k" * 20, timeout_s=5.0) as endpoint:
        reply = await endpoint.send({"model": "teacher", "messages": []})
        try:
            await endpoint.preflight()
        except TeacherError as error:
            return endpoint, reply, str(error)
        return endpoint, reply, ""


def shown(endpoint: Endpoint, reply: Reply, error: str) -> str:
    return "\n".join(
        [repr(endpoint), repr(reply), reply.raw.decode(), reason_of(reply), endpoint.refusal(reply), error]
    )


@pytest.fixture
def _proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.usefixtures("_proxy")
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("place", ["", "127.0.0.1:1"])
def test_the_proxys_password_is_shown_nowhere(monkeypatch, caplog, scheme, place):
    caplog.set_level(logging.DEBUG)
    # The server repeats what it is sent as a key; as a proxy it knows no such path.
    with serve(Settings(key="another")) as server:
        host = place or server.url.removeprefix("http://").removesuffix("/v1")
        monkeypatch.setenv(f"{scheme}_proxy", f"http://bob:hunter2%20secret@{host}")
        endpoint, reply, error = asyncio.run(sent_to(f"{scheme}://teacher.invalid/v1"))
        if not place:
            assert server.headers[0]["proxy-authorization"] == f"Basic {PAIR}"
    assert reply.problem
    text = shown(endpoint, reply, error) + caplog.text + repr(find_proxy(f"{scheme}://teacher.invalid/v1"))
    assert [secret for secret in SECRETS if secret in text] == []


@pytest.mark.usefixtures("_proxy")
def test_a_password_that_a_proxy_repeats_is_blacked_out(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://bob:hunter2%20secret@127.0.0.1:1")
    endpoint = Endpoint("teacher", base_url="http://teacher.invalid/v1", key=None)
    said = " ".join(SECRETS[:2] + SECRETS[3:]).encode()
    assert endpoint.without_key(b"refused: " + said) == b"refused: [password] [password] [password]"


@pytest.mark.usefixtures("_proxy")
@pytest.mark.parametrize(
    ("named", "url", "has_password"),
    [
        ("http://bob:p@h:3128", "http://h:3128", True),
        ("bob:p@h:3128", "http://h:3128", True),
        ("h:3128", "http://h:3128", False),
        ("http://h:3128/?key=p", "http://h:3128/", False),
    ],
)
def test_a_proxys_address_holds_no_secret(monkeypatch, named, url, has_password):
    monkeypatch.setenv("https_proxy", named)
    proxy = find_proxy("https://api.example.com/v1")
    assert (proxy.url, bool(proxy.headers)) == (url, has_password)
    monkeypatch.setenv("no_proxy", "api.example.com")
    assert find_proxy("https://api.example.com/v1") is None
