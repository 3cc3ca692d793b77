"""Where the files of a store lie: a folder of this machine; what is elsewhere has the same protocol.

A file is whole under its final name or not there, whenever the power goes. Refuses to overwrite: files of a store never
change, they only come.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from potstill.errors import StoreError

__all__ = ["FULL", "LocalPlace", "Place", "check_folder", "full", "refusals", "sync_file", "write_part"]

PARTIAL = ".partial"
"""Ending of a file that is still being written; its name begins with a dot, too."""

STALE_SECONDS = 3600.0
"""A partial file this old has no writer any more: the slowest disk writes a shard in less."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What the system says when a disk, or a share of it, is full."""


class Place(Protocol):
    """A folder with files in folders. Names are `FOLDER/NAME` or `NAME`. What the system refuses is a StoreError."""

    name: str
    """The place in the user's words."""

    copied: bool
    """Whether `fetch` gives a copy, which may be damaged where the original is not."""

    def list(self, folder: str) -> dict[str, int]:
        """Names of the files of a folder, with their sizes in bytes; hidden ones, which begin with a dot, left out."""
        ...

    def read(self, name: str) -> bytes | None:
        """A file's content, None where it is not there."""
        ...

    def fetch(self, name: str, *, again: bool = False) -> Path:
        """A path on this machine with the file's content; `again` renews a copy."""
        ...

    def part(self, name: str) -> Path:
        """A path on this machine under which `name` may be written before it is published."""
        ...

    def publish(self, part: Path, name: str) -> None:
        """Gives a finished, synced file its final name, durably. The part is gone afterwards."""
        ...

    def create(self, name: str, content: bytes) -> bool:
        """Publishes a small file unless it is there; whether it was this call that did."""
        ...

    def remove(self, name: str) -> None:
        """Deletes a file; absent is fine."""
        ...

    def sweep(self) -> None:
        """Deletes what writers that died long ago left half-written."""
        ...


class LocalPlace:
    """A folder of this machine. Nothing is made before the first file is written."""

    copied = False

    def __init__(self, folder: Path) -> None:
        """`folder` need not exist."""
        self.name, self.folder = str(folder), folder

    def list(self, folder: str) -> dict[str, int]:
        """Names and sizes; an absent folder has none. Raises StoreError."""
        with refusals(self.name):
            try:
                paths = list((self.folder / folder).iterdir())
            except FileNotFoundError:
                return {}
            sizes = {path.name: _size(path) for path in paths if not path.name.startswith(".")}
            return {name: size for name, size in sizes.items() if size is not None}

    def read(self, name: str) -> bytes | None:
        """The content, or None. Raises StoreError."""
        with refusals(self.name):
            try:
                return (self.folder / name).read_bytes()
            except FileNotFoundError:
                return None

    def fetch(self, name: str, *, again: bool = False) -> Path:  # noqa: ARG002  (there is no copy to renew)
        """The file itself."""
        return self.folder / name

    def part(self, name: str) -> Path:
        """A hidden name of its own in the folder of `name`, which is made. Raises StoreError."""
        final = self.folder / name
        with refusals(self.name):
            _make(final.parent)
            return final.with_name(f".{final.name}.{secrets.token_hex(4)}{PARTIAL}")

    def publish(self, part: Path, name: str) -> None:
        """A rename. Raises StoreError."""
        final = self.folder / name
        with refusals(self.name):
            part.replace(final)
            _sync(final.parent)

    def create(self, name: str, content: bytes) -> bool:
        """A link under the final name, so that of two processes one wins. Raises StoreError."""
        part, final = self.part(name), self.folder / name
        try:
            write_part(part, [content], self.name)
            with refusals(self.name):
                try:
                    os.link(part, final)
                except FileExistsError:
                    return False
                except OSError:  # a file system without links: who looks again after the rename sees the winner
                    if final.exists():
                        return False
                    part.replace(final)
                _sync(final.parent)
            return True
        finally:
            part.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Unlinks. Raises StoreError."""
        with refusals(self.name):
            (self.folder / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Looks in the folder and in the folders in it. Raises StoreError."""
        oldest = time.time() - STALE_SECONDS
        with refusals(self.name):
            for path in (*self.folder.glob(f".*{PARTIAL}"), *self.folder.glob(f"*/.*{PARTIAL}")):
                try:
                    if path.stat().st_mtime < oldest:
                        path.unlink()
                except FileNotFoundError:  # another process swept it, or its writer gave it its name
                    continue


def sync_file(path: Path) -> None:
    """Makes a file that is written survive a power cut. Raises OSError."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def write_part(part: Path, chunks: list[bytes | bytearray | memoryview], place: str) -> None:
    """Writes a file that is on the disk when this returns; where that fails nothing is left. Raises StoreError."""
    done = False
    try:
        with refusals(place), part.open("wb") as stream:
            for chunk in chunks:
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        done = True
    finally:
        if not done:
            part.unlink(missing_ok=True)


def check_folder(folder: Path) -> None:
    """Raises StoreError unless `folder` can be written, or made where it is not there yet; makes nothing."""
    nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "no permission" if nearest.is_dir() else "not a folder"
        raise StoreError(
            f"signals.store: {folder} cannot be written ({nearest}: {reason}). Change its permissions, or choose "
            "another place."
        )


@contextmanager
def refusals(place: str) -> Iterator[None]:
    """Turns what the system refuses into StoreErrors."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StoreError(full(place)) from error
        reason = (error.strerror or str(error)).partition("\n")[0]
        raise StoreError(
            f"signals.store: {place} cannot be used ({error.filename or place}: {reason}). Mend that, or choose "
            "another place."
        ) from error


def full(place: str) -> str:
    """What to say where there is no room left."""
    return (
        f"signals.store: {place} has no room left. What was committed is safe: free some space, and run the same "
        "command again."
    )


def _size(path: Path) -> int | None:
    """Bytes of a file; None where it is none, or went away after it was listed."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _make(folder: Path) -> None:
    """A folder whose name survives a power cut, with those above it that were not there."""
    absent = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in absent:
        _sync(one.parent)


def _sync(folder: Path) -> None:
    if os.name != "posix":  # Windows syncs no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
