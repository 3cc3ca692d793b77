"""Which of the texts with labels are for training, and which are held out; equal ones never on both sides.

Texts are equal here whose words are, whatever the case and the white space: their copies lie about in many collections
and would be learned by heart. Refuses to drop one uncounted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from potstill.data.split import Split, check_shares, place_of
from potstill.data.texts import LabelledText

__all__ = ["Partition", "RemovalReason", "normal_form", "partition_texts"]

Texts = list[LabelledText]


class RemovalReason(StrEnum):
    """Why a text was removed from a split."""

    TRAIN_IN_TEST = "train text stands in test"
    TRAIN_IN_VALIDATION = "train text stands in validation"
    VALIDATION_IN_TEST = "validation text stands in test"
    REPEATED = "train text is repeated"
    CONTRADICTORY = "train text is repeated with another label"
    UNANSWERED = "held-out text of a part of which nobody published the labels"


@dataclass(frozen=True, slots=True)
class Partition:
    """The texts of each split, in the order in which they came, and how many were removed, by `RemovalReason`."""

    texts: Mapping[Split, tuple[LabelledText, ...]]
    removed: Counter[str]


def partition_texts(texts: Iterable[LabelledText], *, seed: int, validation: float, test: float) -> Partition:
    """Each text in the split that its source says; where it says nothing, in train.

    A split that the source lacks altogether is taken from train by a keyed hash of the content: `test` and `validation`
    are its shares. Where some training texts have labels, only such are taken. A text that stands in test too is
    removed from the others, one in validation from train; one that is repeated within train stays once, with the first
    label that it has there. A held-out part without any label, where training texts have some, cannot be measured on:
    it is left out, as if the source lacked it.

    Raises:
        DataError: the shares are negative or leave nothing to train on.
    """
    check_shares(validation, test)
    removed: Counter[str] = Counter()
    splits: dict[Split, Texts] = {"train": [], "validation": [], "test": []}
    for text in texts:
        splits[text.split or "train"].append(text)
    _leave_unanswered(splits, removed)
    test_rows = splits["test"]
    held = splits["validation"] = _without(splits["validation"], test_rows, RemovalReason.VALIDATION_IN_TEST, removed)
    rest = _without(splits["train"], test_rows, RemovalReason.TRAIN_IN_TEST, removed)
    rest = _without(rest, held, RemovalReason.TRAIN_IN_VALIDATION, removed)
    splits["train"] = _once(rest, removed)
    _carve(splits, seed=seed, validation=validation, test=test)
    return Partition({split: tuple(rows) for split, rows in splits.items()}, removed)


def normal_form(text: LabelledText) -> tuple[str, ...]:
    """What equal texts have in common: their words, and those of the second text, in lower case, one space apart."""
    words = " ".join(text.text) if isinstance(text.text, tuple) else text.text
    return tuple(" ".join(part.casefold().split()) for part in (words, text.pair) if part is not None)


def _leave_unanswered(splits: dict[Split, Texts], removed: Counter[str]) -> None:
    """Empty the held-out parts that keep their labels to themselves, as those of competitions do."""
    if not any(text.label is not None for text in splits["train"]):
        return
    for split in ("validation", "test"):
        if splits[split] and all(text.label is None for text in splits[split]):
            removed[RemovalReason.UNANSWERED] += len(splits[split])
            splits[split] = []


def _without(texts: Texts, others: Texts, reason: RemovalReason, removed: Counter[str]) -> Texts:
    held = {normal_form(text) for text in others}
    kept = [text for text in texts if normal_form(text) not in held]
    if len(kept) < len(texts):
        removed[reason.value] += len(texts) - len(kept)
    return kept


def _once(texts: Texts, removed: Counter[str]) -> Texts:
    kept: dict[tuple[str, ...], LabelledText] = {}
    for text in texts:
        form = normal_form(text)
        first = kept.setdefault(form, text)
        if first is text:
            continue
        contradictory = None not in (first.label, text.label) and _claim(first) != _claim(text)
        removed[(RemovalReason.CONTRADICTORY if contradictory else RemovalReason.REPEATED).value] += 1
        if first.label is None:
            kept[form] = text
    return list(kept.values())


def _claim(text: LabelledText) -> object:
    """What is said of a text: of several labels their order plays no part, of those of its words it does."""
    return text.label if isinstance(text.text, tuple) else sorted(text.labels)


def _carve(splits: dict[Split, Texts], *, seed: int, validation: float, test: float) -> None:
    """Take what is missing from train: test the lower end of the hashes and validation the upper one, as `split_of`."""
    lower = 0.0 if splits["test"] else test
    upper = 1.0 if splits["validation"] else 1.0 - validation
    labelled = any(text.label is not None for text in splits["train"])
    rest: Texts = []
    for text in splits["train"]:
        place = lower if labelled and text.label is None else place_of(list(normal_form(text)), seed)
        home: Split = "test" if place < lower else "validation" if place >= upper else "train"
        (rest if home == "train" else splits[home]).append(text)
    splits["train"] = rest
