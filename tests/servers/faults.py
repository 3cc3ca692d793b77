"""How the test server misbehaves: which faults there are, when they come, and a limit of requests a second.

Refuses a fault that it does not know.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.servers.answers import Answer

__all__ = ["FAULTS", "Bucket", "Settings", "pick_fault"]

FAULTS = (
    "http_500", "http_502", "http_503", "http_429", "http_429_after", "http_400", "http_401", "http_403", "http_404",
    "no_quota", "hang", "reset", "truncated_json", "no_choices", "wrong_model", "invalid_utf8", "too_large",
    "slow_drip", "empty", "content_filter", "gzip", "error_in_200", "endless_error",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server is to do.

    rate          requests a second that it takes, through a bucket of `burst`; None for all
    retry_after   what a 429 of that limit says; None for nothing
    faults        {fault: share of requests that meet it}; a body that is sent again may be luckier
    schedule      {number of the request, from 0: fault}; or a function of number and body
    key           needed as Bearer; None for an open server
    models        served names; None for a server without /models
    delay_s       before an answer
    parallel      requests that are worked on at once; others get 429 at once; None for all
    """

    rate: float | None = None
    burst: float | None = None
    retry_after: str | None = None
    faults: Mapping[str, float] = field(default_factory=dict)
    schedule: Mapping[int, str] | Callable[[int, dict[str, object]], str | None] = field(default_factory=dict)
    key: str | None = None
    models: tuple[str, ...] | None = ("teacher",)
    delay_s: float = 0.0
    parallel: int | None = None
    answer: Answer | None = None
    log: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        named = {*self.faults, *(self.schedule.values() if isinstance(self.schedule, Mapping) else ())}
        if named - set(FAULTS):
            raise ValueError(f"faults {sorted(named - set(FAULTS))}: needs some of {', '.join(FAULTS)}")


def pick_fault(settings: Settings, number: int, body: dict[str, object]) -> str | None:
    """The fault that the request of this number meets; None for none."""
    if callable(settings.schedule):
        return settings.schedule(number, body)
    if number in settings.schedule:
        return settings.schedule[number]
    draw = random.Random(settings.seed * 1_000_003 + number).random()
    for fault, share in settings.faults.items():
        if draw < share:
            return fault
        draw -= share
    return None


class Bucket:
    """So many requests a second, after a burst of at most `burst`."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate, self._burst, self._level, self._then = rate, burst, burst, now

    def take(self, now: float) -> bool:
        self._level = min(self._burst, self._level + (now - self._then) * self._rate)
        self._then = now
        if self._level < 1.0:
            return False
        self._level -= 1.0
        return True
