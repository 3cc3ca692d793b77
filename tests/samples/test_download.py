from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from potstill.errors import SampleError
from potstill.samples.download import download_wheel, hash_file


def test_the_wheel_is_the_pinned_one(shelf, tmp_path):
    assert hash_file(download_wheel(shelf.sample, tmp_path / "got")) == shelf.sample.sha256


def test_an_altered_wheel_is_deleted_so_that_the_next_try_downloads_again(shelf, tmp_path):
    whole = shelf.wheel.read_bytes()
    shelf.wheel.write_bytes(whole + b"!")
    with pytest.raises(SampleError, match=hashlib.sha256(whole + b"!").hexdigest()):
        download_wheel(shelf.sample, tmp_path / "got")
    assert list((tmp_path / "got").iterdir()) == []
    shelf.wheel.write_bytes(whole)
    assert download_wheel(shelf.sample, tmp_path / "got").read_bytes() == whole


def test_pips_own_complaint_reaches_the_user_in_one_line(shelf, tmp_path):
    shelf.wheel.unlink()
    with pytest.raises(SampleError, match=r"sample:toy: pip could not download toy==1\.0: .*toy==1\.0") as caught:
        download_wheel(shelf.sample, tmp_path / "got")
    assert "\n" not in str(caught.value)


def test_without_pip_the_error_says_how_to_get_it(shelf, tmp_path, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(SampleError, match=r"no pip module.*ensurepip"):
        download_wheel(shelf.sample, tmp_path)


def test_a_module_in_the_current_folder_cannot_break_pip(shelf, tmp_path, monkeypatch):
    (tmp_path / "logging.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    assert isinstance(download_wheel(shelf.sample, tmp_path / "got"), Path)


def test_looking_for_pip_leaves_the_distutils_that_compiling_needs():
    pytest.importorskip("setuptools")
    program = (
        "from potstill.samples import sample_info; from potstill.samples.download import _need_pip;"
        "_need_pip(sample_info('news-articles')); import distutils.core, setuptools"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
