"""Rows from the user's files: JSON lines, Parquet, CSV, plain text, `datasets` folders and hub ids, read lazily.

A row is handed on as it was found; whether it can be used is judged, and counted, in `clean`. Refuses to guess which
column was meant: one that no row has is an error that lists those there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from potstill.data.records import Format, Record, read_records
from potstill.errors import DataError

__all__ = ["Format", "Row", "identity", "load_examples", "unique_name"]

_PLACE = re.compile(r":\d+$")
_TEXT, _MESSAGES = "text", "messages"


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it was found. `text` and `messages` hold whatever their columns held, None where there is nothing.

    source  name of the file (of the folder, for a saved `datasets` folder), or id of the hub's data set
    """

    id: str
    source: str
    text: object = None
    messages: object = None


def load_examples(
    source: str,
    *,
    config: str | None = None,
    split: str = "train",
    format: Format = "auto",
    text: str = _TEXT,
    messages: str = _MESSAGES,
    max_documents: int | None = None,
) -> Iterator[Row]:
    """Rows of a file, a folder, a saved `datasets` folder or a hub id, in order, at most `max_documents` of them.

    A folder is read file by file in the order of names; subfolders are not entered, and hidden files, README and
    LICENSE are passed over. Documents of a single text file are separated by blank lines (one document could not be
    split); a text file in a folder is one document. JSON files hold one object a line. A row's id is its `id` cell
    (text or whole number), else `file name:row number`; a second row of the same id gets the suffix `#2`. `config` and
    `split` choose among the parts of a data set of the hub.

    Raises:
        DataError: nothing is there, it cannot be read, it has no rows, or no row has the columns asked for. A column
            with another name than the default was asked for, so it must be there. So must a configuration be.
    """
    wanted = ("id", text, messages)
    records = read_records(source, config=config, split=split, format=format, wanted=wanted)
    return _rows(islice(records, max_documents), source=source, text=text, messages=messages)


def _rows(records: Iterable[Record], *, source: str, text: str, messages: str) -> Iterator[Row]:
    columns: dict[str, None] = {}  # a dict, because the message should list them in the file's order
    uses: dict[str, int] = {}
    found = False
    for place, cells in records:
        columns.update(dict.fromkeys(cells))
        # Places are not remembered: they would take memory for every row of a corpus. An id like one is a second one.
        named, found = identity(cells.get("id")), True
        if _PLACE.search(named):
            uses.setdefault(named, 1)
        name = unique_name(named, uses) if named else place
        yield Row(id=name, source=place.rpartition(":")[0], text=cells.get(text), messages=cells.get(messages))
    if not found:
        raise DataError(f"data.source: {source} holds no rows. Give a source with at least a few documents.")
    _check_columns(list(columns), text=text, messages=messages)


def identity(cell: object) -> str:
    """The id that a cell gives: text or a whole number; empty for anything else."""
    if isinstance(cell, bool) or not isinstance(cell, str | int):
        return ""
    return str(cell).strip()


def unique_name(name: str, uses: dict[str, int]) -> str:
    """The name, or with the suffix `#2`, `#3`, ... where `uses`, which counts it, has seen it."""
    uses[name] = uses.get(name, 0) + 1
    return name if uses[name] == 1 else unique_name(f"{name}#{uses[name]}", uses)


def _check_columns(columns: list[str], *, text: str, messages: str) -> None:
    listing = ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "") if columns else "none"
    if text not in columns and messages not in columns:
        raise DataError(
            f"data.text: no row has a column {text!r}, nor {messages!r} (data.messages); the columns are: {listing}. "
            "Set data.text or data.messages to one of them."
        )
    for key, name, default in (("data.text", text, _TEXT), ("data.messages", messages, _MESSAGES)):
        if name != default and name not in columns:
            raise DataError(f"{key}: no row has a column {name!r}; the columns are: {listing}. Name one of them.")
