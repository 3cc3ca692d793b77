"""The whole walk on a tiny model: what is redone, what is not, and that a killed run ends as an undisturbed one."""

from __future__ import annotations

import json
import logging
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.pipeline.killing import finish_killed, finish_undisturbed

from potstill.errors import DataError, NonFiniteError, RecipeError, RunError, VocabularyMismatch
from potstill.pipeline.run import STAGES, explain_run, run_recipe
from potstill.pipeline.rundir import RunDir
from potstill.recipes import Recipe, load_recipe
from potstill.training import CheckpointStore

ONLINE = tuple(name for name in STAGES if name not in ("generate", "finetune", "capture", "static"))
"""The stages of a recipe whose teacher is asked as lessons come."""


@pytest.fixture
def load(tiny_recipe: Path):
    return lambda *overrides: load_recipe(tiny_recipe, overrides)


def weights(recipe: Recipe, arm: str = "train") -> bytes:
    return (recipe.folder / arm / "student" / "model.safetensors").read_bytes()


def measurements(recipe: Recipe) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((recipe.folder / "evaluate" / "measurements.json").read_text())
    return found


def measured(recipe: Recipe, arm: str, name: str) -> float:
    return next(row["value"] for row in measurements(recipe) if (row["arm"], row["name"]) == (arm, name))


def metrics(recipe: Recipe, arm: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (recipe.folder / arm / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, write_tiny_recipe) -> Path:
    """Folder of a finished run of the tiny recipe. Copy it before anything is run in it."""
    folder = tmp_path_factory.mktemp("finished")
    run_recipe(load_recipe(write_tiny_recipe(folder)))
    return folder / "run"


@pytest.fixture
def continued(finished, tmp_path) -> None:
    """Puts the finished run where the tiny recipe runs."""
    shutil.copytree(finished, tmp_path / "run")


@pytest.mark.usefixtures("continued")
def test_a_run_ends_with_a_report_and_students_that_load_anywhere(load):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = load()
    for arm in ("initialise", "train", "control"):
        model = AutoModelForCausalLM.from_pretrained(recipe.folder / arm / "student")
        tokenizer = AutoTokenizer.from_pretrained(recipe.folder / arm / "student")
        assert model.config.num_hidden_layers == 2
        assert tokenizer.chat_template
    assert [status.state for status in explain_run(recipe)] == ["done"] * len(ONLINE)
    assert "tiny" in (recipe.folder / "report" / "index.html").read_text()
    assert (recipe.folder / "train" / "student" / "README.md").is_file()
    assert measured(recipe, "student", "kl_to_teacher") < measured(recipe, "untrained", "kl_to_teacher")
    assert measured(recipe, "teacher", "nll") > 0
    assert [line["step"] for line in metrics(recipe)] == list(range(1, 21))
    assert not (recipe.folder / "train" / "checkpoints").exists()
    samples = json.loads((recipe.folder / "evaluate" / "samples.json").read_text())
    assert len(samples) == 2
    assert set(samples[0]["completions"]) == {"teacher", "untrained", "control", "student"}


@pytest.mark.usefixtures("continued")
def test_nothing_is_done_twice(load, caplog):
    caplog.set_level(logging.INFO)
    assert run_recipe(load()) == load().folder
    assert "all done before: nothing to do" in caplog.text
    assert "in 0 s" not in caplog.text  # what a stage says when it was done


@pytest.mark.usefixtures("continued")
def test_what_else_lies_in_the_current_directory_is_no_part_of_a_run(load, tmp_path, monkeypatch):
    recipe = load()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert {status.state for status in explain_run(recipe)} == {"done"}


@pytest.mark.usefixtures("continued")
def test_only_stale_stages_are_done_again(load, caplog):
    caplog.set_level(logging.INFO)
    recipe = load("evaluation.max_rows=4")
    before = {name: RunDir(recipe.folder).manifest(name) for name in ONLINE}
    run_recipe(recipe)
    after = {name: RunDir(recipe.folder).manifest(name) for name in ONLINE}
    assert [name for name in ONLINE if after[name] != before[name]] == ["evaluate", "report"]
    assert "evaluate: stale (finished" in caplog.text


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ("evaluation.max_rows=4", ["evaluate", "report"]),
        ("evaluation.sample_tokens=5", ["evaluate", "report"]),
        ("report.title=Another", ["report"]),
        ("training.checkpoint.every_steps=7", []),
        ("losses[0].temperature=2", ["train", "evaluate", "report"]),
        ("control.enabled=false", ["evaluate", "report"]),
        ("training.learning_rate=2e-3", ["train", "control", "evaluate", "report"]),
        ("student.count=3", ["initialise", "train", "control", "evaluate", "report"]),
        ("data.sequence_length=16", list(ONLINE)),
    ],
)
@pytest.mark.usefixtures("continued")
def test_a_changed_recipe_makes_stale_what_it_changes_and_no_more(load, change, stages):
    states = {status.stage: status.state for status in explain_run(load(change))}
    assert [stage for stage, state in states.items() if state == "stale"] == stages
    assert set(states.values()) <= {"done", "stale"}


def test_up_to_a_stage_and_no_further(load):
    recipe = load()
    run_recipe(recipe, until="initialise")
    states = {status.stage: status.state for status in explain_run(recipe)}
    assert states["initialise"] == "done"
    assert states["train"] == "missing"


def test_a_stage_that_the_recipe_switches_off_is_refused(load):
    with pytest.raises(RecipeError, match=r"control\.enabled: false"):
        run_recipe(load("control.enabled=false"), until="control")


# Interruptions


@pytest.fixture(scope="session")
def processes():
    """Processes forked from a server that has imported all and computed nothing: quick to start, safe to kill."""
    context = multiprocessing.get_context("forkserver")
    ours = [f"potstill.pipeline.{name}" for name in ("arms", "judge", "run", "telling")]
    theirs = ["torch._dynamo", "transformers.models.llama.modeling_llama", "transformers.generation.utils"]
    context.set_forkserver_preload([*ours, *theirs])
    return context


def check_killed_runs_end_alike(processes, load, tmp_path: Path, kills: int) -> None:
    length = "training.steps=60"
    undisturbed, killed = load(length), load(length, f"run_dir={tmp_path / 'killed'}")
    seconds = finish_undisturbed(processes, undisturbed)
    assert finish_killed(processes, killed, kills, seconds) > 0
    assert weights(killed) == weights(undisturbed)
    assert weights(killed, "control") == weights(undisturbed, "control")
    assert measurements(killed) == measurements(undisturbed)
    for arm in ("train", "control"):
        lines, expected = metrics(killed, arm), metrics(undisturbed, arm)
        assert [line | {"seconds": 0} for line in lines] == [line | {"seconds": 0} for line in expected]


def test_killed_three_times_a_run_ends_as_if_undisturbed(processes, load, tmp_path):
    check_killed_runs_end_alike(processes, load, tmp_path, 3)


@pytest.mark.slow
def test_killed_fifteen_times_a_run_ends_as_if_undisturbed(processes, load, tmp_path):
    check_killed_runs_end_alike(processes, load, tmp_path, 15)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(load, tmp_path, caplog, monkeypatch):
    undisturbed = load()
    run_recipe(undisturbed, until="train")
    recipe = load(f"run_dir={tmp_path / 'damaged'}")
    stop_after_checkpoints(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, until="train")
    monkeypatch.undo()
    newest = recipe.folder / "train" / "checkpoints" / "step-000000008" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    run_recipe(recipe, until="train")
    assert "step-000000008 is damaged" in caplog.text
    assert weights(recipe) == weights(undisturbed)


def stop_after_checkpoints(monkeypatch, count: int) -> None:
    save = CheckpointStore.save
    saved = []

    def save_and_stop(self, step, state):
        path = save(self, step, state)
        saved.append(step)
        if len(saved) == count:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(CheckpointStore, "save", save_and_stop)


def test_a_loss_that_is_no_number_stops_with_the_examples_named(load):
    with pytest.raises(NonFiniteError, match=r"in step \d+.*doc-"):
        run_recipe(load("training.learning_rate=1e30", "training.clip_norm="))


# What cannot be run is refused before anything is done


def test_a_full_disk_is_noticed_before_the_stage_begins(load, monkeypatch):
    recipe = load()
    run_recipe(recipe, until="prepare")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(RunError, match=r"run_dir: .* GB free, but the stage initialise needs"):
        run_recipe(recipe)
    assert not (recipe.folder / "initialise").exists()


def test_a_split_without_documents_is_named(load, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"text": f"Document number {index}."}) + "\n" for index in range(3)))
    shares = "data.splits={validation: 0.45, test: 0.001}"
    with pytest.raises(DataError, match=r"data\.splits\.test: of 3 documents none fell into the test split\. Raise it"):
        run_recipe(load(f"data.source={few}", shares, "seed=2"))


# Students and losses of every kind


def test_a_greedy_student_keeps_as_many_layers_as_asked(load):
    recipe = load("student={kind: layers, keep: greedy, count: 2}", "training.steps=2")
    run_recipe(recipe, until="initialise")
    facts = RunDir(recipe.folder).manifest("initialise").facts
    assert len(facts["layers"]) == len(facts["removed"]) == 2


def test_a_pretrained_student_starts_from_its_own_weights(load, tmp_path, tiny_llama):
    own = smaller_model(tiny_llama, tmp_path / "own")
    recipe = load(f"student={{kind: model, model: {own}}}", "training.steps=3")
    run_recipe(recipe)
    start, given = (
        load_file(recipe.folder / "initialise" / "student" / "model.safetensors"),
        load_file(own / "model.safetensors"),
    )
    assert all(torch.equal(start[name], given[name]) for name in given)


def test_a_fresh_student_has_the_sizes_asked_for(load):
    sizes = "{num_hidden_layers: 1, hidden_size: 16, num_attention_heads: 2, num_key_value_heads: 1}"
    recipe = load(
        f"student={{kind: config, config: {sizes}}}",
        "losses=[{kind: forward_kl}, {kind: hidden_mse, layers: {0: 1, 1: 4}}]",
        "training.steps=3",
    )
    run_recipe(recipe)
    config = json.loads((recipe.folder / "train" / "student" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (1, 16)


def smaller_model(like: Path, folder: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(like)
    config.num_hidden_layers = 1
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "losses",
    [
        "[{kind: reverse_kl}]",
        "[{kind: cross_entropy, weight: 0.3}, {kind: forward_kl, weight: 0.7, temperature: 2}]",
        "[{kind: cross_entropy, weight: 0.2}, {kind: forward_kl, weight: 0.5, temperature: 2}, {kind: hidden_cosine}]",
        "[{kind: forward_kl}, {kind: hidden_mse, layers: even}]",
        "[{kind: hidden_cosine, layers: {0: 0, 2: 3}}]",
        "[{kind: cross_entropy}]",
    ],
    ids=["reverse", "alpha", "distilgpt2", "even", "explicit", "hard"],
)
def test_every_loss_falls_when_it_is_trained(load, losses):
    recipe = load(f"losses={losses}", "control.enabled=false", "training.steps=25")
    run_recipe(recipe, until="train")
    values = [line["loss"] for line in metrics(recipe)]
    assert sum(values[-5:]) < sum(values[:5])


def test_accumulated_micro_batches_give_the_same_student(load, tmp_path):
    whole = load("training.batch_rows=8", "training.steps=4")
    parts = load(
        "training.batch_rows=8", "training.steps=4", "training.micro_batch_rows=2", f"run_dir={tmp_path / 'p'}"
    )
    for recipe in (whole, parts):
        run_recipe(recipe, until="train")
    for ours, theirs in zip(metrics(parts), metrics(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_tensorboard_gets_the_numbers_too(load):
    recipe = load("training.trackers=[tensorboard]", "training.steps=3", "control.enabled=false")
    run_recipe(recipe, until="train")
    assert list((recipe.folder / "train").rglob("events.out.tfevents*"))


def test_half_precision_arms_are_evaluated_as_they_were_trained(load, monkeypatch):
    from potstill.pipeline import build

    seen = {}
    whole = build.build_engine

    def build_engine(model, dtype, device, key, **others):
        seen[key] = dtype
        return whole(model, dtype, device, key, **others)

    monkeypatch.setattr(build, "build_engine", build_engine)
    run_recipe(load("training.precision=bf16", "training.steps=2"))
    assert seen["teacher.model"] == "fp32"
    assert {seen[f"evaluate ({arm})"] for arm in ("untrained", "control", "student")} == {"bf16"}


def test_speed_and_memory_are_measured_for_every_arm(load):
    recipe = load("evaluation.speed=true", "training.steps=2", "control.enabled=false")
    run_recipe(recipe)
    for arm in ("teacher", "untrained", "student"):
        assert measured(recipe, arm, "decode_tokens_per_s") > 0
        assert measured(recipe, arm, "prefill_tokens_per_s") > 0
        assert abs(measured(recipe, arm, "peak_memory_bytes")) < 500e6  # torch alone takes more than a tiny arm
    peak = RunDir(recipe.folder).manifest("evaluate").peak_rss_bytes
    assert peak > 200e6


def test_conversations_from_end_to_end(load, tmp_path):
    chats = tmp_path / "chats.jsonl"
    turns = [
        [
            {"role": "user", "content": f"What comes after {number}?"},
            {"role": "assistant", "content": f"After {number} comes {number + 1}."},
        ]
        for number in range(120)
    ]
    chats.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    recipe = load(f"data.source={chats}", "data.sequence_length=64", "training.steps=3")
    run_recipe(recipe)
    sample = json.loads((recipe.folder / "evaluate" / "samples.json").read_text())[0]
    assert sample["prompt"].startswith("<|im_start|>user\nWhat comes after")
    assert sample["prompt"].endswith("<|im_start|>assistant\n")
    assert sample["reference"].startswith("After")


def test_vocabularies_that_differ_are_refused_before_anything_is_done(load, tmp_path, tiny_llama):
    other = swap_tokens(smaller_model(tiny_llama, tmp_path / "other"))
    recipe = load(f"student={{kind: model, model: {other}}}")
    with pytest.raises(VocabularyMismatch, match=r"student\.model: its tokenizer has"):
        run_recipe(recipe)
    assert not (recipe.folder / "prepare").exists()


def swap_tokens(folder: Path) -> Path:
    """Gives two ordinary tokens each other's numbers."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    return folder
