"""Words of which a tokenizer leaves nothing: those after them keep their own answers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from potstill.data import LabelledText
from potstill.engines import load_tokenizer
from potstill.errors import NonFiniteError
from potstill.pipeline import build
from potstill.pipeline.answerers import answering
from potstill.pipeline.answers import open_answers
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


def test_every_word_has_a_row_and_those_beside_a_lost_one_their_own(words):
    recipe = words()
    run_recipe(recipe, until="prepare")
    texts = [LabelledText("lost", ("red", NOTHING, "fox")), LabelledText("named", ("red", "?", "fox"))]
    with answering(recipe, recipe.folder / "prepare", {})("teacher") as arm:
        found = arm.scores(texts)
    np.testing.assert_allclose(found[:3], found[3:], rtol=1e-4, atol=1e-5)


def test_stored_answers_stand_at_their_words_where_one_tokenizer_knows_what_another_loses(
    words, make_encoder, tmp_path
):
    labels = ("B-BEAST", "B-HUE", "O")
    folder = tmp_path / "keeping"
    shutil.copytree(make_encoder("words", labels=labels), folder)
    keeping = load_tokenizer(str(folder), "teacher.model")
    keeping.backend_tokenizer.normalizer = None  # for which the word is an unknown one, and not nothing
    keeping.save_pretrained(folder)
    recipe = words(
        teacher={"kind": "local", "model": str(folder), "dtype": "fp32"},
        student={"kind": "model", "model": str(make_encoder("words", labels=labels, layers=2))},
        signals={"kind": "dense"},
    )
    run_recipe(recipe, until="capture")
    inputs, cast = inputs_of(recipe), cast_of(recipe, recipe.folder / "prepare")
    student = load_tokenizer(str(inputs.initial / "student"), "student")
    mine, theirs = (cast.rows(inputs.prepared, "validation", one).batch([0]) for one in (student, keeping))
    said = open_answers(recipe, inputs).read(mine, Wants(final=True)).logits.logits_NV
    asked = build.build_teacher(recipe, inputs.prepared).read(theirs, Wants(final=True)).logits.logits_NV
    assert len(said) == 5
    torch.testing.assert_close(said, asked, rtol=1e-4, atol=1e-4)


def test_a_model_that_says_no_number_of_a_word_is_named_and_not_taken_for_one_that_cut_it(words):
    recipe = words()
    run_recipe(recipe, until="prepare")
    with answering(recipe, recipe.folder / "prepare", {})("teacher") as arm:
        with torch.no_grad():
            arm.engine.model.classifier.bias.fill_(float("nan"))
        with pytest.raises(NonFiniteError, match="teacher gives the words of bad are not finite"):
            arm.scores([LabelledText("bad", ("red", "fox"))])
