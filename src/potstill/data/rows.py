"""From the rows of a source to labelled texts, lazily; unusable ones are dropped under a named reason and counted.

Refuses a split that is none, and rows that all lack the column asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice

from potstill.data.clean import Cleaning, mend
from potstill.data.labels import is_absent, label_name
from potstill.data.load import identity, unique_name
from potstill.data.records import Format, Part, read_parts
from potstill.data.split import Split, split_named
from potstill.data.texts import LabelledText
from potstill.errors import DataError
from potstill.types import Role

__all__ = ["TextColumns", "TextReason", "load_texts"]

_ROWS_DEFAULT = "split"


class TextReason(StrEnum):
    """Why a row was dropped."""

    TEXT = "text is not a string"
    EMPTY = "text is empty"
    WORDS = "words are not a list of strings"
    PAIR = "the second text is not a string, or is empty"
    LABEL = "label is not text, a whole number, true or false"
    LABELS = "labels are not a list of text, whole numbers, true or false"
    COUNT = "there are not as many labels as words"


@dataclass(frozen=True, slots=True)
class TextColumns:
    """Which column holds what. `pair` and `slice` are None where no column does; `label` where labels play no part."""

    text: str = "text"
    pair: str | None = None
    label: str | None = "label"
    split_by: str | None = _ROWS_DEFAULT
    slice: str | None = None


class _UnusableError(Exception):
    def __init__(self, reason: TextReason) -> None:
        super().__init__(reason)
        self.reason = reason


def load_texts(
    source: str,
    *,
    columns: TextColumns,
    role: Role,
    multi_label: bool = False,
    config: str | None = None,
    format: Format = "auto",
    max_documents: int | None = None,
) -> tuple[Iterator[LabelledText], Cleaning]:
    """The usable rows of a source as labelled texts, lazily, and the counts that fill while they are read.

    A source that comes in parts (splits of a data set, files of a folder that are named after them, a .json file that
    is one object of lists) gives all of them, each text with its split, and `max_documents` of each part at most.
    Labels become names: 3 is "3", true is "true". A row without its label (null, or empty text) is unlabelled; an empty
    list says that a text bears none of several labels. A list may stand as JSON in a string.

    Raises:
        DataError: as `read_parts`; no row has a column asked for (of `label` only where the role needs one, of
            `split_by` only under another name than the default); a part or a row names a split that is none; no row
            can be used.
    """
    wanted = (columns.text, columns.label, columns.pair, columns.split_by, columns.slice)
    parts = read_parts(source, config=config, format=format, wanted=("id", *(name or "" for name in wanted)))
    cleaning = Cleaning()
    reader = _Reader(columns, role, multi_label)
    return _usable(_rows(parts, reader, max_documents, source), reader, cleaning), cleaning


@dataclass(frozen=True, slots=True)
class _Reader:
    columns: TextColumns
    role: Role
    multi_label: bool


@dataclass(frozen=True, slots=True)
class _Found:
    """A row with the split of its part."""

    id: str
    source: str
    split: Split | None
    cells: Mapping[str, object]


def _rows(parts: Iterable[Part], reader: _Reader, limit: int | None, source: str) -> Iterator[_Found]:
    columns: dict[str, None] = {}
    uses: dict[str, int] = {}
    found = False
    for part, records in parts:
        split = None if part is None else _split_of_part(part, source)
        for place, cells in islice(records, limit):
            found = True
            columns.update(dict.fromkeys(cells))
            home = place.rpartition(":")[0].removesuffix(f":{part}")
            yield _Found(unique_name(identity(cells.get("id")) or place, uses), home, split, cells)
    if not found:
        raise DataError(f"data.source: {source} holds no rows. Give a source with at least a few documents.")
    _check_columns(list(columns), reader)


def _check_columns(found: list[str], reader: _Reader) -> None:
    columns, listing = reader.columns, ", ".join(found[:20]) + (", ..." if len(found) > 20 else "")
    label = columns.label if reader.role is not Role.ENCODER or columns.label != "label" else None
    split_by = None if columns.split_by == _ROWS_DEFAULT else columns.split_by
    asked = {
        "data.text": columns.text,
        "data.label": label,
        "data.text_pair": columns.pair,
        "data.split_by": split_by,
        "data.slice": columns.slice,
    }
    for key, name in asked.items():
        if name is not None and name not in found:
            raise DataError(f"{key}: no row has a column {name!r}; the columns are: {listing}. Name one of them.")


def _split_of_part(part: str, source: str) -> Split:
    split = split_named(part)
    if split is None:
        raise DataError(
            f"data.source: {source} has a part {part!r}, which is none of train, validation and test. "
            "Rename it, or leave it out of the source."
        )
    return split


def _usable(rows: Iterable[_Found], reader: _Reader, cleaning: Cleaning) -> Iterator[LabelledText]:
    for row in rows:
        try:
            text = _judge(row, reader)
        except _UnusableError as unusable:
            cleaning.dropped[unusable.reason.value] += 1
            continue
        cleaning.kept["unlabelled" if text.label is None else "labelled"] += 1
        words = list(text.text) if isinstance(text.text, tuple) else text.text
        whole, pair = mend(words), mend(text.pair)
        if (whole, pair) != (words, text.pair):
            cleaning.mended["NUL or lone surrogates replaced"] += 1
            text = replace(text, text=tuple(whole) if isinstance(whole, list) else whole, pair=pair)
        yield text
    if cleaning.dropped and not cleaning.kept:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in cleaning.dropped.most_common())
        raise DataError(
            f"data.source: none of the {cleaning.rows} rows can be used ({reasons}). "
            "Check data.text and data.label, or mend the rows."
        )


def _judge(row: _Found, reader: _Reader) -> LabelledText:
    cells, columns = row.cells, reader.columns
    text = _check_text(cells.get(columns.text), reader.role)
    label = None if columns.label is None else _check_label(cells.get(columns.label), reader)
    if isinstance(text, tuple) and label is not None and len(label) != len(text):
        raise _UnusableError(TextReason.COUNT)
    pair = None if columns.pair is None else _check_pair(cells.get(columns.pair))
    split = row.split
    if split is None and columns.split_by is not None:
        split = _check_split(cells.get(columns.split_by), columns.split_by, row.id)
    part = None if columns.slice is None else _name_of(cells.get(columns.slice))
    return LabelledText(row.id, text, pair, label, split, part or "", row.source)


def _check_text(cell: object, role: Role) -> str | tuple[str, ...]:
    if role is Role.TOKEN_CLASSIFIER:
        words = _as_list(cell)
        if words is None or not all(isinstance(word, str) for word in words):
            raise _UnusableError(TextReason.WORDS)
        if not "".join(map(str, words)).replace("\x00", "").strip():
            raise _UnusableError(TextReason.EMPTY)
        return tuple(map(str, words))
    if not isinstance(cell, str):
        raise _UnusableError(TextReason.EMPTY if cell is None else TextReason.TEXT)
    if not cell.replace("\x00", "").strip():
        raise _UnusableError(TextReason.EMPTY)
    return cell


def _check_pair(cell: object) -> str:
    if not isinstance(cell, str) or not cell.replace("\x00", "").strip():
        raise _UnusableError(TextReason.PAIR)
    return cell


def _check_label(cell: object, reader: _Reader) -> str | tuple[str, ...] | None:
    if is_absent(cell):
        return None
    if reader.role is Role.TOKEN_CLASSIFIER or reader.multi_label:
        names = [_name_of(part) or "" for part in _check_list(cell)]
        # A word may lack its label; of several labels of a text, one without a name is none.
        return tuple(names if reader.role is Role.TOKEN_CLASSIFIER else dict.fromkeys(filter(None, names)))
    name = _number_of(cell) if reader.role is Role.ENCODER else None
    return name or _name_of(cell)


def _check_list(cell: object) -> list[object]:
    found = _as_list(cell)
    if found is None:
        raise _UnusableError(TextReason.LABELS)
    return found


def _name_of(cell: object) -> str | None:
    try:
        return label_name(cell)
    except TypeError:
        raise _UnusableError(TextReason.LABEL) from None


def _number_of(cell: object) -> str | None:
    """A degree, such as how alike two texts are: kept as the number that it is."""
    return repr(cell) if isinstance(cell, float) and math.isfinite(cell) else None


def _as_list(cell: object) -> list[object] | None:
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            return None
    return list(cell) if isinstance(cell, list | tuple) else None


def _check_split(cell: object, column: str, place: str) -> Split | None:
    if is_absent(cell):
        return None
    found = split_named(cell) if isinstance(cell, str) else None
    if found is None:
        raise DataError(
            f"data.split_by: row {place} has {cell!r} in the column {column!r}, which is none of train, validation and "
            "test. Mend the row, or name another column."
        )
    return found
