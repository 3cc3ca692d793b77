"""What a ledger says in sum, row by row, and on request no more. Refuses to forget what was paid.

A request is forgotten with all that was asked and answered; that an attempt was made, and what it cost, stays.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.engines.ledger_file import connect, translated, whole
from potstill.errors import StoreError

__all__ = ["Account", "Forgotten", "forget_requests", "read_accounts", "read_rows"]

_CHECKPOINT_MS = 2000
"""How long readers of other processes are waited for, so that the log can be emptied."""


@dataclass(frozen=True, slots=True)
class Account:
    """What a run asked of a model, with what is known of these requests now.

    state      reserved | answered | quarantined | given_up, or `forgotten`
    requests   different ones; a forgotten one counts as often as it was sent
    attempts   how often they were sent
    tokens     in and out; worst cases where nobody knows
    usd        None where nobody knows the price of some
    """

    run: str
    model: str
    state: str
    requests: int
    attempts: int
    tokens: int
    usd: float | None


@dataclass(frozen=True, slots=True)
class Forgotten:
    """How many requests were forgotten, and what had been made of them: folders of runs, with stages."""

    requests: int
    affected: tuple[tuple[str, str], ...]


def read_accounts(path: Path) -> list[Account]:
    """Sums a run, model and state. Raises StoreError where there is no ledger, or it is damaged."""
    query = (
        "SELECT a.run, a.model, coalesce(r.state, 'forgotten'), "
        "count(DISTINCT a.key) + sum(a.key IS NULL), count(*), "
        "sum(a.input_tokens + a.output_tokens), sum(a.picousd), sum(a.picousd IS NULL) "
        "FROM attempts a LEFT JOIN requests r ON r.key = a.key GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
    )
    with translated(path), closing(connect(path, create=False)) as db:
        damage = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise sqlite3.DatabaseError(damage)
        rows = db.execute(query).fetchall()
    return [_account(row) for row in rows]


def read_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Every request, in the order in which they were first asked: JSON values. Raises StoreError.

    `answer` is what came back, as text (bytes that are no UTF-8 are replaced); tokens and usd sum over its attempts.
    """
    query = (
        "SELECT r.*, (SELECT json_array(sum(input_tokens + output_tokens), sum(picousd), sum(picousd IS NULL)) "
        "FROM attempts a WHERE a.key = r.key) AS paid FROM requests r ORDER BY r.rowid"
    )
    with translated(path), closing(connect(path, create=False)) as db:
        db.row_factory = sqlite3.Row
        for row in db.execute(query):
            yield _exported(path, row)


def forget_requests(
    path: Path, *, keys: Sequence[bytes] = (), user: str | None = None, unusable: bool = False
) -> Forgotten:
    """Deletes requests by key, or all of a user, or all that are quarantined (`unusable`), to be asked again.

    What was deleted is overwritten, in the write-ahead log too. What was asked for several users is forgotten with the
    first of them.

    Raises StoreError where another process holds the ledger open, so that its log cannot be emptied: end it, and
    forget again.
    """
    with translated(path), closing(connect(path, create=False)) as db:
        with db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("CREATE TEMP TABLE leaving (key BLOB PRIMARY KEY)")
            db.executemany("INSERT OR IGNORE INTO leaving VALUES (?)", ((key,) for key in keys))
            if user:
                theirs = "SELECT key FROM requests WHERE user = ?1 UNION SELECT key FROM users WHERE user = ?1"
                db.execute(f"INSERT OR IGNORE INTO leaving {theirs}", (whole(user),))
            if unusable:
                db.execute("INSERT OR IGNORE INTO leaving SELECT key FROM requests WHERE state = 'quarantined'")
            affected = _delete(db)
        db.execute("VACUUM")
        db.execute(f"PRAGMA busy_timeout = {_CHECKPOINT_MS}")
        is_busy = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    if is_busy:
        raise StoreError(
            f"teacher.ledger: {affected.requests:,} requests are forgotten, but another process has {path} open, and "
            "traces of them may be in its log. End that process, and forget again."
        )
    return affected


def _account(row: tuple[Any, ...]) -> Account:
    run, model, state, requests, attempts, tokens, picousd, unpriced = row
    return Account(run, model, state, requests, attempts, tokens, None if unpriced else picousd / 1e12)


def _delete(db: sqlite3.Connection) -> Forgotten:
    """Deletes what is named in `leaving`."""
    chosen = "key IN (SELECT key FROM leaving)"
    uses = db.execute(f"SELECT DISTINCT run_folder, stage FROM uses WHERE {chosen} ORDER BY 1, 2").fetchall()
    count = db.execute(f"DELETE FROM requests WHERE {chosen}").rowcount
    for table in ("uses", "users"):
        db.execute(f"DELETE FROM {table} WHERE {chosen}")
    db.execute(f"UPDATE attempts SET key = NULL WHERE {chosen}")
    return Forgotten(count, tuple(uses))


def _exported(path: Path, row: sqlite3.Row) -> dict[str, Any]:
    tokens, picousd, unpriced = json.loads(row["paid"])
    try:
        answer = None if row["raw"] is None else zlib.decompress(row["raw"]).decode("utf-8", "replace")
    except zlib.error as error:
        raise StoreError(
            f"teacher.ledger: {path} has a damaged answer, id {row['key'].hex()} ({error}). Forget it, or restore a "
            "copy of the file."
        ) from error
    same = ("run", "model", "served", "base_url", "user", "sample", "state", "attempts")
    return {
        "id": row["key"].hex(),
        **{name: row[name] for name in same},
        "request": json.loads(whole(json.dumps(json.loads(row["body"]), ensure_ascii=False))),
        "answer": answer,
        "usage": None if row["usage"] is None else json.loads(row["usage"]),
        "tokens": tokens,
        "usd": None if unpriced else (picousd or 0) / 1e12,
        "created_at": row["created_at"],
        "answered_at": row["answered_at"],
        "reason": row["reason"],
    }
