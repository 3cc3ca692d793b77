from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from potstill.errors import SampleError
from potstill.samples import cache, fetch, sample_info

FETCH_IN_ANOTHER_PROCESS = """
import os, sys, time
from pathlib import Path
from potstill.samples import Sample, catalogue, fetch

def build(wheel, folder):
    (folder / "part.txt").write_text("begun")
    with open({log!r}, "a") as log:
        log.write("built\\n")
    {during_build}
    (folder / "small.txt").write_text("words")

catalogue.SAMPLES = (Sample("toy", "", "", "toy", "1.0", {sha256!r}, 1, 2**22, build),)
print(fetch("toy"))
"""


def tree(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def start_fetch(shelf, log: Path, during_build: str) -> subprocess.Popen[str]:
    code = FETCH_IN_ANOTHER_PROCESS.format(log=str(log), sha256=shelf.sample.sha256, during_build=during_build)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_sample_is_fetched_whole_and_leaves_no_scratch(shelf):
    folder = fetch("toy")
    assert (folder / "small.txt").read_text() == "words"
    assert folder.parent == shelf.cache
    assert tree(shelf.cache) == [shelf.sample.key]


def test_a_second_fetch_downloads_nothing(shelf):
    first = fetch("toy")
    shelf.wheel.unlink()
    assert fetch("toy", verify=True) == first


def test_a_data_sample_is_a_file(shelf, monkeypatch):
    shelf.change(monkeypatch, product="small.txt")
    assert fetch("toy").read_text() == "words"


def test_wrong_bytes_are_refused_unread_and_leave_nothing(shelf, monkeypatch):
    right = shelf.sample.sha256
    shelf.change(monkeypatch, sha256="0" * 64, build=lambda *_: pytest.fail("the wheel was opened"))
    with pytest.raises(SampleError) as caught:
        fetch("toy")
    assert right in str(caught.value)
    assert "0" * 64 in str(caught.value)
    assert tree(shelf.cache) == []


def damage_marker(folder: Path) -> None:
    (folder / "sample.json").write_text("[]")


def drop_marker(folder: Path) -> None:
    (folder / "sample.json").unlink()


def cut_large(folder: Path) -> None:
    os.truncate(folder / "large.bin", 5)


def alter_small(folder: Path) -> None:
    (folder / "small.txt").write_text("sword")


def drop_small(folder: Path) -> None:
    (folder / "small.txt").unlink()


@pytest.mark.parametrize("harm", [damage_marker, drop_marker, cut_large, alter_small, drop_small])
def test_a_damaged_copy_is_fetched_again_and_said_so(shelf, caplog, harm):
    folder = fetch("toy")
    harm(folder)
    assert fetch("toy") == folder
    assert (folder / "small.txt").read_text() == "words"
    assert (folder / "large.bin").stat().st_size == 2**20 + 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "damaged" in caplog.text
    assert tree(shelf.cache) == [shelf.sample.key]


def test_a_flipped_byte_in_a_large_file_is_found_by_verify(shelf, caplog):
    folder = fetch("toy")
    with (folder / "large.bin").open("r+b") as file:
        file.write(b"!")
    fetch("toy", verify=True)
    assert (folder / "large.bin").read_bytes()[:1] == b"\0"
    assert "large.bin" in caplog.text


def test_a_kill_during_the_conversion_leaves_nothing_that_counts(shelf, tmp_path):
    child = start_fetch(shelf, tmp_path / "log", f"os.kill(os.getpid(), {int(signal.SIGKILL)})")
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert not (shelf.cache / shelf.sample.key).exists()
    assert (fetch("toy") / "small.txt").read_text() == "words"
    assert tree(shelf.cache) == [shelf.sample.key]


def test_two_processes_fetch_once(shelf, tmp_path):
    children = [start_fetch(shelf, tmp_path / "log", "time.sleep(0.5)") for _ in range(2)]
    printed = {child.communicate(timeout=60)[0] for child in children}
    assert printed == {f"{shelf.cache / shelf.sample.key}\n"}
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_full_disk_is_named_before_anything_is_downloaded(shelf, monkeypatch):
    shelf.change(monkeypatch, work_bytes=2**60)
    with pytest.raises(SampleError, match=r"sample:toy: needs .* MB .* free\. Make room"):
        fetch("toy")


def test_a_cache_that_cannot_be_written_is_named(shelf, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "file"))
    with pytest.raises(SampleError, match=r"cannot write to the cache folder .*Set POTSTILL_CACHE"):
        fetch("toy")


def test_without_the_variable_the_users_cache_folder_is_used(shelf, monkeypatch, tmp_path):
    monkeypatch.delenv("POTSTILL_CACHE")
    monkeypatch.setattr(cache.platformdirs, "user_cache_dir", lambda _: str(tmp_path / "mine"))
    assert fetch("toy").is_relative_to(tmp_path / "mine" / "samples")


@pytest.mark.sample
@pytest.mark.parametrize("name", ["chat-templates", "news-articles", "smollm2-135m-instruct"])
def test_the_real_samples_are_here_and_whole(name):
    assert fetch(name, verify=True).exists()
    assert (cache._samples_folder() / sample_info(name).key / "LICENSE").stat().st_size > 1000
