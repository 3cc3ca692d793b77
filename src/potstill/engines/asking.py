"""The loop that asks: many requests at once, each attempt set aside in the ledger before it is sent, retried by rule.

Refuses to send what the ledger has an answer to, and to send anything once the budget or the user says stop.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from potstill.engines.completions import BadAnswer, Unserved
from potstill.engines.ledger import Asked, Budget, Ledger, Outcome, Record, Spend, State, request_key
from potstill.engines.ledger_batches import explain_pending
from potstill.engines.openai import Endpoint
from potstill.engines.pace import Pace
from potstill.engines.prices import Price, is_private, most_tokens
from potstill.engines.replies import Reply, Verdict, delay_s, judge, load_of
from potstill.engines.spent import said_in, spent_on
from potstill.engines.tally import TallyCounter
from potstill.errors import PotstillError, TeacherError
from potstill.types import Request

__all__ = [
    "BUSY_S",
    "KNOWN",
    "Asker",
    "Attempt",
    "Call",
    "Job",
    "Stopping",
    "Terms",
    "ended_by",
    "explain_excess",
    "explain_unserved",
    "job_of",
    "unread",
]

KNOWN = ("answered", "quarantined")
"""States of requests that are never sent again."""
_PASSING = frozenset({"not_json", "not_utf8", "no_choices", "server_error", "empty", "unfinished"})
"""What is wrong with answers that may come out right when they are asked again; all else would be paid again."""
_FAILED = frozenset({"server_error", "unfinished"})
"""Of these: what a server says of itself. There is no answer that could be read another time."""
_LOOK_S = 0.05
"""How often it is looked whether somebody asked to stop."""
BUSY_S = 0.2
"""How often it is looked whether another process has its answer."""


class Stopping(Protocol):
    """Whether somebody asked to stop."""

    def asked(self) -> bool:
        """Whether so."""
        ...


@dataclass(frozen=True, slots=True)
class Terms:
    """Under which run's name is asked, at what price (None: unknown), within which budget, how often at most."""

    run: str
    price: Price | None
    budget: Budget
    attempts: int


@dataclass(frozen=True, slots=True)
class Job:
    """A request as it is sent (`body`) and kept (`asked`), with the most that an attempt can cost."""

    request: Request
    body: dict[str, Any]
    asked: Asked
    worst: Spend


def job_of(endpoint: Endpoint, request: Request, terms: Terms) -> Job:
    """The request as this endpoint takes it. Raises ValueError where it does not fit the endpoint's api."""
    body = endpoint.body(request)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    api = "chat" if "messages" in body else "completion"
    url = _without_secrets(endpoint.base_url)
    key = request_key(endpoint.model, api, text, request.sample, place=_place(url))
    asked = Asked(key, text, endpoint.model, url, terms.run, user=request.user, sample=request.sample)
    given, read = request.prompt_ids, json.dumps(body, ensure_ascii=False)
    tokens_in = most_tokens(read, len(request.messages or ())) if given is None else len(given)
    picousd = None if terms.price is None else terms.price.worst(tokens_in, request.max_tokens)
    return Job(request, body, asked, Spend(tokens_in, request.max_tokens, picousd))


def unread(ledger: Ledger, jobs: Iterable[Job], call: Call) -> Iterator[Job | None]:
    """Those jobs that the ledger has no answer to, once each; None for every other, so that the loop may breathe."""
    seen: set[bytes] = set()
    for job in jobs:
        key = job.asked.key
        ledger.note_user(job.asked)
        if key in seen:
            call.repeat()
            yield None
        elif (state := ledger.states([key]).get(key)) in KNOWN:
            call.read(job)
            yield None
        elif state is not None and call.revive(job):
            yield None
        else:
            yield job
        seen.add(key)


def explain_unserved(endpoint: Endpoint, reason: str, raw: bytes) -> str:
    """Why no request can succeed, by the reason of an `Unserved`: the answer is another's, or lacks what was asked."""
    url = endpoint.base_url
    if reason == "wrong_model":
        return (
            f"teacher.model: {url} answers as {said_in(raw)[0][:100]!r}, and {endpoint.model!r} was asked for. Set "
            "teacher.model to the name that answers if that is the model you want, or ask an endpoint that serves "
            "yours."
        )
    if reason == "no_logprobs":
        return (
            f"teacher.base_url: {url} answers without logprobs, the log-probabilities of what it writes. Ask an "
            "endpoint that gives them, such as vLLM, or for labels only: teacher.signal: label."
        )
    return (
        f"teacher.base_url: {url} answers without prompt_logprobs, the log-probabilities of "
        "given text, which vLLM adds to the protocol. Serve the model with vLLM, or have it write: add generate."
    )


def explain_excess(endpoint: Endpoint, budget: Budget, worst: Spend, spent: Spend) -> str:
    """Why a budget cannot be kept: an attempt took more than the `worst` case that was set aside. Empty where not so,
    or where neither tokens nor dollars are limited.
    """
    if _total(spent) <= _total(worst) or (budget.tokens is None and budget.usd is None):
        return ""
    return (
        f"teacher.budget: {endpoint.base_url} took {_total(spent):,} tokens for a request that may take "
        f"{_total(worst):,}, {worst.output_tokens:,} of them in the answer: it does not keep to max_tokens, so no "
        "budget can be kept. Raise max_tokens to what the model writes, or ask another endpoint."
    )


def ended_by(error: BadAnswer) -> State:
    """What a request comes to whose last answer is bad: put aside for good, or to be asked again by the next run."""
    return "given_up" if error.reason in _FAILED or isinstance(error, Unserved) else "quarantined"


class Asker:
    """Asks one endpoint for the answers that are missing."""

    def __init__(self, endpoint: Endpoint, ledger: Ledger, terms: Terms, pace: Pace) -> None:
        """`pace` says when a request may be sent."""
        self.endpoint, self.ledger, self.terms, self.pace = endpoint, ledger, terms, pace

    async def ask(self, jobs: Iterator[Job | None], window: int, call: Call) -> None:
        """Asks every job, `window` of them at a time, and returns when all attempts are in the ledger.

        Raises TeacherError where the endpoint refuses or fails too often, StoreError where the ledger does.
        """
        watchers = [asyncio.create_task(watch) for watch in (call.watch(), self._close_pace(call))]
        workers = [asyncio.create_task(self._work(jobs, call)) for _ in range(window)]
        try:
            await asyncio.gather(*workers)
        finally:
            for task in (*watchers, *workers):
                task.cancel()
        if call.failure is not None:
            raise call.failure

    async def _close_pace(self, call: Call) -> None:
        """Whoever waits for a turn when the call ends needs none any more."""
        await call.ended.wait()
        self.pace.close()

    async def _work(self, jobs: Iterator[Job | None], call: Call) -> None:
        try:
            for job in jobs:
                if job is None:
                    await asyncio.sleep(0)
                else:
                    await self._answer(job, call)
                if call.ended.is_set():
                    return
        except PotstillError as error:
            call.fail(error)

    async def _answer(self, job: Job, call: Call) -> None:
        """Attempts until there is an answer, or none is to be had."""
        for attempt in range(1, self.terms.attempts + 1):
            reply = await self._send(job, call)
            if reply is None:
                return
            number, answer = reply
            if await self._take(job, call, Attempt(number, answer, attempt == self.terms.attempts)):
                return
            await call.pause(delay_s(attempt, answer, random.random))
            if call.ended.is_set():
                return

    async def _send(self, job: Job, call: Call) -> tuple[int, Reply] | None:
        """One attempt, within budget; None where none is to be made (any more)."""
        is_alone, tokens = False, job.worst.input_tokens + job.worst.output_tokens
        while not call.ended.is_set():
            async with self.pace.slot(tokens) as turn:
                if call.ended.is_set():
                    return None
                claim = await asyncio.wrap_future(self.ledger.claim(job.asked, job.worst, self.terms.budget))
                if claim.verdict == "send":
                    call.open += 1
                    reply = await self.endpoint.send(job.body)
                    self.pace.report(load_of(reply), reply.headers.retry_after_s, turn=turn)
                    return claim.attempt, reply
            self.pace.refund(1, tokens)
            if claim.verdict == "known":
                call.read(job)
                return None
            if claim.batch:
                raise TeacherError(explain_pending(claim.batch))
            if claim.verdict == "busy":
                await call.pause(BUSY_S)
            elif call.open:
                await call.settled()
            elif is_alone:
                call.end("budget")
            else:
                # What has just been settled may have made room: look once more before stopping for good.
                is_alone = True
        return None

    async def _take(self, job: Job, call: Call, attempt: Attempt) -> bool:
        """Puts what an attempt brought into the ledger; whether the request has ended."""
        outcome, verdict = self._judge(job, attempt)
        await asyncio.wrap_future(self.ledger.settle(attempt.number, outcome))
        call.close(outcome)
        left = _total(job.worst) - _total(outcome.spent)
        self.pace.refund(0, max(0, left))
        has_ended = outcome.state != "reserved" and verdict != "stop"
        if verdict == "stop":
            reply, endpoint = attempt.reply, self.endpoint
            refused = endpoint.refusal(reply) if reply.problem else ""
            call.fail(TeacherError(refused or explain_unserved(endpoint, outcome.reason, reply.raw)))
        elif has_ended:
            call.count_ended(outcome)
            self.pace.breaker.record(outcome.reason)
        else:
            call.count.retried[outcome.reason] += 1
        if excess := explain_excess(self.endpoint, self.terms.budget, job.worst, outcome.spent):
            call.fail(TeacherError(excess))
        return has_ended or verdict == "stop"

    def _judge(self, job: Job, attempt: Attempt) -> tuple[Outcome, Verdict]:
        reply, verdict = attempt.reply, judge(attempt.reply)
        spent = spent_on(reply, job.worst, self.terms.price)
        if verdict != "answer":
            is_over = verdict == "give_up" or (verdict == "retry" and attempt.is_last)
            return Outcome("given_up" if is_over else "reserved", spent, reply.problem or verdict), verdict
        try:
            answer = self.endpoint.parse(reply.raw, job.request)
        except BadAnswer as error:
            is_over = attempt.is_last or error.reason not in _PASSING
            state: State = ended_by(error) if is_over else "reserved"
            bad = Outcome(state, spent, error.reason, raw=reply.raw)
            return bad, "stop" if isinstance(error, Unserved) else verdict
        return Outcome("answered", spent, raw=reply.raw, served=answer.model, usage=answer.usage), verdict


@dataclass(frozen=True, slots=True)
class Attempt:
    """An attempt that has come to something: its number in the ledger, and whether no other may follow."""

    number: int
    reply: Reply
    is_last: bool


class Call:
    """One `ask` while it lasts: how many attempts are open, whether it is to end, and why."""

    def __init__(
        self,
        count: TallyCounter,
        reread: Callable[[Job], Outcome],
        stopping: Stopping | None,
        advance: Callable[[int], None],
    ) -> None:
        """`reread` reads an answer that is there; `advance` is told of every request that has ended."""
        self.count, self.open = count, 0
        self.ended = asyncio.Event()
        self.failure: PotstillError | None = None
        self._reread, self._stopping, self._advance = reread, stopping, advance
        self._changed = asyncio.Event()

    def read(self, job: Job) -> None:
        """The ledger has the answer to a request already."""
        outcome = self._reread(job)
        if outcome.state == "answered":
            self.count.answered_before += 1
            self.count.served[outcome.served] += 1
            self._advance(1)
        else:
            self.count_ended(outcome)

    def revive(self, job: Job) -> bool:
        """Whether an answer that could not be used, and was to be asked for again, can be read by today's rules."""
        is_good = self._reread(job).state == "answered"
        if is_good:
            self.read(job)
        return is_good

    def end(self, stopped_by: str) -> None:
        """Nothing more is sent; what is open may still come."""
        if not self.ended.is_set():
            self.count.stopped_by = "budget" if stopped_by == "budget" else "interrupt"
        self._wake()

    def fail(self, error: PotstillError) -> None:
        """Nothing more is sent, and `error` is raised when what is open has come."""
        self.failure = self.failure or error
        self._wake()

    def close(self, outcome: Outcome) -> None:
        """An attempt has ended, and the ledger knows."""
        self.open -= 1
        self.count.spend(outcome.spent)
        self._changed.set()
        self._changed = asyncio.Event()

    def repeat(self) -> None:
        """A request is the same as another of this call."""
        self.count.repeated += 1
        self._advance(1)

    def count_ended(self, outcome: Outcome) -> None:
        """A request has ended."""
        if outcome.state == "answered":
            self.count.answered += 1
            self.count.served[outcome.served] += 1
        else:
            counts = self.count.quarantined if outcome.state == "quarantined" else self.count.given_up
            counts[outcome.reason] += 1
        self._advance(1)

    def conclude(self, job: Job, record: Record | None) -> None:
        """How a request ended that was sent in this call, and settled without being read."""
        if record is None or (record.state == "reserved" and self.ended.is_set()):
            return
        if record.state in KNOWN:
            self.count_ended(self._reread(job))
        else:
            self.count_ended(Outcome("given_up", Spend(), record.reason))

    async def settled(self) -> None:
        """Waits until an attempt has ended."""
        await self._changed.wait()

    async def pause(self, seconds: float) -> None:
        """Waits so long, or until the end."""
        try:
            await asyncio.wait_for(self.ended.wait(), seconds)
        except TimeoutError:
            return

    async def watch(self) -> None:
        """Ends the call when somebody asks to stop."""
        while self._stopping is not None:
            if self._stopping.asked():
                self.end("interrupt")
                return
            await asyncio.sleep(_LOOK_S)

    def _wake(self) -> None:
        self.ended.set()
        self._changed.set()


def _without_secrets(base_url: str) -> str:
    """Some put a password or a key into the address."""
    parts = urlsplit(base_url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _place(url: str) -> str:
    """What of an address tells one teacher from another of the same name: nothing for one that is our own."""
    return "here" if is_private(url) else (urlsplit(url).hostname or "").rstrip(".")


def _total(spend: Spend) -> int:
    return spend.input_tokens + spend.output_tokens
