"""Quality against speed: one mark an arm.

Refuses: drawing two quantities that cannot be compared in one panel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from potstill.report.facts import arms_of, by_definition
from potstill.report.figures import (
    MARGIN,
    PALETTE,
    Figure,
    blank_figure,
    drawable,
    error_bars,
    line_colour,
    mark,
    to_json,
)
from potstill.report.headline import main_measure
from potstill.report.metrics import metric_of
from potstill.report.numbers import format_measurement, format_value
from potstill.report.story import Story, find, kind_of
from potstill.report.text import plotly_label
from potstill.types import Measurement

__all__ = ["speed_figures"]

_LABEL_GAP = 19.0
_HEIGHT = 360
_TICKS = (1, 2, 5)
_NARROW = 0.06


@dataclass(frozen=True, slots=True)
class _Axes:
    """Which speed is drawn, in what words, and whether its axis is logarithmic: arms may be orders apart."""

    speed: str
    words: str
    title: str
    logarithmic: bool = False


_Point = tuple[str, Measurement, Measurement]
"""An arm, its speed, its quality."""

_GENERATING = (
    _Axes("decode_tokens_per_s", "decode speed", "decode speed, tokens/s"),
    _Axes("prefill_tokens_per_s", "prefill speed", "prefill speed, tokens/s"),
)
_READING = (_Axes("prefill_tokens_per_s", "reading speed", "reading speed, tokens/s"),)
_SERVING = (_Axes("throughput_per_s", "throughput", "throughput, texts/s (logarithmic), 32 texts at a time", True),)


def speed_figures(story: Story) -> list[Figure]:
    """The task's main measure against every kind of speed that was measured."""
    main = _main(story)
    if main is None:
        return []
    kinds = {"language_model": _GENERATING, "written": _GENERATING, "unverified": _GENERATING, "masked_lm": _READING}
    figures = (_speed_figure(story, main, axes) for axes in kinds.get(kind_of(story.task), _SERVING))
    return [figure for figure in figures if figure is not None]


def _main(story: Story) -> str | None:
    """The name of what is drawn upwards: for language models what compares with the teacher, where it is here."""
    names = {measurement.name for measurement in story.measurements if measurement.arm != "teacher"}
    if kind_of(story.task) in ("language_model", "masked_lm"):
        return next((name for name in ("agreement", "kl_to_teacher", "nll") if name in names), None)
    measured = main_measure(story)
    return measured.name if measured else None


def _speed_figure(story: Story, quality: str, axes: _Axes) -> Figure | None:
    points = [
        (arm, fast, good)
        for arm in arms_of(story)
        if (fast := drawable(find(story, arm, axes.speed))) and (good := drawable(_quality(story, arm, quality)))
        if fast.value > 0 or not axes.logarithmic
    ]
    if not points:
        return None
    everything = points
    points, outlier = _set_apart(points) if axes.logarithmic else (points, None)
    metric = metric_of(points[0][2], story.task)
    figure = blank_figure(_HEIGHT, axes.title)
    across, up = _across(figure, [fast for _, fast, _ in points], axes), _around([good for *_, good in points], 0.16)
    narrow = ".1%" if up[1] - up[0] < _NARROW else ".0%"
    figure.update_yaxes(range=up, tickformat=narrow if metric.kind == "share" else None)
    for arm, fast, good in points:
        figure.add_trace(_bubble(story, arm, fast, good))
    if axes.logarithmic:
        _teachers_line(figure, points)
    _label(figure, [(a, _place(f.value, axes), g.value, format_value(g)) for a, f, g in points], across, up)
    return Figure(
        title=f"{metric.label} against {axes.words}",
        caption=("Down and to the right" if metric.better == "lower" else "Up and to the right")
        + " is better. Bars: 95 % intervals, where measured. Area of a mark: parameters."
        + (" Dashed line: the teacher." if axes.logarithmic and any(arm == "teacher" for arm, *_ in points) else "")
        + (f" Far below the picture: untrained, at {format_value(outlier)}." if outlier else ""),
        summary="; ".join(f"{a}: {format_measurement(g)} at {format_measurement(f)}" for a, f, g in everything) + ".",
        height=_HEIGHT,
        spec=to_json(figure),
        columns=("arm", axes.words, metric.label),
        rows=tuple((arm, format_measurement(fast), format_measurement(good)) for arm, fast, good in everything),
    )


def _set_apart(points: list[_Point]) -> tuple[list[_Point], Measurement | None]:
    """The points without an untrained student so low that it would press all others together, and its quality."""
    others = [good.value for arm, _, good in points if arm != "untrained"]
    untrained = next((good for arm, _, good in points if arm == "untrained"), None)
    if untrained is None or len(others) < 2 or untrained.value >= 4 * min(others) - 3 * max(others):
        return points, None
    return [point for point in points if point[0] != "untrained"], untrained


def _quality(story: Story, arm: str, name: str) -> Measurement | None:
    defined = by_definition(arm, name)
    stated = None if defined is None else Measurement(arm, name, "test", defined, None, None, 0, "")
    return find(story, arm, name) or stated


def _place(value: float, axes: _Axes) -> float:
    """Where a value stands on its axis."""
    return math.log10(value) if axes.logarithmic else value


def _across(figure: go.Figure, measured: Sequence[Measurement], axes: _Axes) -> tuple[float, float]:
    """Lay out the axis of speed, and return its range, in powers of ten where it is logarithmic."""
    if not axes.logarithmic:
        across = _around(measured, 0.45)
        figure.update_xaxes(range=across)
        return across
    powers = [math.log10(one.value) for one in measured]
    room = 0.2 * ((max(powers) - min(powers)) or 1.0) + 0.1
    first, last = min(powers) - room, max(powers) + room
    ticks = [t * 10.0**p for p in range(math.floor(first), math.ceil(last) + 1) for t in _TICKS]
    ticks = [tick for tick in ticks if first <= math.log10(tick) <= last]
    figure.update_xaxes(type="log", range=(first, last), tickmode="array", tickvals=ticks)
    return first, last


def _teachers_line(figure: go.Figure, points: Sequence[_Point]) -> None:
    """The teacher's quality, across all speeds."""
    for arm, _, good in points:
        if arm == "teacher":
            figure.add_hline(y=good.value, line_width=1.5, line_color=line_colour(arm), line_dash="dash")


def _bubble(story: Story, arm: str, fast: Measurement, good: Measurement) -> go.Scatter:
    own, largest = find(story, arm, "parameters"), _most_parameters(story)
    size = 18 * math.sqrt(own.value / largest) if own is not None and largest > 0 else 12
    return go.Scatter(
        x=[fast.value],
        y=[good.value],
        mode="markers",
        marker=mark(arm, max(size, 6)),
        error_x=error_bars(fast, arm),
        error_y=error_bars(good, arm),
        hovertemplate=f"<b>{plotly_label(arm)}</b><br>{format_measurement(good)}<br>{format_measurement(fast)}"
        + (f"<br>{format_value(own)} parameters" if own else "")
        + "<extra></extra>",
    )


def _most_parameters(story: Story) -> float:
    counts = (find(story, arm, "parameters") for arm in arms_of(story))
    return max((count.value for count in counts if count is not None), default=0.0)


def _around(measured: Sequence[Measurement], margin: float) -> tuple[float, float]:
    """A range that holds all values and intervals, and `margin` times their spread on either side."""
    ends = [end for m in measured for end in (m.value, m.low, m.high) if end is not None]
    low, high = min(ends), max(ends)
    room = margin * ((high - low) or abs(high) or 1.0)
    return low - room, high + room


def _label(
    figure: go.Figure,
    points: Sequence[tuple[str, float, float, str]],
    across: tuple[float, float],
    up: tuple[float, float],
) -> None:
    """Name each mark beside it, on the side with more room, the names spread so that none lies on another."""
    inner = _HEIGHT - MARGIN["t"] - MARGIN["b"]
    wanted = [(up[1] - y) / (up[1] - up[0]) * inner for _, _, y, _ in points]
    placed = _dodge(wanted, 8.0, inner - 8.0)
    for (arm, x, y, text), at, natural in zip(points, placed, wanted, strict=True):
        to_left = x > sum(across) / 2
        figure.add_annotation(
            x=x, y=y, ax=-22 if to_left else 22, ay=at - natural, xanchor="right" if to_left else "left",
            text=f"<b>{plotly_label(arm)}</b>  {text}", showarrow=True, arrowhead=0, arrowwidth=1,
            arrowcolor=PALETTE["muted"][0], standoff=9, bgcolor=PALETTE["surface"][0], borderpad=1,
            font={"color": PALETTE["ink"][0], "size": 12},
        )  # fmt: skip


def _dodge(wanted: Sequence[float], first: float, last: float) -> list[float]:
    """Places near the wanted ones, at least `_LABEL_GAP` apart, pushed down and then back up from `last`."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = list(wanted)
    floor = first
    for index in order:
        placed[index] = max(wanted[index], floor)
        floor = placed[index] + _LABEL_GAP
    ceiling = last
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - _LABEL_GAP
    return placed
