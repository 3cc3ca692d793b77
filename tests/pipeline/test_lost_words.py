"""Words of which a tokenizer leaves nothing: those after them keep their own answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from potstill.data import LabelledText
from potstill.engines import load_tokenizer
from potstill.errors import NonFiniteError, StoreError
from potstill.pipeline import build
from potstill.pipeline.answerers import answering
from potstill.pipeline.answers import open_answers, read_answers
from potstill.pipeline.cast import cast_of
from potstill.pipeline.run import inputs_of, run_recipe
from potstill.types import Wants

NOTHING = "\u200b"
"""A word of which the tokenizer leaves no token."""


@pytest.fixture
def words(task, make_encoder, queries, write_rows):
    """A recipe over words, of which the second of every text is one that is lost."""

    def make(*overrides, **keys):
        rows = queries(80)
        for row in rows:
            row["words"].insert(1, NOTHING)
            row["word_labels"].insert(1, "O")
        data = {"source": str(write_rows(rows)), "text": "words", "label": "word_labels"}
        teacher = {
            "kind": "local",
            "model": str(make_encoder("words", labels=("B-BEAST", "B-HUE", "O"))),
            "dtype": "fp32",
        }
        own = {"teacher": teacher, "task": {"kind": "token_classification"}, "data": data}
        return task("task", *overrides, **{**own, **keys})

    return make


def test_a_teacher_that_knows_every_word_is_right_about_those_after_a_lost_one(words, make_encoder, brief):
    teacher = {"kind": "finetune", "model": str(make_encoder("masked")), "dtype": "fp32", "training": brief(30)}
    recipe = words(teacher=teacher, control={"enabled": False})
    run_recipe(recipe)
    rows = json.loads((recipe.folder / "evaluate" / "measurements.json").read_text())
    found = {(row["arm"], row["name"]): row["value"] for row in rows if row["slice"] == "test"}
    assert found["teacher", "accuracy"] > 0.95
    notes = json.loads((recipe.folder / "evaluate" / "manifest.json").read_text())["facts"]["notes"]
    assert any(note.startswith("14 words of the test split") for note in notes)


def test_a_lost_word_has_a_row_of_its_own_without_numbers(words):
    recipe = words()
    run_recipe(recipe, until="prepare")
    texts = [LabelledText("lost", ("red", NOTHING, "fox")), LabelledText("plain", ("red", "fox"))]
    with answering(recipe, recipe.folder / "prepare", {})("teacher") as arm:
        found = arm.scores(texts)
    assert np.isnan(found).any(1).tolist() == [False, True, False, False, False]
    np.testing.assert_allclose(found[[0, 2]], found[3:], rtol=1e-4, atol=1e-5)


def test_stored_answers_are_found_by_word_where_two_tokenizers_lose_different_ones(words, make_encoder):
    recipe = words(signals={"kind": "dense"})
    run_recipe(recipe, until="capture")
    inputs, cast = inputs_of(recipe), cast_of(recipe, recipe.folder / "prepare")
    own, keeping = (load_tokenizer(recipe.teacher.model, "teacher.model") for _ in range(2))
    keeping.backend_tokenizer.normalizer = None  # for which the lost word is an unknown one
    rows = cast.rows(inputs.prepared, "validation", own)
    batch = rows.batch(range(len(rows)))
    said = open_answers(recipe, inputs, own).read(batch, Wants(final=True)).logits.logits_NV
    asked = build.build_teacher(recipe, inputs.prepared).read(batch, Wants(final=True)).logits.logits_NV
    torch.testing.assert_close(said, asked, rtol=1e-4, atol=1e-4)
    more = cast.rows(inputs.prepared, "validation", keeping)
    with pytest.raises(StoreError, match="answered 4 of the 5 words"):
        open_answers(recipe, inputs, keeping).read(more.batch([0]), Wants(final=True))


def test_a_student_that_loses_words_which_its_teacher_reads_learns_of_the_others(words, make_encoder, tmp_path):
    """The teacher, which reads the word as an unknown one, answers 5 words a text, of which the student asks for 4."""
    import shutil

    folder = tmp_path / "keeping"
    shutil.copytree(make_encoder("words", labels=("B-BEAST", "B-HUE", "O")), folder)
    keeping = load_tokenizer(str(folder), "teacher.model")
    keeping.backend_tokenizer.normalizer = None
    keeping.save_pretrained(folder)
    recipe = words(
        teacher={"kind": "local", "model": str(folder), "dtype": "fp32"},
        student={"kind": "model", "model": str(make_encoder("words", labels=("B-BEAST", "B-HUE", "O"), layers=2))},
        signals={"kind": "dense"},
    )
    run_recipe(recipe, until="capture")
    inputs, cast = inputs_of(recipe), cast_of(recipe, recipe.folder / "prepare")
    student = load_tokenizer(str(inputs.initial / "student"), "student")
    rows, whole = (cast.rows(inputs.prepared, "validation", one) for one in (student, keeping))
    assert [len(rows.words_of(0)), len(whole.words_of(0))] == [4, 5]
    said = open_answers(recipe, inputs, student).read(rows.batch([0]), Wants(final=True)).logits.logits_NV
    every = open_answers(recipe, inputs, keeping).read(whole.batch([0]), Wants(final=True)).logits.logits_NV
    torch.testing.assert_close(said, every[[0, 2, 3, 4]])


def test_a_model_that_says_no_number_of_a_word_is_named_and_not_taken_for_one_that_cut_it(words):
    recipe = words()
    run_recipe(recipe, until="prepare")
    teacher = build.build_teacher(recipe, recipe.folder / "prepare")
    with torch.no_grad():
        teacher.model.classifier.bias.fill_(float("nan"))
    texts = [LabelledText("bad", ("red", "fox"))]
    with pytest.raises(NonFiniteError, match="words of bad are not finite"):
        list(read_answers(teacher, cast_of(recipe, recipe.folder / "prepare"), texts, whole=True))
