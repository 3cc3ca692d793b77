"""Reading the data, once: which documents there are, in which split each falls, and some to show.

Refuses data in which a split is empty, and says which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from potstill.data import Cleaning, Split, clean_examples, load_examples, split_of
from potstill.errors import DataError
from potstill.pipeline.places import resolve_data
from potstill.pipeline.written import ROWS, read_rows
from potstill.recipes import Recipe
from potstill.types import Example

__all__ = ["SPLITS", "Placed", "Survey", "survey_data"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

Placed = tuple[Split, Example]
"""A document, and the split that it falls into."""

HELD_OUT_DOCUMENTS = 64
"""Documents of the test split that are kept as they are, for the prompts of the report."""

SAMPLED_DOCUMENTS = 400


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found. `documents` counts them by split; `held_out` are the first of the test split.

    sampled    some documents, evenly spread over those read
    sources    the names of all the files or data sets that they come from
    complete   False when reading stopped at the limit of the survey; what the recipe itself leaves out is not missed
    """

    documents: Counter[Split]
    held_out: tuple[Example, ...]
    sampled: tuple[Example, ...]
    sources: frozenset[str]
    cleaning: Cleaning
    complete: bool


def survey_data(
    recipe: Recipe, limit: int | None = None, through: Callable[[Iterator[Placed]], Iterator[Placed]] = iter
) -> Survey:
    """Read all documents once, or `limit` of them, and say what there is.

    `through` is given the stream of documents and hands on those that count: what it does with each is done in the same
    pass, and when it ends, reading ends. Raises DataError where there is nothing to read or to use, or where a split
    got no document.
    """
    found, cleaning = _read_placed(recipe)
    placed = through(found)
    documents: Counter[Split] = Counter()
    held_out: list[Example] = []
    sampled: list[Example] = []
    sources: set[str] = set()
    every = 1
    for number, (split, example) in enumerate(islice(placed, limit)):
        documents[split] += 1
        sources.add(example.source)
        if split == "test" and len(held_out) < HELD_OUT_DOCUMENTS:
            held_out.append(example)
        if number % every == 0:
            sampled.append(example)
        if len(sampled) > SAMPLED_DOCUMENTS:  # twice as sparse from now on
            sampled, every = sampled[::2], 2 * every
    complete = next(placed, None) is None
    if complete:
        _check_splits(recipe, documents)
    return Survey(documents, tuple(held_out), tuple(sampled), frozenset(sources), cleaning, complete)


def _read_placed(recipe: Recipe) -> tuple[Iterator[Placed], Cleaning]:
    """All clean examples with their splits: what a teacher has written has its prompts' splits."""
    if recipe.generate is not None:
        cleaning = Cleaning()
        return _counted(read_rows(recipe.folder / "generate" / ROWS), cleaning), cleaning
    examples, cleaning = _read_examples(recipe)
    return ((_split(recipe, example), example) for example in examples), cleaning


def _counted(placed: Iterator[Placed], cleaning: Cleaning) -> Iterator[Placed]:
    for split, example in placed:
        cleaning.kept["messages"] += 1
        yield split, example


def _read_examples(recipe: Recipe) -> tuple[Iterator[Example], Cleaning]:
    """All clean examples, and the counts of their cleaning, complete when these are read."""
    data = recipe.data
    rows = load_examples(
        resolve_data(data.source),
        config=data.config,
        split=data.split,
        format=data.format,
        text=data.text,
        messages=data.messages,
        max_documents=data.max_documents,
    )
    return clean_examples(rows)


def _split(recipe: Recipe, example: Example) -> Split:
    shares = recipe.data.splits
    return split_of(example, seed=recipe.seed, validation=shares.validation, test=shares.test)


def _check_splits(recipe: Recipe, documents: Counter[Split]) -> None:
    empty = [split for split in SPLITS if not documents[split]]
    if not empty:
        return
    shares = recipe.data.splits
    advice = {
        "train": "Lower data.splits.validation and data.splits.test, or give more documents.",
        "validation": f"Raise it above {shares.validation:g}, or give more documents.",
        "test": f"Raise it above {shares.test:g}, or give more documents.",
    }
    key = "data.splits" if empty[0] == "train" else f"data.splits.{empty[0]}"
    budget = "" if recipe.data.max_tokens is None else " Reading ends at data.max_tokens: a higher one reads more."
    raise DataError(
        f"{key}: of {documents.total()} documents none fell into the {empty[0]} split. {advice[empty[0]]}{budget}"
    )
