"""From the bytes that an endpoint answered to a completion, without a network: stored answers are read again for free.

Refuses an answer that is cut off, empty, of another model, or not what was asked for; it never mends one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from potstill.engines.replies import error_of
from potstill.types.request import Completion, Request, Usage

__all__ = ["BadAnswer", "Reading", "Unserved", "read_completion", "read_usage", "same_model"]

_OPEN, _CLOSE = "<think>", "</think>"
_BROKEN = ("error", "abort")
_MOST_TOKENS = 10**9
"""Of one answer: what claims more is not believed, and fits no ledger."""
_SURPLUS = 1e-2
"""By how much rounded log-probabilities of a position may sum to more than 1: servers compute in 16 bits."""
_VERSION = re.compile(r"[-@](latest|preview|\d{4}-\d{2}-\d{2}|\d{3,8})$|:[^:/]*$")


class BadAnswer(Exception):
    """An answer that cannot be used. `reason` is a word to count by; the message is one line.

    Reasons: not_utf8, not_json, server_error, wrong_model, no_choices, unfinished, refused, content_filter, empty,
    not_a_choice, not_the_schema, no_logprobs, no_prompt_logprobs, not_the_prompt.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Unserved(BadAnswer):
    """An answer of another model, or without what was asked for, as all others will be: to go on is of no use."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How the answers of an endpoint are read.

    model      name that was asked for; None where names of the endpoint's own are asked for, which no answer bears
    reasoning  what the endpoint shows of reasoning, where it shows any
    """

    model: str | None
    reasoning: Literal["raw", "summary"] = "raw"


def read_completion(raw: bytes, request: Request, reading: Reading) -> Completion:
    """The first choice in `raw`. Raises BadAnswer, and nothing else, whatever the bytes are."""
    said = _parsed(raw)
    served = said["model"] if isinstance(said.get("model"), str) else ""
    if served and reading.model is not None and not same_model(reading.model, served):
        raise Unserved("wrong_model", f"answered by {served[:100]!r}, asked for {reading.model!r}")
    choice = _first_choice(said)
    finish = choice["finish_reason"] if isinstance(choice.get("finish_reason"), str) else "unknown"
    if finish in _BROKEN or choice.get("error"):
        raise BadAnswer("unfinished", f"the server broke off, finish {finish!r}")
    reasoning, text = _texts(choice)
    # Of a text that is scored nothing is to be written: its one token may be the end.
    if not text and finish != "length" and not request.prompt_logprobs:
        reason = "content_filter" if finish == "content_filter" else "empty"
        raise BadAnswer(reason, f"no text, finish {finish[:40]!r}")
    return Completion(
        _checked(text, request),
        reasoning,
        reading.reasoning if reasoning else "absent",
        finish,
        served,
        read_usage(said.get("usage")),
        _top_logprobs(choice, request.top_logprobs),
        _prompt_logprobs(choice, request),
    )


def same_model(asked: str, served: str) -> bool:
    """Whether a server that was asked for one name may answer under the other.

    Vendor, case and a version count as nothing where only one of the two names them: `gpt-4o` and `gpt-4o-2024-08-06`
    are the same, `gpt-4o` and `gpt-4o-mini` are not, nor are two versions.
    """
    (stem, version), (other, another) = _stem(asked), _stem(served)
    return stem == other and (version == another or not version or not another)


def _stem(name: str) -> tuple[str, str]:
    """A name without vendor and version, and the version; `latest` says as little as none."""
    name = name.lower().rsplit("/", 1)[-1]
    version = ""
    while found := _VERSION.search(name):
        name = name[: found.start()]
        version = ("" if found[0][1:] in ("latest", "preview") else found[0]) + version
    return name, version


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        said = json.loads(raw.decode("utf-8"))
        json.dumps(said, ensure_ascii=False).encode(
            "utf-8"
        )  # an escaped half of a surrogate pair passes the first line
    except UnicodeError:
        raise BadAnswer("not_utf8", "the answer is not UTF-8") from None
    except (ValueError, RecursionError):
        raise BadAnswer("not_json", f"the answer is not JSON ({len(raw)} bytes)") from None
    if not isinstance(said, dict):
        raise BadAnswer("no_choices", "the answer is JSON, but no object")
    if said.get("error"):
        raise BadAnswer("server_error", f"an error in place of an answer: {error_of(raw)['message'][:200]}")
    return said


def _first_choice(said: Mapping[str, Any]) -> dict[str, Any]:
    choices = said.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise BadAnswer("no_choices", "the answer has no choices")
    return choices[0]


def _texts(choice: Mapping[str, Any]) -> tuple[str, str]:
    """Reasoning, and what was said. A reasoning field is believed; without one, <think> tags are looked for."""
    message = choice.get("message")
    if not isinstance(message, dict):
        return _split_thinking(_plain(choice.get("text")))
    text = _plain(message.get("content"))
    if not text and message.get("refusal"):
        raise BadAnswer("refused", f"the model refuses: {str(message['refusal'])[:200]}")
    for field in ("reasoning_content", "reasoning"):
        if reasoning := _plain(message.get(field)):
            return reasoning.strip(), text.strip()
    return _split_thinking(text)


def _plain(content: object) -> str:
    """A text; some servers give it in parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def _split_thinking(text: str) -> tuple[str, str]:
    """Reasoning and answer; a template may have opened the tag already, and max_tokens may have left it open."""
    opened = text.lstrip().startswith(_OPEN)
    before, closed, after = text.partition(_CLOSE)
    if closed and (opened or _OPEN not in before):
        return before.lstrip().removeprefix(_OPEN).strip(), after.strip()
    return (text.lstrip().removeprefix(_OPEN).strip(), "") if opened else ("", text)


def _checked(text: str, request: Request) -> str:
    """The text, or the choice in it. Raises BadAnswer where it is not what was asked for."""
    if request.choices:
        return _choice_in(text, request.choices)
    if request.schema is not None and not _fits(text, json.dumps(request.schema, sort_keys=True)):
        raise BadAnswer("not_the_schema", f"not JSON of the schema: {text[:80]!r}")
    return text


def _choice_in(text: str, choices: tuple[str, ...]) -> str:
    said: object = text.strip()
    if said not in choices:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        said = found.get("label") if isinstance(found, dict) else found
    if not isinstance(said, str) or said not in choices:
        raise BadAnswer("not_a_choice", f"none of the {len(choices)} choices: {text[:80]!r}")
    return said


def _fits(text: str, schema: str) -> bool:
    try:
        return bool(_validator(schema).is_valid(json.loads(text)))
    except (ValueError, RecursionError):
        return False


@lru_cache(maxsize=32)
def _validator(schema: str) -> Any:
    from jsonschema.validators import validator_for

    parsed = json.loads(schema)
    return validator_for(parsed)(parsed)


def read_usage(said: object) -> Usage | None:
    """What an answer says that it took; None where it does not say, or says what no answer takes.

    Some leave reasoning out of completion_tokens: the output is max(completion_tokens, total_tokens - prompt_tokens).
    """
    if not isinstance(said, dict):
        return None
    given, written, total = (_count(said.get(f"{name}_tokens")) for name in ("prompt", "completion", "total"))
    rest = (total or 0) - (given or 0)
    if not given or (written is None and rest <= 0):
        return None
    output, prompt = said.get("completion_tokens_details"), said.get("prompt_tokens_details")
    return Usage(
        given,
        max(written or 0, rest),
        (_count(output.get("reasoning_tokens")) or 0) if isinstance(output, dict) else 0,
        (_count(prompt.get("cached_tokens")) or 0) if isinstance(prompt, dict) else 0,
    )


def _count(said: object) -> int | None:
    return said if isinstance(said, int) and not isinstance(said, bool) and 0 <= said <= _MOST_TOKENS else None


def _top_logprobs(choice: Mapping[str, Any], count: int) -> tuple[tuple[tuple[str, float], ...], ...]:
    """A position of the answer: its likeliest tokens. Raises BadAnswer where they were asked for and are not there."""
    if not count:
        return ()
    if choice.get("logprobs") is None:
        raise Unserved("no_logprobs", "log-probabilities were asked for, and are not there")
    try:
        listed = choice["logprobs"]
        if "content" in listed:
            tops = [
                [(each["token"], each["logprob"]) for each in position["top_logprobs"]]
                for position in listed["content"]
            ]
        else:
            tops = [list((position or {}).items()) for position in listed["top_logprobs"]]
        found = tuple(tuple((str(token), float(value)) for token, value in top[:count]) for top in tops)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadAnswer("no_logprobs", "log-probabilities were asked for, and cannot be read") from None
    if not found or any(math.isnan(value) or value > 1e-3 for top in found for _, value in top):
        raise BadAnswer("no_logprobs", "log-probabilities were asked for, and what is there are none")
    return found


def _prompt_logprobs(choice: Mapping[str, Any], request: Request) -> tuple[tuple[tuple[int, float], ...], ...]:
    """A position of the prompt: its likeliest tokens, the most probable first. Raises BadAnswer unless all is there.

    vLLM lists the tokens that were asked for and, where it is none of them, the one that stands in the prompt.
    """
    ids, count = request.prompt_ids or (), request.prompt_logprobs
    if not count:
        return ()
    listed = choice.get("prompt_logprobs")
    if listed is None:
        raise Unserved("no_prompt_logprobs", "log-probabilities of the prompt were asked for, and are not there")
    if not isinstance(listed, list) or len(listed) != len(ids) or listed[0] is not None:
        raise BadAnswer("not_the_prompt", f"not one list of log-probabilities for each of the {len(ids)} tokens")
    return ((), *(_likeliest(tops, token, count) for tops, token in zip(listed[1:], ids[1:], strict=True)))


def _likeliest(tops: object, token: int, count: int) -> tuple[tuple[int, float], ...]:
    """What is listed at the place of `token`, which must be among it: else the lists belong to other places."""
    if not isinstance(tops, dict) or str(token) not in tops:
        raise BadAnswer("not_the_prompt", f"the token {token} of the prompt is not listed at its place")
    try:
        pairs = [(int(name), float(each["logprob"])) for name, each in tops.items()]
    except (KeyError, TypeError, ValueError):
        raise BadAnswer("not_the_prompt", "what is listed for a token of the prompt has no log-probabilities") from None
    best = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:count]
    mass = sum(math.exp(min(value, 1.0)) for _, value in best)
    odd = any(math.isnan(value) or number < 0 for number, value in pairs) or len(dict(pairs)) < len(pairs)
    if odd or len(best) < count or not 0.0 < mass <= 1.0 + _SURPLUS:
        raise BadAnswer("not_the_prompt", f"{len(best)} of {count} tokens with a probability of {mass:.4g} are listed")
    return tuple(best)
