"""The rows of data sets: saved `datasets` folders, and those of the Hugging Face hub, as a whole or part by part.

Refuses to fetch a data set that is a program, or that cannot be read row by row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potstill.data.files import Record, one_line
from potstill.errors import DataError

__all__ = ["Part", "read_hub", "read_hub_parts", "read_saved", "read_saved_parts"]

_AVAILABLE_CONFIGS = re.compile(r"(?:among the available configs|not found\. Available): \[(.+?)\]")

Part = tuple[str | None, Iterator[Record]]
"""A part of a source, such as a split: its name, None where there is but one, and its rows."""


def read_saved(folder: Path, split: str, wanted: tuple[str, ...]) -> Iterator[Record]:
    """The rows of a saved data set, or of one split of several. Raises DataError where it is not whole or has none."""
    import datasets  # takes a second to import

    saved = _open_saved(folder)
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(
                f"data.split: {folder} has no split {split!r}; it has: {', '.join(saved)}. Name one of them."
            )
        saved = saved[split]
    return _read_table(saved, folder.name, wanted)


def read_saved_parts(folder: Path, wanted: tuple[str, ...]) -> Iterator[Part]:
    """The splits of a saved data set, numbers of classes as their names. Raises DataError where it is not whole."""
    import datasets  # takes a second to import

    saved = _open_saved(folder)
    if isinstance(saved, datasets.DatasetDict):
        return (
            (name, _name_classes(table, _read_table(table, f"{folder.name}:{name}", wanted)))
            for name, table in saved.items()
        )
    return iter([(None, _name_classes(saved, _read_table(saved, folder.name, wanted)))])


def _open_saved(folder: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.source: {folder} is not a whole `datasets` folder ({one_line(error)}). Save it again."
        ) from None


def read_hub(source: str, config: str | None, split: str, wanted: tuple[str, ...]) -> Iterator[Record]:
    """The rows of one split of the hub's data set, streamed. Raises DataError where the hub does not give it."""
    return _read_remote(_open_hub(source, config, split), source, wanted)


def read_hub_parts(source: str, config: str | None, wanted: tuple[str, ...]) -> Iterator[Part]:
    """All splits of the hub's data set, streamed, numbers of classes as their names. Raises DataError as `read_hub`."""
    tables = _open_hub(source, config, None)
    return (
        (str(name), _name_classes(table, _read_remote(table, f"{source}:{name}", wanted)))
        for name, table in tables.items()
    )


def _open_hub(source: str, config: str | None, split: str | None) -> Any:
    import datasets  # takes a second to import

    try:
        return datasets.load_dataset(source, config, split=split, streaming=True)
    except RuntimeError as error:  # data sets that are a program, archives that cannot be streamed
        raise _unreadable(source, error) from None
    except (ValueError, datasets.exceptions.DatasetsError, *_network_errors()) as error:
        raise _refused(source, config, split, error) from None


def _name_classes(table: Any, records: Iterator[Record]) -> Iterator[Record]:
    """The same rows with the names of classes where a column holds their numbers, and None for -1, which is none."""
    columns = {name: feature for name, feature in (table.features or {}).items() if _numbers_classes(feature)}
    for place, cells in records:
        named = {name: _name_class(columns[name], cells.get(name)) for name in columns}
        yield place, {**cells, **named}


def _numbers_classes(feature: Any) -> bool:
    inner = getattr(feature, "feature", None)
    return hasattr(feature, "int2str") or (inner is not None and _numbers_classes(inner))


def _name_class(feature: Any, cell: Any) -> Any:
    if cell is None or cell == -1:
        return None
    if isinstance(cell, list):
        return [_name_class(feature.feature, number) for number in cell]
    return feature.int2str(cell)


def _read_remote(table: Any, name: str, wanted: tuple[str, ...]) -> Iterator[Record]:
    """As `_read_table`; files are fetched and decoded only now, so that much can still go wrong."""
    import datasets

    try:
        yield from _read_table(table, name, wanted)
    except _network_errors() as error:
        raise DataError(
            f"data.source: the Hugging Face hub stopped giving {name} ({one_line(error)}). "
            "Check the network and run it again."
        ) from None
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(name, error) from None


def _network_errors() -> tuple[type[Exception], ...]:
    """The hub's client lets errors of its HTTP library through, of which some are no OSError."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # whichever version it uses

    return OSError, httpx.HTTPError


def _unreadable(source: str, error: Exception) -> DataError:
    return DataError(
        f"data.source: {source} cannot be read from the Hugging Face hub row by row ({one_line(error)}). "
        "Download it, and give its files as Parquet or JSON lines."
    )


def _refused(source: str, config: str | None, split: str | None, error: Exception) -> DataError:
    """Why the hub does not give a data set. That a configuration is needed is told by the library's words alone."""
    available = _AVAILABLE_CONFIGS.search(str(error))
    if available:
        listing = available[1].replace("'", "")
        got = "has several configurations" if config is None else f"has no configuration {config!r}"
        return DataError(f"data.config: {source} {got}; available are: {listing}. Name one of them.")
    asked = (("data.config", config), ("data.split", split))
    chosen = " and ".join(f"{key}={value}" for key, value in asked if value is not None)
    return DataError(
        f"data.source: {source} is no file or folder here, and the Hugging Face hub does not give it"
        f"{' with ' if chosen else ''}{chosen} ({one_line(error)}). Check the id, the split and the network."
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
