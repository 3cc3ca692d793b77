"""Any endpoint that speaks OpenAI's protocol (OpenAI, vLLM, SGLang, llama.cpp, LiteLLM, ...), one attempt at a time.

Refuses to retry: what a reply means is judged in `replies`, when the next one may be sent is `pace`'s to say. The key
goes into the header of a request and nowhere else.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from potstill.engines.completions import BadAnswer, Reading, read_completion
from potstill.engines.preflight import Served, explain_stop, look_around
from potstill.engines.replies import (
    Allowance,
    Load,
    Reply,
    Verdict,
    delay_s,
    judge,
    load_of,
    read_allowance,
    reason_of,
)
from potstill.engines.transport import Refused, connect, find_proxy, is_azure, is_openai
from potstill.errors import TeacherError
from potstill.types.request import Completion, Request

if TYPE_CHECKING:
    import httpx2
    from openai import AsyncOpenAI

    Ask = Callable[[AsyncOpenAI, type[httpx2.Response]], Awaitable[httpx2.Response]]

__all__ = [
    "MOST_BYTES",
    "Allowance",
    "BadAnswer",
    "Endpoint",
    "Load",
    "Reply",
    "Served",
    "Verdict",
    "delay_s",
    "judge",
    "load_of",
    "reason_of",
]

MOST_BYTES = 10_000_000
"""Of one answer: more than any model writes. Log-probabilities of long texts take more."""
_LEAST_SECRET = 12
"""Characters of a key. What servers without keys are given (`EMPTY`, `none`) is shorter, and may stand in an answer."""
_LEAST_PASSWORD = 4
"""Characters of a proxy's password: it may be short, and is blacked out of what is no answer."""


class Endpoint:
    """One model at one endpoint. Connections belong to an event loop: `async with endpoint:` closes them at its end."""

    def __init__(
        self,
        model: str,
        *,
        base_url: str,
        key: str | None,
        api: Literal["chat", "completion"] = "chat",
        reasoning: Literal["raw", "summary"] = "raw",
        timeout_s: float = 120.0,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        """`key` None for endpoints without one; `most_bytes` of an answer are read.

        Raises TeacherError for a key or an address that cannot be sent.
        """
        _check_address(base_url)
        self.model, self.base_url, self.api, self.timeout_s = model, base_url.rstrip("/"), api, timeout_s
        self.has_key, self._most_bytes = key is not None, most_bytes
        self._key = None if key is None else _clean(key)
        # An Azure deployment bears a name of the user's, and answers under that of its model.
        self._reading = Reading(None if is_azure(base_url) else model, reasoning)
        self._is_openai, self._is_vllm = is_openai(base_url), False
        proxy = find_proxy(base_url)
        self._passwords = () if proxy is None else proxy.secrets
        self._client: AsyncOpenAI | None = None

    def __repr__(self) -> str:
        return f"Endpoint({self.model!r}, base_url={self.base_url!r})"

    @property
    def path(self) -> str:
        """Where requests go, after the address."""
        return "/chat/completions" if self.api == "chat" else "/completions"

    def body(self, request: Request) -> dict[str, Any]:
        """The HTTP body, the same for the same request; neither `sample` nor `user` is in it, and no seed.

        A chat's `choices` become a JSON Schema {"label": one of them}, which OpenAI, vLLM, SGLang, llama.cpp and
        LiteLLM take alike; a plain prompt's become vLLM's `structured_outputs`, as a chat's do when they are sent to
        vLLM. Raises ValueError where the request is
        of the other api, or has both choices and a schema.
        """
        if (request.messages is not None) != (self.api == "chat"):
            needed = "messages" if self.api == "chat" else "prompt"
            raise ValueError(
                f"teacher.api={self.api} needs a request with {needed}. Give it one, or set the other api."
            )
        if request.choices and request.schema is not None:
            raise ValueError("a request has both choices and a schema: it needs one of them at most")
        body: dict[str, Any] = {"model": self.model}
        if request.messages is not None:
            body["messages"] = [dict(message) for message in request.messages]
        else:
            body["prompt"] = request.prompt if request.prompt_ids is None else list(request.prompt_ids)
        if request.prompt_logprobs:
            body["prompt_logprobs"] = request.prompt_logprobs
        body |= self._sampling(request)
        if request.choices or request.schema is not None:
            body |= _chat_form(request) if self.api == "chat" else _plain_form(request)
        if request.top_logprobs:
            is_chat = self.api == "chat"
            body |= (
                {"logprobs": True, "top_logprobs": request.top_logprobs}
                if is_chat
                else {"logprobs": request.top_logprobs}
            )
        return body

    def _sampling(self, request: Request) -> dict[str, Any]:
        """OpenAI's reasoning models refuse `max_tokens`, and temperatures but 1; other servers have other defaults."""
        is_new = self._is_openai and self.api == "chat"
        chosen: dict[str, Any] = {"max_completion_tokens" if is_new else "max_tokens": request.max_tokens}
        if request.temperature != 1.0 or not self._is_openai:
            chosen["temperature"] = request.temperature
        if request.top_p != 1.0 or not self._is_openai:
            chosen["top_p"] = request.top_p
        if request.stop:
            chosen["stop"] = list(request.stop)
        return chosen

    async def send(self, body: Mapping[str, Any]) -> Reply:
        """One attempt, of at most `timeout_s` and `most_bytes`. What a server or a network does is never raised.

        Raises ValueError for a body that is not JSON, NaN included.
        """
        sent = _without_json(body) if self._is_vllm else body
        content = json.dumps(sent, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")
        options: Any = {"headers": {"Content-Type": "application/json"}}
        return await self._exchange(
            lambda client, cast_to: client.post(self.path, cast_to=cast_to, content=content, options=options)
        )

    async def get(self, path: str) -> Reply:
        """What stands at `path`, as `send` gives it."""
        return await self._exchange(lambda client, cast_to: client.get(path, cast_to=cast_to))

    async def _exchange(self, ask: Ask) -> Reply:
        import aiohttp

        started = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout_s):
                status, content, said = await self._answer(ask)
            problem = "" if status == 200 else f"http_{status}"
        except TimeoutError:
            status, content, said, problem = 0, b"", Allowance(), "timeout"
        except Refused as refused:
            status, content, said = refused.status, str(refused).encode(), Allowance()
            problem = refused.problem
        except (aiohttp.ClientError, OSError) as error:
            status, content, said, problem = 0, str(error).encode("utf-8", "replace"), Allowance(), "connection"
        content = self.without_key(content) if problem else self._without_secrets(content, _LEAST_SECRET)
        return Reply(status, content, said, problem, time.monotonic() - started)

    async def _answer(self, ask: Ask) -> tuple[int, bytes, Allowance]:
        import httpx2
        import openai

        try:
            response = await ask(self._open(), httpx2.Response)
        except openai.APIStatusError as error:
            response = error.response
        except openai.APIConnectionError as error:  # of TLS: all else comes as aiohttp raises it
            raise OSError(str(error.__cause__ or error)) from None
        return response.status_code, response.content, read_allowance(response.headers)

    def _open(self) -> AsyncOpenAI:
        if self._client is None:
            self._client = connect(self.base_url, self._key, timeout_s=self.timeout_s, most_bytes=self._most_bytes)
        return self._client

    def without_key(self, raw: bytes) -> bytes:
        """What is no answer, with the key and a proxy's password blacked out: servers repeat what they refuse."""
        return self._without_secrets(raw, _LEAST_PASSWORD)

    def _without_secrets(self, raw: bytes, shortest: int) -> bytes:
        key = self._key or ""
        if len(key) >= _LEAST_SECRET:
            raw = raw.replace(key.encode(), b"[key]")
        for password in self._passwords:
            if len(password) >= shortest:
                raw = raw.replace(password.encode(), b"[password]")
        return raw

    def unbounded(self) -> AsyncOpenAI:
        """A client of its own for files, which are streamed and of any length. To be closed by whoever asks for it."""
        return connect(self.base_url, self._key, timeout_s=self.timeout_s, most_bytes=None)

    def parse(self, raw: bytes, request: Request) -> Completion:
        """The completion in an answer's body; asks nobody. Raises BadAnswer where it cannot be used."""
        return read_completion(raw, request, self._reading)

    async def preflight(self) -> Served:
        """Which models are served. Raises TeacherError, in one line that names the key of the recipe, where none can be
        asked: nobody answers, the key is refused, the model is not served. Nothing that costs is asked.
        """
        served = await look_around(self)
        self._is_vllm = served.is_vllm
        return served

    def refusal(self, reply: Reply) -> str:
        """Why the run stops, for a reply that is judged `stop`: one line."""
        return explain_stop(self, reply)

    async def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()


def _check_address(base_url: str) -> None:
    parts = urlsplit(base_url)
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise TeacherError(
            f"teacher.base_url: the address at {parts.hostname} holds a user, a password or a query, which may be "
            "secret; it needs scheme, host and path only. Put a key into the variable that teacher.api_key names."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise TeacherError(f"teacher.base_url: {base_url!r} is no address. It needs to look like https://HOST/v1.")


def _clean(key: str) -> str:
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise TeacherError(
            "teacher.api_key: the environment variable holds no key that can be sent: it is empty, or has spaces, line "
            "breaks or letters that are not ASCII. Set it anew."
        )
    return key


def _chat_form(request: Request) -> dict[str, Any]:
    schema: Mapping[str, Any] | None = request.schema
    if request.choices:
        label = {"type": "string", "enum": list(request.choices)}
        schema = {
            "type": "object",
            "properties": {"label": label},
            "required": ["label"],
            "additionalProperties": False,
        }
    named = {"name": "answer", "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _plain_form(request: Request) -> dict[str, Any]:
    return {"structured_outputs": {"choice": list(request.choices)} if request.choices else {"json": request.schema}}


def _without_json(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same choices as vLLM takes them without JSON, in which a model may write white space without end."""
    match body:
        case {"response_format": {"json_schema": {"schema": {"properties": {"label": {"enum": choices}}} as schema}}}:
            if len(schema["properties"]) == 1:
                rest = {name: value for name, value in body.items() if name != "response_format"}
                return rest | {"structured_outputs": {"choice": choices}}
    return body
