"""What the report says of an arm's size."""

from __future__ import annotations

from pathlib import Path

import pytest

from potstill.pipeline import footprint


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """A cached model of 42 bytes, whose hub id is someone/tiny."""
    (tmp_path / "model.safetensors").write_bytes(b"x" * 42)
    monkeypatch.setattr(footprint, "find_folder", {"someone/tiny": tmp_path, str(tmp_path): tmp_path}.get)
    return tmp_path


def sizes(folder: Path) -> dict[str, float]:
    return {found.name: found.value for found in footprint.measure_sizes("teacher", 7, [str(folder)])}


def test_a_hub_id_weighs_as_much_as_its_copy_here(snapshot):
    assert sizes(Path("someone/tiny")) == sizes(snapshot) == {"parameters": 7, "folder_bytes": 42}


def test_without_a_copy_here_nothing_is_said_of_bytes(snapshot):
    assert sizes(Path("someone/else")) == {"parameters": 7}
