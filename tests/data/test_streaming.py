"""Corpora larger than memory: one pass over the source, memory that does not grow, no more read than is needed."""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice

import pytest

from potstill.data import Encoded, PackedRows, Row, write_rows
from potstill.data.pack import RowWriter
from potstill.errors import DataError, RecipeError
from potstill.pipeline import stages, survey
from potstill.pipeline.run import run_recipe
from potstill.pipeline.rundir import RunDir
from potstill.recipes import load_recipe

WINDOW = 256


def synthetic_rows(number: int | None = None) -> Iterator[Row]:
    """A source that is made as it is read; endless without a number."""
    return (
        Row(f"made-{index}", "made.jsonl", text=f"Document {index}. " + "word " * (index % 9))
        for index in islice(count(), number)
    )


def peak_bytes(work: Callable[[], object]) -> int:
    """What `work` held at most beyond what was there before."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_ten_times_the_documents_are_packed_in_the_same_memory(tmp_path):
    def documents(number: int) -> Iterator[Encoded]:
        return (Encoded(f"d-{i}", [7] * (2 + i % 11), [False] + [True] * (1 + i % 11), "made") for i in range(number))

    def pack(number: int, name: str) -> int:
        settings = {"sequence_length": 16, "pad_id": 0, "window": WINDOW}
        return peak_bytes(lambda: write_rows(documents(number), tmp_path / name, **settings))

    assert pack(10_000, "many") < 1.5 * pack(1_000, "few")
    assert PackedRows(tmp_path / "many").stats.documents == 10_000
    assert PackedRows(tmp_path / "many").sources() == {"made"}


@pytest.fixture
def opened(monkeypatch):
    """Every opening of a made source, as the list of the rows that were read from it; `source` makes these."""
    monkeypatch.setattr(stages, "RowWriter", partial(RowWriter, window=WINDOW))
    readings: list[list[str]] = []

    def become(source):
        def load(*_, **__):
            readings.append(read := [])
            for row in source():
                read.append(row.id)
                yield row

        monkeypatch.setattr(survey, "load_examples", load)
        return readings

    return become


@pytest.fixture
def prepare(tiny_recipe, tmp_path):
    def run(*overrides: str):
        run_recipe(load_recipe(tiny_recipe, list(overrides)), until="prepare")
        return RunDir(tmp_path / "run").manifest("prepare").facts

    return run


def test_one_pass_over_the_source_fills_all_splits(opened, prepare, tmp_path):
    readings = opened(partial(synthetic_rows, 900))
    facts = prepare()
    assert [len(read) for read in readings] == [900]
    assert facts["reading"] == {"source_rows": 900, "documents_used": 900, "stopped_at_max_tokens": False}
    assert sum(facts["documents"].values()) == 900
    found = Counter()
    for split in survey.SPLITS:
        rows = PackedRows(tmp_path / "run" / "prepare" / split)
        batch = rows.batch(range(len(rows)))
        names = {name for names in batch.examples for name in names}
        assert len(names) == facts["documents"][split]
        found.update(names)
    assert found == Counter(readings[0])


def test_ten_times_the_documents_are_prepared_in_the_same_memory(opened, prepare, monkeypatch):
    opened(synthetic_rows)
    peaks = []
    for number in (50, 600, 6_000):  # the first run imports and compiles, and is not looked at
        monkeypatch.setattr(survey, "load_examples", lambda *_, number=number, **__: synthetic_rows(number))
        # Another limit each time, for the fingerprint cannot see that the made source is another one.
        peaks.append(peak_bytes(partial(prepare, f"data.max_documents={number}")))
    assert peaks[2] < 1.5 * peaks[1], peaks


def test_a_token_budget_ends_the_reading_of_an_endless_source(opened, prepare):
    readings = opened(synthetic_rows)
    facts = prepare("data.max_tokens=5e3")
    longest = 100  # tokens of no document exceed it
    assert 5_000 <= facts["tokens"]["train"] < 5_000 + longest
    used = sum(facts["documents"].values())
    told = {"source_rows": len(readings[0]), "documents_used": used, "stopped_at_max_tokens": True}
    assert facts["reading"] == told
    assert len(readings[0]) - used < stages.ENCODED_AT_ONCE


def test_what_a_budget_keeps_does_not_depend_on_what_comes_after_it(opened, prepare, tmp_path):
    folder = tmp_path / "run" / "prepare" / "train"
    opened(synthetic_rows)
    endless, first = prepare("data.max_tokens=3e3"), (folder / "ids.npy").read_bytes()
    opened(partial(synthetic_rows, sum(endless["documents"].values())))
    finite = prepare("data.max_tokens=1e9")
    assert finite["documents"] == endless["documents"]
    assert not finite["reading"]["stopped_at_max_tokens"]
    assert (folder / "ids.npy").read_bytes() == first


def test_a_source_that_fails_in_the_middle_leaves_no_split_that_opens(opened, prepare, tmp_path):
    def failing() -> Iterator[Row]:
        yield from synthetic_rows(900)
        raise DataError("data.source: the line went dead.")

    opened(failing)
    with pytest.raises(DataError, match="went dead"):
        prepare()
    for split in survey.SPLITS:
        folder = tmp_path / "run" / "prepare" / split
        assert not folder.exists() or not (folder / "rows.json").exists()
        assert not (folder / "spool.bin").exists()


def test_an_empty_split_is_refused_after_the_pass_with_nothing_that_opens(opened, prepare, tmp_path):
    opened(partial(synthetic_rows, 3))
    with pytest.raises(DataError, match=r"of 3 documents none fell into the "):
        prepare("data.splits={validation: 0.001, test: 0.4}", "seed=0")
    assert not list((tmp_path / "run").rglob("rows.json"))


@pytest.mark.parametrize("value", ["0", "-3", "true", ".inf", "many"])
def test_a_budget_that_is_no_number_of_tokens_is_refused(tiny_recipe, value):
    with pytest.raises(RecipeError, match=r"data\.max_tokens"):
        load_recipe(tiny_recipe, [f"data.max_tokens={value}"])
