"""Laws of what a report is told: the run folder's facts in words, and nothing that is not there."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from potstill.pipeline.chain import phases_of
from potstill.pipeline.remarks import describe_term, remarks_on
from potstill.pipeline.run import stage_fingerprints
from potstill.pipeline.rundir import Manifest
from potstill.pipeline.telling import name_teacher, tell
from potstill.recipes import Recipe
from potstill.report import write_report
from potstill.types import Measurement

TRAINING = {"steps": 10}
FACTS = {
    "prepare": {
        "documents": {"train": 100, "validation": 10, "test": 20},
        "labels": ["bill", "card"],
        "labelled": {"train": 40, "validation": 10, "test": 20},
        "cleaning": {"kept: text": 130, "removed: repeated": 7},
    },
    "finetune": {"model": "bert", "learns": "head", "steps": 1234, "seconds": 9.5},
    "initialise": {"layers": [0, 5], "head": "fresh"},
    "train": {"overlong": 3, "lost_words": 1017},
    "evaluate": {"notes": ["no test text is out of scope"]},
}


def recipe_with(folder: Path, **keys) -> Recipe:
    (folder / "data.jsonl").write_text("{}")
    (folder / "bert").mkdir(exist_ok=True)
    return Recipe.model_validate(
        {
            "name": "planted",
            "run_dir": str(folder / "run"),
            "task": {"kind": "classification", "out_of_scope": "oos"},
            "data": {"source": str(folder / "data.jsonl"), "sequence_length": 64},
            "teacher": {"kind": "finetune", "model": str(folder / "bert"), "learns": "head", "training": TRAINING},
            "student": {"kind": "layers", "keep": [0, 5], "architecture": "distilbert"},
            "losses": [{"kind": "forward_kl"}, {"kind": "hidden_cosine", "layers": {"1": 3}}],
            "training": TRAINING,
            **keys,
        }
    )


def plant(recipe: Recipe, facts=None) -> None:
    """A finished run folder with these facts, without any model."""
    for stage, fingerprint in stage_fingerprints(recipe).items():
        folder = recipe.folder / stage
        folder.mkdir(parents=True)
        manifest = Manifest(
            stage=stage, fingerprint=fingerprint, inputs={}, outputs={}, versions={"potstill": "0"}, seed=0, attempts=1,
            wall_s=1.0, peak_rss_bytes=10**9, finished_at="now", facts=(facts or FACTS).get(stage, {}),
        )  # fmt: skip
        (folder / "manifest.json").write_text(manifest.model_dump_json())
        if stage in ("train", "control", "static"):
            line = {"step": 1, "tokens": 9, "seconds": 1.0, "loss": 2.0, "forward_kl": 2.0, "gradient_norm": 1.0,
                    "learning_rate": 0.1, "validation_forward_kl": 0.5, "validation_vector_cosine": 0.25}  # fmt: skip
            (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    sliced = [
        Measurement("student", "accuracy", "slice:web", 0.7, 0.6, 0.8, 5, "share"),
        Measurement("teacher", "accuracy", "slice:web", 0.8, 0.7, 0.9, 5, "share"),
    ]
    slices = [{"value": "web", "measurements": [asdict(one) for one in sliced]}]
    (recipe.folder / "evaluate" / "slices.json").write_text(json.dumps(slices))
    measured = [asdict(Measurement("student", "accuracy", "test", 0.9, 0.8, 0.95, 20, "share"))]
    (recipe.folder / "evaluate" / "measurements.json").write_text(json.dumps(measured))


def test_a_run_over_texts_is_told_from_its_folder(tmp_path):
    recipe = recipe_with(tmp_path, static={"training": TRAINING}, evaluation={"price": {"machine_usd_per_hour": 0.5}})
    plant(recipe)
    rows = [{"label": "bill", "precision": None, "recall": 0.5, "f1": 0.5, "n": 4}]
    (recipe.folder / "evaluate" / "classes.json").write_text(
        json.dumps({"labels": ["bill"], "arms": {"student": rows}})
    )
    pairs = [{"true": "bill", "predicted": "card", "student": 3, "teacher": 1}]
    (recipe.folder / "evaluate" / "confusions.json").write_text(json.dumps(pairs))
    story = tell(recipe, recipe.folder)
    assert story.task.labels == ("bill", "card")
    assert story.task.out_of_scope == "oos"
    assert story.task.price == "0.5 USD an hour for a machine such as this one, kept busy"
    assert story.student_origin == (
        "Cut from the teacher: layers 0, 5 (listed choice), with its embeddings and head, turned into a DistilBERT."
    )
    assert story.data.unlabelled == 60
    assert story.classes.arms["student"][0].precision is None
    assert [(one.true, one.student - one.teacher) for one in story.confusions] == [("bill", 2)]
    assert [(row.value, len(row.measurements)) for row in story.slices] == [("web", 2)]
    assert (story.teacher_training.steps, story.teacher_training.learns) == (1234, "head")
    assert set(story.curves) == {"student", "control", "static"}


def test_all_that_must_stand_beside_the_numbers_does(tmp_path):
    notes = " | ".join(remarks_on(recipe_with(tmp_path), FACTS))
    for words in (
        "has no head for this task: one was fitted first in 1,234 steps",
        "7 texts removed: repeated",
        "train: 3 texts of more than 64 tokens were cut",
        "train: 1,017 words were cut off: nothing was learned of them",
        "60 of 100 training texts have no label",
        "texts labelled oos are no class",
        "the student began with a new head",
        "no test text is out of scope",
    ):
        assert words in notes
    assert "kept" not in notes


def test_a_run_without_these_things_has_no_remark(tmp_path):
    recipe = recipe_with(
        tmp_path,
        task={"kind": "classification", "overlong": "refuse"},
        teacher={"kind": "local", "model": str(tmp_path / "bert")},
    )
    prepared = {**FACTS["prepare"], "labelled": {"train": 100}, "cleaning": {"kept: text": 130}}
    assert remarks_on(recipe, {"prepare": prepared, "initialise": {}, "evaluate": {"notes": []}}) == ()


def test_long_texts_that_nobody_counted_are_said_to_be_uncounted(tmp_path):
    facts = {**FACTS, "train": {}}
    assert [note for note in remarks_on(recipe_with(tmp_path), facts) if "tokens" in note] == [
        "texts of more than 64 tokens are cut; how many were was not counted"
    ]


def test_what_is_validated_is_no_loss_of_the_training(tmp_path):
    recipe = recipe_with(tmp_path)
    plant(recipe)
    (point,) = tell(recipe, recipe.folder).curves["student"]
    assert point.terms == {"forward_kl": 2.0}
    assert point.validation == {"kl_to_teacher": 0.5, "vector_cosine": 0.25}


def test_earlier_phases_are_told_from_folders_of_their_own(tmp_path):
    data = {"source": str(tmp_path / "data.jsonl")}
    recipe = recipe_with(tmp_path, phases=[{"name": "general", "task": {"kind": "masked_lm"}, "data": data}])
    (phase,) = phases_of(recipe)
    packed = {**FACTS, "prepare": {"documents": {"train": 1}, "tokens": {}, "rows": {}, "cleaning": {}}}
    plant(phase, {**packed, "initialise": {"layers": [0, 2, 4]}})
    plant(recipe, {**FACTS, "initialise": {}})
    story = tell(recipe, recipe.folder)
    assert story.student == "3-layer student"
    assert "Trained before in phases: general." in story.student_origin
    (told,) = story.phases
    assert (told.name, told.task, told.folder) == ("general", "saying masked tokens", "phases/general")
    assert told.measurements[0].name == "accuracy"


@pytest.mark.parametrize(
    ("teacher", "name"),
    [
        ({"kind": "finetune", "model": "org/bert", "training": TRAINING}, "org/bert, fine-tuned here"),
        ({"kind": "recorded", "path": "answers.csv", "label": "said"}, "answers recorded in answers.csv"),
        ({"kind": "local", "model": "org/bert"}, "org/bert"),
    ],
)
def test_the_teacher_is_named_as_what_it_is(tmp_path, teacher, name):
    assert name_teacher(recipe_with(tmp_path, teacher=teacher)) == name


@pytest.mark.parametrize(
    ("term", "words"),
    [
        ({"kind": "attention_mse"}, "attention_mse (layers last, heads matched)"),
        ({"kind": "minilm_v2", "weight": 2, "relation_heads": 4}, "2 minilm_v2 (layers last, relation heads 4)"),
        ({"kind": "rkd_angle", "over": "texts"}, "rkd_angle (over texts)"),
        ({"kind": "gram_mse", "layers": "even"}, "gram_mse (layers even, over positions)"),
        ({"kind": "hidden_cosine", "layers": {"1": 3, "2": 6}}, "hidden_cosine (layers 1:3 2:6)"),
        ({"kind": "vector_cosine"}, "vector_cosine"),
        ({"kind": "forward_kl", "weight": 5, "temperature": 2}, "5 forward_kl (T = 2, times T^2)"),
    ],
)
def test_every_kind_of_loss_is_said_with_its_layers(tmp_path, term, words):
    (own,) = recipe_with(tmp_path, losses=[term]).losses
    assert describe_term(own) == words


def test_a_language_model_s_report_stays_about_next_tokens(tmp_path):
    losses = [{"kind": "forward_kl"}]
    recipe = recipe_with(
        tmp_path, task={"kind": "language_model"}, teacher={"kind": "local", "model": "x"}, losses=losses
    )
    packed = {
        "documents": {"train": 5},
        "tokens": {"train": 9},
        "rows": {"train": 1},
        "cleaning": {"dropped: empty": 2},
    }
    plant(recipe, {"prepare": packed, "initialise": {"layers": [0, 5]}})
    story = tell(recipe, recipe.folder)
    assert story.notes == ("2 rows dropped: empty",)
    assert (story.classes, story.confusions, story.phases, story.teacher_training) == (None, (), (), None)
    text = write_report(story, tmp_path / "page").with_name("report.md").read_text("utf-8")
    assert "most probable next token" in text
    assert "| split | documents | tokens | packed rows |" in text
    assert "Task:" not in text
