"""Rows of a ledger that say which attempts a provider works on, in which batch.

Refuses to have a request asked while a batch has it that was not collected. Before a batch is sent it stands here under
a name of our own, by which the provider is asked for it when its reply was lost.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence

__all__ = ["explain_pending", "find_batch", "name_batch", "nameless", "nonce_of", "owner_of", "record_batch"]

_NAMELESS = "nameless/"


def nameless(owner: str, nonce: str) -> str:
    """The name of a batch of `owner` until the provider's is known; `nonce` goes to the provider with it."""
    return f"{_NAMELESS}{owner}/{nonce}"


def owner_of(batch: str) -> str:
    """Who sends a batch whose name is not known yet; empty where it is."""
    return batch.split("/")[1] if batch.startswith(_NAMELESS) else ""


def nonce_of(batch: str) -> str:
    """What the provider was given with a batch whose name is not known yet."""
    return batch.rpartition("/")[2]


def explain_pending(batch: str) -> str:
    """Why a request in a batch is not asked, and what to do: one line."""
    return (
        f"teacher.batch: requests of this run are in batch {batch}, which was paid and is not collected. Run its "
        "recipe with teacher.batch: true, which waits for it; then this command continues."
    )


def find_batch(db: sqlite3.Connection, key: bytes) -> str:
    """The batch that has the request, and was not collected; empty for none."""
    query = (
        "SELECT b.id FROM attempts a JOIN batch_items i ON i.attempt = a.number JOIN batches b ON b.id = i.batch "
        "WHERE a.key = ? AND a.ended_at IS NULL AND NOT b.collected LIMIT 1"
    )
    row = db.execute(query, (key,)).fetchone()
    return str(row[0]) if row else ""


def record_batch(db: sqlite3.Connection, batch: tuple[str, str], attempts: Sequence[int]) -> None:
    """`batch` is its name and its run."""
    db.execute("INSERT INTO batches VALUES (?, ?, ?, 0)", (*batch, time.time()))
    db.executemany("INSERT INTO batch_items VALUES (?, ?)", ((attempt, batch[0]) for attempt in attempts))


def name_batch(db: sqlite3.Connection, before: str, batch: str) -> None:
    """The provider calls it `batch`."""
    db.execute("UPDATE batches SET id = ? WHERE id = ?", (batch, before))
    db.execute("UPDATE batch_items SET batch = ? WHERE batch = ?", (batch, before))
