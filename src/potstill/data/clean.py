"""From rows to examples: every row that cannot be used is dropped under a named reason and counted.

Refuses to mend meaning: a malformed conversation is not repaired, and a row whose messages are broken does not fall
back to its text. Only what no tokenizer should see is mended (NULs go, lone surrogates are replaced), and counted too.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from potstill.data.load import Row
from potstill.errors import DataError
from potstill.types import Example

__all__ = ["Cleaning", "Reason", "clean_examples", "mend"]

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_UNREADABLE = re.compile("[\x00\ud800-\udfff]")


class Reason(StrEnum):
    """Why a row was dropped."""

    ABSENT = "neither text nor messages"
    TEXT_TYPE = "text is not a string"
    TEXT_EMPTY = "text is empty"
    MESSAGES_TYPE = "messages are not a list of objects"
    MESSAGES_VALUE = "messages hold values that are not JSON"
    ROLE = "a message has no usable role"
    CONTENT = "a message has no text content"
    UNANSWERED = "no assistant turn says anything"


@dataclass(frozen=True, slots=True)
class Cleaning:
    """What cleaning kept, dropped and mended, in rows. Complete once the examples have been read to their end."""

    kept: Counter[str] = field(default_factory=Counter)
    """Rows kept, by what they hold: `text` or `messages`."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows dropped, by `Reason`."""
    mended: Counter[str] = field(default_factory=Counter)
    """Rows kept in which characters were replaced."""

    @property
    def rows(self) -> int:
        """Rows seen."""
        return self.kept.total() + self.dropped.total()


class _UnusableError(Exception):
    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


def clean_examples(rows: Iterable[Row]) -> tuple[Iterator[Example], Cleaning]:
    """The usable rows as examples, lazily, and the counts that fill while they are read.

    A row with anything in its messages uses them (JSON in a string is parsed), else its text. A conversation needs a
    role and text content in every message, and an assistant turn that says something or calls a tool; turns after the
    last answer are allowed. Fields of a message that are None are left out, so that the same conversation from Parquet
    and from JSON is the same example.

    Raises:
        DataError: at the end, when there were rows and none was usable; lists the reasons with counts.
    """
    cleaning = Cleaning()
    return _examples(rows, cleaning), cleaning


def _examples(rows: Iterable[Row], cleaning: Cleaning) -> Iterator[Example]:
    for row in rows:
        try:
            example, mended = _judge(row)
        except _UnusableError as unusable:
            cleaning.dropped[unusable.reason.value] += 1
            continue
        cleaning.kept["text" if example.messages is None else "messages"] += 1
        if mended:
            cleaning.mended["NUL or lone surrogates replaced"] += 1
        yield example
    if cleaning.dropped and not cleaning.kept:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in cleaning.dropped.most_common())
        raise DataError(
            f"data.source: none of the {cleaning.rows} rows can be used ({reasons}). "
            "Check data.text and data.messages, or mend the rows."
        )


def _judge(row: Row) -> tuple[Example, bool]:
    """The example of a row, and whether characters were replaced in it."""
    if _is_empty(row.messages):
        text = _check_text(row.text)
        mended = mend(text)
        return Example(id=row.id, text=mended, source=row.source), mended != text
    messages = _check_messages(row.messages)
    mended = mend(messages)
    return Example(id=row.id, messages=tuple(mended), source=row.source), mended != messages


def _is_empty(cell: object) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip()) or (isinstance(cell, list | tuple) and not cell)


def _check_text(cell: object) -> str:
    if cell is None:
        raise _UnusableError(Reason.ABSENT)
    if not isinstance(cell, str):
        raise _UnusableError(Reason.TEXT_TYPE)
    if not cell.replace("\x00", "").strip():
        raise _UnusableError(Reason.TEXT_EMPTY)
    return cell


def _check_messages(cell: object) -> list[dict[str, Any]]:
    if isinstance(cell, str):
        cell = _parse(cell)
    if not isinstance(cell, list | tuple) or not all(isinstance(message, Mapping) for message in cell):
        raise _UnusableError(Reason.MESSAGES_TYPE)
    messages = [{key: value for key, value in message.items() if value is not None} for message in cell]
    for message in messages:
        if not isinstance(message.get("role"), str) or not _ROLE.fullmatch(message["role"]):
            raise _UnusableError(Reason.ROLE)
        if not isinstance(message.get("content"), str):
            raise _UnusableError(Reason.CONTENT)
    if not any(_answers(message) for message in messages):
        raise _UnusableError(Reason.UNANSWERED)
    return _as_json(messages)


def _answers(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and bool(message["content"].strip() or message.get("tool_calls"))


def _parse(cell: str) -> object:
    try:
        parsed: object = json.loads(cell)
    except (ValueError, RecursionError):
        raise _UnusableError(Reason.MESSAGES_TYPE) from None
    return parsed


def _as_json(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages in plain JSON types, so that they render, hash and compare alike wherever they came from."""
    try:
        plain: list[dict[str, Any]] = json.loads(json.dumps(messages, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise _UnusableError(Reason.MESSAGES_VALUE) from None
    return plain


def mend(value: Any) -> Any:
    """A JSON value with NULs dropped and lone surrogates replaced in every string: what no tokenizer should see."""
    if isinstance(value, str):
        return _UNREADABLE.sub(lambda found: "" if found[0] == "\x00" else "\ufffd", value)
    if isinstance(value, list):
        return [mend(part) for part in value]
    if isinstance(value, dict):
        return {key: mend(part) for key, part in value.items()}
    return value
