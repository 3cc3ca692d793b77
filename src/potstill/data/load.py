"""Rows from the user's files: JSON lines, Parquet, CSV, plain text, `datasets` folders and hub ids, read lazily.

A row is handed on as it was found; whether it can be used is judged, and counted, in `clean`. Refuses to guess: an
encoding that is not UTF-8, a line that is not JSON, a table with ragged rows or a file of unknown kind is an error that
names the place.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from potstill.errors import DataError

__all__ = ["Format", "Row", "load_examples"]

Format = Literal["auto", "jsonl", "parquet", "csv", "text"]
Record = tuple[str, Mapping[str, object]]  # where the row stands (`file name:row number`), and its cells by column

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_NOT_DATA = re.compile(r"\..*|README.*|LICEN[CS]E.*", re.IGNORECASE)
_DATASETS_MARKS = ("dataset_info.json", "dataset_dict.json")
_AVAILABLE_CONFIGS = re.compile(r"(?:among the available configs|not found\. Available): \[(.+?)\]")
_PLACE = re.compile(r":\d+$")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONGEST_CELL = 2**31 - 1
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
    records = _open_source(source, config=config, split=split, format=format, wanted=wanted)
    return _rows(islice(records, max_documents), source=source, text=text, messages=messages)


def _rows(records: Iterable[Record], *, source: str, text: str, messages: str) -> Iterator[Row]:
    columns: dict[str, None] = {}  # a dict, because the message should list them in the file's order
    uses: dict[str, int] = {}
    found = False
    for place, cells in records:
        columns.update(dict.fromkeys(cells))
        # Places are not remembered: they would take memory for every row of a corpus. An id like one is a second one.
        named, found = _identity(cells.get("id")), True
        if _PLACE.search(named):
            uses.setdefault(named, 1)
        name = _unique(named, uses) if named else place
        yield Row(id=name, source=place.rpartition(":")[0], text=cells.get(text), messages=cells.get(messages))
    if not found:
        raise DataError(f"data.source: {source} holds no rows. Give a source with at least a few documents.")
    _check_columns(list(columns), text=text, messages=messages)


def _identity(cell: object) -> str:
    if isinstance(cell, bool) or not isinstance(cell, str | int):
        return ""
    return str(cell).strip()


def _unique(name: str, uses: dict[str, int]) -> str:
    uses[name] = uses.get(name, 0) + 1
    return name if uses[name] == 1 else _unique(f"{name}#{uses[name]}", uses)


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


def _open_source(
    source: str, *, config: str | None, split: str, format: Format, wanted: tuple[str, ...]
) -> Iterator[Record]:
    path = Path(source).expanduser()
    kind = _kind_of_path(path) if source.strip() else "absent"
    if config is not None and kind != "absent":
        raise DataError(
            f"data.config: got {config!r}, but {source} is a {'file' if kind == 'file' else 'folder'} here, and only "
            "data sets of the Hugging Face hub have configurations. Leave data.config out."
        )
    if kind == "file":
        return _read_file(path, _format_of(path, format), wanted)
    if kind == "datasets":
        return _read_saved(path, split, wanted)
    if kind == "folder":
        return _read_folder(path, format, wanted)
    if format == "auto" and path.suffix.lower() not in _FORMATS and _HUB_ID.fullmatch(source):
        return _read_hub(source, config, split, wanted)
    raise DataError(f"data.source: {source!r} does not exist. Give a file, a folder, a Hugging Face id or sample:NAME.")


def _kind_of_path(path: Path) -> Literal["file", "folder", "datasets", "absent"]:
    try:
        if path.is_dir():
            return "datasets" if any((path / mark).is_file() for mark in _DATASETS_MARKS) else "folder"
        return "file" if path.exists() else "absent"
    except (OSError, ValueError):  # a name too long for the file system, or with a NUL in it
        return "absent"


def _format_of(path: Path, format: Format) -> Format:
    if format != "auto":
        return format
    found = _FORMATS.get(path.suffix.lower())
    if found is None:
        raise DataError(
            f"data.format: the ending of {path} does not tell its format; known are {', '.join(_FORMATS)}. "
            "Set data.format, convert the file, or move it out of the folder."
        )
    return found


def _read_folder(folder: Path, format: Format, wanted: tuple[str, ...]) -> Iterator[Record]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not _NOT_DATA.fullmatch(path.name))
    if not files:
        raise DataError(f"data.source: {folder} holds no data files. Put {', '.join(_FORMATS)} files directly in it.")
    # All endings are judged before the first row is read: a stray file should not end a long read.
    plan = [(path, _format_of(path, format)) for path in files]
    return (
        record
        for path, found in plan
        for record in (_read_document(path, wanted) if found == "text" else _read_file(path, found, wanted))
    )


def _read_file(path: Path, format: Format, wanted: tuple[str, ...]) -> Iterator[Record]:
    if format == "jsonl":
        return _read_jsonl(path)
    if format == "csv":
        return _read_csv(path)
    if format == "parquet":
        return _read_parquet(path, wanted)
    return _read_paragraphs(path, wanted)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends. Cut at line feeds only: text may hold the other Unicode line separators."""
    offset = 0
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(
            f"data.source: {path} cannot be read ({error.strerror}). Check the path and its rights."
        ) from None
    with file:
        for number, raw in enumerate(file, start=1):
            mark = len(_BYTE_ORDER_MARK) if number == 1 and raw.startswith(_BYTE_ORDER_MARK) else 0
            yield number, _decode(raw[mark:], path, offset + mark)
            offset += len(raw)


def _decode(raw: bytes, path: Path, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.source: {path} is not UTF-8 at byte {offset + error.start}. "
            "Convert it, for example with `iconv -f latin1 -t utf-8`."
        ) from None


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        if line.strip():
            yield f"{path.name}:{number}", _parse_object(line, f"{path}:{number}")


def _parse_object(line: str, place: str) -> dict[str, object]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"data.source: {place} is not JSON ({reason}). Write one object a line.") from None
    if not isinstance(value, dict):
        raise DataError(
            f"data.source: {place} is a JSON {type(value).__name__}, not an object. Write one object a line."
        )
    return value


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(_LONGEST_CELL)  # the default of 131,072 characters refuses a long article
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise DataError(f"data.source: {path} names a column twice in its header. Rename one of them.")
        for number, cells in enumerate(filter(None, reader), start=1):
            if len(cells) != len(header):
                raise DataError(
                    f"data.source: {path}:{reader.line_num} has {len(cells)} cells, the header {len(header)}. "
                    "Quote cells that hold commas."
                )
            yield f"{path.name}:{number}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"data.source: {path}:{reader.line_num} is not CSV ({error}). Mend the quotes.") from None


def _read_parquet(path: Path, wanted: tuple[str, ...]) -> Iterator[Record]:
    import pyarrow as arrow  # type: ignore[import-untyped]
    from pyarrow import parquet  # heavy, and needed for this format only

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        absent = dict.fromkeys(names)
        batches = file.iter_batches(columns=[name for name in names if name in wanted])
        for number, cells in enumerate((cells for batch in batches for cells in batch.to_pylist()), start=1):
            yield f"{path.name}:{number}", {**absent, **cells}
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.source: {path} is not whole Parquet ({_one_line(error)}). Write or fetch it again."
        ) from None


def _read_document(path: Path, wanted: tuple[str, ...]) -> Iterator[Record]:
    yield f"{path.name}:1", {wanted[1]: "".join(line for _, line in _lines(path))}


def _read_paragraphs(path: Path, wanted: tuple[str, ...]) -> Iterator[Record]:
    number, lines = 0, list[str]()
    for _, line in _lines(path):
        if line.strip():
            lines.append(line)
        elif lines:
            number += 1
            yield f"{path.name}:{number}", {wanted[1]: "".join(lines).rstrip("\r\n")}
            lines = []
    if lines:
        yield f"{path.name}:{number + 1}", {wanted[1]: "".join(lines).rstrip("\r\n")}


def _read_saved(folder: Path, split: str, wanted: tuple[str, ...]) -> Iterator[Record]:
    import datasets  # takes a second to import

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.source: {folder} is not a whole `datasets` folder ({_one_line(error)}). Save it again."
        ) from None
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(
                f"data.split: {folder} has no split {split!r}; it has: {', '.join(saved)}. Name one of them."
            )
        saved = saved[split]
    return _read_table(saved, folder.name, wanted)


def _read_hub(source: str, config: str | None, split: str, wanted: tuple[str, ...]) -> Iterator[Record]:
    import datasets  # takes a second to import

    try:
        table = datasets.load_dataset(source, config, split=split, streaming=True)
    except RuntimeError as error:  # data sets that are a program, archives that cannot be streamed
        raise _unreadable(source, error) from None
    except (ValueError, datasets.exceptions.DatasetsError, *_network_errors()) as error:
        raise _refused(source, config, split, error) from None
    return _read_remote(table, source, wanted)


def _read_remote(table: Any, source: str, wanted: tuple[str, ...]) -> Iterator[Record]:
    """As `_read_table`; files are fetched and decoded only now, so that much can still go wrong."""
    import datasets

    try:
        yield from _read_table(table, source, wanted)
    except _network_errors() as error:
        raise DataError(
            f"data.source: the Hugging Face hub stopped giving {source} ({_one_line(error)}). "
            "Check the network and run it again."
        ) from None
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(source, error) from None


def _network_errors() -> tuple[type[Exception], ...]:
    """The hub's client lets errors of its HTTP library through, of which some are no OSError."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # whichever version it uses

    return OSError, httpx.HTTPError


def _unreadable(source: str, error: Exception) -> DataError:
    return DataError(
        f"data.source: {source} cannot be read from the Hugging Face hub row by row ({_one_line(error)}). "
        "Download it, and give its files as Parquet or JSON lines."
    )


def _refused(source: str, config: str | None, split: str, error: Exception) -> DataError:
    """Why the hub does not give a data set. That a configuration is needed is told by the library's words alone."""
    available = _AVAILABLE_CONFIGS.search(str(error))
    if available:
        listing = available[1].replace("'", "")
        got = "has several configurations" if config is None else f"has no configuration {config!r}"
        return DataError(f"data.config: {source} {got}; available are: {listing}. Name one of them.")
    chosen = f"data.split={split}" if config is None else f"data.config={config} and data.split={split}"
    return DataError(
        f"data.source: {source} is no file or folder here, and the Hugging Face hub does not give it with {chosen} "
        f"({_one_line(error)}). Check the id, the split and the network."
    )


def _read_table(table: Any, name: str, wanted: tuple[str, ...]) -> Iterator[Record]:
    # Other columns may hold images or sound that are costly to decode; their names are kept for the error message.
    names = table.column_names or []
    chosen = [column for column in names if column in wanted]
    if chosen:
        table = table.select_columns(chosen)
    absent = dict.fromkeys(names)
    for number, cells in enumerate(table, start=1):
        yield f"{name}:{number}", {**absent, **cells}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
