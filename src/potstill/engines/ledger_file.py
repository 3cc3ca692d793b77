"""The file in which every request, answer and payment stays: one SQLite database, its schema, and how it is opened.

Refuses to touch a file that is damaged, of another schema, or not a ledger: it is never deleted, nor written over.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from potstill.errors import StoreError

__all__ = ["SCHEMA_VERSION", "connect", "translated", "whole"]

SCHEMA_VERSION = 1
_APPLICATION = 0x706F7473
_BUSY_S = 60.0

_SCHEMA = """
CREATE TABLE requests (
    key BLOB NOT NULL UNIQUE,         -- blake2b-16 of what is asked and the sample's number
    body TEXT NOT NULL,               -- as it is sent, JSON
    model TEXT NOT NULL,              -- as it was asked for
    base_url TEXT NOT NULL,
    run TEXT NOT NULL,                -- that asked last
    user TEXT NOT NULL,
    sample INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('reserved', 'answered', 'quarantined', 'given_up')),
    owner TEXT,                       -- process that has an attempt open
    attempts INTEGER NOT NULL,
    raw BLOB,                         -- answer as it came, zlib
    served TEXT,                      -- model that answered, as it names itself
    usage TEXT,                       -- tokens as the teacher counts them, JSON
    created_at REAL NOT NULL,         -- seconds since 1970
    answered_at REAL,
    reason TEXT NOT NULL DEFAULT ''
);
CREATE INDEX requests_by_user ON requests (user) WHERE user <> '';
CREATE TABLE attempts (
    number INTEGER PRIMARY KEY,
    key BLOB,                         -- null: the request was forgotten, what it cost was not
    run TEXT NOT NULL,
    model TEXT NOT NULL,
    started_at REAL NOT NULL,
    ended_at REAL,                    -- null: open, or its process is gone
    input_tokens INTEGER NOT NULL,    -- the worst case until the attempt has ended
    output_tokens INTEGER NOT NULL,
    picousd INTEGER,                  -- null: nobody knows the price
    outcome TEXT NOT NULL DEFAULT ''
);
CREATE INDEX attempts_by_key ON attempts (key);
CREATE INDEX attempts_by_run ON attempts (run) WHERE picousd IS NULL;
CREATE TABLE spending (run TEXT PRIMARY KEY, requests INTEGER NOT NULL, tokens INTEGER NOT NULL,
    picousd INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE batches (id TEXT PRIMARY KEY, run TEXT NOT NULL, created_at REAL NOT NULL, collected INTEGER NOT NULL)
    WITHOUT ROWID;
CREATE TABLE batch_items (attempt INTEGER PRIMARY KEY, batch TEXT NOT NULL);
CREATE INDEX items_by_batch ON batch_items (batch);
CREATE TABLE uses (key BLOB NOT NULL, run_folder TEXT NOT NULL, stage TEXT NOT NULL,
    PRIMARY KEY (key, run_folder, stage)) WITHOUT ROWID;
"""

_USERS = """
CREATE TABLE IF NOT EXISTS users (key BLOB NOT NULL, user TEXT NOT NULL, PRIMARY KEY (key, user)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS keys_by_user ON users (user)
"""
"""Whose data a request is: it may be asked for several. Ledgers of before know one user a request."""


def connect(path: Path, *, create: bool = True) -> sqlite3.Connection:
    """A connection to the ledger at `path`, made with mode 0600 where it is not there and `create`.

    WAL, synchronous=FULL, busy timeout of a minute; deleted content is overwritten. Transactions are the caller's.
    Raises StoreError.
    """
    with translated(path), ExitStack() as unless_ready:
        _claim_file(path, create)
        connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        unless_ready.callback(connection.close)
        _prepare(connection, path)
        unless_ready.pop_all()
    return connection


def whole(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which no file takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turns what SQLite and the system refuse into StoreErrors that name the file."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StoreError(
            f"teacher.ledger: {path} cannot be used ({error}). Free some space, change its permissions, end a process "
            "that holds it, or choose another file."
        ) from error
    except sqlite3.DatabaseError as error:
        raise StoreError(
            f"teacher.ledger: {path} is damaged, or no ledger ({error}). It was left as it is: restore a copy of it, "
            "or choose another file."
        ) from error
    except OSError as error:
        raise StoreError(
            f"teacher.ledger: {path} cannot be opened ({error.strerror or error}). Choose another file."
        ) from error


def _claim_file(path: Path, create: bool) -> None:
    """What was asked of a teacher is private: the file, and with it SQLite's side files, is for its owner only."""
    if not create:
        path.stat()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    application, version, tables = _identity(connection)
    if (application, version, tables) == (0, 0, 0):
        connection.execute("PRAGMA journal_mode = WAL")
        _make_tables(connection)
        application, version, _ = _identity(connection)
    if application != _APPLICATION:
        raise StoreError(f"teacher.ledger: {path} is a database, but no ledger of potstill. Choose another file.")
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"teacher.ledger: {path} has schema {version}, this potstill reads {SCHEMA_VERSION}. Use the potstill that "
            "wrote it, or choose another file."
        )
    for statement in _USERS.split(";\n"):
        connection.execute(statement)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")


def _identity(connection: sqlite3.Connection) -> tuple[int, int, int]:
    """Application, schema and number of tables."""
    application, version = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
    )
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    return application, version, tables


def _make_tables(connection: sqlite3.Connection) -> None:
    """In one transaction: another process may be making them too."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        if _identity(connection) != (0, 0, 0):
            return
        for statement in _SCHEMA.split(";\n"):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
