"""Answers that were given elsewhere, by any model or API, in a file: a teacher without a model.

Refuses probabilities that are none, labels that nobody knows, two answers to one text, and a text without one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from potstill.data.labels import is_absent, label_name
from potstill.data.load import identity
from potstill.data.records import read_records
from potstill.data.texts import content_key
from potstill.errors import DataError, ModelError
from potstill.types import Batch, Logits, Offer, Signal, Wants

__all__ = ["RecordedReader", "read_recorded"]

LEAST = math.exp(-30.0)
"""In place of a probability of 0, which no student could reach: 1e-13."""
_TOLERANCE = 1e-3
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class _Column:
    """Which column holds the answers, and what they are: certain (labels), or probabilities of these labels."""

    name: str
    certain: bool
    labels: tuple[str, ...]
    multi_label: bool


class RecordedReader:
    """Recorded answers as a `Reader`: it looks up what was said about the texts of a batch."""

    offers = frozenset({Offer.LOGITS})
    models: tuple[()] = ()

    def __init__(self, answers: Mapping[str | bytes, int], scores_RC: Tensor, *, path: str) -> None:
        """`answers` gives the row of `scores_RC` for a text's key (bytes) or id (str)."""
        self._answers, self._scores_RC, self._path = answers, scores_RC, path
        self._by_key = all(isinstance(name, bytes) for name in answers)

    @property
    def vocabulary(self) -> int:
        """Number of classes."""
        return self._scores_RC.shape[1]

    def rows_of(self, ids: Sequence[str], keys: Sequence[bytes]) -> list[int]:
        """Where the answers to these texts stand. Raises DataError with the count and first id of those without one."""
        rows = [self._answers.get(name, -1) for name in (keys if self._by_key else ids)]
        absent = [name for name, row in zip(ids, rows, strict=True) if row < 0]
        if absent:
            raise DataError(
                f"teacher.path: {self._path} has no answer to {len(absent)} of {len(rows)} texts, the first is "
                f"{absent[0]} (matched by {'text' if self._by_key else 'id'}). Add their rows, or set teacher.match."
            )
        return rows

    def read(self, batch: Batch, wants: Wants) -> Signal:
        """What was recorded for the rows of `batch` that are taught (or supervised), [N, C] float32, on its device.

        log p; of several labels a text, log(p / (1 - p)). Raises DataError for a text without an answer, ModelError
        where more than answers is wanted, ValueError for a batch that is not of texts.
        """
        if wants.layers or wants.attentions or wants.vectors or wants.pooled:
            raise ModelError("teacher.kind=recorded has answers and no model. Remove losses over layers and vectors.")
        if not wants.final:
            return Signal()
        taught_BT = batch.supervised_BT if batch.taught_BT is None else batch.taught_BT
        if len(batch.keys) != len(batch) or len(batch.examples) != len(batch) or bool(taught_BT[:, 1:].any()):
            raise ValueError("the batch is not of one text a row with its key, id and answer at position 0: needs one.")
        taught = taught_BT[:, 0].nonzero()[:, 0].tolist()
        rows = self.rows_of([batch.examples[row][0] for row in taught], [batch.keys[row] for row in taught])
        return Signal(Logits(self._scores_RC[rows].to(batch.ids_BT.device)))


def read_recorded(
    path: str,
    *,
    labels: Sequence[str],
    match: Literal["text", "id"] = "text",
    text: str = "text",
    pair: str | None = None,
    probabilities: str | None = None,
    label: str | None = None,
    multi_label: bool = False,
) -> RecordedReader:
    """The answers in a file (.jsonl, .parquet, .csv), in any order, as a teacher.

    The column `probabilities` holds {label: p}, what is not listed being 0, or a list in the order of `labels`; the
    column `label` a label, named as the data's are, or a list of them with `multi_label`. In a .csv file both may be
    JSON. A row without an answer is passed over. `match` says what a row is known by: the columns `text` and `pair`, or
    `id`.

    Raises:
        DataError: the file cannot be read or has no answers; probabilities that are negative, above 1, or do not sum to
            1 within 1e-3; labels that are not among `labels`; two different answers to one text.
        ValueError: not exactly one of `probabilities` and `label`.
    """
    if (probabilities is None) == (label is None):
        raise ValueError("read_recorded needs exactly one of probabilities, label: the column that holds the answers")
    column = _Column(probabilities or label or "", label is not None, tuple(labels), multi_label)
    rows: dict[str | bytes, int] = {}
    answers: list[list[float]] = []
    for place, cells in _records(path, ("id", text, column.name, pair or "")):
        answer = _answer(cells.get(column.name), column, place)
        if answer is None:
            continue
        row = rows.setdefault(_name(cells, place, match, (text, pair)), len(answers))
        if row == len(answers):
            answers.append(answer)
        elif answers[row] != answer:
            raise DataError(f"{place} is a second, different answer to the same text. Keep one of them.")
    if not answers:
        raise DataError(
            f"teacher.path: {path} has no answer in a column {column.name!r}. Name the column that has them."
        )
    return RecordedReader(rows, _scores(torch.tensor(answers, dtype=torch.float64), multi_label), path=path)


def _records(path: str, wanted: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Rows of the file with their places, in words for an error."""
    try:
        for place, cells in read_records(path, config=None, split="train", format="auto", wanted=wanted):
            yield f"teacher.path: {place}", cells
    except DataError as error:
        raise DataError(str(error).replace("data.source:", "teacher.path:")) from None


def _name(
    cells: Mapping[str, object], place: str, match: Literal["text", "id"], columns: tuple[str, str | None]
) -> str | bytes:
    if match == "id":
        name = identity(cells.get("id"))
        if not name:
            raise DataError(f"{place} has no id (text or whole number). Fill it in, or set teacher.match: text.")
        return name
    text, pair = cells.get(columns[0]), None if columns[1] is None else cells.get(columns[1])
    if isinstance(text, list):  # words, of which a key is known as well
        text = tuple(str(word) for word in text)
    if not isinstance(text, str | tuple) or not isinstance(pair, str | None):
        raise DataError(f"{place} has no text in the column {columns[0]!r}. Fill it in, or set teacher.match: id.")
    return content_key(text, pair)


def _answer(cell: object, column: _Column, place: str) -> list[float] | None:
    """The probability of every label; None where nothing was answered."""
    said = cell if cell in column.labels else _parsed(cell)
    if is_absent(said):
        return None
    if column.certain:
        return _certain(said if isinstance(said, list) else [said], column, place)
    found = dict(zip(column.labels, said, strict=False)) if isinstance(said, list) else said
    if not isinstance(found, dict) or (isinstance(said, list) and len(said) != len(column.labels)):
        raise DataError(
            f"{place}: {column.name} is neither an object {{label: probability}} nor a list of {len(column.labels)} "
            "probabilities, one for each of the labels. Mend the row."
        )
    _check_known(found, column, place)
    answer = [_probability(found.get(name), name, place) for name in column.labels]
    if not column.multi_label and abs(sum(answer) - 1.0) > _TOLERANCE:
        raise DataError(
            f"{place}: the probabilities sum to {sum(answer):.6g}: they must sum to 1 within {_TOLERANCE:g}. Give that "
            "of every label, or set task.multi_label if each label is a question of its own."
        )
    return answer


def _parsed(cell: object) -> object:
    """A list or an object that stands as JSON in a text, as it must in .csv; anything else as it is."""
    if isinstance(cell, str) and cell.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def _certain(said: list[object], column: _Column, place: str) -> list[float]:
    try:
        names = [name for name in map(label_name, said) if name is not None]
    except TypeError:
        names = []
    if len(names) < len(said) or (len(said) != 1 and not column.multi_label):
        raise DataError(
            f"{place}: {column.name} is not {'a list of labels' if column.multi_label else 'one label'} (text, a whole "
            "number, true or false). Mend the row."
        )
    _check_known(names, column, place)
    return [float(label in names) for label in column.labels]


def _check_known(names: Iterable[object], column: _Column, place: str) -> None:
    strange = sorted({str(name) for name in names} - set(column.labels))
    if strange:
        listing = ", ".join(strange[:_SHOWN]) + (", ..." if len(strange) > _SHOWN else "")
        raise DataError(
            f"{place}: {column.name} names {listing}, of which the task does not know; its labels are "
            f"{', '.join(column.labels[:_SHOWN])}{', ...' if len(column.labels) > _SHOWN else ''}. Mend the row, or "
            "set task.labels."
        )


def _probability(value: object, label: str, place: str) -> float:
    if value is None:  # a table that has a column for every label fills up with nothing
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise DataError(
            f"{place}: the probability of {label} is {value!r}: it must be a number from 0 to 1. Mend the row."
        )
    return float(value)


def _scores(probabilities_RC: Tensor, multi_label: bool) -> Tensor:
    """What `Logits` holds: log p, or log(p / (1 - p)); a certainty is exp(-30) short of it. float32 [R, C]."""
    yes_RC = probabilities_RC.clamp_min(LEAST).log()
    return (yes_RC - (1.0 - probabilities_RC).clamp_min(LEAST).log() if multi_label else yes_RC).float()
