from __future__ import annotations

import csv
import json

import pytest

from potstill.data import LabelledText, TextColumns, load_texts
from potstill.errors import DataError
from potstill.types import Role


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(source, columns=None, role=Role.CLASSIFIER, **options):
    texts, cleaning = load_texts(str(source), columns=columns or TextColumns(), role=role, **options)
    return list(texts), cleaning


def labels_of(tmp_path, cells, **options):
    rows = [{"text": f"t{number}", "label": cell} for number, cell in enumerate(cells)]
    return [text.label for text in load(write_lines(tmp_path / "a.jsonl", rows), **options)[0]]


def test_labels_become_names_and_their_absence_is_no_label(tmp_path):
    cells = ["x", " y ", 3, -1, 0, 2.0, True, False, None, "", "  ", float("nan")]
    assert labels_of(tmp_path, cells) == ["x", "y", "3", "-1", "0", "2", "true", "false", None, None, None, None]


def test_several_labels_are_a_list_of_which_an_empty_one_is_a_label_too(tmp_path):
    cells = [["x", 1], [], None, '["x", "y"]', ["x", "x", None]]
    assert labels_of(tmp_path, cells, multi_label=True) == [("x", "1"), (), None, ("x", "y"), ("x",)]


def test_how_alike_two_texts_are_stays_a_number(tmp_path):
    assert labels_of(tmp_path, [3.8, 4.0, 2, "1.5", None], role=Role.ENCODER) == ["3.8", "4.0", "2", "1.5", None]


def test_words_have_a_label_each(tmp_path):
    rows = [
        {"text": ["The", "fox"], "label": ["O", None]},
        {"text": '["a", "b"]', "label": '["X", 1]'},
        {"text": ["a"], "label": None},
    ]
    texts, _ = load(write_lines(tmp_path / "a.jsonl", rows), role=Role.TOKEN_CLASSIFIER)
    assert [(text.text, text.label) for text in texts] == [
        (("The", "fox"), ("O", "")),
        (("a", "b"), ("X", "1")),
        (("a",), None),
    ]


@pytest.mark.parametrize(
    ("row", "role", "why"),
    [
        ({"text": 3, "label": "x"}, Role.CLASSIFIER, "text is not a string"),
        ({"text": ["a"], "label": "x"}, Role.CLASSIFIER, "text is not a string"),
        ({"text": " \x00", "label": "x"}, Role.CLASSIFIER, "text is empty"),
        ({"text": None, "label": "x"}, Role.CLASSIFIER, "text is empty"),
        ({"text": "a", "label": ["x"]}, Role.CLASSIFIER, "label is not text, a whole number, true or false"),
        ({"text": "a", "label": 0.5}, Role.CLASSIFIER, "label is not text, a whole number, true or false"),
        ({"text": "a b", "label": ["x"]}, Role.TOKEN_CLASSIFIER, "words are not a list of strings"),
        ({"text": ["a", 1], "label": ["x", "y"]}, Role.TOKEN_CLASSIFIER, "words are not a list of strings"),
        ({"text": ["a", "b"], "label": ["x"]}, Role.TOKEN_CLASSIFIER, "there are not as many labels as words"),
        ({"text": ["a"], "label": "x"}, Role.TOKEN_CLASSIFIER, "labels are not a list of text, whole numbers"),
        ({"text": ["a"], "label": "[1"}, Role.TOKEN_CLASSIFIER, "labels are not a list of text, whole numbers"),
        ({"text": [], "label": []}, Role.TOKEN_CLASSIFIER, "text is empty"),
    ],
)
def test_a_row_that_cannot_be_used_is_dropped_under_its_reason(tmp_path, row, role, why):
    good = {"text": ["a"] if role is Role.TOKEN_CLASSIFIER else "a", "label": None}
    texts, cleaning = load(write_lines(tmp_path / "a.jsonl", [row, good]), role=role)
    assert [text.id for text in texts] == ["a.jsonl:2"]
    assert [reason.startswith(why) for reason in cleaning.dropped] == [True]
    assert cleaning.kept == {"unlabelled": 1}
    with pytest.raises(DataError, match=r"none of the 1 rows can be used"):
        load(write_lines(tmp_path / "b.jsonl", [row]), role=role)


def test_what_no_tokenizer_should_see_is_mended_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\u0000b\\ud800", "label": "x\\ud800"}\n{"text": "c", "label": "y"}\n')
    texts, cleaning = load(path)
    assert [(text.text, text.label) for text in texts] == [("ab\ufffd", "x\ufffd"), ("c", "y")]
    assert cleaning.mended.total() == 1


@pytest.mark.parametrize(
    "parts", [("train", "val", "test"), ("oos_train", "dev", "is_test"), ("TRAIN", "valid", "Test")]
)
def test_a_json_object_of_lists_gives_its_parts(tmp_path, parts):
    rows = {
        parts[0]: [["a", "x"], ["b", "y"]],
        parts[1]: [{"text": "c", "label": "x", "id": 7}],
        parts[2]: [["d", None]],
    }
    path = tmp_path / "all.json"
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    texts, cleaning = load(path)
    assert [(text.text, text.label, text.split) for text in texts] == [
        ("a", "x", "train"),
        ("b", "y", "train"),
        ("c", "x", "validation"),
        ("d", None, "test"),
    ]
    assert [text.id for text in texts] == [
        f"all.json:{parts[0]}:1",
        f"all.json:{parts[0]}:2",
        "7",
        f"all.json:{parts[2]}:1",
    ]
    assert {text.source for text in texts} == {"all.json"}
    assert cleaning.kept == {"labelled": 3, "unlabelled": 1}


def test_a_json_file_of_lines_is_read_as_lines(tmp_path):
    path = tmp_path / "a.json"
    write_lines(path, [{"text": ["a"], "label": ["x"]}, {"text": ["b"], "label": ["y"]}])
    texts, _ = load(path, role=Role.TOKEN_CLASSIFIER)
    assert [text.text for text in texts] == [("a",), ("b",)]
    write_lines(path, [{"text": ["a", "b"], "label": ["x", "y"]}])
    assert load(path, role=Role.TOKEN_CLASSIFIER)[0][0].text == ("a", "b")
    write_lines(path, [{"more": [{"k": 1}], "text": "a", "label": "x"}, {"more": [{}], "text": "b", "label": "y"}])
    assert [text.text for text in load(path)[0]] == ["a", "b"]


def test_at_most_so_many_of_each_part_are_read(tmp_path):
    path = tmp_path / "all.json"
    path.write_text(json.dumps({name: [[f"{name}{n}", "x"] for n in range(9)] for name in ("val", "train", "test")}))
    assert [text.text for text in load(path, max_documents=2)[0]] == [
        "val0",
        "val1",
        "train0",
        "train1",
        "test0",
        "test1",
    ]


def test_files_of_a_folder_that_are_named_after_splits_are_these(tmp_path):
    for name in ("train", "test-0", "test-1"):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": name, "label": "x"}])
    assert [(text.text, text.split) for text in load(tmp_path)[0]] == [
        ("test-0", "test"),
        ("test-1", "test"),
        ("train", "train"),
    ]
    write_lines(tmp_path / "extra.jsonl", [{"text": "more", "label": "x"}])
    with pytest.raises(DataError, match=r"extra\.jsonl is not named after a split .* as other files"):
        load(tmp_path)


def test_a_column_may_say_the_split_the_slice_and_a_second_text(tmp_path):
    rows = [
        {"q": "a", "p": "b", "label": "x", "part": "dev", "channel": "web"},
        {"q": "c", "p": "d", "label": "x", "part": None, "channel": 3},
    ]
    columns = TextColumns(text="q", pair="p", split_by="part", slice="channel")
    texts, _ = load(write_lines(tmp_path / "a.jsonl", rows), columns)
    assert texts[0] == LabelledText("a.jsonl:1", "a", "b", "x", "validation", "web", "a.jsonl")
    assert (texts[1].split, texts[1].slice) == (None, "3")


def test_csv_and_parquet_and_saved_data_sets_give_the_same_texts(tmp_path):
    import datasets

    rows = [{"text": "a", "label": "x", "split": "train"}, {"text": "b", "label": "", "split": "test"}]
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "t.parquet")
    table.save_to_disk(tmp_path / "saved")
    seen = {
        tuple((text.text, text.label, text.split) for text in load(tmp_path / name)[0])
        for name in ("t.csv", "t.parquet", "saved")
    }
    assert seen == {(("a", "x", "train"), ("b", None, "test"))}


@pytest.fixture
def splits():
    import datasets

    names = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": names,
            "tags": datasets.List(names),
            "other": datasets.Value("int64"),
        }
    )
    rows = {"text": ["a", "b"], "label": [1, -1], "tags": [[0, 1], []], "other": [1, 2]}
    table = datasets.Dataset.from_dict(rows, features)
    return datasets.DatasetDict({"train": table, "test": table.select([0])})


def test_a_saved_data_set_gives_all_splits_and_names_for_its_class_numbers(tmp_path, splits):
    splits.save_to_disk(tmp_path / "saved")
    texts, _ = load(tmp_path / "saved")
    assert [(text.text, text.label, text.split, text.id) for text in texts] == [
        ("a", "yes", "train", "saved:train:1"),
        ("b", None, "train", "saved:train:2"),
        ("a", "yes", "test", "saved:test:1"),
    ]
    several, _ = load(tmp_path / "saved", TextColumns(label="tags"), multi_label=True)
    assert [text.label for text in several] == [("no", "yes"), (), ("no", "yes")]


def test_the_hub_gives_all_splits_of_a_data_set(monkeypatch, splits):
    import datasets

    asked = []

    def give(*args, **options):
        asked.append((args, options))
        return datasets.IterableDatasetDict({name: table.to_iterable_dataset() for name, table in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", give)
    texts, _ = load("who/what", config="small")
    assert [(text.text, text.label, text.split) for text in texts] == [
        ("a", "yes", "train"),
        ("b", None, "train"),
        ("a", "yes", "test"),
    ]
    assert texts[0].source == "who/what"
    assert asked == [(("who/what", "small"), {"split": None, "streaming": True})]


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        ([{"text": "a"}], TextColumns(), r"^data\.label: no row has a column 'label'; the columns are: text\. Name"),
        ([{"body": "a", "label": 1}], TextColumns(), r"^data\.text: no row has a column 'text'; .*: body, label"),
        ([{"text": "a", "label": 1}], TextColumns(slice="z"), r"^data\.slice: no row has a column 'z'"),
        ([{"text": "a", "label": 1}], TextColumns(pair="z"), r"^data\.(source: none of|text_pair: no row)"),
        ([{"text": "a", "label": 1}], TextColumns(split_by="z"), r"^data\.split_by: no row has a column 'z'"),
        (
            [{"id": "r", "text": "a", "label": 1, "split": "holdout"}],
            TextColumns(),
            r"^data\.split_by: row r has 'holdout' in the column 'split', which is none of train, validation and test",
        ),
        ([{"text": "a", "label": 1, "split": 2}], TextColumns(), r"row a\.jsonl:1 has 2 in the column 'split'"),
    ],
)
def test_a_column_or_split_that_is_not_there_is_named(tmp_path, rows, columns, words):
    with pytest.raises(DataError, match=words):
        load(write_lines(tmp_path / "a.jsonl", rows), columns)


def test_labels_need_not_be_there_where_nothing_asks_for_them(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a", "split": "holdout", "label": ["?"]}])
    assert load(path, TextColumns(label=None, split_by=None))[0][0].label is None
    bare = write_lines(tmp_path / "b.jsonl", [{"text": "a"}])
    assert load(bare, role=Role.ENCODER)[0][0].label is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"train": [["a", "x"]], "more": [["b", "x"]]}, r"has a part 'more', which is none of train"),
        ({"train": [["a", "x", "y"]]}, r"all\.json:train:1 is a list of 3\. Write \[text, label\]"),
        ({"train": []}, r"holds no rows"),
    ],
)
def test_parts_that_cannot_be_told_are_named(tmp_path, content, words):
    path = tmp_path / "all.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=words):
        load(path)


def test_a_second_row_of_an_id_gets_another(tmp_path):
    rows = [{"id": 1, "text": "a", "label": "x"}, {"id": "1", "text": "b", "label": "x"}]
    assert [text.id for text in load(write_lines(tmp_path / "a.jsonl", rows))[0]] == ["1", "1#2"]
