"""What the test server says: an answer that depends on the request's body only. Refuses to know a model.

A function of the user may answer instead: it gets the body and gives a text, or a message (a dict), which may hold the
`prompt_logprobs` of the choice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Answer", "answer_to", "body_key", "models"]

Answer = Callable[[dict[str, Any]], str | dict[str, Any]]
_TOKEN = re.compile(r"\s*\S+|\s+")


def body_key(body: Mapping[str, Any]) -> str:
    """SHA-256 of the body as sorted JSON, hex."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def models(names: tuple[str, ...]) -> dict[str, Any]:
    """What GET /models gives."""
    return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "tests"} for name in names]}


def answer_to(
    body: dict[str, Any], *, chat: bool, write: Answer | None = None, model: str | None = None
) -> dict[str, Any]:
    """The whole object that answers `body`."""
    key = body_key(body)
    said = write(body) if write else _text(body, key)
    message = {"role": "assistant", "content": said} if isinstance(said, str) else {"role": "assistant", **said}
    scores = message.pop("prompt_logprobs", None)
    tokens = _TOKEN.findall(message.get("content") or "")
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    choice |= {"message": message} if chat else {"text": message["content"]}
    if body.get("logprobs"):
        choice["logprobs"] = _chat_logprobs(tokens, body) if chat else _plain_logprobs(tokens, body)
    prompt = body.get("messages") or body.get("prompt")
    if body.get("prompt_logprobs"):
        choice["prompt_logprobs"] = scores if scores is not None else _prompt_logprobs(prompt, body["prompt_logprobs"])
    given = len(prompt) if body.get("prompt_logprobs") else len(_TOKEN.findall(json.dumps(prompt)))
    usage = {"prompt_tokens": given, "completion_tokens": len(tokens)}
    return {
        "id": f"answer-{key[:16]}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": model or body.get("model"),
        "system_fingerprint": "tests",
        "choices": [choice],
        "usage": {**usage, "total_tokens": sum(usage.values())},
    }


def _text(body: dict[str, Any], key: str) -> str:
    number = int(key[:12], 16)
    choices = body.get("structured_outputs", {}).get("choice")
    if choices:
        return str(choices[number % len(choices)])
    schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
    schema = schema or body.get("structured_outputs", {}).get("json")
    if schema:
        return json.dumps(_instance(schema, number))
    return f"The answer number {key[:8]} says {number % 1000}."


def _instance(schema: dict[str, Any], number: int) -> Any:
    """Some value that fits a simple schema."""
    if "enum" in schema:
        return schema["enum"][number % len(schema["enum"])]
    match schema.get("type"):
        case "object":
            return {name: _instance(part, number) for name, part in schema.get("properties", {}).items()}
        case "array":
            return [_instance(schema.get("items", {}), number)] * schema.get("minItems", 1)
        case "integer" | "number":
            return schema.get("minimum", number % 10)
        case "boolean":
            return bool(number % 2)
        case "null":
            return None
    return f"text {number % 1000}"


def _others(token: str, count: int) -> list[tuple[str, float]]:
    return [(token, -0.25)] + [(f"{token}~{rank}", -2.0 - rank) for rank in range(1, count)]


def _chat_logprobs(tokens: list[str], body: dict[str, Any]) -> dict[str, Any]:
    count = max(1, body.get("top_logprobs", 0))
    listed = [[{"token": token, "logprob": value} for token, value in _others(token, count)] for token in tokens]
    return {"content": [{**top[0], "top_logprobs": top[: body.get("top_logprobs", 0)]} for top in listed]}


def _plain_logprobs(tokens: list[str], body: dict[str, Any]) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "token_logprobs": [-0.25] * len(tokens),
        "top_logprobs": [dict(_others(token, int(body["logprobs"]))) for token in tokens],
    }


def _prompt_logprobs(ids: list[int], count: int) -> list[dict[str, Any] | None]:
    """As vLLM has them: the likeliest tokens of each place, by what stands before it, and the one that stands there."""
    listed: list[dict[str, Any] | None] = [None]
    for place in range(1, len(ids)):
        first = sum(ids[:place]) % 50
        ranked = {first + rank: -1.0 - rank for rank in range(count)}
        ranked.setdefault(ids[place], -1.0 - count)
        listed.append(
            {
                str(number): {"logprob": value, "rank": rank, "decoded_token": f"<{number}>"}
                for rank, (number, value) in enumerate(ranked.items(), 1)
            }
        )
    return listed
