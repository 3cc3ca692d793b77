"""Teachers that write, behind an API: what is asked stays in a ledger, and is asked and paid once.

Refuses to ask before it is known that the endpoint serves the model, what that costs, and that the budget holds it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from potstill.engines.answers import Answers
from potstill.engines.asking import KNOWN, Asker, Call, Job, Stopping, Terms, ended_by, job_of, unread
from potstill.engines.batching import BatchAsker
from potstill.engines.ledger import Ledger, Outcome, Spend
from potstill.engines.openai import BadAnswer, Endpoint
from potstill.engines.pace import Pace
from potstill.engines.prices import check_price
from potstill.engines.tally import Tally, TallyCounter
from potstill.errors import BudgetError, Interrupted
from potstill.types import Completion, Request

__all__ = ["ApiAuthor"]


class ApiAuthor:
    """A model behind an endpoint as an `Author`. `tally` says what the last `ask` came to.

    Every attempt counts against the budget, and is set aside at its worst case before it is sent. Where the budget is
    used up midway the rest stays unanswered, which is no error: see `Tally.stopped_by`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        ledger: Ledger,
        terms: Terms,
        *,
        concurrency: int = 32,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        batch: bool = False,
        stopping: Stopping | None = None,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`batch`: through the provider's batch API; `advance` is told of requests that have ended.

        Where `stopping` says so, nothing more is sent, what is open is waited for, and Interrupted is raised.
        """
        self.tally = Tally()
        self._endpoint, self._ledger, self._terms = endpoint, ledger, terms
        self._pace = partial(
            Pace,
            concurrency=concurrency,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
        )
        self._concurrency, self._is_batch = concurrency, batch
        self._stopping, self._advance = stopping, advance

    def ask(self, requests: Sequence[Request]) -> Sequence[Completion | None]:
        """The answers in order, read from the ledger when indexed; None where there is none.

        Raises TeacherError where the endpoint cannot be used, BudgetError where the price is unknown but limited or the
        budget too small for one request, StoreError, Interrupted; ValueError for a request that the api does not take.
        """
        count = TallyCounter(len(requests))
        call = Call(count, self._reread, self._stopping, self._advance)
        try:
            _complete(self._ask(requests, call), call)
        except KeyboardInterrupt:
            count.stopped_by = "interrupt"
            raise Interrupted("stopped; what was answered is kept, and the same command continues.") from None
        finally:
            self._ledger.flush()
            self.tally = count.tally()
        if count.stopped_by == "interrupt":
            raise Interrupted("stopped; what was answered is kept, and the same command continues.")
        return Answers(requests, self._find, self._endpoint.parse).as_sequence()

    def key_of(self, request: Request) -> bytes:
        """The ledger's key of what is sent for this request and its sample."""
        return self._job(request).asked.key

    def note_use(self, requests: Iterable[Request], run_folder: str | Path, stage: str) -> None:
        """Keep in the ledger that this stage of this run reads the answers, so that forgetting one can name it."""
        self._ledger.record_use(map(self.key_of, requests), run_folder, stage)

    async def _ask(self, requests: Sequence[Request], call: Call) -> None:
        def jobs() -> Iterator[Job]:
            return (self._job(request) for request in requests)

        first = self._first_missing(jobs())
        if first is not None:
            self._check(first)
            async with self._endpoint:
                await self._endpoint.preflight()
                await self._ask_missing(jobs, call)
            return
        for _ in unread(self._ledger, jobs(), call):
            pass

    async def _ask_missing(self, jobs: Callable[[], Iterator[Job]], call: Call) -> None:
        if self._is_batch:
            await BatchAsker(self._endpoint, self._ledger, self._terms).ask(jobs, call)
            return
        asker = Asker(self._endpoint, self._ledger, self._terms, self._pace())
        # Twice as many as may be open at once: those that wait before another attempt leave room for others.
        await asker.ask(unread(self._ledger, jobs(), call), 2 * self._concurrency, call)

    def _first_missing(self, jobs: Iterator[Job]) -> Job | None:
        states = ((job, self._ledger.states([job.asked.key])) for job in jobs)
        return next((job for job, state in states if state.get(job.asked.key) not in KNOWN), None)

    def _check(self, job: Job) -> None:
        """Raises BudgetError where nothing may be sent at all."""
        terms, worst = self._terms, job.worst
        check_price(terms.price, terms.budget, self._endpoint.model)
        if not terms.budget.holds(1, worst.input_tokens + worst.output_tokens, worst.picousd or 0):
            cost = "" if worst.picousd is None else f", {worst.picousd / 1e12:.6f} USD"
            raise BudgetError(
                f"teacher.budget: too small for one request, which may take up to {worst.input_tokens:,} tokens in and "
                f"{worst.output_tokens:,} out{cost}. Raise it, or lower max_tokens."
            )
        if terms.price is not None:
            self._ledger.price_unpriced(terms.run, terms.price.worst)

    def _job(self, request: Request) -> Job:
        return job_of(self._endpoint, request, self._terms)

    def _find(self, request: Request) -> bytes | None:
        record = self._ledger.read(self._job(request).asked.key)
        return None if record is None else record.raw

    def _reread(self, job: Job) -> Outcome:
        """What an answer that is there comes to as answers are read today; the ledger learns where that has changed."""
        key, nothing = job.asked.key, Spend()
        record = self._ledger.read(key)
        if record is None or record.raw is None:
            return Outcome("given_up", nothing, record.reason if record else "forgotten")
        try:
            answer = self._endpoint.parse(record.raw, job.request)
        except BadAnswer as error:
            state = ended_by(error)
            # What is to be asked again stays so, unless it can be read now.
            outcome = Outcome(state if record.state in KNOWN else record.state, nothing, error.reason)
        else:
            outcome = Outcome("answered", nothing, served=answer.model)
        if outcome.state != record.state:
            self._ledger.amend(key, outcome.state, outcome.reason)
        return outcome


def _complete(work: Coroutine[Any, Any, None], call: Call) -> None:
    """Runs `work` to its end: in this thread, or in another where this one has a loop already, as notebooks do.

    There an interrupt reaches this thread only: it ends the call, and is raised when what is open has come.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    loop = Future[asyncio.AbstractEventLoop]()

    async def begin() -> None:
        loop.set_result(asyncio.get_running_loop())
        await work

    with ThreadPoolExecutor(1) as other:
        running = other.submit(lambda: asyncio.run(begin()))
        try:
            running.result()
        except KeyboardInterrupt:
            with suppress(RuntimeError):  # the loop is closed: all has come
                loop.result().call_soon_threadsafe(call.end, "interrupt")
            running.result()
            raise
