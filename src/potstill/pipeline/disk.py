"""Files and folders that are whole or absent, whenever the power goes.

Refuses: to leave a half-written file under its final name. What cannot be written is a RunError, never a traceback.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import JsonValue

from potstill.errors import RunError

__all__ = [
    "PARTIAL",
    "check_disk",
    "check_writable",
    "read_json",
    "remove",
    "replace_folder",
    "sync_tree",
    "write_json_atomic",
    "write_text_atomic",
    "writing",
]

PARTIAL = ".partial"
"""Ending of a file that is still being written; the next write of the same name takes its place."""


def write_text_atomic(path: Path, text: str) -> None:
    """Writes a file that is, after a crash at any instant, the old one or the new one. Raises RunError."""
    temp = path.with_name(f".{path.name}{PARTIAL}")
    with writing(path):
        with temp.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temp.replace(path)
        _sync(path.parent)


def write_json_atomic(path: Path, value: object) -> None:
    """Like `write_text_atomic`, as indented JSON. Raises ValueError for NaN and TypeError for what is not JSON."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> JsonValue:
    """The file's content. Raises RunError naming the file if it cannot be read or is no JSON."""
    try:
        value: JsonValue = json.loads(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}). Run the stage that writes it again.") from None
    except (ValueError, RecursionError):
        raise RunError(f"{path}: is damaged, not JSON. Delete it and run again.") from None
    return value


def replace_folder(temp: Path, final: Path) -> None:
    """Publishes the finished folder `temp` under the name `final`, in the same parent, whole or not at all.

    A new name is one rename. Where `final` exists it steps aside first as `.NAME.old`; a crash between the two renames
    leaves it there, whole, and `final` absent: call again with a whole `temp`. Raises RunError.
    """
    aside = final.with_name(f".{final.name}.old")
    with writing(final):
        sync_tree(temp)
        if os.path.lexists(final):
            remove(aside)
            final.rename(aside)
        temp.rename(final)
        _sync(final.parent)
        remove(aside)


def check_disk(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises RunError unless the disk that holds `folder`, which need not exist yet, has the room for `what`."""
    place = _existing(folder)
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < needed_bytes:
        raise RunError(
            f"run_dir: {place} has {free_bytes / 1e9:.2f} GB free, but {what} needs {needed_bytes / 1e9:.2f} GB. "
            "Free some space, or choose another run_dir."
        )


def check_writable(folder: Path) -> None:
    """Raises RunError unless `folder` can be written, or made where it is not there yet; makes nothing."""
    place = _existing(folder)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        reason = "no permission" if place.is_dir() else "not a folder"
        raise RunError(
            f"run_dir: {folder} cannot be written ({place}: {reason}). "
            "Change its permissions, or choose another run_dir."
        )


def sync_tree(folder: Path) -> None:
    """Makes all that is below `folder`, and its names, survive a power cut."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            _sync(path)


def remove(path: Path) -> None:
    """Deletes a file, a link or a folder with all that is in it; absent is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest of its parents that is there."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))


def _sync(path: Path) -> None:
    if os.name != "posix":  # Windows syncs neither folders nor files opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's refusals into RunErrors that name the recipe key."""
    try:
        yield
    except OSError as error:
        place = error.filename or path
        raise RunError(
            f"run_dir: {place} cannot be written ({error.strerror or error}). "
            "Free space or change its permissions, or choose another run_dir."
        ) from error
