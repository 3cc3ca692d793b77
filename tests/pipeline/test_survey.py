from __future__ import annotations

import json
from collections import Counter
from itertools import islice, pairwise

import pytest

from potstill.errors import DataError
from potstill.pipeline.survey import SAMPLED_DOCUMENTS, survey_data
from potstill.recipes import load_recipe


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    def with_documents(count: int, *overrides: str):
        file = tmp_path / "words.jsonl"
        file.write_text("".join(json.dumps({"id": str(i), "text": f"Document {i}."}) + "\n" for i in range(count)))
        return load_recipe(tiny_recipe, [f"data.source={file}", *overrides])

    return with_documents


def test_every_document_passes_once_in_order_with_the_split_that_it_is_counted_in(recipe):
    passed = []

    def note(documents):
        for split, example in documents:
            passed.append((split, example.id))
            yield split, example

    survey = survey_data(recipe(300), through=note)
    assert [name for _, name in passed] == list(map(str, range(300)))
    assert Counter(split for split, _ in passed) == survey.documents
    assert [example.id for example in survey.held_out] == [name for split, name in passed if split == "test"][:64]
    assert survey.cleaning.kept["text"] == 300


def test_reading_ends_with_what_the_documents_pass_through(recipe):
    survey = survey_data(recipe(300), through=lambda documents: islice(documents, 200))
    assert survey.documents.total() == survey.cleaning.rows == 200
    assert survey.complete


@pytest.mark.parametrize("count", [30, 401, 3000])
def test_sampled_documents_are_spread_over_all(recipe, count):
    sampled = [int(example.id) for example in survey_data(recipe(count)).sampled]
    steps = {after - before for before, after in pairwise(sampled)}
    assert len(steps) == 1
    assert sampled[-1] + steps.pop() >= count
    assert min(count, SAMPLED_DOCUMENTS / 2) <= len(sampled) <= SAMPLED_DOCUMENTS


def test_reading_stops_at_the_limit_and_says_so(recipe):
    survey = survey_data(recipe(300), 50)
    assert not survey.complete
    assert survey.documents.total() == 50
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


def test_a_split_that_is_empty_because_reading_ended_early_is_named_with_what_ended_it(recipe):
    asked = recipe(300, "data.splits={validation: 0.01, test: 0.01}", "data.max_tokens=1")
    with pytest.raises(DataError, match=r"^data\.splits\.validation: of 1 documents .* a higher one reads more\.$"):
        survey_data(asked, through=lambda documents: islice(documents, 1))


def test_the_configuration_that_the_recipe_names_is_read(recipe):
    with pytest.raises(DataError, match=r"^data\.config: got 'large', but .* is a file here"):
        survey_data(recipe(30, "data.config=large"))
