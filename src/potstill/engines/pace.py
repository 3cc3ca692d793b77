"""When the next request may be sent: limits that the user sets, and those that the server shows by refusing.

Refuses to spend a limit at once: requests leave evenly. Times are seconds of the event loop, rates are of a second.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from potstill.engines.replies import Load
from potstill.errors import TeacherError

__all__ = ["Breaker", "Pace"]

_FIRST_WINDOW = 8.0
_SHORTEST_PAUSE_S, _FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 0.5, 60.0
_BURST_S = 1.0
_FEW = 10
_GUESS_S = 0.25
_TICK_S = 0.001  # timers know nothing shorter
_MOST_IN_A_ROW, _LAST, _MOST_SHARE = 20, 50, 0.5


class Breaker:
    """Opens when 20 requests in a row, or more than half of the last 50, were given up after their retries."""

    def __init__(self) -> None:
        self._last: deque[str] = deque(maxlen=_LAST)
        self._in_a_row = 0

    def record(self, reason: str) -> None:
        """How a request ended: empty for an answer, else a word for why there is none."""
        self._last.append(reason)
        self._in_a_row = self._in_a_row + 1 if reason else 0

    def check(self) -> None:
        """Raises TeacherError with the count and the reasons where it is open."""
        failed = Counter(reason for reason in self._last if reason)
        is_mostly_bad = len(self._last) == _LAST and failed.total() > _MOST_SHARE * _LAST
        if self._in_a_row < _MOST_IN_A_ROW and not is_mostly_bad:
            return
        listing = ", ".join(f"{reason} {count}" for reason, count in failed.most_common(5))
        key = "teacher.model" if failed.most_common(1)[0][0] == "wrong_model" else "teacher.base_url"
        raise TeacherError(
            f"{key}: the endpoint fails: of the last {len(self._last)} requests {failed.total()} were given up "
            f"({listing}). Look into these; the same command continues with what is missing."
        )


class Flow:
    """A token bucket of `rate` a second that holds `burst_s` seconds' worth, `least` at least, and at first one."""

    def __init__(self, rate: float, burst_s: float = _BURST_S, least: float = 1.0) -> None:
        self.rate, self._burst_s, self._least = rate, burst_s, least
        self._level, self._then = 1.0, -1.0

    def wait_s(self, amount: float, now: float) -> float:
        """How long until `amount` may pass; one that is larger than the bucket passes when that is full."""
        if self._then >= 0.0:
            self._level = min(self._most(), self._level + self.rate * max(0.0, now - self._then))
        self._then = now
        return max(0.0, min(amount, self._most()) - self._level) / self.rate

    def take(self, amount: float) -> None:
        """Let it pass; the bucket may owe for it."""
        self._level -= amount

    def _most(self) -> float:
        return max(self._least, self.rate * self._burst_s)


class LearnedRate:
    """How many requests a second the server takes, learned from when it refuses.

    Between two refusals the rate follows W (1 + 0.05 ((t - K) / K)^3), which is 0.95 W at first, stays near W for long
    and then looks for more (Ha, Rhee and Xu, 2008, CUBIC). K doubles while the limit is found where it was before.
    """

    _STEP, _LEAST = 0.05, 0.02

    def __init__(self) -> None:
        self._flow: Flow | None = None
        self._peak, self._plateau_s = 0.0, 1.0
        self._since, self._accepted = -1.0, 0
        self._refused_at: float | None = None
        self._is_guess = False
        self._times: deque[float] = deque(maxlen=10_000)

    def accept(self, now: float) -> None:
        """A request was served."""
        self._accepted += 1
        self._times.append(now)

    def refuse(self, now: float) -> None:
        """The server has had enough; what it takes is worked out when asking goes on."""
        self._refused_at = now

    def pause_s(self) -> float:
        """How long to send nothing after a refusal: as long as some requests take, where their rate is known."""
        return max(_SHORTEST_PAUSE_S, min(_FIRST_PAUSE_S, _FEW / self._peak)) if self._peak else _FIRST_PAUSE_S

    def wait_s(self, now: float) -> float:
        """How long until another request may be sent."""
        if self._since < 0.0:
            self._since = now
        if self._refused_at is not None:
            self._learn(self._refused_at, now)
        if self._flow is None:
            return 0.0
        self._flow.rate = self._rate(now)
        return self._flow.wait_s(1.0, now)

    def take(self) -> None:
        """A request is sent."""
        if self._flow is not None:
            self._flow.take(1.0)

    def _rate(self, now: float) -> float:
        return self._peak * (1.0 + self._STEP * ((now - self._since) / self._plateau_s - 1.0) ** 3)

    def _learn(self, refused_at: float, now: float) -> None:
        peak = max(self._LEAST, self._estimate(refused_at, now))
        is_known = 0.9 * self._peak <= peak <= 1.1 * self._peak
        self._is_guess = self._flow is None and self._accepted < _FEW
        self._peak = peak
        moment_s = self._moment_s()
        known_s = min(20.0 * moment_s, 2.0 * self._plateau_s)
        self._plateau_s = _GUESS_S if self._is_guess else known_s if is_known else moment_s
        self._since, self._accepted, self._refused_at = now, 0, None
        self._flow = Flow(self._rate(now), burst_s=0.1, least=2.0)

    def _estimate(self, refused_at: float, now: float) -> float:
        """What the server takes, a second."""
        moment_s = self._moment_s()
        if self._is_guess:  # it rose fast: what was taken a second ago tells too little
            moment_s *= 0.5
        if self._flow is not None and refused_at - self._since > moment_s:
            lately = sum(when > refused_at - moment_s for when in self._times) / moment_s
            return max(min(lately, 0.98 * self._rate(refused_at)), 0.85 * self._peak)
        # What a server lets through in a moment is its burst; the pause afterwards pays for that. But the pause may
        # have been longer than it need be: what was known before does not fall by more than a part.
        return max(max(1, self._accepted) / max(now - self._since, 1e-3), 0.85 * self._peak)

    def _moment_s(self) -> float:
        """The shortest time that says something about a rate: that of some requests, and a second at least."""
        return max(1.0, _FEW / self._peak) if self._peak else 1.0


class Pace:
    """Gives turns to send. The window of open requests grows by one a round trip, and shrinks when the server refuses.

    Until the first refusal it doubles every round trip. Replies to requests that were sent before the last shrinking
    shrink it no more: one round trip, one decrease.
    """

    def __init__(
        self,
        *,
        concurrency: int,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
    ) -> None:
        """`concurrency` is the widest window."""
        self.breaker = Breaker()
        self._concurrency, self._window = concurrency, min(float(concurrency), _FIRST_WINDOW)
        self._requests = None if requests_per_minute is None else Flow(requests_per_minute / 60.0)
        self._tokens = None if tokens_per_minute is None else Flow(tokens_per_minute / 60.0)
        self._learned = LearnedRate()
        self._queue, self._changed = asyncio.Lock(), asyncio.Event()
        self._open, self._turn, self._cut_turn = 0, 0, -1
        # Every refusal in a row doubles the pause: it is so many times as long as the first.
        self._resume_at, self._pauses = 0.0, 1.0
        self._has_overloaded = self._is_closed = False

    @property
    def window(self) -> int:
        """How many requests may be open now."""
        return max(1, int(self._window))

    @asynccontextmanager
    async def slot(self, tokens: int) -> AsyncIterator[int]:
        """Wait for a turn to send a request of `tokens` tokens, input and output; gives the turn's number.

        First come, first served. Raises TeacherError where the breaker is open.
        """
        async with self._queue:
            turn = await self._admit(tokens)
        try:
            yield turn
        finally:
            self._open -= 1
            self._changed.set()

    def report(self, load: Load, retry_after_s: float | None = None, *, turn: int | None = None) -> None:
        """What an attempt came to, told before its turn ends; `retry_after_s` stops everyone for so long."""
        now = asyncio.get_running_loop().time()
        if load == "ok":
            self._learned.accept(now)
            self._pauses = 1.0
            self._window = min(self._concurrency, self._window + (1.0 / self._window if self._has_overloaded else 1.0))
        elif load in ("limited", "overload"):
            self._slow_down(load, now, turn)
            if retry_after_s is not None:
                self._resume_at = max(self._resume_at, now + retry_after_s)
        self._changed.set()

    def refund(self, requests: float, tokens: float) -> None:
        """So much of what a turn took of the user's limits was not used."""
        for flow, amount in ((self._requests, requests), (self._tokens, tokens)):
            if flow is not None:
                flow.take(-amount)
        self._changed.set()

    def close(self) -> None:
        """Nobody waits any more: whoever waits gets a turn at once, and is to send nothing."""
        self._is_closed = True
        self._changed.set()

    def _slow_down(self, load: Load, now: float, turn: int | None) -> None:
        if turn is not None and turn <= self._cut_turn:
            return
        self._has_overloaded, self._cut_turn = True, self._turn
        # 429 speaks of requests a second first, which the learned rate answers; 503 of those that are open.
        self._window = max(1.0, self._window * (0.85 if load == "limited" else 0.5))
        if load == "limited":
            self._learned.refuse(now)
            pause_s = min(self._pauses * self._learned.pause_s(), _LONGEST_PAUSE_S)
            self._resume_at = max(self._resume_at, now + pause_s)
            self._pauses = min(2.0 * self._pauses, _LONGEST_PAUSE_S / _SHORTEST_PAUSE_S)

    async def _admit(self, tokens: int) -> int:
        while not self._is_closed:
            self.breaker.check()
            self._changed.clear()
            wait_s = self._wait_s(tokens, asyncio.get_running_loop().time())
            if wait_s == 0.0:
                break
            try:
                await asyncio.wait_for(self._changed.wait(), wait_s and max(wait_s, _TICK_S))
            except TimeoutError:
                continue
        self._learned.take()
        for flow, amount in self._flows(tokens):
            flow.take(amount)
        self._open += 1
        self._turn += 1
        return self._turn

    def _wait_s(self, tokens: int, now: float) -> float | None:
        """How long no request may be sent; None until something changes."""
        if now < self._resume_at:
            return self._resume_at - now
        if self._open >= self.window:
            return None
        waits = [flow.wait_s(amount, now) for flow, amount in self._flows(tokens)]
        return max([self._learned.wait_s(now), *waits])

    def _flows(self, tokens: int) -> list[tuple[Flow, float]]:
        flows = ((self._requests, 1.0), (self._tokens, float(tokens)))
        return [(flow, amount) for flow, amount in flows if flow is not None]
