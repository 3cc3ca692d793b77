from __future__ import annotations

import json
from itertools import pairwise

import pytest

from potstill.errors import DataError
from potstill.pipeline.survey import SAMPLED_DOCUMENTS, SPLITS, read_split, survey_data
from potstill.recipes import load_recipe


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    def with_documents(count: int, *overrides: str):
        file = tmp_path / "words.jsonl"
        file.write_text("".join(json.dumps({"id": str(i), "text": f"Document {i}."}) + "\n" for i in range(count)))
        return load_recipe(tiny_recipe, [f"data.source={file}", *overrides])

    return with_documents


def test_every_document_is_in_the_split_that_it_is_counted_in(recipe):
    asked = recipe(300)
    survey = survey_data(asked)
    read = {split: [example.id for example in read_split(asked, split)] for split in SPLITS}
    assert {split: len(ids) for split, ids in read.items()} == dict(survey.documents)
    assert sorted(name for ids in read.values() for name in ids) == sorted(map(str, range(300)))
    assert [example.id for example in survey.held_out] == read["test"][:64]
    assert survey.cleaning.kept["text"] == 300


@pytest.mark.parametrize("count", [30, 401, 3000])
def test_sampled_documents_are_spread_over_all(recipe, count):
    sampled = [int(example.id) for example in survey_data(recipe(count)).sampled]
    steps = {after - before for before, after in pairwise(sampled)}
    assert len(steps) == 1
    assert sampled[-1] + steps.pop() >= count
    assert min(count, SAMPLED_DOCUMENTS / 2) <= len(sampled) <= SAMPLED_DOCUMENTS


def test_reading_stops_at_the_limit_and_says_so(recipe):
    seen = []
    survey = survey_data(recipe(300), 50, seen.append)
    assert not survey.complete
    assert survey.documents.total() == len(seen) == 50
    assert survey_data(recipe(300), 300).complete


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ("{validation: 0.9, test: 0.09}", r"data\.splits: of 4 documents none fell into the train split\. Lower"),
        ("{validation: 0.001, test: 0.4}", r"data\.splits\.validation: .* none .* Raise it above 0\.001"),
        ("{validation: 0.4, test: 0.001}", r"data\.splits\.test: .* none .* Raise it above 0\.001"),
    ],
)
def test_an_empty_split_is_named(recipe, shares, words):
    with pytest.raises(DataError, match=words):
        survey_data(recipe(4, f"data.splits={shares}", "seed=0"))


def test_the_configuration_that_the_recipe_names_is_read(recipe):
    with pytest.raises(DataError, match=r"^data\.config: got 'large', but .* is a file here"):
        survey_data(recipe(30, "data.config=large"))
