"""What `potstill ledger` does with a ledger by its place alone: sum it up, export it, forget requests.

Refuses to export into half a file, or to make a ledger where there is none.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from potstill.engines.accounts import Account, forget_requests, read_accounts, read_rows
from potstill.errors import StoreError

__all__ = ["describe_ledger", "export_ledger", "forget_in_ledger"]

_GROUP = 1000
"""Rows of a row group, so that an export needs little memory however large the ledger."""


def describe_ledger(path: Path) -> Iterator[str]:
    """Lines: what every run asked of which model, what became of it, what it cost. Raises StoreError."""
    accounts = read_accounts(path)
    if not accounts:
        yield f"{path}: nothing was asked yet."
        return
    runs = max(len("run"), *(len(account.run) for account in accounts))
    models = max(len("model"), *(len(account.model) for account in accounts))
    names = f"{'run':<{runs}}  {'model':<{models}}  {'state':<11}"
    yield f"{names}  {'requests':>10}  {'attempts':>10}  {'tokens':>14}  {'usd':>12}"
    for account in accounts:
        names = f"{account.run:<{runs}}  {account.model:<{models}}  {account.state:<11}"
        numbers = f"{account.requests:>10,}  {account.attempts:>10,}  {account.tokens:>14,}"
        yield f"{names}  {numbers}  {_dollars(account):>12}"


def export_ledger(path: Path, target: Path) -> str:
    """Writes every request with its answer to a .jsonl or .parquet file, readable for its owner only.

    Returns a line that says how many. Raises StoreError.
    """
    writers: Mapping[str, Callable[[Path, Iterator[Mapping[str, Any]]], int]] = {
        ".jsonl": _write_lines,
        ".parquet": _write_parquet,
    }
    if target.suffix not in writers or not target.parent.is_dir():
        raise StoreError(
            f"ledger export: {str(target)!r} cannot be written: needs a name that ends in .jsonl or .parquet, in a "
            "folder that is there."
        )
    with _writing(target) as part:
        count = writers[target.suffix](part, read_rows(path))
    return f"{target}: {count:,} requests."


def forget_in_ledger(path: Path, ids: Sequence[str], user: str | None, *, unusable: bool = False) -> Iterator[str]:
    """Deletes requests by id or user, or all that are quarantined (`unusable`), which are asked again then.

    Lines: how many, and which runs had used them. Raises StoreError.
    """
    if not (ids or user or unusable):
        raise StoreError("ledger forget: got nothing to forget. Give ids of requests, --user NAME, or --unusable.")
    if unusable and (ids or user):
        # All of both, or only what is in both: whoever means the one would lose, or keep, what they did not mean to.
        raise StoreError(
            "ledger forget: got --unusable with ids or --user, and needs one of them: --unusable is all that could not "
            "be used, whoever it was asked for. Forget in two commands."
        )
    forgotten = forget_requests(path, keys=[_key(name) for name in ids], user=user, unusable=unusable)
    yield f"{path}: {forgotten.requests:,} requests are forgotten; what they cost stays counted."
    for run_folder, stage in forgotten.affected:
        yield _affected(run_folder, stage, unusable=unusable)


def _affected(run_folder: str, stage: str, *, unusable: bool) -> str:
    if unusable:
        return (
            f"affected: {run_folder} ({stage} had no use of their answers). Delete its {stage} folder and run its "
            "recipe again, which asks them again."
        )
    return (
        f"affected: {run_folder} ({stage} used their answers). Delete its {stage} folder and run its recipe again, "
        "so that data set and student are made without them."
    )


def _key(name: str) -> bytes:
    try:
        key = bytes.fromhex(name)
    except ValueError:
        key = b""
    if len(key) != 16:
        raise StoreError(
            f"ledger forget: {name!r} is no id of a request: needs 32 hexadecimal digits, as `potstill ledger export` "
            "writes them."
        )
    return key


def _dollars(account: Account) -> str:
    return "unknown" if account.usd is None else f"{account.usd:,.6f}"


@contextmanager
def _writing(target: Path) -> Iterator[Path]:
    """A hidden file beside `target` that takes its name if all goes well, and is gone if not."""
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        yield part
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())
        part.replace(target)
    except OSError as error:
        raise StoreError(
            f"ledger export: {target} cannot be written ({error.strerror or error}). Free some space, or choose "
            "another file."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _write_lines(part: Path, rows: Iterator[Mapping[str, Any]]) -> int:
    count = 0
    with part.open("w", encoding="utf-8", newline="\n") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_parquet(part: Path, rows: Iterator[Mapping[str, Any]]) -> int:
    """Requests and usage are JSON text here: what they hold differs from row to row."""
    import pyarrow as arrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    text, whole, real = arrow.string(), arrow.int64(), arrow.float64()
    kinds = {"sample": whole, "attempts": whole, "tokens": whole, "usd": real, "created_at": real, "answered_at": real}
    names = "id run model served base_url user sample state attempts request answer usage tokens usd created_at"
    schema = arrow.schema([(name, kinds.get(name, text)) for name in (*names.split(), "answered_at", "reason")])
    count = 0
    with parquet.ParquetWriter(part, schema) as writer:
        for group in _groups(rows):
            writer.write_table(arrow.Table.from_pylist([_flat(row) for row in group], schema=schema))
            count += len(group)
    return count


def _groups(rows: Iterator[Mapping[str, Any]]) -> Iterator[Sequence[Mapping[str, Any]]]:
    while group := list(islice(rows, _GROUP)):
        yield group


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value for name, value in row.items()
    }
