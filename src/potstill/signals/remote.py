"""Stores on object storage (s3://, gs://, az://) through fsspec: whole files go up, and copies of them come down.

Refuses a place of which it does not know that an upload is whole or absent, and asks for credentials by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from potstill.errors import MissingExtra, StoreError
from potstill.signals.places import FULL, LocalPlace, Place, check_folder, full

__all__ = ["RemotePlace", "check_place", "is_remote", "place_at"]

EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure", "memory": ""}
"""Protocol to pip extra. All of them publish an upload when it is complete, and not before."""

CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
    "azure": "AZURE_STORAGE_CONNECTION_STRING",
    "": "nothing",
}

SERVICE_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("gcsfs.retry", "HttpError"),
    ("azure.core.exceptions", "AzureError"),
    ("aiohttp", "ClientError"),
)
"""What the services' own packages raise that is no OSError."""


def is_remote(place: str) -> bool:
    """Whether `place` is an address, not a folder of this machine."""
    return "://" in place


def place_at(place: str | Path, cache: Path | None = None) -> Place:
    """The folder, or the address with `cache` as the folder of copies. Touches neither.

    Raises StoreError for an address of an unknown kind or without its credentials, MissingExtra where the package that
    reaches it is absent, ValueError for an address without a cache.
    """
    if not is_remote(str(place)):
        return LocalPlace(Path(place).expanduser())
    if cache is None:
        raise ValueError(f"{place}: an address needs a cache folder for copies of its files")
    return RemotePlace(str(place), cache)


def check_place(place: str | Path) -> None:
    """Raises StoreError where a store could not be kept at `place`, MissingExtra where a package is absent.

    A folder must be writable, or able to be made; an address must answer. Nothing is written.
    """
    if not is_remote(str(place)):
        check_folder(Path(place).expanduser())
        return
    RemotePlace(str(place), Path()).list("")


class RemotePlace:
    """An address of an object store. Files of a store never change, so that a copy that is there is good."""

    copied = True

    def __init__(self, address: str, cache: Path) -> None:
        """`cache` is made when the first file comes down or goes up. Raises StoreError, MissingExtra."""
        self.name = address
        self._extra = _extra(address)
        self._copies = LocalPlace(cache)
        self._files, self._root = self._connect()

    def list(self, folder: str) -> dict[str, int]:
        """Names and sizes, from the service and not from memory. Raises StoreError."""
        with self._reaching():
            self._files.invalidate_cache()
            try:
                found = self._files.ls(self._path(folder), detail=True)
            except FileNotFoundError:
                return {}
        sizes = {one["name"].rpartition("/")[2]: int(one["size"] or 0) for one in found if one["type"] == "file"}
        return {name: size for name, size in sizes.items() if name and not name.startswith(".")}

    def read(self, name: str) -> bytes | None:
        """The content, or None. Raises StoreError."""
        with self._reaching():
            try:
                return bytes(self._files.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def fetch(self, name: str, *, again: bool = False) -> Path:
        """A copy in the cache, downloaded where it is not there. Raises StoreError; none is left where that fails."""
        copy = self._copies.fetch(name)
        if again or not copy.exists():
            part = self._copies.part(name)
            try:
                with self._reaching():
                    self._files.get_file(self._path(name), str(part))
                self._copies.publish(part, name)
            finally:
                part.unlink(missing_ok=True)
        return copy

    def part(self, name: str) -> Path:
        """In the cache. Raises StoreError."""
        return self._copies.part(name)

    def publish(self, part: Path, name: str) -> None:
        """Uploads, and keeps the file as the copy. Raises StoreError."""
        with self._reaching():
            self._files.put_file(str(part), self._path(name))
        self._copies.publish(part, name)

    def create(self, name: str, content: bytes) -> bool:
        """An upload that the service refuses where the name is taken. Raises StoreError."""
        with self._reaching():
            try:
                self._files.pipe_file(self._path(name), content, mode="create")
            except FileExistsError:
                return False
        return True

    def remove(self, name: str) -> None:
        """Deletes the file and its copy. Raises StoreError."""
        with self._reaching(), suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))
        self._copies.remove(name)

    def sweep(self) -> None:
        """Deletes half-written copies; the service shows no half-written file. Raises StoreError."""
        self._copies.sweep()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _connect(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        with self._reaching():
            try:
                files, root = url_to_fs(self.name)
            except ImportError as error:
                raise MissingExtra(
                    f"signals.store: {self.name} needs a package that is not installed ({error}). Install it with "
                    f'pip install "potstill[{self._extra}]".'
                ) from error
        return files, root.rstrip("/")

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turns what the service, or its package, refuses into StoreErrors that name the credentials."""
        refused: tuple[type[Exception], ...] = (OSError, ValueError, *_service_errors())
        try:
            yield
        except refused as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise StoreError(full(self._copies.name)) from error
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise StoreError(
                f"signals.store: {self.name} cannot be reached ({reason}). Check the address and your network, set "
                f"{CREDENTIALS[self._extra]}, and run the same command again."
            ) from error


def _extra(address: str) -> str:
    protocol = address.partition("://")[0]
    if protocol not in EXTRAS:
        raise StoreError(
            f"signals.store: {address} is of an unknown kind. Use a folder, or an address that begins with s3://, "
            "gs:// or az://."
        )
    return EXTRAS[protocol]


def _service_errors() -> tuple[type[Exception], ...]:
    """Of the packages that are loaded: who is not loaded raises nothing."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in SERVICE_ERRORS)
    return tuple(kind for kind in found if isinstance(kind, type) and issubclass(kind, Exception))
