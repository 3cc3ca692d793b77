"""The rows of one file: JSON lines, Parquet, CSV or plain text, read lazily.

Refuses to guess: an encoding that is not UTF-8, a line that is not JSON, a table with ragged rows or a file of unknown
kind is an error that names the place.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from potstill.errors import DataError

__all__ = ["FORMATS", "Format", "Record", "format_of", "one_line", "read_document", "read_file"]

Format = Literal["auto", "jsonl", "parquet", "csv", "text"]
Record = tuple[str, Mapping[str, object]]  # where the row stands (`file name:row number`), and its cells by column

FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
}
"""Known endings of files."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONGEST_CELL = 2**31 - 1


def format_of(path: Path, format: Format) -> Format:
    """The format of a file: the one named, else by its ending. Raises DataError where that is unknown."""
    if format != "auto":
        return format
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        raise DataError(
            f"data.format: the ending of {path} does not tell its format; known are {', '.join(FORMATS)}. "
            "Set data.format, convert the file, or move it out of the folder."
        )
    return found


def read_file(path: Path, format: Format, wanted: tuple[str, ...]) -> Iterator[Record]:
    """The rows of a file of this format; `wanted` are the columns that are read, of which the second holds text.

    Raises:
        DataError: while it is read: it cannot be, or is not what its format says. Names the place.
    """
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
            f"data.source: {path} is not whole Parquet ({one_line(error)}). Write or fetch it again."
        ) from None


def read_document(path: Path, wanted: tuple[str, ...]) -> Iterator[Record]:
    """A text file as one row, in the column of the text. Raises DataError where it is not UTF-8."""
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


def one_line(error: Exception) -> str:
    """What an error of a library says, in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
