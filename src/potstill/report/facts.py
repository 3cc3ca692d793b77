"""The tables of the page as plain rows of text, so that the HTML and the Markdown tell the same facts.

Refuses: filling a hole. What was not measured is None here and is called "not measured" there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from potstill.report.headline import Verdict, judge
from potstill.report.metrics import Metric, gains_of, metric_of, metrics_of
from potstill.report.numbers import format_interval, format_rate, format_size, format_value
from potstill.report.story import ARMS, SignalFacts, Story
from potstill.types import Measurement

__all__ = [
    "SCOPE",
    "ArmRow",
    "Cell",
    "Gain",
    "arm_rows",
    "arms_of",
    "by_definition",
    "cell_of",
    "gain_rows",
    "signal_rows",
]

SCOPE = "oos_"
"""How the names of what is measured of out-of-scope texts begin."""

_GAIN_MARK = "_gain_over_"
_DETAILS = ("class:", "slice:")
"""Slices that have tables of their own."""

_DEFINITIONS = {
    ("teacher", "agreement"): 1.0,
    ("teacher", "kl_to_teacher"): 0.0,
    ("teacher", "retention"): 1.0,
    ("teacher", "recovered_agreement"): 1.0,
    ("teacher", "recovered_kl"): 1.0,
    ("teacher", "recovered_nll"): 1.0,
    ("untrained", "recovered_agreement"): 0.0,
    ("untrained", "recovered_kl"): 0.0,
    ("untrained", "recovered_nll"): 0.0,
    ("teacher", "cosine_to_teacher"): 1.0,
    ("teacher", "spearman_to_teacher"): 1.0,
    ("teacher", "neighbours_kept"): 1.0,
    ("teacher", "throughput_vs_teacher"): 1.0,
    ("teacher", "latency_vs_teacher"): 1.0,
}


@dataclass(frozen=True, slots=True)
class Cell:
    """A number as text: its value with unit and its interval, or `by definition`, or nothing."""

    value: str
    interval: str = ""


@dataclass(frozen=True, slots=True)
class ArmRow:
    """One quantity for all arms, None where it was not measured; `n` is the number of observations as text."""

    metric: Metric
    cells: tuple[Cell | None, ...]
    n: str


@dataclass(frozen=True, slots=True)
class Gain:
    """A paired gain of the student.

    start, end, value_at, zero_at: places on a strip, 0 to 100; None where there is no interval.
    """

    metric: Metric
    cell: Cell
    verdict: Verdict
    start: float | None
    end: float | None
    value_at: float | None
    zero_at: float | None


def by_definition(arm: str, name: str) -> float | None:
    """The value that an arm has without measuring: a teacher agrees with itself everywhere. Else None."""
    return _DEFINITIONS.get((arm, name))


def arms_of(story: Story) -> tuple[str, ...]:
    """The arms that were measured, the known ones first."""
    seen = {measurement.arm for measurement in story.measurements}
    return (*(arm for arm in ARMS if arm in seen), *sorted(seen.difference(ARMS)))


def arm_rows(story: Story, *, scope: bool = False) -> list[ArmRow]:
    """One row a quantity, in the vocabulary's order; quantities outside the vocabulary follow under their own names.

    `scope` asks for what was measured of out-of-scope texts, and nothing else; else that is left out.
    """
    held: dict[tuple[str, str], dict[str, Measurement]] = {}
    for measurement in story.measurements:
        told_elsewhere = _GAIN_MARK in measurement.name or measurement.slice.startswith(_DETAILS)
        if not told_elsewhere and measurement.name.startswith(SCOPE) == scope:
            held.setdefault((measurement.name, measurement.slice), {})[measurement.arm] = measurement
    order = {metric.name: index for index, metric in enumerate(metrics_of(story.task))}
    keys = sorted(held, key=lambda key: (order.get(key[0], len(order)), key))
    return [_arm_row(story, held[key], arms_of(story)) for key in keys]


def _arm_row(story: Story, by_arm: dict[str, Measurement], arms: tuple[str, ...]) -> ArmRow:
    first = next(iter(by_arm.values()))
    metric = metric_of(first, story.task)
    if first.slice != "test":
        metric = replace(metric, label=f"{metric.label} ({first.slice})")
    counts = sorted({measurement.n for measurement in by_arm.values()})
    n = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    return ArmRow(metric, tuple(_cell(by_arm.get(arm), arm, metric) for arm in arms), n)


def cell_of(measurement: Measurement | None) -> Cell | None:
    """A measurement as text; None where nobody measured it."""
    return None if measurement is None else Cell(format_value(measurement), format_interval(measurement))


def _cell(measurement: Measurement | None, arm: str, metric: Metric) -> Cell | None:
    defined = by_definition(arm, metric.name)
    if measurement is not None or defined is None:
        return cell_of(measurement)
    return Cell(format_value(Measurement(arm, metric.name, "test", defined, None, None, 0, "")), "by definition")


def gain_rows(story: Story, over: str) -> list[Gain]:
    """The student's paired gains over the arm `over` ("control" or "untrained"), those that were measured."""
    order = [gain.name for gain in gains_of(story.task)]
    found = [
        m for m in story.measurements if (m.arm, m.slice) == ("student", "test") and m.name.endswith(_GAIN_MARK + over)
    ]
    found.sort(key=lambda m: (order.index(m.name) if m.name in order else len(order), m.name))
    return [_gain(story, measurement) for measurement in found]


def _gain(story: Story, measurement: Measurement) -> Gain:
    metric, verdict = metric_of(measurement, story.task), judge(measurement)
    cell = Cell(format_value(measurement), format_interval(measurement))
    if measurement.low is None or measurement.high is None or not math.isfinite(measurement.high - measurement.low):
        return Gain(metric, cell, verdict, None, None, None, None)
    # Each row has a scale of its own, as units differ, with zero always on it.
    left, right = min(0.0, measurement.low), max(0.0, measurement.high)
    span = (right - left) or 1.0
    low, high, value, zero = (
        round(4 + 92 * (number - left) / span, 2)
        for number in (measurement.low, measurement.high, measurement.value, 0.0)
    )
    return Gain(metric, cell, verdict, low, high, value, zero)


def signal_rows(signals: SignalFacts, *, texts: bool = False) -> list[tuple[str, str]]:
    """What was stored of the teacher, as (what, how much); `texts` says that it answered texts, one at a time."""
    if texts:
        return _answer_rows(signals)
    because = f": {signals.bias}" if signals.bias else ""
    rate = signals.capture_tokens_per_s
    return [
        ("what is stored", signals.kind),
        ("positions asked", signals.rule),
        ("stored in", signals.store),
        ("pieces", f"{signals.pieces:,} ({signals.captured:,} captured in this run, {signals.found:,} found before)"),
        ("positions stored", f"{signals.positions:,}"),
        ("size", f"{format_size(signals.bytes)}, {signals.bytes_per_token:,.1f} bytes a position"),
        ("capture speed", "nothing was captured" if rate is None else format_rate(rate)),
        ("damage", _damage(signals)),
        ("biased", f"{'yes' if signals.biased else 'no'}{because}"),
    ]


def _answer_rows(signals: SignalFacts) -> list[tuple[str, str]]:
    rate = signals.capture_tokens_per_s
    asked = f"{signals.pieces:,} ({signals.captured:,} asked in this run, {signals.found:,} found before)"
    return [
        ("what is stored", signals.kind),
        ("stored in", signals.store),
        ("texts", asked),
        ("size", format_size(signals.bytes)),
        ("capture speed", "nothing was captured" if rate is None else format_rate(rate, texts=True)),
        ("damage", _damage(signals)),
    ]


def _damage(signals: SignalFacts) -> str:
    if not signals.quarantined:
        return "none found"
    parts = "block or file" if signals.quarantined == 1 else "blocks or files"
    return (
        f"{signals.quarantined:,} damaged {parts} put aside in this store since it was begun; what this run needs of "
        "them was captured again"
    )
