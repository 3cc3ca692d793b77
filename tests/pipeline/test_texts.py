"""What tasks over texts are prepared from: splits, classes, labels that are kept or hidden, noisy copies."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from potstill.data import LabelMap, content_key, normal_form
from potstill.errors import DataError, RecipeError, RunError
from potstill.pipeline.rundir import open_run
from potstill.pipeline.texts import open_labels, open_texts, prepare_texts, survey_texts
from potstill.recipes import load_recipe

CLASSIFY = "task={kind: classification}"


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    def over(rows, *overrides, task=CLASSIFY):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return load_recipe(tiny_recipe, [f"data.source={file}", task, *overrides])

    return over


@pytest.fixture
def prepare(tmp_path):
    def run(recipe, **options):
        with open_run(tmp_path / "prepared") as folder:
            with folder.stage("prepare", "x") as stage:
                prepare_texts(recipe, stage, **options)
            return stage.folder, folder.manifest("prepare").facts

    return run


def rows(count, *, classes=("a", "b"), split=None, first=0, **cells):
    return [
        {"text": f"Text number {n} of some", "label": classes[n % len(classes)], "split": split, **cells}
        for n in range(first, first + count)
    ]


def split_rows(train=20, validation=4, test=6, **cells):
    parts = (("train", train), ("validation", validation), ("test", test))
    return [
        row for place, (name, count) in enumerate(parts) for row in rows(count, split=name, first=1000 * place, **cells)
    ]


def test_texts_and_labels_come_back_from_the_folder_as_they_were_surveyed(recipe, prepare):
    asked = recipe(split_rows())
    folder, facts = prepare(asked)
    survey = survey_texts(asked)
    for split, texts in survey.texts.items():
        assert tuple(open_texts(folder, split)) == texts
    assert open_labels(folder) == survey.labels == LabelMap(("a", "b"))
    assert facts["documents"] == facts["labelled"] == {"train": 20, "validation": 4, "test": 6}
    assert facts["labels"] == ["a", "b"]
    assert facts["per_class"] == {"a": 10, "b": 10}
    assert facts["cleaning"] == {"kept: labelled": 30}
    assert facts["reading"]["source_rows"] == facts["reading"]["documents_used"] == 30


def test_repeated_texts_never_straddle_and_are_counted(recipe, prepare):
    leaked = [{"text": "TEXT  number 2000 of some", "label": "a", "split": "train"}]
    _, facts = prepare(recipe([*split_rows(), *leaked, *rows(3, split="train")]))
    assert facts["documents"]["train"] == 20
    assert facts["cleaning"]["removed: train text stands in test"] == 1
    assert facts["cleaning"]["removed: train text is repeated"] == 3


def test_without_splits_of_the_source_they_follow_from_content(recipe):
    survey = survey_texts(recipe(rows(400), "data.splits={validation: 0.1, test: 0.2}"))
    sizes = {split: len(texts) for split, texts in survey.texts.items()}
    assert sizes == pytest.approx({"train": 280, "validation": 40, "test": 80}, rel=0.4)


def test_out_of_scope_texts_are_unlabelled_in_training_and_keep_their_label_where_held_out(recipe):
    task = "task={kind: classification, out_of_scope: oos}"
    outside = [{"text": f"far {split}", "label": "oos", "split": split} for split in ("train", "validation", "test")]
    survey = survey_texts(recipe([*split_rows(), *outside], task=task))
    assert survey.labels == LabelMap(("a", "b"), "oos")
    far = {
        split: [text.label for text in texts if text.text.startswith("far")] for split, texts in survey.texts.items()
    }
    assert far == {"train": [None], "validation": ["oos"], "test": ["oos"]}
    assert survey.changed["unlabelled: out of scope in train"] == 1


def test_labels_of_so_many_texts_a_class_are_kept_by_content_and_seed(recipe):
    def kept(rows, seed):
        survey = survey_texts(recipe(rows, "data.labels_per_class=3", f"seed={seed}"))
        assert len(survey.texts["train"]) == 20
        assert survey.changed["unlabelled: beyond data.labels_per_class"] == 14
        return {text.text: text.label for text in survey.texts["train"] if text.label}

    first = kept(split_rows(), 0)
    assert Counter(first.values()) == {"a": 3, "b": 3}
    assert kept(split_rows()[::-1], 0) == first != kept(split_rows(), 1)


def test_held_out_texts_keep_their_labels_whatever_training_loses(recipe):
    survey = survey_texts(recipe(split_rows(), "data.labels_per_class=1"))
    assert all(text.label for split in ("validation", "test") for text in survey.texts[split])


def test_unlabelled_texts_are_for_training_and_known_ones_among_them_are_left_out(recipe, tmp_path):
    logs = tmp_path / "logs.jsonl"
    written = ["A new query", "text number 2001 of SOME", "Text number 3 of some"]
    logs.write_text("".join(json.dumps({"id": "rows.jsonl:1", "text": text, "split": "?"}) + "\n" for text in written))
    survey = survey_texts(recipe(split_rows(), f"data.unlabelled={logs}"))
    new = [text for text in survey.texts["train"] if text.label is None]
    assert [text.text for text in new] == ["A new query"]
    assert len({text.id for texts in survey.texts.values() for text in texts}) == 31
    assert survey.changed == {"removed: train text stands in test": 1, "removed: train text is repeated": 1}
    assert survey.cleaning.rows == 33


def test_noisy_copies_have_the_label_and_the_key_of_their_text(recipe):
    survey = survey_texts(recipe(split_rows(), "data.noise={copies: 2, share: 0.3}"))
    train = survey.texts["train"]
    own = {text.key: text for text in train if text.origin is None}
    copies = [text for text in train if text.origin is not None]
    assert (len(own), len(copies)) == (20, 40)
    assert {copy.id for copy in copies} == {f"{text.id}~{number}" for text in own.values() for number in (1, 2)}
    assert all(copy.label == own[copy.origin].label for copy in copies)
    assert sum(copy.text != own[copy.origin].text for copy in copies) > 30
    assert not any(text.origin for split in ("validation", "test") for text in survey.texts[split])
    assert survey_texts(recipe(split_rows(), "data.noise={copies: 2, share: 0.3}")) == survey


def test_a_noisy_copy_that_is_a_held_out_text_is_left_out(recipe):
    texts = [
        *({"text": f"{word} x", "label": "ab"[n % 2], "split": "train"} for n, word in enumerate("abcdefgh")),
        *({"text": word, "label": "a", "split": "test"} for word in "abcdefgh"),
        {"text": "v", "label": "a", "split": "validation"},
    ]
    survey = survey_texts(recipe(texts, "data.noise={copies: 9, share: 0.5}"))
    held = {normal_form(text) for text in survey.texts["test"]}
    assert not any(normal_form(text) in held for text in survey.texts["train"])
    assert survey.changed["dropped: noisy copy equals a held-out text"] > 0


def test_classes_of_a_ready_teacher_are_taken_where_the_recipe_lists_none(recipe):
    assert survey_texts(recipe(split_rows()), labels=["b", "a"]).labels.names == ("b", "a")
    listed = recipe(split_rows(), task="task={kind: classification, labels: [a, b]}")
    assert survey_texts(listed, labels=["x", "y"]).labels.names == ("a", "b")


def test_embeddings_need_no_labels(recipe, prepare):
    plain = [{"text": f"text {n}"} for n in range(100)]
    folder, facts = prepare(recipe(plain, task="task={kind: embedding}"))
    assert open_labels(folder) is None
    assert (facts["labels"], facts["per_class"], facts["labelled"]["train"]) == ([], {}, 0)
    assert open_texts(folder, "test")[0].key == content_key(open_texts(folder, "test")[0].text)


def test_words_and_several_labels_are_prepared_as_they_are(recipe):
    words = [{**row, "text": row["text"].split(), "label": ["O", "X", "O", "O", "O"]} for row in split_rows()]
    survey = survey_texts(recipe(words, task="task={kind: token_classification}"))
    assert survey.texts["test"][0].label == ("O", "X", "O", "O", "O")
    assert survey.labels.names == ("O", "X")
    several = [{**row, "label": [[], ["a"], ["a", "b"]][n % 3]} for n, row in enumerate(split_rows())]
    survey = survey_texts(recipe(several, task="task={kind: classification, multi_label: true}"))
    assert {text.label for text in survey.texts["train"]} == {(), ("a",), ("a", "b")}


@pytest.mark.parametrize(
    ("texts", "overrides", "task", "error", "words"),
    [
        (split_rows(train=0), [], CLASSIFY, DataError, r"^data\.splits: of 10 texts none is in the train split"),
        (
            [{"text": "a", "label": "x", "split": "train"}, {"text": "b", "label": "x", "split": "test"}],
            ["data.splits={validation: 0.0001, test: 0.1}"],
            CLASSIFY,
            DataError,
            r"^data\.splits\.validation: of 2 texts none is in the validation split",
        ),
        (
            [{**row, "label": None} if row["split"] == "train" else row for row in split_rows()],
            [],
            "task={kind: classification, labels: [a, b]}",
            DataError,
            r"^data\.label: none of the 20 training texts has a label, and control\.enabled learns from labels",
        ),
        ([{**row, "label": None} for row in split_rows()], [], CLASSIFY, DataError, r"no training text is labelled"),
        (
            split_rows(),
            ["data.labels_per_class=2"],
            "task={kind: classification, multi_label: true}",
            RecipeError,
            r"^data\.labels_per_class: needs",
        ),
        (split_rows(), ["data.noise={}"], "task={kind: embedding}", RecipeError, r"^data\.noise: goes with"),
        (
            split_rows(classes=("a", "z")),
            [],
            "task={kind: classification, labels: [a, b]}",
            DataError,
            r"not listed: 'z'",
        ),
    ],
)
def test_what_cannot_be_prepared_is_told(recipe, texts, overrides, task, error, words):
    with pytest.raises(error, match=words):
        survey_texts(recipe(texts, *overrides, task=task))


def test_texts_without_labels_can_be_taught_where_nothing_learns_from_labels(recipe):
    bare = [{**row, "label": None} if row["split"] == "train" else row for row in split_rows()]
    asked = recipe(bare, "control.enabled=false", task="task={kind: classification, labels: [a, b]}")
    assert survey_texts(asked).labels.names == ("a", "b")


@pytest.mark.parametrize("content", ["[]", '{"names": 1}', '{"names": ["a"]}', "{"])
def test_damaged_labels_are_named(tmp_path, content):
    (tmp_path / "labels.json").write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match=r"labels\.json"):
        open_labels(tmp_path)


def test_where_nobody_tells_the_labels_of_the_test_part_another_is_taken_from_training(recipe):
    hidden = [{**row, "label": None} if row["split"] == "test" else row for row in split_rows()]
    survey = survey_texts(recipe(hidden, "data.splits={validation: 0.1, test: 0.3}"))
    assert survey.changed["removed: held-out text of a part of which nobody published the labels"] == 6
    assert survey.texts["test"]
    assert all(text.label for text in survey.texts["test"])


def test_for_vectors_each_text_of_a_pair_is_one_and_none_stands_in_a_test_pair(tmp_path):
    rows = [
        {"text": "a fox", "second": "an owl", "label": "1", "split": "train"},
        {"text": "a hare", "second": "A  Toad", "label": "0", "split": "train"},
        {"text": "a wren", "second": "a crow", "label": "0", "split": "validation"},
        {"text": "a toad", "second": "a newt", "label": "1", "split": "test"},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changes = [
        "task={kind: embedding}",
        f"data={{source: {json.dumps(str(file))}, text_pair: second}}",
        "teacher={kind: local, model: none}",
        "losses=[{kind: vector_mse}]",
        "signals={kind: online}",
        "static=null",
    ]
    survey = survey_texts(load_recipe("intent-sample", changes))
    assert [text.text for text in survey.texts["train"]] == ["a fox", "an owl", "a hare"]
    assert [text.text for text in survey.texts["validation"]] == ["a wren", "a crow"]
    assert survey.texts["test"][0].pair == "a newt"
    assert len({text.id for text in survey.texts["train"]}) == 3
    assert survey.changed["removed: text of a pair stands in a test pair"] == 1
