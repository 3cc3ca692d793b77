"""Class by class: how each arm does on it, and what the student mixes up that its teacher tells apart.

Refuses: hiding classes. The picture shows those on which the student lost most; the table behind it has them all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from potstill.report.figures import MARGIN, Figure, blank_figure, mark, to_json
from potstill.report.story import ARMS, ClassFacts, ClassRow, Confusion, SliceRow, Story
from potstill.report.text import plotly_label
from potstill.report.wording import wording_of
from potstill.types import Measurement

__all__ = ["class_figure", "confusion_rows", "slice_arms", "slice_rows", "worst_classes"]

_SHOWN = 15
_ROW = 30
_LONGEST = 24
_DRAWN = ("teacher", "control", "student", "static")


def worst_classes(classes: ClassFacts) -> list[str]:
    """All labels, those first on which the student's F1 falls furthest below the teacher's; then by its own F1."""
    student, teacher = (_by_label(classes, arm) for arm in ("student", "teacher"))

    def loss(label: str) -> tuple[float, float]:
        own = _f1(student.get(label))
        return own - _f1(teacher.get(label)), own

    return sorted((label for label in classes.labels if label in student), key=loss)


def class_figure(story: Story) -> Figure | None:
    """F1 of the classes on which the student lost most, all arms; the numbers behind it are of all classes."""
    classes = story.classes
    ordered = worst_classes(classes) if classes else []
    arms = [arm for arm in _DRAWN if classes and arm in classes.arms]
    if classes is None or not ordered:
        return None
    shown = ordered[:_SHOWN]
    height = _ROW * len(shown) + MARGIN["t"] + MARGIN["b"]
    figure = blank_figure(height, "F1 of the class")
    figure.update_xaxes(range=[_floor(classes, arms, shown), 1.03], tickformat=".0%")
    names = [f"{_short(label)}  ({_count_of(label, classes, arms):,})" for label in shown]
    ticks = {"tickmode": "array", "tickvals": list(range(len(shown))), "ticktext": names}
    figure.update_yaxes(range=[len(shown) - 0.4, -0.6], **ticks)
    figure.update_layout(margin={**MARGIN, "l": 215})
    for arm in arms:
        figure.add_trace(_marks(arm, shown, classes))
    places = wording_of(story.task).places if not _multi(story) else "texts"
    return Figure(
        title="Class by class"
        if len(shown) == len(ordered)
        else f"The {_SHOWN} classes on which the student lost most",
        caption="By F1, against the teacher's; the classes lost most come first. "
        + (f"All {len(ordered):,} stand in the numbers below. " if len(ordered) > len(shown) else "")
        + f"In parentheses: held-out {places} of the class; few make a number uncertain.",
        summary="; ".join(f"{label}: {_words(label, classes, arms)}" for label in shown) + ".",
        height=height,
        spec=to_json(figure),
        columns=("class", "n", *(f"F1, {arm}" for arm in arms), "precision, student", "recall, student"),
        rows=tuple(_row(label, classes, arms) for label in ordered),
        arms=tuple(arms),
    )


def confusion_rows(confusions: Sequence[Confusion]) -> list[tuple[str, str, str, str, str]]:
    """(true, taken for, student, teacher, added) of the pairs that the student confuses more often than its teacher."""
    added = [one for one in confusions if one.student > one.teacher]
    added.sort(key=lambda one: (one.teacher - one.student, -one.student, one.true, one.predicted))
    return [
        (one.true, one.predicted, f"{one.student:,}", f"{one.teacher:,}", f"+{one.student - one.teacher:,}")
        for one in added[:_SHOWN]
    ]


def slice_arms(story: Story) -> list[str]:
    """The arms that were measured on any slice."""
    seen = {measurement.arm for row in story.slices for measurement in row.measurements}
    return [arm for arm in ARMS if arm in seen] + sorted(seen.difference(ARMS))


def slice_rows(story: Story) -> list[tuple[str, list[Measurement | None], str]]:
    """(value, a measurement an arm, n) of every slice of the texts, those with most texts first."""
    arms = slice_arms(story)
    ordered = sorted(story.slices, key=lambda row: (-_count(row), row.value))
    return [(row.value, [_of(row, arm) for arm in arms], f"{_count(row):,}") for row in ordered]


def _count(row: SliceRow) -> int:
    return max((measurement.n for measurement in row.measurements), default=0)


def _of(row: SliceRow, arm: str) -> Measurement | None:
    return next((measurement for measurement in row.measurements if measurement.arm == arm), None)


def _multi(story: Story) -> bool:
    return story.task is not None and story.task.multi_label


def _by_label(classes: ClassFacts, arm: str) -> dict[str, ClassRow]:
    return {row.label: row for row in classes.arms.get(arm, ())}


def _f1(row: ClassRow | None) -> float:
    return 0.0 if row is None or row.f1 is None else row.f1


def _marks(arm: str, shown: Sequence[str], classes: ClassFacts) -> go.Scatter:
    rows = _by_label(classes, arm)
    found = [
        (place, row, row.f1) for place, label in enumerate(shown) if (row := rows.get(label)) and row.f1 is not None
    ]
    return go.Scatter(
        x=[f1 for *_, f1 in found],
        y=[place for place, *_ in found],
        customdata=[(plotly_label(row.label), _share(row.f1), row.n) for _, row, _ in found],
        mode="markers",
        marker=mark(arm, 10),
        hovertemplate=f"<b>{plotly_label(arm)}</b>, %{{customdata[0]}}<br>F1 %{{customdata[1]}}, n = "
        "%{customdata[2]}<extra></extra>",
    )


def _floor(classes: ClassFacts, arms: Sequence[str], shown: Sequence[str]) -> float:
    """Where the axis begins: the tens below all that is drawn."""
    drawn = [row.f1 for arm in arms for row in classes.arms[arm] if row.label in shown and row.f1 is not None]
    return max(0.0, math.floor(10 * min(drawn, default=0.0)) / 10) - 0.02


def _count_of(label: str, classes: ClassFacts, arms: Sequence[str]) -> int:
    return max((row.n for arm in arms if (row := _by_label(classes, arm).get(label))), default=0)


def _short(label: str) -> str:
    return plotly_label(label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…")


def _words(label: str, classes: ClassFacts, arms: Sequence[str]) -> str:
    return ", ".join(f"{arm} {_share(_at(classes, arm, label, 'f1'))}" for arm in arms)


def _row(label: str, classes: ClassFacts, arms: Sequence[str]) -> tuple[str, ...]:
    count = _count_of(label, classes, arms)
    f1 = (_share(_at(classes, arm, label, "f1")) for arm in arms)
    return (
        label,
        f"{count:,}",
        *f1,
        *(_share(_at(classes, "student", label, name)) for name in ("precision", "recall")),
    )


def _at(classes: ClassFacts, arm: str, label: str, name: str) -> float | None:
    row = _by_label(classes, arm).get(label)
    return None if row is None else {"f1": row.f1, "precision": row.precision, "recall": row.recall}[name]


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value * 100:.1f} %"
