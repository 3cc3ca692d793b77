"""Records of a source: a file, a folder of files, a saved `datasets` folder or an id of the Hugging Face hub.

`read_records` reads it as one stream, `read_parts` part by part where it comes in parts (train, validation, test).
Refuses a source that is not there, and a folder of which some files name a part and others do not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from potstill.data.files import FORMATS, Format, Record, format_of, read_document, read_file
from potstill.data.split import split_named
from potstill.data.tables import Part, read_hub, read_hub_parts, read_saved, read_saved_parts
from potstill.errors import DataError

__all__ = ["Format", "Part", "Record", "read_parts", "read_records"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_NOT_DATA = re.compile(r"\..*|README.*|LICEN[CS]E.*", re.IGNORECASE)
_DATASETS_MARKS = ("dataset_info.json", "dataset_dict.json")
_OBJECT_OF_LISTS = re.compile(rb'(?:\xef\xbb\xbf)?\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\[\s*[\[{\]]')
_LOOKED_AT = 4096


def read_records(
    source: str, *, config: str | None, split: str, format: Format, wanted: tuple[str, ...]
) -> Iterator[Record]:
    """All rows of a source in order, with the columns `wanted`, of which the second holds text.

    Raises:
        DataError: nothing is there, or it cannot be read; much of that shows only while it is read.
    """
    path = Path(source).expanduser()
    kind = _kind_of_source(source, config, format)
    if kind == "file":
        return read_file(path, format_of(path, format), wanted)
    if kind == "datasets":
        return read_saved(path, split, wanted)
    if kind == "folder":
        return (record for file, found in _plan_folder(path, format) for record in _read_one(file, found, wanted))
    return read_hub(source, config, split, wanted)


def read_parts(source: str, *, config: str | None, format: Format, wanted: tuple[str, ...]) -> Iterator[Part]:
    """The parts of a source, each with its name and its rows; a source without parts is one of the name None.

    Parts are the splits of a data set, the files of a folder if each is named after a split, or the lists of a .json
    file that is one object: there a row is an object or a list [text, label], the second and third of `wanted`.

    Raises:
        DataError: as `read_records`; and some files of a folder are named after a split, and others are not.
    """
    path = Path(source).expanduser()
    kind = _kind_of_source(source, config, format)
    if kind == "datasets":
        return read_saved_parts(path, wanted)
    if kind == "hub":
        return read_hub_parts(source, config, wanted)
    if kind == "folder":
        return _folder_parts(path, format, wanted)
    parts = _parse_parts(path) if format == "auto" and path.suffix.lower() == ".json" else None
    if parts is None:
        return iter([(None, read_file(path, format_of(path, format), wanted))])
    return ((name, _list_rows(path, name, rows, wanted)) for name, rows in parts.items())


def _kind_of_source(source: str, config: str | None, format: Format) -> Literal["file", "folder", "datasets", "hub"]:
    path = Path(source).expanduser()
    kind = _kind_of_path(path) if source.strip() else "absent"
    if config is not None and kind != "absent":
        raise DataError(
            f"data.config: got {config!r}, but {source} is a {'file' if kind == 'file' else 'folder'} here, and only "
            "data sets of the Hugging Face hub have configurations. Leave data.config out."
        )
    if kind != "absent":
        return kind
    if format == "auto" and path.suffix.lower() not in FORMATS and _HUB_ID.fullmatch(source):
        return "hub"
    raise DataError(f"data.source: {source!r} does not exist. Give a file, a folder, a Hugging Face id or sample:NAME.")


def _kind_of_path(path: Path) -> Literal["file", "folder", "datasets", "absent"]:
    try:
        if path.is_dir():
            return "datasets" if any((path / mark).is_file() for mark in _DATASETS_MARKS) else "folder"
        return "file" if path.exists() else "absent"
    except (OSError, ValueError):  # a name too long for the file system, or with a NUL in it
        return "absent"


def _plan_folder(folder: Path, format: Format) -> list[tuple[Path, Format]]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not _NOT_DATA.fullmatch(path.name))
    if not files:
        raise DataError(f"data.source: {folder} holds no data files. Put {', '.join(FORMATS)} files directly in it.")
    # All endings are judged before the first row is read: a stray file should not end a long read.
    return [(path, format_of(path, format)) for path in files]


def _read_one(file: Path, format: Format, wanted: tuple[str, ...]) -> Iterator[Record]:
    return read_document(file, wanted) if format == "text" else read_file(file, format, wanted)


def _folder_parts(folder: Path, format: Format, wanted: tuple[str, ...]) -> Iterator[Part]:
    plan = _plan_folder(folder, format)
    unnamed = [file.name for file, _ in plan if split_named(file.stem) is None]
    if unnamed and len(unnamed) < len(plan):
        raise DataError(
            f"data.source: {folder}: {unnamed[0]} is not named after a split (train, validation, test) as other files "
            "there are. Rename it, or move it out of the folder."
        )
    return ((None if unnamed else file.stem, _read_one(file, found, wanted)) for file, found in plan)


def _parse_parts(path: Path) -> dict[str, list[Any]] | None:
    """The lists of a .json file that is one object of lists of rows; None for JSON lines."""
    try:
        with path.open("rb") as file:
            if not _OBJECT_OF_LISTS.match(file.read(_LOOKED_AT)):
                return None
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # the reader of JSON lines says what is wrong, and where
        return None
    lists = isinstance(found, dict) and all(isinstance(rows, list) for rows in found.values())
    if not lists or not all(isinstance(row, dict | list) for rows in found.values() for row in rows):
        return None
    return dict(found)


def _list_rows(path: Path, part: str, rows: list[Any], wanted: tuple[str, ...]) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        place = f"{path.name}:{part}:{number}"
        if isinstance(row, dict):
            yield place, row
        elif len(row) == 2:
            yield place, {wanted[1]: row[0], wanted[2]: row[1]}
        else:
            raise DataError(f"data.source: {place} is a list of {len(row)}. Write [text, label], or an object.")
