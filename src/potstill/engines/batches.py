"""A provider's batch API: many requests in a file, answered within a day for half the price.

Refuses to keep anything: the caller notes a batch's name before it does anything else, so that a later run can wait for
it. Plain data goes in and comes out.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from potstill.engines.openai import Endpoint
from potstill.engines.replies import Allowance, Reply, error_of, judge
from potstill.errors import TeacherError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

__all__ = [
    "MOST_BYTES",
    "MOST_REQUESTS",
    "BatchState",
    "Item",
    "LostReply",
    "cancel",
    "collect",
    "create",
    "find",
    "poll",
    "split",
    "upload",
]

Item = tuple[str, Mapping[str, Any]]
"""A name of the caller's and the body of a request."""

MOST_REQUESTS, MOST_BYTES = 50_000, 200_000_000
_ATTEMPTS = 5
_ENDED = ("completed", "failed", "expired", "cancelled")
_NONCE = "potstill"
_LOOKED_AT = 2000
"""Of a provider's batches, the newest first."""
_UNSURE = {408, 409, 499}
"""Refusals after which a batch may have been made all the same."""


class LostReply(TeacherError):
    """Nobody knows whether a batch was started."""


@dataclass(frozen=True, slots=True)
class BatchState:
    """Where a batch stands.

    status   in the provider's words: validating, in_progress, finalizing, completed, failed, expired, cancelling,
             cancelled
    done     nothing more will come: collect what there is
    total, completed, failed   requests
    problem  one line, where the provider says what is wrong; else empty
    """

    status: str
    done: bool
    total: int
    completed: int
    failed: int
    problem: str = ""


def split(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Parts that a provider takes at once: at most 50,000 requests and 200 MB, in order.

    Raises ValueError for a request that is larger by itself.
    """
    part: list[Item] = []
    size = 0
    for name, body in items:
        # The path adds less than a hundred bytes to a line.
        length = len(_line(name, body, "/v1/chat/completions"))
        if length > MOST_BYTES:
            raise ValueError(f"request {name} has {length:,} bytes: a batch takes {MOST_BYTES:,}. Shorten its prompt.")
        if part and (len(part) == MOST_REQUESTS or size + length > MOST_BYTES):
            yield part
            part, size = [], 0
        part.append((name, body))
        size += length
    if part:
        yield part


async def upload(endpoint: Endpoint, items: Iterable[Item]) -> str:
    """Upload one part of `split`; gives the file's name. Raises TeacherError where the provider takes no such files."""
    path = f"/v1{endpoint.path}"
    content = b"".join(_line(name, body, path) for name, body in items)
    async with _asking(endpoint) as client:
        file = await client.files.create(file=("batch.jsonl", content), purpose="batch")
        return str(file.id)


async def create(endpoint: Endpoint, file_id: str, nonce: str) -> str:
    """Start a batch of an uploaded file; gives its name. It is asked once: a second try could be a second batch.

    Raises TeacherError where the provider refuses, LostReply where it may have started it: `find` it by its `nonce`.
    """
    import openai

    try:
        async with endpoint.unbounded() as client:
            start: Any = client.batches.create
            wanted = {"input_file_id": file_id, "endpoint": f"/v1{endpoint.path}", "metadata": {_NONCE: nonce}}
            name = getattr(await start(**wanted, completion_window="24h"), "id", None)
        problem = "no name in the reply"
    except openai.APIStatusError as error:
        if 400 <= error.status_code < 500 and error.status_code not in _UNSURE:
            raise TeacherError(_explain(endpoint, error.status_code, error.response.content)) from None
        name, problem = None, f"HTTP {error.status_code}"
    except (openai.OpenAIError, ValueError) as error:
        name, problem = None, type(error).__name__
    if isinstance(name, str) and name:
        return name
    raise LostReply(
        f"teacher.batch: {endpoint.base_url} did not say whether it started a batch ({problem}), and lists none. It "
        "counts at its worst case. The same command asks again."
    )


async def find(endpoint: Endpoint, nonce: str) -> str | None:
    """The batch that was started with `nonce`; None where the provider lists none. Raises TeacherError as `poll`."""
    import openai

    async with _asking(endpoint) as client:
        looked_at = 0
        try:
            async for batch in client.batches.list(limit=100):
                told: Any = batch.metadata
                if isinstance(told, dict) and told.get(_NONCE) == nonce:
                    return str(batch.id)
                looked_at += 1
                if looked_at == _LOOKED_AT:
                    break
        except openai.APIStatusError as error:
            if error.status_code not in (404, 405, 501):
                raise
    return None


async def poll(endpoint: Endpoint, batch_id: str) -> BatchState:
    """How far a batch is. Raises TeacherError where the provider does not know it, or cannot be reached."""
    async with _asking(endpoint) as client:
        batch = await client.batches.retrieve(batch_id)
    counts = batch.request_counts
    total, completed, failed = (counts.total, counts.completed, counts.failed) if counts else (0, 0, 0)
    errors = (batch.errors.data if batch.errors else None) or []
    problem = " ".join(str(errors[0].message).split())[:200] if errors else ""
    return BatchState(str(batch.status), batch.status in _ENDED, total, completed, failed, problem)


async def collect(endpoint: Endpoint, batch_id: str) -> AsyncIterator[tuple[str, int, bytes]]:
    """What a batch that is done has brought: name, HTTP status (0 where the request was not sent), and the body.

    In any order; requests that a batch never came to do not occur. Raises TeacherError where the provider does not know
    the batch, cannot be reached, or gives a file that is none of a batch.
    """
    async with _asking(endpoint) as client:
        batch = await client.batches.retrieve(batch_id)
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id is not None:
                async with client.files.with_streaming_response.content(file_id) as response:
                    async for line in response.iter_lines():
                        if line.strip():
                            yield _result(line, endpoint)


async def cancel(endpoint: Endpoint, batch_id: str) -> None:
    """Ask the provider to stop; what is answered until then can be collected, and is paid."""
    async with _asking(endpoint) as client:
        await client.batches.cancel(batch_id)


def _line(name: str, body: Mapping[str, Any], path: str) -> bytes:
    line = {"custom_id": name, "method": "POST", "url": path, "body": body}
    return json.dumps(line, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def _result(line: str, endpoint: Endpoint) -> tuple[str, int, bytes]:
    try:
        said = json.loads(line)
        name, response = said["custom_id"], said.get("response")
        if response is None:
            return str(name), 0, json.dumps({"error": said.get("error")}).encode("ascii")
        return str(name), int(response["status_code"]), json.dumps(response["body"]).encode("ascii")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise TeacherError(
            f"teacher.batch: {endpoint.base_url} gave a result that is no line of a batch ({line[:80]!r}). "
            "Set teacher.batch: false, and ask one by one."
        ) from None


@asynccontextmanager
async def _asking(endpoint: Endpoint) -> AsyncIterator[AsyncOpenAI]:
    """A client for some calls; what goes wrong becomes one line."""
    import openai

    try:
        # Batches are few and asked for by the hour: here the client's own retries do.
        async with endpoint.unbounded() as client:
            yield client.with_options(max_retries=_ATTEMPTS)
    except openai.APIStatusError as error:
        raise TeacherError(_explain(endpoint, error.status_code, error.response.content)) from None
    except openai.OpenAIError as error:
        raise TeacherError(
            f"teacher.base_url: {endpoint.base_url} cannot be reached ({type(error).__name__}). Try again: the same "
            "command continues."
        ) from None


def _explain(endpoint: Endpoint, status: int, raw: bytes) -> str:
    reply = Reply(status, endpoint.without_key(raw), Allowance(), f"http_{status}", 0.0)
    if status != 404 and judge(reply) == "stop":
        return endpoint.refusal(reply)
    words = " ".join(error_of(reply.raw)["message"].split())[:200]
    return (
        f"teacher.batch: {endpoint.base_url} has no batch API, does not know the batch or refuses it (HTTP {status}: "
        f"{words}). Set teacher.batch: false, and ask one by one."
    )
