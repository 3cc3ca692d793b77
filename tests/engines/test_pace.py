"""Laws of the pace, in virtual time: a minute of traffic takes a moment."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.engines.pace import Breaker, Flow, LearnedRate, Pace
from potstill.errors import TeacherError


def in_virtual_time(work: Callable[[], Awaitable[Any]]) -> Any:
    """Runs `work` in a loop whose clock jumps to the next timer instead of waiting for it."""
    loop = asyncio.new_event_loop()
    now = [0.0]
    select = loop._selector.select

    def jump(timeout):
        if timeout is None:
            raise AssertionError("nothing will ever happen")
        now[0] += max(timeout, 0.0)
        return select(0)

    loop._selector.select = jump
    loop.time = lambda: now[0]
    try:
        return loop.run_until_complete(asyncio.wait_for(work(), 7200))
    finally:
        loop.close()


@dataclass
class FakeServer:
    """Takes `rate` requests a second (a bucket of `burst`) or `parallel` at once; refuses others at once."""

    rate: float = 1e9
    burst: float = 50.0
    parallel: int = 10**9
    latency_s: float = 0.02
    retry_after_s: float | None = None
    window_s: float = 0.0
    status: str = "limited"
    counts: Counter = field(default_factory=Counter)
    level: float = -1.0
    then: float = -1.0
    active: int = 0

    def admits(self) -> bool:
        now = asyncio.get_running_loop().time()
        if self.window_s:  # a fixed window, filled anew at its beginning
            number = now // self.window_s
            if number != self.then:
                self.then, self.level = number, self.rate * self.window_s
        else:
            self.level = self.burst if self.then < 0 else min(self.burst, self.level + (now - self.then) * self.rate)
            self.then = now
        if self.level < 1 or self.active >= self.parallel:
            return False
        self.level -= 1
        return True

    async def answer(self) -> tuple[str, float | None]:
        if not self.admits():
            await asyncio.sleep(0.002)
            self.counts["refused"] += 1
            return self.status, self.retry_after_s
        self.active += 1
        await asyncio.sleep(self.latency_s)
        self.active -= 1
        self.counts["accepted"] += 1
        return "ok", None


async def drive(pace: Pace, server: FakeServer, seconds: float, workers: int = 64) -> None:
    """Workers that ask until the time is over; one that is refused waits as a retry does."""
    loop, draw = asyncio.get_running_loop(), random.Random(0)
    end = loop.time() + seconds

    async def work():
        while loop.time() < end:
            async with pace.slot(100) as turn:
                if loop.time() >= end:
                    return
                load, retry_after_s = await server.answer()
                pace.report(load, retry_after_s, turn=turn)
            if load != "ok":
                await asyncio.sleep((retry_after_s or 0.0) + draw.random())

    await asyncio.gather(*(work() for _ in range(workers)))


STORMS = {
    "retry-after": (60, FakeServer(rate=50.0, retry_after_s=1.0)),
    "no retry-after": (60, FakeServer(rate=50.0)),
    "no burst": (120, FakeServer(rate=50.0, burst=2.0)),
    "large burst": (60, FakeServer(rate=50.0, burst=200.0, retry_after_s=1.0)),
    "slow answers": (60, FakeServer(rate=50.0, retry_after_s=1.0, latency_s=0.5)),
    "slow server": (900, FakeServer(rate=2.0, burst=2.0, retry_after_s=1.0)),
    "window of a second": (60, FakeServer(rate=50.0, window_s=1.0)),
    "window of ten seconds": (60, FakeServer(rate=50.0, window_s=10.0, retry_after_s=3.0)),
}


@pytest.mark.parametrize("name", STORMS)
def test_nine_tenths_of_a_servers_limit_are_used_and_few_requests_are_wasted(name):
    seconds, server = STORMS[name]
    in_virtual_time(lambda: drive(Pace(concurrency=32), server, seconds, workers=48))
    accepted, refused = server.counts["accepted"], server.counts["refused"]
    assert accepted >= 0.9 * server.rate * seconds
    assert refused <= 0.10 * (accepted + refused)


@pytest.mark.parametrize("status", ["limited", "overload"])
def test_the_window_finds_how_many_a_server_works_on_at_once(status):
    server = FakeServer(parallel=10, burst=1e9, latency_s=0.2, status=status)
    in_virtual_time(lambda: drive(Pace(concurrency=64), server, 60.0))
    accepted, refused = server.counts["accepted"], server.counts["refused"]
    assert accepted >= 0.6 * (10 / 0.2) * 60.0
    assert refused <= 0.10 * (accepted + refused)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.sampled_from([None, 60.0, 600.0]), st.sampled_from([None, 6_000.0, 120_000.0]))
def test_limits_of_the_user_hold_in_every_stretch_of_time(concurrency, requests, tokens):
    times, most = [], [0, 0]

    async def work(pace):
        async with pace.slot(100):
            times.append(asyncio.get_running_loop().time())
            most[0] += 1
            most[1] = max(most)
            await asyncio.sleep(0.1)
            most[0] -= 1

    async def all_of_it():
        pace = Pace(concurrency=concurrency, requests_per_minute=requests, tokens_per_minute=tokens)
        await asyncio.gather(*(work(pace) for _ in range(80)))

    in_virtual_time(all_of_it)
    assert most[1] <= concurrency
    rate = min((requests or 1e9) / 60.0, (tokens or 1e9) / 6_000.0)
    for number, first in enumerate(times):
        for more, last in enumerate(times[number:], start=1):
            assert more <= max(1.0, rate) + rate * (last - first) + 1.001


def test_a_limit_of_the_user_is_used():
    async def all_of_it():
        pace, loop = Pace(concurrency=8, requests_per_minute=600.0), asyncio.get_running_loop()
        for _ in range(101):
            async with pace.slot(1):
                pass
        return loop.time()

    assert in_virtual_time(all_of_it) == pytest.approx(10.0, abs=0.15)


def test_a_request_of_more_tokens_than_the_bucket_holds_passes_and_is_paid_for():
    async def both():
        pace, loop = Pace(concurrency=8, tokens_per_minute=600.0), asyncio.get_running_loop()
        times = []
        for tokens in (200, 1):
            async with pace.slot(tokens):
                times.append(loop.time())
        return times

    first, second = in_virtual_time(both)
    assert first == pytest.approx(0.9, abs=0.05)  # until the bucket is full
    assert second == pytest.approx(20.0, abs=0.05)


def test_retry_after_stops_everyone():
    async def both():
        pace, loop = Pace(concurrency=8), asyncio.get_running_loop()
        async with pace.slot(1) as turn:
            pace.report("limited", 30.0, turn=turn)
        async with pace.slot(1):
            return loop.time()

    assert in_virtual_time(both) == pytest.approx(30.0, abs=0.05)


@pytest.mark.parametrize(("load", "share"), [("limited", 0.85), ("overload", 0.5)])
def test_a_round_trip_shrinks_the_window_once(load, share):
    async def all_at_once():
        pace = Pace(concurrency=64)
        for _ in range(56):
            async with pace.slot(1) as turn:
                pace.report("ok", turn=turn)
        before = pace.window

        async def work():
            async with pace.slot(1) as turn:
                await asyncio.sleep(0.1)
                pace.report(load, turn=turn)

        await asyncio.gather(*(work() for _ in range(before)))
        return before, pace.window

    before, after = in_virtual_time(all_at_once)
    assert (before, after) == (64, int(share * 64))


def test_whoever_is_cancelled_gives_the_turn_back():
    async def cancelled():
        pace = Pace(concurrency=1)

        async def hold():
            async with pace.slot(1):
                await asyncio.sleep(1e6)

        holder, waiter = asyncio.create_task(hold()), asyncio.create_task(hold())
        await asyncio.sleep(1)
        waiter.cancel()
        await asyncio.sleep(1)
        holder.cancel()
        async with pace.slot(1):
            return True

    assert in_virtual_time(cancelled)


def test_nobody_waits_once_it_is_closed():
    async def closed():
        pace, loop = Pace(concurrency=1, requests_per_minute=1.0), asyncio.get_running_loop()
        async with pace.slot(1) as turn:
            pace.report("limited", 3000.0, turn=turn)

        async def wait():
            async with pace.slot(1):
                return loop.time()

        waiters = [asyncio.create_task(wait()) for _ in range(5)]
        await asyncio.sleep(1)
        pace.close()
        return await asyncio.gather(*waiters)

    assert in_virtual_time(closed) == pytest.approx([1.0] * 5, abs=0.05)


def test_twenty_in_a_row_open_the_breaker_with_their_reasons():
    breaker = Breaker()
    for _ in range(30):
        breaker.record("")
    for number in range(20):
        breaker.check()
        breaker.record("http_500" if number else "timeout")
    with pytest.raises(TeacherError, match=r"^teacher\.base_url: .* 20 were given up \(http_500 19, timeout 1\)"):
        breaker.check()


@given(st.lists(st.booleans(), max_size=200))
def test_the_breaker_opens_by_its_two_rules_only(failures):
    breaker = Breaker()
    for failed in failures:
        breaker.record("empty" if failed else "")
    last, tail = failures[-50:], failures[-20:]
    is_open = (len(tail) == 20 and all(tail)) or (len(last) == 50 and sum(last) > 25)
    try:
        breaker.check()
        assert not is_open
    except TeacherError:
        assert is_open


def test_an_open_breaker_ends_the_waiting():
    async def ask():
        pace = Pace(concurrency=1)
        for _ in range(20):
            pace.breaker.record("wrong_model")
        async with pace.slot(1):
            raise AssertionError("a turn was given")

    with pytest.raises(TeacherError, match=r"^teacher\.model"):
        in_virtual_time(ask)


@given(st.floats(0.1, 1e3), st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 5)), max_size=30))
def test_a_flow_lets_no_more_through_than_its_rate_and_a_second(rate, steps):
    flow, now, taken = Flow(rate), 0.0, 0.0
    for pause, amount in steps:
        now += pause
        now += flow.wait_s(amount, now)
        flow.wait_s(amount, now)
        flow.take(amount)
        taken += amount
        assert taken <= max(1.0, rate) + rate * now + 5.0 + 1e-6


def test_after_a_refusal_nothing_is_sent_for_as_long_as_some_requests_take():
    learned = LearnedRate()
    assert learned.pause_s() == 0.5
    for number in range(200):
        learned.accept(number / 100.0)
    learned.wait_s(0.0)
    learned.refuse(2.0)
    learned.wait_s(2.5)
    assert 0.1 <= learned.pause_s() < 0.2
    for number in range(4):
        learned.refuse(2.5 + 30.0 * number)
        learned.wait_s(30.0 * (number + 1))
    assert learned.pause_s() < 0.5
