"""Large files beside the records of a store, such as a teacher's head: kept once, under a name that bears their hash.

Refuses names that lead elsewhere, and a second file under a name whose first is whole.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

from potstill.errors import StoreError
from potstill.signals.places import Place, refusals, sync_file

__all__ = ["file_is_whole", "find_file", "keep_file"]

FILE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,99})\.([0-9a-f]{32})")
"""NAME.HASH"""


def keep_file(place: Place, name: str, path: Path) -> None:
    """Copies the file at `path` into the store. A whole one of the same content is left, a damaged one replaced.

    Raises ValueError for a name that is no plain file name, StoreError where another file has it, or nothing can be
    written.
    """
    with refusals(place.name):
        final = f"{_checked(name)}.{_hash(path)}"
    for there in _versions(place, name):
        if not file_is_whole(place, there):
            place.remove(f"files/{there}")
        elif there != final:
            raise StoreError(
                f"signals.store: {place.name} has another file {name} ({there}; this one is {final}). Choose another "
                "place for the signals of this teacher."
            )
        else:
            return
    part = place.part(f"files/{final}")
    try:
        with refusals(place.name):
            shutil.copyfile(path, part)
            sync_file(part)
        place.publish(part, f"files/{final}")
    finally:
        part.unlink(missing_ok=True)


def find_file(place: Place, name: str) -> Path:
    """A path on this machine with the content that was kept under `name`; its hash is checked.

    Raises ValueError for a name that is no plain file name, StoreError where there is none, or none that is whole.
    """
    there = _versions(place, _checked(name))
    for version in there:
        path = place.fetch(f"files/{version}")
        with refusals(place.name):
            whole = _hash(path) == version.rpartition(".")[2]
        if whole or file_is_whole(place, version):  # the copy may be damaged where the original is not
            return path
    state = "is damaged" if there else "is not there"
    raise StoreError(
        f"signals.store: the file {name} of {place.name} {state}. Run the same command again: it is written anew."
    )


def file_is_whole(place: Place, version: str) -> bool:
    """Whether a file NAME.HASH of the store has the content of which the hash was taken. Raises StoreError."""
    with refusals(place.name):
        return _hash(place.fetch(f"files/{version}", again=True)) == version.rpartition(".")[2]


def _versions(place: Place, name: str) -> list[str]:
    matches = (FILE.fullmatch(there) for there in sorted(place.list("files")))
    return [match[0] for match in matches if match and match[1] == name]


def _checked(name: str) -> str:
    if not FILE.fullmatch(f"{name}.{'0' * 32}"):
        raise ValueError(f"a file of a store has a plain name of letters, digits, '.', '_' and '-'; got {name!r}")
    return name


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
