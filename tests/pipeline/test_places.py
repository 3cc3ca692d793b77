from __future__ import annotations

import os
from pathlib import Path

import pytest

from potstill.errors import ModelError, RecipeError, SampleError
from potstill.pipeline import places
from potstill.pipeline.places import identify, resolve_model, source_bytes


@pytest.fixture
def conversions(monkeypatch, tmp_path) -> list[Path]:
    """Makes the converter write one small file; every conversion is noted."""
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    done: list[Path] = []

    def convert(gguf_file: Path, folder: Path) -> None:
        done.append(folder)
        folder.mkdir()
        (folder / "config.json").write_text(gguf_file.read_text())

    monkeypatch.setattr(places.samples, "convert_gguf", convert)
    return done


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(conversions, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_text("first")
    folder = Path(resolve_model(str(file), "teacher.model"))
    assert resolve_model(str(file), "teacher.model") == str(folder)
    assert (folder / "config.json").read_text() == "first"
    assert len(conversions) == 1
    file.write_text("second, longer")
    other = Path(resolve_model(str(file), "teacher.model"))
    assert other != folder
    assert (other / "config.json").read_text() == "second, longer"


def test_a_conversion_is_whole_or_absent(conversions, tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    file.write_text("whole")
    convert = places.samples.convert_gguf

    def fail(gguf_file: Path, folder: Path) -> None:
        convert(gguf_file, folder)
        (folder / "half").write_text("written when the power went")
        raise ModelError("cut short")

    monkeypatch.setattr(places.samples, "convert_gguf", fail)
    with pytest.raises(ModelError, match="cut short"):
        resolve_model(str(file), "teacher.model")
    assert conversions[0].name.endswith(".part")
    monkeypatch.setattr(places.samples, "convert_gguf", convert)
    folder = Path(resolve_model(str(file), "teacher.model"))
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert not conversions[0].exists()


def test_a_gguf_file_that_is_not_there_is_named():
    with pytest.raises(RecipeError, match=r"student\.model: /nowhere/x\.gguf does not exist\. Give"):
        resolve_model("/nowhere/x.gguf", "student.model")


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "file"))
    (tmp_path / "model.gguf").write_text("x")
    with pytest.raises(
        ModelError, match=r"teacher\.model: .* cannot be converted in the cache folder .* POTSTILL_CACHE"
    ):
        resolve_model(str(tmp_path / "model.gguf"), "teacher.model")


def test_what_a_source_is_changes_with_its_files_and_with_nothing_else(tmp_path):
    file = tmp_path / "words.jsonl"
    file.write_text("{}")
    before = identify(str(file)), identify(str(tmp_path))
    assert (identify(str(file)), identify(str(tmp_path))) == before
    os.utime(file, ns=(1, 1))
    after = identify(str(file)), identify(str(tmp_path))
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert identify("org/name") == identify("org/name") != identify("org/other")


def test_a_sample_is_identified_without_fetching_it(monkeypatch, tmp_path):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    assert identify("sample:news-articles").startswith("news-articles-")
    assert not list(tmp_path.iterdir())
    with pytest.raises(SampleError, match="Did you mean"):
        identify("sample:news")


def test_bytes_of_a_source_are_those_of_its_files(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "b").write_bytes(b"12345")
    assert source_bytes(str(tmp_path)) == 8
    assert source_bytes(str(tmp_path / "a")) == 3
    assert source_bytes("org/name") == 0
