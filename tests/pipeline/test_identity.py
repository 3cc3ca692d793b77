"""A stage is done again where, and only where, something changed that decides its result."""

from __future__ import annotations

from pathlib import Path

import pytest

from potstill.pipeline.identity import stage_fingerprints
from potstill.recipes import load_recipe

INTENT = """\
name: intent
task: {kind: classification}
data: {source: questions.jsonl}
teacher: {kind: finetune, model: big, training: {epochs: 1}}
student: {kind: layers, keep: [0, 1]}
signals: {kind: dense}
losses: [{kind: forward_kl}]
static: {training: {epochs: 1}}
training: {epochs: 1}
"""
GENERAL = "phases=[{name: general, task: {kind: masked_lm}, signals: {kind: online}, training: {steps: 5}}]"
ALL = {"prepare", "finetune", "initialise", "capture", "train", "control", "static", "evaluate", "report"}
LATER = {"evaluate", "report"}
LEARNED = {"train", "static", *LATER}
BEGUN = ALL - {"prepare", "finetune"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(INTENT, encoding="utf-8")
    return tmp_path


def stale(*changes: str, base: tuple[str, ...] = ()) -> set[str]:
    """The stages whose fingerprint these changes change, or that they bring or take away."""
    before = stage_fingerprints(load_recipe("recipe.yaml", base))
    after = stage_fingerprints(load_recipe("recipe.yaml", [*base, *changes]))
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def test_every_stage_of_a_task_has_a_fingerprint_of_its_own(here):
    found = stage_fingerprints(load_recipe("recipe.yaml"))
    assert set(found) == ALL
    assert len(set(found.values())) == len(ALL)


CHANGES = [
    ("teacher.device=cpu", set()),
    ("training.trackers=[tensorboard]", set()),
    ("training.checkpoint.every_steps=3", set()),
    ("teacher.training.trackers=[tensorboard]", set()),
    ("static.training.trackers=[tensorboard]", set()),
    ("signals.batch_tokens=64", set()),
    ("run_dir=elsewhere", set()),
    ("data.label=intent", ALL),
    ("data.slice=channel", ALL),
    ("data.unlabelled=logs.jsonl", ALL),
    ("data.noise={}", ALL),
    ("data.labels_per_class=5", ALL),
    ("task.out_of_scope=other", ALL),
    ("task.multi_label=true", ALL),
    ("seed=1", ALL),
    ("teacher.model=bigger", ALL - {"prepare"}),
    ("teacher.training.epochs=2", ALL - {"prepare"}),
    ("teacher.learns=head", ALL - {"prepare"}),
    ("teacher.dtype=fp32", BEGUN),
    ("student.keep=[0, 2]", BEGUN),
    ("student.architecture=distilbert", BEGUN),
    ("losses[0].weight=2", LEARNED),
    ("losses[0].temperature=2", LEARNED | {"capture"}),
    ("training.learning_rate=1", {"train", "control", *LATER}),
    ("training.epochs=2", {"capture", "train", "control", *LATER}),
    ("static.dimensions=8", {"static", *LATER}),
    ("static.training.epochs=2", {"static", *LATER}),
    ("evaluation.price={machine_usd_per_hour: 1}", LATER),
    ("evaluation.precision=0.8", LATER),
    ("control.enabled=false", {"control", *LATER}),
    ("report.title=Intents", {"report"}),
]  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), CHANGES, ids=[change.partition("=")[0] for change, _ in CHANGES])
def test_a_change_makes_stale_what_it_decides_and_nothing_else(here, change, expected):
    assert stale(change) == expected


def test_where_features_are_kept_the_layers_that_are_compared_decide_what_is_captured(here):
    kept = ("signals={kind: dense, features: true}", "losses=[{kind: forward_kl}, {kind: hidden_mse}]")
    assert stale("losses[1].layers=even", base=kept) == LEARNED | {"capture"}


READY = "teacher={kind: local, model: ready}"


@pytest.mark.parametrize("other", ["{kind: local, model: other}", "{kind: mixture, members: [{model: a}, {model: b}]}"])
def test_classes_that_a_ready_teacher_names_are_read_again_with_another_teacher(here, other):
    """The recipe lists none, and a teacher that labels what nobody labelled may know other ones."""
    assert stale(f"teacher={other}", base=(READY,)) == ALL - {"finetune"}
    listed = (READY, "task.labels=[a, b]")
    assert "prepare" not in stale(f"teacher={other}", base=listed)


def test_a_folder_of_models_that_were_trained_first_serves_any_precision_and_device(here):
    """The finetuned teacher is kept: how it teaches afterwards is no reason to train it again."""
    assert not {"prepare", "finetune"} & stale("teacher.dtype=fp32", "teacher.device=cpu")


def test_another_content_of_the_data_or_of_recorded_answers_is_seen(here):
    said = "teacher={kind: recorded, path: said.jsonl, label: answer}"
    base = (said, "signals={kind: online}", "student={kind: model, model: m}", "static=")
    files = [here / "said.jsonl", here / "questions.jsonl"]
    for file in files:
        file.write_text("{}\n", encoding="utf-8")
    before = stage_fingerprints(load_recipe("recipe.yaml", base))
    files[0].write_text('{"text": "a", "answer": "b"}\n', encoding="utf-8")
    answered = stage_fingerprints(load_recipe("recipe.yaml", base))
    assert {name for name in before if before[name] != answered[name]} == set(before) - {"prepare"}
    files[1].write_text('{"text": "a"}\n', encoding="utf-8")
    asked = stage_fingerprints(load_recipe("recipe.yaml", base))
    assert {name for name in before if answered[name] != asked[name]} == set(before)


def test_a_change_in_an_earlier_phase_changes_the_student_that_begins_and_not_the_texts(here):
    assert stale("phases[0].training.steps=6", base=(GENERAL,)) == BEGUN
    assert stale("phases[0].losses=[{kind: reverse_kl}]", base=(GENERAL,)) == BEGUN


def test_what_changes_no_student_of_an_earlier_phase_changes_at_most_what_the_page_tells_of_it(here):
    assert stale("phases[0].evaluation={max_rows: 3}", base=(GENERAL,)) == {"report"}
    assert stale("phases[0].training.trackers=[tensorboard]", base=(GENERAL,)) == set()


def test_a_phase_before_another_reaches_the_last_through_it(here):
    two = GENERAL.replace("}]", "}, {name: middle, training: {steps: 5}}]")
    assert stale("phases[0].training.steps=6", base=(two,)) == BEGUN
    assert stale("phases[1].training.steps=6", base=(two,)) == BEGUN


def test_a_language_model_is_the_same_work_whether_or_not_its_task_is_named(here):
    named = stage_fingerprints(load_recipe("quickstart", ["task={kind: language_model}"]))
    assert named == stage_fingerprints(load_recipe("quickstart"))
