"""Files and folders that are whole or absent, whenever the power goes.

Refuses: to leave a half-written file under its final name. What cannot be written is a RunError, never a traceback.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import JsonValue
from safetensors import SafetensorError

from potstill.errors import PotstillError, RunError

__all__ = [
    "PARTIAL",
    "check_disk",
    "check_writable",
    "folder_bytes",
    "hash_file",
    "read_json",
    "remove",
    "replace_folder",
    "sync_tree",
    "working",
    "write_json_atomic",
    "write_text_atomic",
    "writing",
]

PARTIAL = ".partial"
"""Ending of a file that is still being written; the next write of the same name takes its place."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What the system says, often without naming a file, when a disk or a share of it is full."""

PROTECTED = {errno.EACCES, errno.EPERM, errno.EROFS}


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


def check_disk(folder: Path, needed_bytes: int, what: str, key: str = "run_dir") -> None:
    """Raises RunError unless the disk that holds `folder`, which need not exist yet, has the room for `what`.

    `key` is the recipe's name for the folder.
    """
    place = _existing(folder)
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < needed_bytes:
        raise RunError(
            f"{key}: {place} has {free_bytes / 1e9:.2f} GB free, but {what} needs {needed_bytes / 1e9:.2f} GB. "
            f"Free some space, or choose another {key}."
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


def folder_bytes(folder: Path) -> int:
    """Sizes of all files below `folder` together; 0 where it is a link or not there."""
    if folder.is_symlink():
        return 0
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def hash_file(path: Path) -> str:
    """blake2b of the file's content, 16 bytes as hex. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


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
        raise RunError(_unwritable(error.filename or path, error.strerror or error)) from error


@contextmanager
def working(folder: Path) -> Iterator[None]:
    """Turns what the system refuses while a stage works in `folder` into RunErrors; potstill's own errors pass."""
    try:
        yield
    except PotstillError:  # a SampleError is an OSError too, and says more
        raise
    except OSError as error:
        raise RunError(_refusal(folder, error)) from error
    except SafetensorError as error:
        raise RunError(_unwritable(folder, error) if "os error" in str(error) else _stuck(folder, error)) from error


def _refusal(folder: Path, error: OSError) -> str:
    place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else folder
    inside = place.absolute().is_relative_to(folder.absolute())
    if error.errno in FULL or (error.errno in PROTECTED and inside):
        return _unwritable(place, error.strerror)
    return _stuck(folder, error)


def _unwritable(place: object, reason: object) -> str:
    return (
        f"run_dir: {place} cannot be written ({reason}). "
        "Free space or change its permissions, or choose another run_dir."
    )


def _stuck(folder: Path, reason: object) -> str:
    return f"run_dir: the stage in {folder} could not go on ({reason}). Mend that and run the same command again."
