"""Where the models and data of a recipe are, and which they are: samples fetched, .gguf files converted, each once.

Importing this module is cheap, so that a finished run is recognised at once. Refuses to open a model or a data file.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import platformdirs
from filelock import FileLock

from potstill import samples
from potstill.errors import ModelError, RecipeError
from potstill.pipeline.disk import sync_tree
from potstill.recipes import fingerprint

__all__ = ["STUDENT", "identify", "resolve_data", "resolve_model", "source_bytes"]

SAMPLE = "sample:"

STUDENT = "student"
"""Folder name of a model within a stage."""


def resolve_model(model: str, key: str) -> str:
    """A folder or hub id for what a recipe calls a model; fetches samples and converts .gguf files, each once.

    Raises RecipeError or ModelError naming `key`, SampleError for a sample that cannot be had.
    """
    if model.startswith(SAMPLE):
        return str(samples.fetch(model.removeprefix(SAMPLE)))
    path = Path(model).expanduser()
    if model.endswith(".gguf"):
        return str(_convert_once(path, key))
    return str(path) if path.is_dir() else model


def resolve_data(source: str) -> str:
    """A path or hub id for what a recipe calls a data source; fetches samples."""
    return str(samples.fetch(source.removeprefix(SAMPLE))) if source.startswith(SAMPLE) else source


def identify(source: str) -> str:
    """Which model or data this is, for fingerprints: another file or folder content is another identity.

    Files count by name, size and time of change; nothing is fetched or read. Raises SampleError for an unknown sample.
    """
    if source.startswith(SAMPLE):
        return samples.sample_info(source.removeprefix(SAMPLE)).key
    return fingerprint([source, *map(_describe_file, _files(source))])


def source_bytes(source: str) -> int:
    """Bytes of the files of a resolved data source; 0 where they are not on this machine."""
    return sum(path.stat().st_size for path in _files(source))


def _files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    return [path] if path.is_file() else []


def _describe_file(path: Path) -> list[str | int]:
    stat = path.stat()
    return [path.name, stat.st_size, stat.st_mtime_ns]


def _convert_once(path: Path, key: str) -> Path:
    """The model folder of a .gguf file in the cache; made aside and renamed, so that it is whole or absent."""
    if not path.is_file():
        raise RecipeError(f"{key}: {path} does not exist. Give the path of a .gguf file, a folder, or a hub id.")
    root = Path(os.environ.get("POTSTILL_CACHE") or platformdirs.user_cache_dir("potstill")).expanduser() / "gguf"
    folder = root / identify(str(path.absolute()))
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():  # else whoever held the lock has made it
                _convert(path, folder)
    except OSError as error:
        raise ModelError(
            f"{key}: {path} cannot be converted in the cache folder {root} ({error.strerror or error}). "
            "Free some space there, or set POTSTILL_CACHE to another folder."
        ) from error
    return folder


def _convert(path: Path, folder: Path) -> None:
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a conversion that was killed
    samples.convert_gguf(path, part)
    sync_tree(part)
    part.rename(folder)
