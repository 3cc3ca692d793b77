"""A teacher answers every text once; its answers are found by content, whoever reads them and in whichever tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from potstill.engines import EncoderEngine, load_tokenizer
from potstill.errors import Interrupted, StoreError
from potstill.pipeline import build
from potstill.pipeline.answers import open_answers, read_answers
from potstill.pipeline.cast import cast_of
from potstill.pipeline.chain import settle_teacher
from potstill.pipeline.run import inputs_of, run_recipe
from potstill.pipeline.rundir import RunDir
from potstill.pipeline.stopping import Stopping
from potstill.pipeline.texts import open_texts
from potstill.types import Wants

CLASSES = ("counting", "finding", "painting")
DENSE = {"kind": "dense"}
ANSWERS = Wants(final=True)


@pytest.fixture
def stored(task, make_encoder):
    """A recipe whose teacher's answers are kept."""

    def make(name="task", *overrides, **keys):
        teacher = {"kind": "local", "model": str(make_encoder("classes", labels=CLASSES)), "dtype": "fp32"}
        return task(name, *overrides, **{"teacher": teacher, "signals": DENSE, **keys})

    return make


@pytest.fixture
def asked(monkeypatch):
    """Ids of the texts that a model was asked about, one list a call."""
    calls, read = [], EncoderEngine.read

    def counted(self, batch, wants):
        calls.append([names[0] for names in batch.examples])
        return read(self, batch, wants)

    monkeypatch.setattr(EncoderEngine, "read", counted)
    return calls


def captured(recipe):
    run_recipe(recipe, until="capture")
    return RunDir(recipe.folder).manifest("capture").facts


def reader(recipe):
    return open_answers(recipe, inputs_of(recipe))


def rows(recipe, split, tokenizer=None):
    folder = recipe.folder / "prepare"
    own = tokenizer or load_tokenizer(recipe.teacher.model, "teacher.model")
    return cast_of(recipe, folder).rows(folder, split, own)


def test_a_text_is_asked_about_once_and_test_texts_not_at_all(stored, asked):
    recipe = stored()
    run_recipe(recipe, until="control")
    folder = recipe.folder / "prepare"
    expected = [text.id for split in ("train", "validation") for text in open_texts(folder, split)]
    assert sorted(name for call in asked for name in call) == sorted(expected)


def test_another_student_beside_asks_nothing(stored, asked):
    first = captured(stored("first"))
    before = len(asked)
    found = captured(stored("second", student={"kind": "layers", "keep": [1]}, losses=[{"kind": "reverse_kl"}]))
    assert found["store"] == first["store"]
    assert (found["captured"], len(asked)) == (0, before)


def test_another_seed_asks_only_about_texts_that_were_held_out_before(stored, asked):
    first = stored("first")
    captured(first)
    held = {text.id for text in open_texts(first.folder / "prepare", "test")}
    asked.clear()
    captured(stored("second", "seed=1"))
    assert {name for call in asked for name in call} <= held


def test_what_else_decides_an_answer_is_part_of_its_key(stored):
    first, second = captured(stored("first")), captured(stored("second", "data.sequence_length=12"))
    assert first["store"] == second["store"]
    assert second["captured"] == second["pieces"] == first["pieces"]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_is_read_back_is_what_the_teacher_says(stored, split):
    recipe = stored()
    captured(recipe)
    table = rows(recipe, split)
    batch = table.batch(range(len(table))[::-1])
    said = build.build_teacher(recipe, recipe.folder / "prepare").read(batch, ANSWERS).logits.logits_NV
    kept = reader(recipe).read(batch, ANSWERS).logits.logits_NV
    torch.testing.assert_close(kept, said, rtol=1e-4, atol=1e-4)


def test_readers_of_other_tokens_find_the_same_answers(stored, make_encoder):
    recipe = stored()
    captured(recipe)
    other = load_tokenizer(str(make_encoder("masked", backwards=True)), "student")
    table, same = rows(recipe, "train", other), rows(recipe, "train")
    ours, theirs = table.batch(range(9)), same.batch(range(9))
    assert not ours.ids_BT.equal(theirs.ids_BT)
    kept = [reader(recipe).read(batch, ANSWERS).logits.logits_NV for batch in (ours, theirs)]
    assert kept[0].equal(kept[1])


def test_a_noisy_copy_has_the_answer_of_its_original(stored, asked):
    recipe = stored("task", "data.noise={copies: 2, share: 0.5}")
    facts = captured(recipe)
    texts = open_texts(recipe.folder / "prepare", "train")
    originals = {text.key: number for number, text in enumerate(texts) if text.origin is None}
    copies = {number: originals[text.origin] for number, text in enumerate(texts) if text.origin is not None}
    assert len(copies) > len(originals)
    assert not any("~" in name for call in asked for name in call)
    assert facts["pieces"] == len(originals) + len(open_texts(recipe.folder / "prepare", "validation"))
    table, book = rows(recipe, "train"), reader(recipe)
    of_copies, of_originals = (
        book.read(table.batch(list(numbers)), ANSWERS).logits.logits_NV for numbers in (copies, copies.values())
    )
    assert of_copies.equal(of_originals)


def test_words_have_an_answer_each(stored, make_encoder):
    recipe = stored(
        task={"kind": "token_classification"},
        data={"text": "words", "label": "word_labels"},
        teacher={
            "kind": "local",
            "model": str(make_encoder("words", labels=("B-BEAST", "B-HUE", "O"))),
            "dtype": "fp32",
        },
    )
    captured(recipe)
    table, book = rows(recipe, "train"), reader(recipe)
    batch = table.batch([4, 1])
    kept = book.read(batch, ANSWERS).logits.logits_NV
    said = build.build_teacher(recipe, recipe.folder / "prepare").read(batch, ANSWERS).logits.logits_NV
    assert kept.shape == (8, 3)
    torch.testing.assert_close(kept, said, rtol=1e-4, atol=1e-4)


def test_vectors_are_kept_whole(stored, make_encoder):
    recipe = stored(
        task={"kind": "embedding"},
        teacher={"kind": "local", "model": str(make_encoder("body")), "dtype": "fp32"},
        losses=[{"kind": "vector_mse"}],
    )
    captured(recipe)
    batch = rows(recipe, "validation").batch(range(5))
    kept = reader(recipe).read(batch, Wants(pooled=True)).pooled_BD
    said = build.build_teacher(recipe).read(batch, Wants(pooled=True)).pooled_BD
    torch.testing.assert_close(kept, said, rtol=1e-4, atol=1e-5)


def test_what_lies_behind_answers_is_not_in_their_store(stored):
    recipe = stored()
    captured(recipe)
    with pytest.raises(ValueError, match="not in a store of answers"):
        reader(recipe).read(rows(recipe, "train").batch([0]), Wants(layers=(1,)))


def test_a_text_that_nobody_was_asked_about_is_said(stored):
    recipe = stored()
    captured(recipe)
    with pytest.raises(StoreError, match=r"^signals\.store: .* lacks the answers to 2 of 2 texts of a batch"):
        reader(recipe).read(rows(recipe, "test").batch([0, 1]), ANSWERS)


def test_asked_to_stop_a_capture_keeps_what_it_has(stored, monkeypatch, asked):
    from potstill.pipeline import answers

    recipe, stopping = stored(), Stopping()
    monkeypatch.setattr(answers, "COMMITTED_TEXTS", 16)
    monkeypatch.setattr(Stopping, "asked", lambda self: bool(asked))
    with pytest.raises(Interrupted, match=r"stopped after 16 of \d+ texts"):
        run_recipe(recipe, until="capture", stopping=stopping)
    monkeypatch.setattr(Stopping, "asked", lambda self: False)
    asked.clear()
    facts = captured(recipe)
    assert sum(map(len, asked)) == facts["captured"] == facts["pieces"] - 16


def test_answers_come_for_every_text_whatever_its_length(stored):
    recipe = stored()
    run_recipe(recipe, until="prepare")
    folder = recipe.folder / "prepare"
    texts = open_texts(folder, "train")
    teacher = build.build_teacher(settle_teacher(recipe), folder)
    found: dict[int, np.ndarray] = {}
    for numbers, answers in read_answers(teacher, cast_of(recipe, folder), texts, batch_tokens=20):
        found.update(zip(numbers, answers, strict=True))
    whole = dict(
        pair
        for numbers, answers in read_answers(teacher, cast_of(recipe, folder), texts)
        for pair in zip(numbers, answers, strict=True)
    )
    assert sorted(found) == sorted(whole) == list(range(len(texts)))
    for number in found:
        np.testing.assert_allclose(found[number], whole[number], rtol=1e-4, atol=1e-4)
