"""The quickstart recipe on the real sample model, cut down to a few steps: what a user sees at the end of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ARMS = {"teacher", "untrained", "control", "student"}
SHORT = {
    "student.keep": "even",
    "data.max_documents": 120,
    "data.sequence_length": 64,
    "data.splits": "{validation: 0.1, test: 0.1}",
    "training": "{steps: 3, batch_rows: 2, validation_rows: 2, validate_every: 3, learning_rate: 5e-4}",
    "evaluation": "{max_rows: 4, sample_prompts: 1, sample_tokens: 4, speed: false, resamples: 200}",
}

pytestmark = [pytest.mark.sample, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    options = [part for key, value in SHORT.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-c", "from potstill.cli import main; main()", "run", "quickstart", *options]
    finished = subprocess.run(
        [*command, "--set", f"run_dir={folder}"], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert finished.returncode == 0, finished.stderr
    assert f"report at {folder / 'report' / 'index.html'}" in finished.stdout
    return folder


def test_every_arm_is_measured_on_the_same_held_out_text(run):
    rows = json.loads((run / "evaluate" / "measurements.json").read_text())
    assert all(set(row) == {"arm", "name", "slice", "value", "low", "high", "n", "unit"} for row in rows)
    value = {(row["arm"], row["name"]): row["value"] for row in rows}
    assert {arm for arm, _ in value} == ARMS
    assert value["teacher", "nll"] < 5  # the sample is a language model, and the text is English
    assert value["teacher", "nll"] < value["untrained", "nll"]
    assert value["student", "kl_to_teacher"] < value["untrained", "kl_to_teacher"]
    assert 0.4 < value["student", "parameters"] / value["teacher", "parameters"] < 0.8
    assert {name for arm, name in value if arm == "student"} >= {"kl_gain_over_control", "recovered_kl", "retention"}


def test_the_report_and_the_card_tell_it(run):
    page = (run / "report" / "index.html").read_text()
    for word in ("quickstart", "15-layer student", "smollm2-135m-instruct", "Agreement"):
        assert word in page
    assert "https://cdn" not in page
    assert "| " in (run / "report" / "report.md").read_text()
    assert (run / "train" / "student" / "README.md").read_text().startswith("---")


def test_the_student_loads_and_writes(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student = AutoModelForCausalLM.from_pretrained(run / "train" / "student")
    tokenizer = AutoTokenizer.from_pretrained(run / "train" / "student")
    ids = tokenizer("The minister said", return_tensors="pt")
    assert student.config.num_hidden_layers == 15
    assert student.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 4
    assert tokenizer.chat_template
