"""A run with compiled blocks: the student of a run that was interrupted is the one of a run that was not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

STOP_AFTER = """
import sys
import potstill.training.loop as loop
take, steps = loop._take_step, []
def take_and_count(*arguments):
    steps.append(1)
    return take(*arguments)
loop._take_step = take_and_count
from potstill.pipeline.stopping import Stopping
limit = int(sys.argv[1])
if limit:
    Stopping.asked = lambda self: len(steps) >= limit
sys.argv = ["potstill", *sys.argv[2:]]
from potstill.cli import main
main()
"""


def run(recipe: Path, folder: Path, stop_after: int) -> int:
    sets = ["training.compile=true", "training.steps=8", "training.micro_batch_rows=2", f"run_dir={folder}"]
    arguments = [part for change in sets for part in ("--set", change)]
    command = [sys.executable, "-c", STOP_AFTER, str(stop_after), "control", str(recipe), *arguments]
    return subprocess.run(command, check=False, capture_output=True).returncode


def test_interrupted_in_both_arms_a_compiled_run_ends_bitwise_alike(tiny_recipe: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(tiny_recipe, whole, 0) == 0
    assert run(tiny_recipe, broken, 5) == 130
    assert run(tiny_recipe, broken, 6) == 130  # the rest of train, and some steps of control
    assert run(tiny_recipe, broken, 0) == 0
    for arm in ("train", "control"):
        first, second = (load_file(folder / arm / "student" / "model.safetensors") for folder in (whole, broken))
        assert all(first[name].equal(second[name]) for name in first)
