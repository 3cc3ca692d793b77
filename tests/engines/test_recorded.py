"""Answers are found by text or id whatever the order of rows, and what is no distribution is refused with its row."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.testing import assert_close

from potstill.data.texts import content_key
from potstill.engines import models_of, read_recorded
from potstill.errors import DataError, ModelError
from potstill.types import IGNORE, Batch, Wants

LABELS = ("fox", "owl", "toad")
FINAL = Wants(final=True)
ROWS = [
    {"id": "a", "text": "It barks.", "p": {"fox": 0.7, "owl": 0.1, "toad": 0.2}, "label": "fox"},
    {"id": 7, "text": "It hoots. é", "p": [0.0, 1.0, 0.0], "label": "owl"},
    {"id": "c", "text": "It croaks.", "p": {"toad": 1.0}, "label": "toad"},
]
PROBABILITIES = torch.tensor([[0.7, 0.1, 0.2], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


def asking(*rows, taught=None) -> Batch:
    """A batch of these rows' texts, one token each."""
    ids_BT = torch.ones(len(rows), 2, dtype=torch.int64)
    taught_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    taught_BT[:, 0] = True if taught is None else torch.tensor(taught)
    return Batch(
        ids_BT,
        torch.full_like(ids_BT, IGNORE),
        torch.ones_like(ids_BT),
        tuple((str(row["id"]),) for row in rows),
        taught_BT=taught_BT,
        keys=tuple(content_key(row["text"]) for row in rows),
    )


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSON lines and gives the path."""

    def write(*rows):
        file = tmp_path / "answers.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(file)

    return write


@pytest.mark.parametrize("match", ["text", "id"])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_answers_are_found_in_any_order_of_rows(write, match, order):
    reader = read_recorded(write(*[ROWS[i] for i in order]), labels=LABELS, match=match, probabilities="p")
    said = reader.read(asking(ROWS[1], ROWS[0], ROWS[2], ROWS[1]), FINAL).logits.logits_NV
    assert_close(said.softmax(-1), PROBABILITIES[[1, 0, 2, 1]], rtol=1e-5, atol=1e-6)
    assert said.dtype == torch.float32
    assert float(said.min()) == pytest.approx(-30.0)


def test_only_rows_that_are_taught_are_answered(write):
    reader = read_recorded(write(*ROWS), labels=LABELS, probabilities="p")
    said = reader.read(asking(*ROWS, taught=[True, False, True]), FINAL).logits.logits_NV
    assert_close(said.exp(), PROBABILITIES[[0, 2]], rtol=1e-5, atol=1e-6)
    assert reader.read(asking(*ROWS), Wants()).logits is None


def test_labels_alone_are_all_but_certain(write):
    reader = read_recorded(write(*ROWS), labels=LABELS, label="label")
    assert reader.read(asking(*ROWS), FINAL).logits.logits_NV.tolist() == [
        [0, -30, -30],
        [-30, 0, -30],
        [-30, -30, 0],
    ]


def test_several_labels_a_text_have_a_probability_each(write):
    rows = [ROWS[0] | {"p": {"fox": 0.9, "owl": 0.9}, "label": ["fox", "owl"]}, ROWS[1] | {"p": [0, 0, 0], "label": []}]
    soft = read_recorded(write(*rows), labels=LABELS, probabilities="p", multi_label=True)
    expected = torch.tensor([[0.9, 0.9, 0.0], [0.0, 0.0, 0.0]])
    said = soft.read(asking(*rows), FINAL).logits.logits_NV
    assert_close(said.sigmoid(), expected, rtol=1e-5, atol=1e-6)
    hard = read_recorded(write(*rows), labels=LABELS, label="label", multi_label=True)
    assert hard.read(asking(*rows), FINAL).logits.logits_NV.tolist() == [[30, 30, -30], [-30, -30, -30]]


def test_labels_are_names_whatever_they_were_written_as(write):
    rows = [ROWS[0] | {"label": 1}, ROWS[1] | {"label": True}]
    reader = read_recorded(write(*rows), labels=("1", "true"), label="label")
    assert reader.read(asking(*rows), FINAL).logits.logits_NV.argmax(-1).tolist() == [0, 1]


def test_a_label_that_looks_like_a_list_is_a_label_if_the_task_has_it(write):
    reader = read_recorded(write(ROWS[0] | {"label": "[1]"}), labels=("[1]", "1"), label="label")
    assert reader.read(asking(ROWS[0]), FINAL).logits.logits_NV.tolist() == [[0, -30]]


def test_a_table_of_comma_separated_values_holds_json(tmp_path):
    file = tmp_path / "answers.csv"
    file.write_text('id,text,p\na,It barks.,"{""fox"": 0.75, ""owl"": 0.25}"\nc,It croaks.,"[0, 0, 1]"\n')
    reader = read_recorded(str(file), labels=LABELS, probabilities="p")
    said = reader.read(asking(ROWS[0], ROWS[2]), FINAL).logits.logits_NV
    assert_close(said.exp(), torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]]), rtol=1e-5, atol=1e-6)


def test_a_parquet_file_fills_up_with_nothing(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([ROWS[0] | {"id": "a"}, ROWS[2]]), tmp_path / "answers.parquet")
    reader = read_recorded(str(tmp_path / "answers.parquet"), labels=LABELS, probabilities="p")
    said = reader.read(asking(ROWS[2]), FINAL).logits.logits_NV
    assert_close(said.exp(), PROBABILITIES[[2]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("cell", "word"),
    [
        ({"fox": 0.7, "owl": 0.2}, "the probabilities sum to 0.9"),
        ({"fox": 0.7, "owl": 0.302}, "the probabilities sum to 1.002"),
        ({"fox": -0.1, "owl": 1.0, "toad": 0.1}, "the probability of fox is -0.1"),
        ({"fox": 1.5}, "the probability of fox is 1.5"),
        ({"fox": math.nan}, "the probability of fox is nan"),
        ({"fox": True}, "the probability of fox is True"),
        ({"fox": "0.5", "owl": 0.5}, "the probability of fox is '0.5'"),
        ({"fox": 0.5, "hare": 0.5}, "p names hare, of which the task does not know; its labels are fox, owl, toad"),
        ([0.5, 0.5], "neither an object {label: probability} nor a list of 3"),
        ("fox", "neither an object"),
        (1.0, "neither an object"),
    ],
)
def test_what_is_no_distribution_is_refused_with_its_row(write, cell, word):
    with pytest.raises(DataError) as caught:
        read_recorded(write(ROWS[0], ROWS[1] | {"p": cell}), labels=LABELS, probabilities="p")
    assert str(caught.value).startswith("teacher.path: answers.jsonl:2")
    assert word in str(caught.value)


def test_rounding_is_no_offence(write):
    read_recorded(write(ROWS[0] | {"p": [0.333, 0.333, 0.3335]}), labels=LABELS, probabilities="p")


@pytest.mark.parametrize(
    ("cell", "word"),
    [("hare", "label names hare"), (["fox"], None), (["fox", "owl"], "is not one label"), (1.5, "is not")],
)
def test_an_answer_is_one_known_label(write, cell, word):
    path = write(ROWS[1], ROWS[0] | {"label": cell})
    if word is None:
        assert read_recorded(path, labels=LABELS, label="label").vocabulary == 3
        return
    with pytest.raises(DataError, match=rf"^teacher\.path: answers\.jsonl:2: .*{word}"):
        read_recorded(path, labels=LABELS, label="label")


def test_two_answers_to_one_text_are_refused_and_one_given_twice_is_not(write):
    same, other = ROWS[0] | {"id": "z"}, ROWS[0] | {"id": "z", "label": "owl"}
    read_recorded(write(ROWS[0], same), labels=LABELS, label="label")
    with pytest.raises(DataError, match=r"answers\.jsonl:2 is a second, different answer"):
        read_recorded(write(ROWS[0], other), labels=LABELS, label="label")
    read_recorded(write(ROWS[0], other), labels=LABELS, label="label", match="id")


def test_texts_without_an_answer_are_counted_and_the_first_is_named(write):
    reader = read_recorded(write(ROWS[0], ROWS[1] | {"label": None}, ROWS[2]), labels=LABELS, label="label")
    other = {"id": "x", "text": "It sings."}
    with pytest.raises(DataError, match=r"has no answer to 2 of 3 texts, the first is 7 \(matched by text\)"):
        reader.read(asking(ROWS[1], ROWS[0], other), FINAL)
    reader.read(asking(ROWS[1], ROWS[0], taught=[False, True]), FINAL)


def test_rows_that_cannot_be_matched_are_named(write):
    with pytest.raises(DataError, match=r"answers\.jsonl:1 has no text in the column 'text'"):
        read_recorded(write({"id": "a", "label": "fox"}), labels=LABELS, label="label")
    with pytest.raises(DataError, match=r"answers\.jsonl:1 has no id"):
        read_recorded(write({"text": "a", "label": "fox"}), labels=LABELS, label="label", match="id")


def test_a_second_text_is_part_of_the_name(write):
    rows = [ROWS[0] | {"pair": "Why?"}, ROWS[0] | {"pair": "How?", "label": "owl"}]
    reader = read_recorded(write(*rows), labels=LABELS, label="label", pair="pair")
    keys = (content_key(ROWS[0]["text"], "How?"),)
    assert reader.rows_of(["a"], keys) == [1]


def test_files_without_answers_are_refused(write, tmp_path):
    with pytest.raises(DataError, match=r"^teacher\.path: .* has no answer in a column 'said'"):
        read_recorded(write(*ROWS), labels=LABELS, label="said")
    with pytest.raises(DataError, match=r"^teacher\.path: .*absent"):
        read_recorded(str(tmp_path / "absent.jsonl"), labels=LABELS, label="said")
    with pytest.raises(ValueError, match="exactly one of probabilities, label"):
        read_recorded(write(*ROWS), labels=LABELS)


def test_there_is_no_model(write):
    reader = read_recorded(write(*ROWS), labels=LABELS, label="label")
    assert models_of(reader) == ()
    for wants in (Wants(layers=(1,)), Wants(attentions=(1,)), Wants(vectors=(1,)), Wants(pooled=True)):
        with pytest.raises(ModelError, match=r"teacher\.kind=recorded has answers and no model"):
            reader.read(asking(*ROWS), wants)
    words = asking(*ROWS)
    with pytest.raises(ValueError, match="not of one text a row"):
        reader.read(Batch(words.ids_BT, words.targets_BT, words.segments_BT), FINAL)


def test_labels_are_named_as_those_of_the_data_and_gaps_are_no_answers(write):
    said = [3.0, " yes ", True, float("nan"), "  ", None]
    rows = [{"id": str(n), "text": f"t{n}", "label": label} for n, label in enumerate(said)]
    reader = read_recorded(write(*rows), labels=("3", "yes", "true"), label="label")
    assert reader.read(asking(*rows[:3]), FINAL).logits.logits_NV.argmax(-1).tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="no answer to 3 of 3 texts"):
        reader.read(asking(*rows[3:]), FINAL)
