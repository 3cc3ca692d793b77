"""The classes of a task: their names in order, fitted to the data or held against it.

A label is kept by name from the first row to the saved student; numbers are made here only. Refuses data whose splits
differ in their labels, and a class without a row to learn from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from potstill.data.clean import mend
from potstill.data.split import Split
from potstill.data.texts import LabelledText
from potstill.errors import DataError
from potstill.types import IGNORE

__all__ = ["LabelMap", "count_labels", "fit_labels", "is_absent", "label_name"]

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class LabelMap:
    """Names of the classes; a class is its place among them. `out_of_scope` is a label that is no class."""

    names: tuple[str, ...]
    out_of_scope: str | None = None

    def index(self, name: str) -> int:
        """The number of a class. Raises DataError where there is none of this name."""
        if name not in self.names:
            raise DataError(
                f"task.labels: there is no class {name!r} among the {len(self.names)} ({_listing(self.names)}). "
                "Mend the row, or add the label."
            )
        return self.names.index(name)

    def target(self, name: str) -> int:
        """The number of a class, IGNORE for what is out of scope. Raises DataError where there is none of this name."""
        return IGNORE if name == self.out_of_scope else self.index(name)

    def __len__(self) -> int:
        return len(self.names)


def fit_labels(
    texts: Mapping[Split, Sequence[LabelledText]], given: Sequence[str] | None, *, out_of_scope: str | None = None
) -> LabelMap:
    """The classes of these texts: the names given, in their order, else those of the training texts, alphabetically.

    Texts out of scope are of no class. Where names are given and no training text is labelled (a teacher labels them),
    no class can be empty.

    Raises:
        DataError: there is no labelled training text and no name was given; a label is not among those given, or no
            training text has it; a class given has no training text; there are fewer than 2; nothing is out of scope.
    """
    counts = {split: count_labels(rows) for split, rows in texts.items()}
    if out_of_scope is not None:
        _check_out_of_scope(out_of_scope, given, counts)
    seen = {split: {name: n for name, n in found.items() if name != out_of_scope} for split, found in counts.items()}
    trained = seen.get("train", {})
    names = tuple(sorted(trained)) if given is None else tuple(given)
    _check_distinct(names)
    if given is not None:
        _check_listed(texts, seen, names)
    if not trained and given is None:
        raise DataError(
            "data.label: no training text is labelled. Name the column of the labels in data.label, "
            "or list the classes in task.labels and let a ready teacher label the texts."
        )
    if trained:
        _check_trained(seen, names)
    if len(names) < 2:
        raise DataError(
            f"data.label: the training texts have one class only ({names[0]!r}), and 2 are needed to tell apart. "
            "Give rows of other classes, or name another column in data.label."
        )
    return LabelMap(names, out_of_scope)


def count_labels(texts: Iterable[LabelledText]) -> dict[str, int]:
    """How often each label stands, by name; a text or word without a label counts nowhere."""
    counts: dict[str, int] = {}
    for text in texts:
        for name in text.labels:
            counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def label_name(cell: object) -> str | None:
    """The name of a label as a table has it, None where there is none: 3 is "3", true is "true", " x " is "x".

    A whole number may come as a float, since tables with gaps have no whole ones. Raises TypeError for what is neither
    text, nor a whole number, nor true or false.
    """
    if is_absent(cell):
        return None
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, str):
        return str(mend(cell.strip()))
    if isinstance(cell, int) or (isinstance(cell, float) and cell.is_integer()):
        return str(int(cell))
    raise TypeError(f"{cell!r} is no label: needs text, a whole number, true or false.")


def is_absent(cell: object) -> bool:
    """Whether a cell of a table holds nothing: null, white space, or the NaN that stands for a gap."""
    return (
        cell is None or (isinstance(cell, str) and not cell.strip()) or (isinstance(cell, float) and math.isnan(cell))
    )


def _check_out_of_scope(name: str, given: Sequence[str] | None, counts: Mapping[Split, Mapping[str, int]]) -> None:
    if given is not None and name in given:
        raise DataError(f"task.out_of_scope: {name!r} is no class, but task.labels lists it. Take it out of the list.")
    labels = sorted(set().union(*counts.values()))
    if name not in labels:
        raise DataError(
            f"task.out_of_scope: no text is labelled {name!r}; the labels are: {_listing(labels)}. "
            "Name one of them, or leave task.out_of_scope out."
        )


def _check_distinct(names: Sequence[str]) -> None:
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise DataError(f"task.labels: {_listing(twice)} is there twice. List each class once.")


def _check_listed(
    texts: Mapping[Split, Sequence[LabelledText]], seen: Mapping[Split, Mapping[str, int]], names: Sequence[str]
) -> None:
    strange = sorted(set().union(*seen.values()) - set(names))
    if not strange:
        return
    where = next(text.id for rows in texts.values() for text in rows if strange[0] in text.labels)
    numbers = all(name.lstrip("-").isdigit() for name in strange) and not any(name.isdigit() for name in names)
    advice = (
        "The data numbers its labels: write their names into the rows, or list the numbers, quoted, in task.labels."
        if numbers
        else "Add the label, mend the rows, or name it in task.out_of_scope."
    )
    raise DataError(
        f"task.labels: the data has {len(strange)} labels that are not listed: {_listing(strange)} (row {where}); "
        f"listed are {_listing(names)}. {advice}"
    )


def _check_trained(seen: Mapping[Split, Mapping[str, int]], names: Sequence[str]) -> None:
    trained = set(seen["train"])
    for split, found in seen.items():
        untaught = sorted(set(found) - trained)
        if untaught:
            raise DataError(
                f"data.label: the labels of the splits differ: no training text has {_listing(untaught)}, which "
                f"{split} texts have. Give training rows of it, or remove these rows."
            )
    empty = [name for name in names if name not in trained]
    if empty:
        raise DataError(
            f"task.labels: no training text is of {_listing(empty)}. Give rows of it, or take it out of the list."
        )


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
