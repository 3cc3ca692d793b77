"""What came back for one request, and what to do next: use it, send again, give it up, or stop the run.

Refuses to read an answer's text: that is `completions`. Times are seconds.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

__all__ = [
    "Allowance",
    "Load",
    "Reply",
    "Verdict",
    "delay_s",
    "error_of",
    "judge",
    "load_of",
    "read_allowance",
    "reason_of",
]

Verdict = Literal["answer", "retry", "give_up", "stop"]
Load = Literal["ok", "limited", "overload", "error"]
"""What an attempt says about how hard the endpoint is asked: `limited` is 429, `overload` 503, 529 and a time-out."""

LONGEST_WAIT_S = 3600.0
"""A server that asks to wait longer stops the run: the same command continues when it is time."""
_FIRST_DELAY_S = 1.0
_LONGEST_DELAY_S = 60.0
_SHOWN = 200
_TRANSIENT = frozenset({408, 409, 423, 425, 429})
_HOPELESS = frozenset({401, 402, 403, 404, 405, 407, 410})
_NO_CREDIT = frozenset(
    {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_balance"}
)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, slots=True)
class Allowance:
    """What the server says about its limits; None where it says nothing.

    retry_after_s     how long to send nothing
    requests_left, requests_reset_s   requests that it still takes, and when it takes as many as ever
    tokens_left, tokens_reset_s       the same of tokens
    """

    retry_after_s: float | None = None
    requests_left: int | None = None
    requests_reset_s: float | None = None
    tokens_left: int | None = None
    tokens_reset_s: float | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What one attempt came to.

    status   of HTTP; 0 where there was none
    raw      the body, or what is known of a broken connection; the key never stands in it
    headers  what the server says about its limits
    problem  empty for an answer; else timeout, connection, too_large, encoded, http_NNN
    seconds  from sending to the last byte
    """

    status: int
    raw: bytes
    headers: Allowance
    problem: str
    seconds: float


def judge(reply: Reply) -> Verdict:
    """What to do: `answer` (read it), `retry`, `give_up` (this request only) or `stop` (no request can succeed)."""
    status = reply.status
    if not reply.problem:
        return "answer"
    if not reply.problem.startswith("http_"):
        return "retry"
    if status == 402 or (status == 429 and _no_credit(reply)):
        return "stop"
    if (reply.headers.retry_after_s or 0.0) > LONGEST_WAIT_S and (status == 429 or status >= 500):
        return "stop"
    if status == 403 and _is_moderation(reply):
        return "give_up"
    if status < 400 or status in _HOPELESS:
        return "stop"
    return "retry" if status >= 500 or status in _TRANSIENT else "give_up"


def load_of(reply: Reply) -> Load:
    """What the reply says about how hard the endpoint is asked. A refusal for another reason is `ok`: it was served."""
    if reply.status == 429:
        return "limited"
    if reply.status in (503, 529) or reply.problem == "timeout":
        return "overload"
    return "error" if reply.status == 0 or reply.status >= 500 else "ok"


def reason_of(reply: Reply) -> str:
    """One line: what went wrong, and the server's own words, shortened; empty for an answer."""
    if not reply.problem:
        return ""
    what = f"HTTP {reply.status}" if reply.problem.startswith("http_") else reply.problem
    words = " ".join(error_of(reply.raw)["message"].split())
    return f"{what}: {words[:_SHOWN]}{'...' if len(words) > _SHOWN else ''}" if words else what


def delay_s(attempt: int, reply: Reply, random: Callable[[], float]) -> float:
    """How long to wait after attempt number `attempt` (1 is the first) before the next, in seconds.

    What the server asks for (Retry-After, else the reset of a limit that is used up) and at most a tenth more; else
    random() * min(60, 2^(attempt - 1)), exponential back-off with full jitter (Brooker, 2015, AWS Architecture Blog).
    `random` is uniform in [0, 1).
    """
    backoff = random() * min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2.0 ** min(attempt - 1, 30))
    asked = _asked_wait(reply.headers)
    return backoff if asked is None else asked + min(backoff, 0.1 * asked + 0.1)


def _asked_wait(said: Allowance) -> float | None:
    if said.retry_after_s is not None:
        return min(said.retry_after_s, LONGEST_WAIT_S)
    pairs = ((said.requests_left, said.requests_reset_s), (said.tokens_left, said.tokens_reset_s))
    waits = [reset for left, reset in pairs if left == 0 and reset is not None]
    return min(max(waits), LONGEST_WAIT_S) if waits else None


def error_of(raw: bytes) -> dict[str, str]:
    """`message`, `code` and `type` of the error in a body, as texts, whatever the body is; empty where it has none."""
    try:
        said = json.loads(raw)
    except (ValueError, RecursionError):
        return {"message": raw[: 4 * _SHOWN].decode("utf-8", "replace"), "code": "", "type": ""}
    error: Any = said.get("error", said) if isinstance(said, dict) else said
    if not isinstance(error, dict):
        return {"message": str(error), "code": "", "type": ""}
    message = error.get("message") or error.get("detail") or json.dumps(error)
    return {"message": str(message), "code": str(error.get("code") or ""), "type": str(error.get("type") or "")}


def _no_credit(reply: Reply) -> bool:
    error = error_of(reply.raw)
    return bool({error["code"], error["type"]} & _NO_CREDIT)


def _is_moderation(reply: Reply) -> bool:
    """Some gateways refuse a text, not the key, with 403."""
    error = error_of(reply.raw)
    words = f"{error['message']} {error['code']} {error['type']}".lower()
    return any(word in words for word in ("moderation", "flagged", "content_policy", "content_filter"))


def read_allowance(headers: Mapping[str, str], now: float | None = None) -> Allowance:
    """What OpenAI, Azure, vLLM, LiteLLM and others put into headers (lower-case names). `now`: seconds of the epoch.

    Durations stand as `6m0s`, seconds, milliseconds, a time of the epoch or a date; nonsense counts as nothing.
    """
    now = time.time() if now is None else now
    milliseconds = _seconds(headers.get("retry-after-ms"), now)
    return Allowance(
        _seconds(headers.get("retry-after"), now) if milliseconds is None else milliseconds / 1000.0,
        _whole(headers.get("x-ratelimit-remaining-requests") or headers.get("x-ratelimit-remaining")),
        _seconds(headers.get("x-ratelimit-reset-requests") or headers.get("x-ratelimit-reset"), now),
        _whole(headers.get("x-ratelimit-remaining-tokens")),
        _seconds(headers.get("x-ratelimit-reset-tokens"), now),
    )


def _whole(said: str | None) -> int | None:
    try:
        number = math.nan if said is None else float(said)
    except ValueError:
        return None
    return max(0, int(number)) if math.isfinite(number) else None


def _seconds(said: str | None, now: float) -> float | None:
    if said is None:
        return None
    parts = _DURATION.findall(said)
    if parts and _DURATION.sub("", said).strip() == "":
        return sum(float(number) * _UNITS_S[unit] for number, unit in parts)
    try:
        number = float(said)
    except ValueError:
        return _until(said, now)
    if not math.isfinite(number):
        return None
    if number > 1e11:  # milliseconds since 1970
        number /= 1000.0
    return max(0.0, number - now if number > 1e9 else number)


def _until(said: str, now: float) -> float | None:
    for read in (parsedate_to_datetime, datetime.fromisoformat):
        try:
            return max(0.0, read(said).timestamp() - now)
        except (ValueError, OverflowError, TypeError, IndexError):
            continue
    return None
