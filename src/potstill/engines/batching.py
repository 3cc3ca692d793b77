"""Asking through a provider's batch API: half the price, hours later, the same ledger and budget.

A batch is in the ledger before it is sent, so that a later run finds it, waits for it and collects it. Refuses to ask
an unusable answer of a batch again: it is quarantined at once. Refuses to send another batch when the answers of one
show that all others will be of no use, or that no budget can be kept.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

from potstill.engines.asking import Call, Job, Terms, explain_excess, explain_unserved, unread
from potstill.engines.batches import (
    MOST_BYTES,
    MOST_REQUESTS,
    BatchState,
    Item,
    LostReply,
    collect,
    create,
    find,
    poll,
    split,
    upload,
)
from potstill.engines.completions import BadAnswer, Unserved
from potstill.engines.ledger import Claim, Ledger, Outcome, Spend
from potstill.engines.ledger_batches import explain_pending, nameless, nonce_of, owner_of
from potstill.engines.openai import Endpoint
from potstill.engines.replies import Allowance, Reply, judge
from potstill.engines.spent import said_in, spend_of
from potstill.errors import TeacherError
from potstill.types import Request

__all__ = ["BatchAsker"]

_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
_LIMIT_WAIT_S, _LONGEST_LIMIT_WAIT_S = 60.0, 900.0
_LOOKS_S = (0.0, 2.0, 5.0)
"""Waits before each look for a batch whose reply was lost: a list may be late."""
_GROUP = 500
"""Rows of the ledger that one commit changes."""
_MISSING = (None, "reserved")
_QUEUE_IS_FULL = re.compile(r"enqueued.{0,40}limit|token_limit_exceeded", re.IGNORECASE)


class BatchAsker:
    """Asks one endpoint in batches for the answers that are missing."""

    def __init__(self, endpoint: Endpoint, ledger: Ledger, terms: Terms) -> None:
        """Each request is in `terms.attempts` batches at most."""
        self._endpoint, self._ledger, self._terms = endpoint, ledger, terms
        self._tried: Counter[bytes] = Counter()
        self._claimed: dict[str, tuple[Job, int]] = {}
        self._sent: dict[bytes, Request] = {}
        self._held: list[Claim] = []
        self._is_short, self._failure = False, ""
        self._most, self._limit_wait_s = MOST_REQUESTS, 0.0

    async def ask(self, jobs: Callable[[], Iterable[Job]], call: Call) -> None:
        """Waits for batches of earlier runs, then asks what is missing. `jobs` gives all jobs anew each time.

        Raises TeacherError where answers show that to go on is of no use, when they are in the ledger.
        """
        watcher = asyncio.create_task(call.watch())
        try:
            await self._adopt_all(call)
            self._recall(jobs())
            await self._collect_all(call)
            missing: Iterator[Job | None] = unread(self._ledger, jobs(), call)
            while not call.ended.is_set():
                if not await self._submit_all(missing, call) and not await self._may_wait(call):
                    break
                await self._collect_all(call)
                missing = self._still_missing(jobs())
            self._count(jobs(), call)
        finally:
            watcher.cancel()
        if call.failure is not None:
            raise call.failure

    async def _may_wait(self, call: Call) -> bool:
        """Nothing could be sent: whether that may change by itself."""
        if self._is_short:
            call.end("budget")
            return False
        own = self._ledger.open_batches(self._terms.run)
        for claim in self._held:
            if claim.batch and claim.batch not in own:
                raise TeacherError(explain_pending(claim.batch))
        await call.pause(_FIRST_WAIT_S if self._held else 0.0)
        return bool(self._held)

    async def _submit_all(self, jobs: Iterator[Job | None], call: Call) -> bool:
        """Sends what the budget holds; whether that was anything."""
        self._held, self._is_short, has_sent = [], False, False
        try:
            while not call.ended.is_set() and await self._claim_some(jobs, call):
                items = [(name, job.body) for name, (job, _) in self._claimed.items()]
                for part in split(items):
                    if not call.ended.is_set():
                        await self._submit(part, call)
                        has_sent = True
            # Of the rest the answers that are there are read.
            while self._is_short and not call.ended.is_set() and list(islice(jobs, _GROUP)):
                await asyncio.sleep(0)
        finally:
            unsent = [attempt for _, attempt in self._claimed.values()]
            self._claimed.clear()
            self._release(unsent, "not_sent", call)
        return has_sent

    async def _claim_some(self, jobs: Iterator[Job | None], call: Call) -> bool:
        """Sets aside what one batch holds, at most; whether that is anything."""
        size = 0
        while not (call.ended.is_set() or self._is_short or size >= MOST_BYTES):
            some = list(islice(jobs, min(_GROUP, self._most - len(self._claimed))))
            if not some:
                break
            wanted = [job for job in some if job is not None]
            futures = [self._ledger.claim(job.asked, job.worst, self._terms.budget) for job in wanted]
            await asyncio.sleep(0)
            claims = await asyncio.gather(*map(asyncio.wrap_future, futures))
            for job, claim in zip(wanted, claims, strict=True):
                self._note(job, claim, call)
                size += len(job.asked.body)
        return bool(self._claimed)

    def _note(self, job: Job, claim: Claim, call: Call) -> None:
        if claim.verdict == "send":
            self._claimed[job.asked.key.hex()] = (job, claim.attempt)
        elif claim.verdict == "known":
            call.read(job)
        elif claim.verdict == "budget":
            # What the batches that are on their way leave over is asked in the next round.
            self._is_short = True
        elif len(self._held) < _GROUP:
            self._held.append(claim)

    async def _submit(self, part: Sequence[Item], call: Call) -> None:
        """Sends one batch, which the ledger knows before it is started."""
        file = await upload(self._endpoint, part)
        attempts = [self._claimed[name][1] for name, _ in part]
        nonce = uuid.uuid4().hex
        before = nameless(self._ledger.owner, nonce)
        self._ledger.record_batch(before, self._terms.run, attempts)
        for name, _ in part:
            job = self._claimed.pop(name)[0]
            self._tried[job.asked.key] += 1
            self._sent[job.asked.key] = job.request
        try:
            batch = await create(self._endpoint, file, nonce)
        except LostReply:
            if not await self._adopt(before, attempts, call):
                raise
        except TeacherError:
            self._release(attempts, "refused", call)
            self._ledger.finish_batch(before)
            raise
        else:
            self._ledger.name_batch(before, batch)

    async def _adopt_all(self, call: Call) -> None:
        """Batches whose name nobody noted: the reply was lost, or whoever sent them ended."""
        for batch, attempts in self._ledger.open_batches(self._terms.run).items():
            owner = owner_of(batch)
            if owner and not self._ledger.is_elsewhere(owner):
                await self._adopt(batch, list(attempts.values()), call)

    async def _adopt(self, before: str, attempts: Sequence[int], call: Call) -> bool:
        """Whether the provider has a batch that was sent; where it has none nobody knows what it cost."""
        for wait_s in _LOOKS_S:
            await call.pause(wait_s)
            batch = await find(self._endpoint, nonce_of(before))
            if batch is not None:
                self._ledger.name_batch(before, batch)
                return True
        worst = [(attempt, Outcome("reserved", self._ledger.set_aside(attempt), "lost")) for attempt in attempts]
        self._settle(worst, call)
        self._ledger.finish_batch(before)
        return False

    def _recall(self, jobs: Iterable[Job]) -> None:
        """What was asked in batches of earlier runs: without it their answers could not be judged."""
        waiting = {key for attempts in self._ledger.open_batches(self._terms.run).values() for key in attempts}
        if waiting:
            self._sent.update((job.asked.key, job.request) for job in jobs if job.asked.key in waiting)

    def _still_missing(self, jobs: Iterable[Job]) -> Iterator[Job | None]:
        """Those that may be sent once more; None for every other, so that the loop may breathe."""
        seen: set[bytes] = set()
        for job in jobs:
            key = job.asked.key
            is_over = key in seen or self._tried[key] >= self._terms.attempts
            seen.add(key)
            yield None if is_over or self._ledger.states([key]).get(key) not in _MISSING else job

    async def _collect_all(self, call: Call) -> None:
        """Waits for all batches of the run, and settles what they bring; earlier where somebody says stop."""
        waiting = {
            batch: attempts
            for batch, attempts in self._ledger.open_batches(self._terms.run).items()
            if not owner_of(batch)
        }
        limited = []
        for batch, attempts in waiting.items():
            state = await self._wait(batch, call)
            if state is not None and await self._collect(batch, state, attempts, call):
                if state.status == "failed" and not self._failure:
                    self._check_failure(batch, state)
                    limited.append(attempts)
            elif call.ended.is_set():
                break
        if self._failure:
            call.fail(TeacherError(self._failure))
        elif not call.ended.is_set():
            await self._wait_for_room(limited, len(waiting), call)

    async def _wait(self, batch: str, call: Call) -> BatchState | None:
        """What the batch came to; None where somebody says stop before, or it would keep a failure from being told."""
        wait_s = _FIRST_WAIT_S
        while not (state := await poll(self._endpoint, batch)).done:
            if self._failure:
                return None
            await call.pause(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            if call.ended.is_set():
                return None
        return state

    async def _collect(self, batch: str, state: BatchState, attempts: Mapping[bytes, int], call: Call) -> bool:
        """Settles what a batch brought; whether all of it."""
        left = {key.hex(): attempt for key, attempt in attempts.items()}
        group: list[tuple[int, Outcome]] = []
        async for name, status, raw in collect(self._endpoint, batch):
            attempt = left.pop(name, None)
            if attempt is not None:
                group.append((attempt, self._outcome(name, attempt, status, raw)))
            if len(group) == _GROUP:
                self._settle(group, call)
                group = []
                await asyncio.sleep(0)
                if call.ended.is_set():
                    return False
        self._settle(group, call)
        # Providers bill what they answered, and nothing of what a batch never came to.
        self._release(list(left.values()), state.status, call)
        self._ledger.finish_batch(batch)
        return True

    def _check_failure(self, batch: str, state: BatchState) -> None:
        """Raises TeacherError where a batch would fail again."""
        if not _QUEUE_IS_FULL.search(state.problem):
            raise TeacherError(
                f"teacher.batch: {self._endpoint.base_url} failed batch {batch} ({state.problem or 'without a reason'})"
                ". Nothing of it was asked: mend what it says, or set teacher.batch: false."
            )

    async def _wait_for_room(self, limited: Sequence[Mapping[bytes, int]], batches: int, call: Call) -> None:
        """Providers limit what may wait in all batches: later there is room again, but not for a batch that is larger
        than the limit.
        """
        if not limited:
            self._limit_wait_s = 0.0
            return
        for attempts in limited:
            self._tried.subtract({key: 1 for key in attempts if self._tried[key]})
        if len(limited) == batches:
            self._most = max(1, max(map(len, limited)) // 2)
        self._limit_wait_s = min(max(2 * self._limit_wait_s, _LIMIT_WAIT_S), _LONGEST_LIMIT_WAIT_S)
        await call.pause(self._limit_wait_s)

    def _settle(self, group: Sequence[tuple[int, Outcome]], call: Call) -> None:
        """One commit for many."""
        futures = [self._ledger.settle(attempt, outcome) for attempt, outcome in group]
        for future, (_, outcome) in zip(futures, group, strict=True):
            future.result()
            call.count.spend(outcome.spent)

    def _release(self, attempts: Sequence[int], reason: str, call: Call) -> None:
        """These attempts cost nothing, and may be made again."""
        self._settle([(attempt, Outcome("reserved", self._nothing(), reason)) for attempt in attempts], call)

    def _outcome(self, name: str, attempt: int, status: int, raw: bytes) -> Outcome:
        if status == 200:
            model, usage = said_in(raw)
            worst = self._ledger.set_aside(attempt)
            spent = spend_of(usage, self._terms.price) if usage else worst
            unserved = self._unserved(name, raw)
            why = explain_unserved(self._endpoint, unserved, raw) if unserved else ""
            excess = explain_excess(self._endpoint, self._terms.budget, worst, spent)
            self._failure = self._failure or why or excess
            # The next run asks again what an endpoint did not serve: by then it may be mended.
            return Outcome("given_up" if unserved else "answered", spent, unserved, raw, model, usage)
        problem = f"http_{status}" if status else "connection"
        verdict = judge(Reply(status, raw, Allowance(), problem, 0.0))
        return Outcome("given_up" if verdict == "give_up" else "reserved", self._nothing(), problem)

    def _unserved(self, name: str, raw: bytes) -> str:
        """The reason where an answer is another model's or lacks what was asked for, as all others will; else empty.

        Empty, too, for a request of an earlier run that is none of this one's.
        """
        request = self._sent.pop(bytes.fromhex(name), None)
        try:
            if request is not None:
                self._endpoint.parse(raw, request)
        except BadAnswer as error:
            return error.reason if isinstance(error, Unserved) else ""
        return ""

    def _nothing(self) -> Spend:
        return Spend(0, 0, None if self._terms.price is None else 0)

    def _count(self, jobs: Iterable[Job], call: Call) -> None:
        """How the requests ended that were sent in this call."""
        for job in jobs:
            key = job.asked.key
            if key in self._tried:
                del self._tried[key]
                call.conclude(job, self._ledger.read(key))
