"""Entities: runs of words that B- and I- labels mark, right only as a whole.

Refuses label sets without such marks: there words are classes and no more.

Suffixes: N words, D texts, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from potstill.evaluation.bootstrap import Floats
from potstill.evaluation.classes import Truth
from potstill.evaluation.intervals import Quantity, measure, ratio
from potstill.types import Measurement

__all__ = ["Span", "find_spans", "marks_entities", "measure_entities"]

OUTSIDE = "O"

Span = tuple[int, int, str]
"""First word, the word after the last, type."""


def marks_entities(names: Sequence[str]) -> bool:
    """Whether labels are O, B-TYPE and I-TYPE, at least one of which begins something."""
    return any(name.startswith("B-") for name in names) and all(
        name == OUTSIDE or name.startswith(("B-", "I-")) for name in names
    )


def find_spans(labels: Sequence[str]) -> set[Span]:
    """The entities of one text: a B- begins one, and so does an I- that does not go on with one of its type.

    Ramshaw and Marcus (1995), arXiv:cmp-lg/9505040; Tjong Kim Sang and De Meulder (2003), arXiv:cs/0306050.
    """
    found: set[Span] = set()
    begin, kind = 0, ""
    for place, label in enumerate((*labels, OUTSIDE)):
        goes_on = label == f"I-{kind}" and kind != ""
        if goes_on:
            continue
        if kind:
            found.add((begin, place, kind))
        begin, kind = place, "" if label == OUTSIDE else label[2:]
    return found


def measure_entities(
    said: Mapping[str, NDArray[np.int64]], truth: Truth, *, resamples: int, seed: int
) -> list[Measurement]:
    """entity_f1 = 2 right / (answered + true) of every arm: an entity is right where both ends and the type are.

    `said` holds the class of every word, [N]. Only texts of which every word is labelled count, and are resampled:
    95 % percentiles. Gains of the student over control and untrained are paired. Left out where there is no entity.
    """
    whole_D = np.bincount(truth.text_N, ~truth.labelled_N, truth.texts) == 0
    true = _spans(truth.true_NC.argmax(-1), truth)
    counts = {arm: _counts(_spans(said_N, truth), true)[whole_D] for arm, said_N in said.items()}
    n = int(whole_D.sum())

    def statistic(weights_RD: Floats) -> Mapping[Quantity, Floats]:
        scores = {}
        for arm, counts_D3 in counts.items():
            right, answered, there = (weights_RD @ counts_D3).T
            scores[arm] = ratio(2 * right, answered + there)
        found = {Quantity(arm, "entity_f1", n): values_R for arm, values_R in scores.items()}
        gained = [other for other in ("control", "untrained") if {other, "student"} <= scores.keys()]
        gains = {
            Quantity("student", f"entity_f1_gain_over_{other}", n): scores["student"] - scores[other]
            for other in gained
        }
        return {**found, **gains}

    return measure(statistic, texts=n, resamples=resamples, seed=seed)


def _spans(class_N: NDArray[np.int64], truth: Truth) -> list[set[Span]]:
    """The entities of every text."""
    words: list[list[str]] = [[] for _ in range(truth.texts)]
    for text, label in zip(truth.text_N.tolist(), class_N.tolist(), strict=True):
        words[text].append(truth.names[label])
    return [find_spans(labels) for labels in words]


def _counts(said: Sequence[set[Span]], true: Sequence[set[Span]]) -> Floats:
    """Right, answered and true entities of every text, [D, 3]."""
    rows = [(len(ours & theirs), len(ours), len(theirs)) for ours, theirs in zip(said, true, strict=True)]
    return np.array(rows, dtype=np.float64).reshape(-1, 3)
