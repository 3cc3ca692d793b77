"""Asking through a provider's batch API: half the price, hours later, the same ledger and budget.

The name of a batch is in the ledger before anything else is done, so that a later run goes on waiting for it. Refuses
to ask an unusable answer of a batch again: it is quarantined at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from potstill.engines.asking import Call, Job, Terms, unread
from potstill.engines.batches import collect, poll, split, submit
from potstill.engines.ledger import Ledger, Outcome, Spend
from potstill.engines.openai import Endpoint
from potstill.engines.replies import Allowance, Reply, judge
from potstill.engines.spent import said_in, spend_of
from potstill.errors import TeacherError

__all__ = ["BatchAsker"]

_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
_MISSING = (None, "reserved")


class BatchAsker:
    """Asks one endpoint in batches for the answers that are missing."""

    def __init__(self, endpoint: Endpoint, ledger: Ledger, terms: Terms) -> None:
        """Rounds of batches are sent until nothing is missing, `terms.attempts` at most."""
        self._endpoint, self._ledger, self._terms = endpoint, ledger, terms
        self._sent: set[bytes] = set()

    async def ask(self, jobs: Callable[[], Iterable[Job]], call: Call) -> None:
        """Waits for batches of earlier runs, then asks what is missing. `jobs` gives all jobs anew each time."""
        watcher = asyncio.create_task(call.watch())
        try:
            await self._collect_all(call)
            missing: Iterator[Job] = (job for job in unread(self._ledger, jobs(), call) if job is not None)
            for _ in range(self._terms.attempts):
                if call.ended.is_set() or not await self._submit_all(missing, call):
                    break
                await self._collect_all(call)
                missing = self._still_missing(jobs())
            self._count(jobs(), call)
        finally:
            watcher.cancel()

    async def _submit_all(self, jobs: Iterator[Job], call: Call) -> bool:
        """Sends what the budget holds; whether that was anything."""
        attempts: dict[str, int] = {}
        has_sent = False
        for part in split(self._claimed(jobs, attempts, call)):
            try:
                batch = await submit(self._endpoint, part)
            except TeacherError:
                for name, _ in part:
                    self._settle(attempts[name], Outcome("reserved", self._nothing(), "refused"), call)
                raise
            self._ledger.record_batch(batch, self._terms.run, [attempts.pop(name) for name, _ in part])
            self._sent.update(bytes.fromhex(name) for name, _ in part)
            has_sent = True
        return has_sent

    def _claimed(
        self, jobs: Iterator[Job], attempts: dict[str, int], call: Call
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        is_first = True
        for job in jobs:
            claim = self._ledger.claim(job.asked, job.worst, self._terms.budget).result()
            if claim.verdict == "budget":
                # What the batches that are on their way leave over is asked in the next round.
                if is_first:
                    call.end("budget")
                return
            if claim.verdict == "send":
                is_first = False
                name = job.asked.key.hex()
                attempts[name] = claim.attempt
                yield name, job.body

    def _still_missing(self, jobs: Iterable[Job]) -> Iterator[Job]:
        seen: set[bytes] = set()
        for job in jobs:
            key = job.asked.key
            if key not in seen and self._ledger.states([key]).get(key) in _MISSING:
                seen.add(key)
                yield job

    async def _collect_all(self, call: Call) -> None:
        """Waits for all batches of the run, and settles what they bring; earlier where somebody says stop."""
        for batch, attempts in self._ledger.open_batches(self._terms.run).items():
            wait_s = _FIRST_WAIT_S
            while not (state := await poll(self._endpoint, batch)).done:
                await call.pause(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
                if call.ended.is_set():
                    return
            left = dict(attempts)
            async for name, status, raw in collect(self._endpoint, batch):
                attempt = left.pop(bytes.fromhex(name), None)
                if attempt is not None:
                    self._settle(attempt, self._outcome(attempt, status, raw), call)
            for attempt in left.values():
                # Providers bill what they answered, and nothing of what a batch never came to.
                self._settle(attempt, Outcome("reserved", self._nothing(), state.status), call)
            self._ledger.finish_batch(batch)

    def _settle(self, attempt: int, outcome: Outcome, call: Call) -> None:
        self._ledger.settle(attempt, outcome).result()
        call.count.spend(outcome.spent)

    def _outcome(self, attempt: int, status: int, raw: bytes) -> Outcome:
        if status == 200:
            model, usage = said_in(raw)
            spent = spend_of(usage, self._terms.price) if usage else self._ledger.set_aside(attempt)
            return Outcome("answered", spent, raw=raw, served=model, usage=usage)
        problem = f"http_{status}" if status else "connection"
        verdict = judge(Reply(status, raw, Allowance(), problem, 0.0))
        return Outcome("given_up" if verdict == "give_up" else "reserved", self._nothing(), problem)

    def _nothing(self) -> Spend:
        return Spend(0, 0, None if self._terms.price is None else 0)

    def _count(self, jobs: Iterable[Job], call: Call) -> None:
        """How the requests ended that were sent in this call."""
        for job in jobs:
            key = job.asked.key
            if key in self._sent:
                self._sent.discard(key)
                call.conclude(job, self._ledger.read(key))
