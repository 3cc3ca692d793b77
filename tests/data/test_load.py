"""What comes out of the user's files: every row, in order, once; and a plain error for everything else."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from huggingface_hub.utils import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from potstill.data import Row, load_examples
from potstill.errors import DataError

TEXTS = ["one", "zwei äöü", "three\n\nblank line", 'four, "quoted"', "five\u2028separator"]


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def write_as(kind: str, folder: Path, texts: list[str]) -> Path:
    path = folder / f"rows.{kind}"
    if kind in ("jsonl", "json"):
        return write_jsonl(path, [{"text": text} for text in texts])
    if kind == "csv":
        return write_csv(path, [["number", "text"], *([str(i), text] for i, text in enumerate(texts))])
    if kind == "parquet":
        parquet.write_table(pa.table({"text": texts, "other": [b"\x00"] * len(texts)}), path)
        return path
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(path))
    return path


def read(source: object, **options: object) -> list[Row]:
    return list(load_examples(str(source), **options))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved"])
def test_every_format_gives_the_same_texts_in_order(kind, tmp_path):
    rows = read(write_as(kind, tmp_path, TEXTS))
    assert [row.text for row in rows] == TEXTS
    assert [row.id for row in rows] == [f"rows.{kind}:{number}" for number in range(1, 6)]
    assert all(row.messages is None for row in rows)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1), min_size=1, max_size=5))
def test_csv_and_jsonl_agree_on_any_text(tmp_path, texts):
    from_csv = read(write_as("csv", tmp_path, texts))
    from_jsonl = read(write_as("jsonl", tmp_path, texts))
    assert [row.text for row in from_csv] == [row.text for row in from_jsonl] == texts


def test_a_folder_is_read_in_the_order_of_names_and_each_text_file_is_a_document(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"text": "b1"}, {"text": "b2"}])
    (tmp_path / "a.txt").write_text("a\n\nstill a\n", encoding="utf-8")
    (tmp_path / "README.md").write_text("not data", encoding="utf-8")
    (tmp_path / ".hidden.bin").write_bytes(b"\xff")
    (tmp_path / "sub").mkdir()
    assert [(row.id, row.text) for row in read(tmp_path)] == [
        ("a.txt:1", "a\n\nstill a\n"),
        ("b.jsonl:1", "b1"),
        ("b.jsonl:2", "b2"),
    ]


def test_a_single_text_file_holds_documents_between_blank_lines(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"\n\none\r\nstill one\r\n \t\r\n\r\ntwo")
    assert [row.text for row in read(path, text="anything")] == ["one\r\nstill one", "two"]


def test_messages_are_handed_on_as_found(tmp_path):
    talk = [{"role": "user", "content": "hi"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"chat": talk, "body": "b"}, {"chat": 3}, {"body": None}])
    rows = read(path, messages="chat", text="body")
    assert [(row.text, row.messages) for row in rows] == [("b", talk), (None, 3), (None, None)]


def test_ids_are_the_rows_own_and_unique(tmp_path):
    cells = ["x", "x", 7, True, "", "x#2", "x", 2.5, "a.jsonl:10"]
    path = write_jsonl(tmp_path / "a.jsonl", [*({"id": cell, "text": "t"} for cell in cells), {"text": "t"}])
    ids = [row.id for row in read(path)]
    assert ids[:3] == ["x", "x#2", "7"]
    assert ids[3:5] == ["a.jsonl:4", "a.jsonl:5"]
    assert len(set(ids)) == len(ids)


def test_reading_stops_at_max_documents_and_never_looks_further(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": "two"}\nnot json\n')
    assert [row.text for row in read(path, max_documents=2)] == ["one", "two"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext\r\nhello\r\n")
    assert [row.text for row in read(path)] == ["hello"]


def test_a_long_csv_cell_is_read_whole(tmp_path):
    path = write_csv(tmp_path / "a.csv", [["text"], ["x" * 200_000]])
    assert len(read(path)[0].text) == 200_000


def test_a_split_of_a_saved_folder_is_chosen_by_name(tmp_path):
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "dev")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    assert [row.text for row in read(tmp_path / "saved", split="dev")] == ["dev"]
    with pytest.raises(DataError, match=r"data\.split: .*'test'.*train, dev"):
        read(tmp_path / "saved", split="test")


BROKEN = {
    "line.jsonl": (b'{"text": "a"}\n{"text": \n', r"data\.source: .*line\.jsonl:2 is not JSON"),
    "deep.jsonl": (b"[" * 200_000, r"deep\.jsonl:1 is not JSON"),
    "list.json": (b'[{"text": "a"}]\n', r"list\.json:1 is a JSON list, not an object"),
    "latin.csv": ("text\ncafé\n".encode("latin-1"), r"latin\.csv is not UTF-8 at byte 8\. Convert"),
    "latin.txt": (b"\xef\xbb\xbfab\nc\xff", r"latin\.txt is not UTF-8 at byte 7\."),
    "wide.jsonl": ('{"text": "a"}'.encode("utf-16"), r"not UTF-8 at byte 0"),
    "ragged.csv": (b"text,label\nhello, world,1\n", r"ragged\.csv:2 has 3 cells, the header 2"),
    "open.csv": (b'text\n"never closed\n', r"open\.csv:2 is not CSV"),
    "twice.csv": (b"text,text\na,b\n", r"names a column twice"),
    "half.parquet": (b"PAR1 and no more", r"half\.parquet is not whole Parquet"),
    "empty.jsonl": (b"\n \n", r"data\.source: .*empty\.jsonl holds no rows"),
    "header.csv": (b"text\n", r"holds no rows"),
    "empty.txt": (b"", r"holds no rows"),
    "what.bin": (b"text", r"data\.format: the ending of .*what\.bin"),
    "other.jsonl": (b'{"body": "a"}\n{"note": 1}\n', r"data\.text: no row has a column 'text'.*body, note\. Set"),
    "other.csv": (b"body\na\n", r"data\.text: .*columns are: body\."),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_is_named_with_its_place(name, tmp_path):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_truncated_parquet_file_is_named(tmp_path):
    path = write_as("parquet", tmp_path, TEXTS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"rows\.parquet is not whole Parquet"):
        read(path)


@pytest.mark.parametrize(
    "source", ["no/such/file.jsonl", "gone.csv", "", " ", "sample:news", "a\0b", "x" * 5000 + "/y/z"]
)
def test_a_missing_source_is_refused_without_asking_the_hub(source):
    with pytest.raises(DataError, match=r"data\.source: .* does not exist\. Give a file, a folder"):
        load_examples(source)


def test_an_id_that_the_hub_does_not_know_is_refused(monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError("no\nsuch dataset")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"data\.source: acme/nothing is no file .*\(no such dataset\)"):
        load_examples("acme/nothing")


@pytest.mark.parametrize("config", [None, "large"])
def test_a_hub_id_is_streamed_with_its_configuration_and_split(config, monkeypatch):
    asked = {}

    def give(source: str, config: str | None, **options: object) -> datasets.IterableDataset:
        asked.update(options, source=source, config=config)
        return datasets.Dataset.from_dict({"text": ["a", "b"], "x": [1, 2]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", give)
    assert [(row.id, row.text) for row in read("acme/some", config=config, split="dev")] == [
        ("acme/some:1", "a"),
        ("acme/some:2", "b"),
    ]
    assert asked == {"source": "acme/some", "config": config, "split": "dev", "streaming": True}


@pytest.mark.parametrize(
    ("config", "told"),
    [(None, "has several configurations"), ("larg", "has no configuration 'larg'")],
)
def test_a_configuration_that_is_needed_or_not_there_is_told_with_those_that_are(config, told, tmp_path, monkeypatch):
    """Through the library itself, so that a change of its words is noticed."""
    for name in ("large", "small"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "a.jsonl", [{"text": name}])
    lines = [f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("large", "small")]
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(lines)}---\n")
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda _, *rest, **options: load(str(tmp_path), *rest, **options))
    assert [row.text for row in read("acme/some", config="small")] == ["small"]
    with pytest.raises(DataError) as caught:
        load_examples("acme/some", config=config)
    assert str(caught.value) == f"data.config: acme/some {told}; available are: large, small. Name one of them."


def test_a_configuration_of_what_is_no_hub_id_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    for source, kind in ((path, "file"), (tmp_path, "folder")):
        with pytest.raises(
            DataError, match=rf"^data\.config: got 'large', but .* is a {kind} here.* Leave data\.config out"
        ):
            load_examples(str(source), config="large")


def test_a_data_set_that_is_a_script_is_refused(monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Dataset scripts are no longer supported,\nbut found some.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DataError, match=r"^data\.source: acme/some cannot be read .*but found some\.py\)\. Download it"
    ):
        load_examples("acme/some")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ConnectionError("Server\nDisconnected"),
            r"stopped giving acme/some \(Server Disconnected\)\. Check the network",
        ),
        (httpx.ReadTimeout(""), r"stopped giving acme/some \(ReadTimeout\)\. Check the network"),
        (ValueError("bad\ncell"), r"acme/some cannot be read .*\(bad cell\)"),
        (NotImplementedError("archive"), r"acme/some cannot be read .*\(archive\)"),
    ],
)
def test_what_goes_wrong_after_the_first_rows_is_told_in_one_line(error, told, monkeypatch):
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise error

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    found = load_examples("acme/some")
    assert next(found).text == "a"
    with pytest.raises(DataError, match=rf"^data\.source: .*{told}"):
        next(found)


def test_a_folder_with_a_stray_file_or_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no data files"):
        load_examples(str(tmp_path))
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "b.jsonl.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"data\.format: the ending of .*b\.jsonl\.gz"):
        load_examples(str(tmp_path))


@pytest.mark.parametrize("key", ["text", "messages"])
def test_a_column_asked_for_by_name_must_be_there(key, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "messages": []}])
    with pytest.raises(DataError, match=rf"data\.{key}: no row has a column 'typo'; the columns are: text, messages"):
        read(path, **{key: "typo"})


def test_a_row_knows_the_file_that_it_stands_in(tmp_path):
    (tmp_path / "code:1.jsonl").write_text('{"id": "x", "text": "a"}\n{"text": "b"}\n')
    (tmp_path / "talk.csv").write_text("text\nc\n")
    found = [(row.id, row.source) for row in load_examples(str(tmp_path))]
    assert found == [("x", "code:1.jsonl"), ("code:1.jsonl:2", "code:1.jsonl"), ("talk.csv:1", "talk.csv")]
    assert [row.source for row in load_examples(str(tmp_path / "talk.csv"))] == ["talk.csv"]
