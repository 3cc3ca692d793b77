"""A package index in a folder, with one tiny wheel: pip is real, the network is not needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import ZipFile

import pytest

from potstill.samples import Sample, catalogue


@dataclass
class Shelf:
    """The sample `toy` of a fake catalogue, the folder that serves as its index, and its cache."""

    sample: Sample
    wheel: Path
    cache: Path

    def change(self, monkeypatch: pytest.MonkeyPatch, **fields: object) -> None:
        self.sample = replace(self.sample, **fields)
        monkeypatch.setattr(catalogue, "SAMPLES", (self.sample,))


def build_toy(wheel: Path, folder: Path) -> None:
    with ZipFile(wheel) as archive:
        (folder / "small.txt").write_bytes(archive.read("toy/data.txt"))
    (folder / "large.bin").write_bytes(bytes(2**20 + 1))


def write_wheel(folder: Path, name: str, members: dict[str, str | bytes]) -> Path:
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with ZipFile(wheel, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/LICENSE", "as you like it")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def make_wheel(tmp_path: Path) -> Callable[[dict[str, str | bytes]], Path]:
    """Write a wheel `toy` 1.0 with these members and the usual metadata."""
    index = tmp_path / "index"
    index.mkdir()
    return lambda members: write_wheel(index, "toy", members)


@pytest.fixture
def shelf(tmp_path: Path, make_wheel: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Shelf:
    wheel = make_wheel({"toy/data.txt": "words"})
    sample = Sample(
        name="toy",
        about="a toy",
        licence="none",
        package="toy",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        work_bytes=2**22,
        build=build_toy,
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalogue, "SAMPLES", (sample,))
    return Shelf(sample, wheel, tmp_path / "cache" / "samples")
