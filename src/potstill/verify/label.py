"""Answers that must be one of some labels. Refuses an answer that names several, and labels that look alike."""

from __future__ import annotations

from collections.abc import Sequence

from potstill.errors import DataError, RecipeError
from potstill.verify.verdict import Row, Verdict, Verifier, cell_of

__all__ = ["label_verifier", "plain_label"]

_AROUND = " \t\r\n*_`\"'"
_AFTER = ".,;:!"


def label_verifier(*, labels: Sequence[str], answer: str | None = None) -> Verifier:
    """The answer is a label, but for case, quotes around it and punctuation after it; where `answer` is set, the row's.

    Raises RecipeError for labels that differ in nothing else; DataError for a row whose label is not among them.
    """
    known: dict[str, str] = {}
    for label in labels:
        other = known.setdefault(plain_label(label), label)
        if other != label or not plain_label(label):
            raise RecipeError(
                f"generate.verify.labels: {label!r} cannot be told from {other!r} in an answer. Give it another name."
                if other != label
                else f"generate.verify.labels: {label!r} is empty but for quotes and punctuation. Give it a name."
            )

    def judge(text: str, row: Row) -> Verdict:
        said = known.get(plain_label(text))
        wanted = _wanted(row, answer, known) if answer is not None else said
        if said is None:
            return Verdict(False, "not one of the labels", extracted=text.strip())
        return Verdict(said == wanted, "" if said == wanted else "another label", extracted=said)

    return Verifier(judge)


def plain_label(text: str) -> str:
    """A label without case, quotes and emphasis around it, and punctuation after it."""
    return text.strip(_AROUND).rstrip(_AFTER).strip(_AROUND).casefold()


def _wanted(row: Row, column: str, known: dict[str, str]) -> str:
    cell = str(cell_of(row, column, "generate.verify.answer"))
    if plain_label(cell) not in known:
        raise DataError(
            f"generate.verify.answer: a row's {column} is {cell!r}, which is not one of {', '.join(known.values())}. "
            "Mend the row, or add it to generate.verify.labels."
        )
    return known[plain_label(cell)]
