"""The tiles and tables of the page as plain rows of text, so that the HTML and the Markdown tell the same facts.

Refuses: filling a hole. What was not measured is None here and is called "not measured" there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from potstill.report.headline import Verdict, judge
from potstill.report.metrics import (
    GAINS,
    METRICS,
    Metric,
    format_interval,
    format_rate,
    format_size,
    format_value,
    metric_of,
)
from potstill.report.story import ARMS, SignalFacts, Story, find
from potstill.types import Measurement

__all__ = [
    "ArmRow",
    "Cell",
    "Gain",
    "Tile",
    "arm_rows",
    "arms_of",
    "by_definition",
    "gain_rows",
    "signal_rows",
    "tiles",
]

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


@dataclass(frozen=True, slots=True)
class Tile:
    """One number in large type, or None where it was not measured, and what it is."""

    label: str
    cell: Cell | None
    note: str


def by_definition(arm: str, name: str) -> float | None:
    """The value that an arm has without measuring: a teacher agrees with itself everywhere. Else None."""
    return _DEFINITIONS.get((arm, name))


def arms_of(story: Story) -> tuple[str, ...]:
    """The arms that were measured, the known ones first."""
    seen = {measurement.arm for measurement in story.measurements}
    return (*(arm for arm in ARMS if arm in seen), *sorted(seen.difference(ARMS)))


def arm_rows(story: Story) -> list[ArmRow]:
    """One row a quantity, in the vocabulary's order; quantities outside the vocabulary follow under their own names."""
    gains = {gain.name for gain in GAINS}
    held: dict[tuple[str, str], dict[str, Measurement]] = {}
    for measurement in story.measurements:
        if measurement.name not in gains:
            held.setdefault((measurement.name, measurement.slice), {})[measurement.arm] = measurement
    order = {metric.name: index for index, metric in enumerate(METRICS)}
    keys = sorted(held, key=lambda key: (order.get(key[0], len(order)), key))
    return [_arm_row(held[key], arms_of(story)) for key in keys]


def _arm_row(by_arm: dict[str, Measurement], arms: tuple[str, ...]) -> ArmRow:
    first = next(iter(by_arm.values()))
    metric = metric_of(first)
    if first.slice != "test":
        label = f"{metric.label} ({first.slice})"
        metric = Metric(metric.name, label, metric.kind, metric.better, metric.meaning)
    counts = sorted({measurement.n for measurement in by_arm.values()})
    n = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    return ArmRow(metric, tuple(_cell(by_arm.get(arm), arm, metric) for arm in arms), n)


def _cell(measurement: Measurement | None, arm: str, metric: Metric) -> Cell | None:
    if measurement is not None:
        return Cell(format_value(measurement), format_interval(measurement))
    defined = by_definition(arm, metric.name)
    if defined is None:
        return None
    return Cell(format_value(Measurement(arm, metric.name, "test", defined, None, None, 0, "")), "by definition")


def gain_rows(story: Story, over: str) -> list[Gain]:
    """The student's paired gains over the arm `over` ("control" or "untrained"), those that were measured."""
    named = [gain for gain in GAINS if gain.name.endswith(f"_over_{over}")]
    found = [find(story, "student", gain.name) for gain in named]
    return [_gain(measurement) for measurement in found if measurement is not None]


def _gain(measurement: Measurement) -> Gain:
    metric, verdict = metric_of(measurement), judge(measurement)
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


def tiles(story: Story) -> list[Tile]:
    """The six numbers to look at first."""
    gain = _tile(story, "Gain from distillation", "agreement_gain_over_control", "agreement, over the control arm")
    if not story.has_control:
        gain = Tile(gain.label, None, "unknown: this run has no control arm")
    return [
        _tile(story, "Agreement with the teacher", "agreement", "same most probable next token"),
        gain,
        _tile(story, "KL to the teacher", "kl_to_teacher", "per token; 0 is the teacher itself"),
        _tile(story, "Gap closed", "recovered_kl", "of the untrained student's KL to the teacher"),
        _tile(story, "Parameters", "parameters", _share_of_teacher(story)),
        _tile(story, "Decode speed", "decode_tokens_per_s", _times_the_teacher(story)),
    ]


def _tile(story: Story, label: str, name: str, note: str) -> Tile:
    measurement = find(story, "student", name)
    if measurement is None:
        return Tile(label, None, "")
    return Tile(label, Cell(format_value(measurement), format_interval(measurement)), note)


def _ratio(story: Story, name: str) -> float | None:
    own, teachers = find(story, "student", name), find(story, "teacher", name)
    return None if own is None or teachers is None or not teachers.value > 0 else own.value / teachers.value


def _share_of_teacher(story: Story) -> str:
    share, folder = _ratio(story, "parameters"), find(story, "student", "folder_bytes")
    parts = [] if share is None else [f"{share:.1%}".replace("%", " %") + " of the teacher's"]
    return "; ".join(parts + ([] if folder is None else [f"{format_value(folder)} on disk"]))


def _times_the_teacher(story: Story) -> str:
    times = _ratio(story, "decode_tokens_per_s")
    return "on the machine named below" if times is None else f"{times:.2f} times the teacher's, same machine"


def signal_rows(signals: SignalFacts) -> list[tuple[str, str]]:
    """What was stored of the teacher, as (what, how much)."""
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


def _damage(signals: SignalFacts) -> str:
    if not signals.quarantined:
        return "none found"
    parts = "block or file" if signals.quarantined == 1 else "blocks or files"
    return (
        f"{signals.quarantined:,} damaged {parts} put aside in this store since it was begun; what this run needs of "
        "them was captured again"
    )
