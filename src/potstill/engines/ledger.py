"""Every request to a teacher as a durable row: what was asked, what came back, what it cost.

A request's worst case is set aside, within the budget, in the same transaction that says who asks it; so the budget
holds for several processes too. What an attempt of a process that is gone has cost nobody knows: it stays counted at
its worst case for ever, and the request may be asked again, which is counted as well. Refuses to forget a payment.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import sqlite3
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]

from potstill.engines.ledger_batches import find_batch, name_batch, record_batch
from potstill.engines.ledger_file import connect, translated, whole
from potstill.errors import StoreError
from potstill.types import Usage

__all__ = ["Asked", "Budget", "Claim", "Ledger", "Outcome", "Record", "Spend", "State", "request_key"]

State = Literal["reserved", "answered", "quarantined", "given_up"]

_GROUP = 1000
"""Changes that one commit makes durable, at most."""
_VARIABLES = 500
_CLOCK_S = 2.0
_OPEN: set[str] = set()
"""Ledgers that this process has open, by owner: of its own rows it knows whether they are still being asked."""


@dataclass(frozen=True, slots=True)
class Spend:
    """Tokens in and out, and 1e-12 US dollars (None: nobody knows the price)."""

    input_tokens: int = 0
    output_tokens: int = 0
    picousd: int | None = 0


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may spend, with all that it spent before; None for no limit. Every attempt counts as a request."""

    usd: float | None = None
    requests: int | None = None
    tokens: int | None = None

    def holds(self, requests: int, tokens: int, picousd: int) -> bool:
        """Whether so much is within it."""
        return (
            (self.requests is None or requests <= self.requests)
            and (self.tokens is None or tokens <= self.tokens)
            and (self.usd is None or picousd <= int(Decimal(repr(self.usd)) * 10**12))
        )


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it is kept. `body` is the JSON that is sent; `key` is from `request_key`."""

    key: bytes
    body: str
    model: str
    base_url: str
    run: str
    user: str = ""
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Claim:
    """Whether a request may be sent, and under which number.

    verdict  `send`; `known`, an answer is there; `busy`, another process is asking it; `budget`, it does not fit
    attempt  number for `settle` if it may be sent, else 0
    batch    that has the request and was not collected, where that is why it is busy
    """

    verdict: Literal["send", "known", "busy", "budget"]
    attempt: int = 0
    batch: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an attempt.

    state   of the request from now on: `reserved` where it is to be tried again
    spent   what the attempt cost; its worst case where nobody knows
    reason  in a word, empty for a good answer
    raw     what came back, as it came
    """

    state: State
    spent: Spend
    reason: str = ""
    raw: bytes | None = None
    served: str = ""
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """What the ledger knows of a request."""

    state: State
    raw: bytes | None
    served: str
    usage: Usage | None
    reason: str
    attempts: int


def request_key(model: str, api: str, body: str, sample: int, *, place: str = "here") -> bytes:
    """16 bytes: blake2b of the canonical JSON of who is asked where, what, and the sample's number. `body` is JSON."""
    asked = [model, api, json.loads(body), sample, place]
    text = json.dumps(asked, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class Ledger:
    """An open ledger. Changes are made durable many at a time: a future resolves when its change has been committed."""

    def __init__(self, path: str | Path) -> None:
        """Opens the file, or makes it. Raises StoreError where it is damaged, or of another schema."""
        self.path = Path(path)
        self.owner = f"{os.getpid()}:{psutil.Process().create_time()}:{uuid.uuid4().hex}"
        self._writer = connect(self.path)
        self._reader = connect(self.path)
        self._reading = threading.Lock()
        self._waiting: queue.SimpleQueue[tuple[Callable[[sqlite3.Connection], Any], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._commit_groups, name="ledger", daemon=True)
        self._thread.start()
        _OPEN.add(self.owner)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Commits what waits, and closes the file. Attempts that are open stay counted at their worst case."""
        if self.owner not in _OPEN:
            return
        _OPEN.discard(self.owner)
        self._waiting.put(None)
        self._thread.join()
        self._writer.close()
        self._reader.close()

    def claim(self, asked: Asked, worst: Spend, budget: Budget) -> Future[Claim]:
        """Sets `worst` aside for one attempt, if it fits with all that `asked.run` has spent and set aside."""
        return self._submit(lambda db: _claim(db, self.owner, (asked, worst, budget)))

    def settle(self, attempt: int, outcome: Outcome) -> Future[None]:
        """The attempt has ended: what it cost takes the place of its worst case."""
        return self._submit(lambda db: _settle(db, attempt, outcome))

    def amend(self, key: bytes, state: State, reason: str = "") -> Future[None]:
        """Another reading of an answer that is there has found it good, or not."""
        return self._submit(lambda db: _amend(db, key, state, reason))

    def price_unpriced(self, run: str, cost: Callable[[int, int], int]) -> None:
        """Prices what `run` spent while nobody knew the price; `cost` takes tokens in and out, gives 1e-12 dollars."""
        self._submit(lambda db: _price_unpriced(db, run, cost)).result()

    def note_user(self, asked: Asked) -> None:
        """A request is asked for `asked.user` too, whoever asked it first: forgetting that user forgets it."""
        if asked.user:
            self._submit(lambda db: _note_user(db, asked))

    def record_use(self, keys: Iterable[bytes], run_folder: str | Path, stage: str) -> None:
        """A data set or student in `run_folder` was made of these answers."""
        rows = [(key, str(run_folder), stage) for key in keys]
        self._submit(lambda db: db.executemany("INSERT OR IGNORE INTO uses VALUES (?, ?, ?)", rows)).result()

    def record_batch(self, batch: str, run: str, attempts: Sequence[int]) -> None:
        """The provider works on these attempts, under that name."""
        self._submit(lambda db: record_batch(db, (batch, run), attempts)).result()

    def name_batch(self, before: str, batch: str) -> None:
        """The provider has told how it calls a batch."""
        self._submit(lambda db: name_batch(db, before, batch)).result()

    def is_elsewhere(self, owner: str) -> bool:
        """Whether `owner` is another that is still there."""
        return owner != self.owner and _is_alive(owner)

    def finish_batch(self, batch: str) -> None:
        """All that a batch brought is settled."""
        self._submit(lambda db: db.execute("UPDATE batches SET collected = 1 WHERE id = ?", (batch,))).result()

    def open_batches(self, run: str) -> Mapping[str, Mapping[bytes, int]]:
        """Batches of `run` that are not collected: for each the attempts that are open, by key."""
        found: dict[str, dict[bytes, int]] = {}
        query = (
            "SELECT b.id, a.key, a.number FROM batches b LEFT JOIN batch_items i ON i.batch = b.id "
            "LEFT JOIN attempts a ON a.number = i.attempt AND a.ended_at IS NULL AND a.key IS NOT NULL "
            "WHERE b.run = ? AND NOT b.collected ORDER BY b.created_at"
        )
        for batch, key, number in self._rows(query, (run,)):
            found.setdefault(batch, {}).update({key: number} if key is not None else {})
        return found

    def set_aside(self, attempt: int) -> Spend:
        """The worst case of an attempt that is open, or what it has cost."""
        query = "SELECT input_tokens, output_tokens, picousd FROM attempts WHERE number = ?"
        return Spend(*self._rows(query, (attempt,))[0])

    def flush(self) -> None:
        """Returns when all that was asked for before is durable."""
        self._submit(lambda _db: None).result()

    def states(self, keys: Sequence[bytes]) -> dict[bytes, State]:
        """States of those of `keys` that were ever asked."""
        found: dict[bytes, State] = {}
        for start in range(0, len(keys), _VARIABLES):
            some = keys[start : start + _VARIABLES]
            query = f"SELECT key, state FROM requests WHERE key IN ({','.join('?' * len(some))})"
            found.update(self._rows(query, some))
        return found

    def read(self, key: bytes) -> Record | None:
        """What is known of a request; None where it was never asked, or was forgotten."""
        query = "SELECT state, raw, served, usage, reason, attempts FROM requests WHERE key = ?"
        for state, raw, served, usage, reason, attempts in self._rows(query, (key,)):
            content = None if raw is None else _unpack(self.path, raw)
            return Record(state, content, served or "", Usage(**json.loads(usage)) if usage else None, reason, attempts)
        return None

    def spent(self, run: str) -> tuple[int, int, int]:
        """Requests, tokens and 1e-12 dollars of `run`, worst cases of open attempts included."""
        query = "SELECT requests, tokens, picousd FROM spending WHERE run = ?"
        requests, tokens, picousd = next(iter(self._rows(query, (run,))), (0, 0, 0))
        return requests, tokens, picousd

    def _rows(self, query: str, values: Sequence[Any]) -> list[Any]:
        with self._reading, translated(self.path):
            return self._reader.execute(query, values).fetchall()

    def _submit(self, change: Callable[[sqlite3.Connection], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        if self.owner not in _OPEN:
            future.set_exception(StoreError(f"teacher.ledger: {self.path} was closed. Open it again."))
            return future
        self._waiting.put((change, future))
        return future

    def _commit_groups(self) -> None:
        """The thread's work. While one group is being synced to the disk, the next one gathers."""
        ended = False
        while not ended:
            group = [self._waiting.get()]
            with contextlib.suppress(queue.Empty):
                while group[-1] is not None and len(group) < _GROUP:
                    group.append(self._waiting.get_nowait())
            ended = group[-1] is None
            self._commit([entry for entry in group if entry is not None])

    def _commit(self, group: Sequence[tuple[Callable[[sqlite3.Connection], Any], Future[Any]]]) -> None:
        waiting = [future for _, future in group if future.set_running_or_notify_cancel()]

        def tell(_kind: object, error: BaseException | None, _trace: object) -> bool:
            for future in waiting if error is not None else ():
                future.set_exception(error)
            return True

        with contextlib.ExitStack() as stack:
            stack.push(tell)  # whatever it is: a thread that dies silently lets all others wait for ever
            with translated(self.path), self._writer:
                self._writer.execute("BEGIN IMMEDIATE")
                results = {future: change(self._writer) for change, future in group}
            for future in waiting:
                future.set_result(results[future])


def _claim(db: sqlite3.Connection, owner: str, wanted: tuple[Asked, Spend, Budget]) -> Claim:
    asked, worst, budget = wanted
    row = db.execute("SELECT state, owner FROM requests WHERE key = ?", (asked.key,)).fetchone()
    if row and row[0] in ("answered", "quarantined"):
        return Claim("known")
    if row and (batch := find_batch(db, asked.key)):
        return Claim("busy", batch=batch)
    if row and row[1] not in (None, owner) and _is_alive(row[1]):
        return Claim("busy")
    if not _set_aside(db, asked.run, worst, budget):
        return Claim("budget")
    now = time.time()
    _note_user(db, asked)
    db.execute(
        "INSERT INTO requests (key, body, model, base_url, run, user, sample, state, owner, attempts, created_at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, 'reserved', ?, 1, ?) ON CONFLICT (key) DO UPDATE SET run = excluded.run, "
        "base_url = excluded.base_url, state = 'reserved', owner = excluded.owner, attempts = attempts + 1",
        (asked.key, asked.body, asked.model, asked.base_url, asked.run, whole(asked.user), asked.sample, owner, now),
    )
    cursor = db.execute(
        "INSERT INTO attempts (key, run, model, started_at, input_tokens, output_tokens, picousd) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (asked.key, asked.run, asked.model, now, worst.input_tokens, worst.output_tokens, worst.picousd),
    )
    return Claim("send", cursor.lastrowid or 0)


def _note_user(db: sqlite3.Connection, asked: Asked) -> None:
    if asked.user:
        db.execute("INSERT OR IGNORE INTO users VALUES (?, ?)", (asked.key, whole(asked.user)))


def _set_aside(db: sqlite3.Connection, run: str, worst: Spend, budget: Budget) -> bool:
    row = db.execute("SELECT requests, tokens, picousd FROM spending WHERE run = ?", (run,)).fetchone()
    requests, tokens, picousd = row or (0, 0, 0)
    total = requests + 1, tokens + worst.input_tokens + worst.output_tokens, picousd + (worst.picousd or 0)
    if not budget.holds(*total):
        return False
    db.execute("INSERT OR REPLACE INTO spending VALUES (?, ?, ?, ?)", (run, *total))
    return True


def _settle(db: sqlite3.Connection, attempt: int, outcome: Outcome) -> None:
    query = "SELECT key, run, input_tokens + output_tokens, picousd FROM attempts WHERE number = ? AND ended_at IS NULL"
    row = db.execute(query, (attempt,)).fetchone()
    if row is None:  # settled before: a batch may bring the same answer twice
        return
    key, run, tokens, picousd = row
    now, spent = time.time(), outcome.spent
    db.execute(
        "UPDATE attempts SET ended_at = ?, input_tokens = ?, output_tokens = ?, picousd = ?, outcome = ? "
        "WHERE number = ?",
        (now, spent.input_tokens, spent.output_tokens, spent.picousd, outcome.reason or outcome.state, attempt),
    )
    db.execute(
        "UPDATE spending SET tokens = tokens + ?, picousd = picousd + ? WHERE run = ?",
        (spent.input_tokens + spent.output_tokens - tokens, (spent.picousd or 0) - (picousd or 0), run),
    )
    raw = None if outcome.raw is None else zlib.compress(outcome.raw, 1)
    usage = json.dumps(asdict(outcome.usage)) if outcome.usage else None
    db.execute(
        "UPDATE requests SET state = ?, owner = NULL, reason = ?, raw = coalesce(?, raw), served = ?, usage = ?, "
        "answered_at = coalesce(?, answered_at) WHERE key = ? AND state IN ('reserved', 'given_up')",
        (outcome.state, outcome.reason, raw, whole(outcome.served), usage, now if raw else None, key),
    )


def _amend(db: sqlite3.Connection, key: bytes, state: State, reason: str) -> None:
    query = "UPDATE requests SET state = ?, reason = ? WHERE key = ? AND raw IS NOT NULL"
    db.execute(query, (state, reason, key))


def _price_unpriced(db: sqlite3.Connection, run: str, cost: Callable[[int, int], int]) -> None:
    query = "SELECT number, input_tokens, output_tokens FROM attempts WHERE run = ? AND picousd IS NULL"
    costs = [(cost(tokens_in, tokens_out), number) for number, tokens_in, tokens_out in db.execute(query, (run,))]
    db.executemany("UPDATE attempts SET picousd = ? WHERE number = ?", costs)
    total = sum(picousd for picousd, _ in costs)
    db.execute("UPDATE spending SET picousd = picousd + ? WHERE run = ?", (total, run))


def _is_alive(owner: str) -> bool:
    """Whether the process that has an attempt open, on this machine, is still there and has not closed the ledger."""
    pid, born, _ = owner.split(":")
    if owner in _OPEN:
        return True
    try:
        there = psutil.Process(int(pid))
        # A clock that is set right moves the time at which processes are said to have begun.
        is_same = abs(there.create_time() - float(born)) < _CLOCK_S
        return bool(is_same and there.pid != os.getpid() and there.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _unpack(path: Path, raw: bytes) -> bytes:
    try:
        return zlib.decompress(raw)
    except zlib.error as error:
        raise StoreError(
            f"teacher.ledger: {path} has an answer that is damaged ({error}). Restore a copy of the file, or forget "
            "that request."
        ) from error
