"""The pictures: plotly figures as data, with the numbers behind each as a table, and plotly.js itself, packed once.

A picture is built in the light palette; the page's script swaps each colour for its dark twin. Refuses: drawing two
quantities that cannot be compared in one panel.
"""

from __future__ import annotations

import base64
import gzip
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs, get_plotlyjs_version

from potstill.report.facts import arms_of, by_definition
from potstill.report.metrics import format_measurement, format_value, metric_of
from potstill.report.story import ARMS, Story, find
from potstill.report.text import plotly_label
from potstill.types import Measurement

__all__ = [
    "PALETTE",
    "Figure",
    "arm_colour",
    "blank_figure",
    "dark_twins",
    "line_colour",
    "mark",
    "packed_plotly",
    "plotly_size",
    "recovered_figure",
    "speed_figures",
    "to_json",
]

PALETTE = {
    "page": ("#faf9f7", "#14161a"),
    "surface": ("#ffffff", "#1c1f25"),
    "ink": ("#1c2024", "#e9e8e4"),
    "muted": ("#5d646c", "#a3a9b1"),
    "line": ("#e3e0da", "#31353d"),
    "teacher": ("#23507f", "#86b6ea"),
    "untrained": ("#7b848f", "#98a2ae"),
    "control": ("#1f8a80", "#4fc4b6"),
    "student": ("#bd5215", "#f2955c"),
    "other": ("#8052a0", "#c39ae0"),
}
"""Role: (light, dark). One colour an arm, everywhere; shapes and dashes say the same without colour."""

_SYMBOLS = {"teacher": "diamond", "untrained": "circle", "control": "square", "student": "circle"}
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
_LABEL_GAP = 19.0
_SPEED_HEIGHT = 360
_MARGIN = {"l": 52, "r": 14, "t": 12, "b": 46}


@dataclass(frozen=True, slots=True)
class Figure:
    """One picture. spec: plotly's JSON; summary: what it shows, for who cannot see it; rows: the numbers behind it;
    arms: those that need a legend.
    """

    title: str
    caption: str
    summary: str
    height: int
    spec: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    arms: tuple[str, ...] = ()


def arm_colour(arm: str) -> str:
    """The role in `PALETTE` that an arm is drawn with."""
    return arm if arm in ARMS else "other"


def dark_twins() -> dict[str, str]:
    """{light colour: dark colour} of the palette."""
    return dict(PALETTE.values())


@cache
def packed_plotly() -> str:
    """plotly.js, gzipped, in base64: less than half of the plain file, which is the only bundle that plotly carries."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def plotly_size() -> str:
    """What the inlined plotly.js weighs, in words."""
    packed, plain = len(packed_plotly()) / 1e6, len(get_plotlyjs()) / 1e6
    return f"plotly.js {get_plotlyjs_version()} is inlined: {packed:.1f} MB packed, {plain:.1f} MB unpacked"


# --- quality against speed -------------------------------------------------------------------------------------------


def speed_figures(story: Story) -> list[Figure]:
    """Agreement (KL where that is all there is) against decode and prefill speed; those that were measured."""
    names = {measurement.name for measurement in story.measurements if measurement.arm != "teacher"}
    quality = next((name for name in ("agreement", "kl_to_teacher") if name in names), None)
    if quality is None:
        return []
    figures = (_speed_figure(story, quality, speed) for speed in ("decode_tokens_per_s", "prefill_tokens_per_s"))
    return [figure for figure in figures if figure is not None]


def _speed_figure(story: Story, quality: str, speed: str) -> Figure | None:
    points = [
        (arm, fast, good)
        for arm in arms_of(story)
        if (fast := _drawable(find(story, arm, speed))) and (good := _drawable(_quality(story, arm, quality)))
    ]
    if not points:
        return None
    height, percent = _SPEED_HEIGHT, quality == "agreement"
    figure = blank_figure(height, f"{_kind(speed)} speed, tokens/s")
    across, up = _around([fast for _, fast, _ in points], 0.45), _around([good for _, _, good in points], 0.16)
    figure.update_xaxes(range=across)
    figure.update_yaxes(range=up, tickformat=".0%" if percent else None)
    for arm, fast, good in points:
        figure.add_trace(_bubble(story, arm, fast, good))
    _label(figure, [(a, f.value, g.value, format_value(g)) for a, f, g in points], across, up)
    label = metric_of(points[0][2]).label
    return Figure(
        title=f"{label} against {_kind(speed)} speed",
        caption=("Up and to the right" if percent else "Down and to the right")
        + " is better. Bars: 95 % intervals, where measured. Area of a mark: parameters.",
        summary="; ".join(f"{a}: {format_measurement(g)} at {format_measurement(f)}" for a, f, g in points) + ".",
        height=height,
        spec=to_json(figure),
        columns=("arm", f"{_kind(speed)} speed", label),
        rows=tuple((arm, format_measurement(fast), format_measurement(good)) for arm, fast, good in points),
    )


def _kind(speed: str) -> str:
    return speed.split("_", 1)[0]


def _quality(story: Story, arm: str, name: str) -> Measurement | None:
    defined = by_definition(arm, name)
    stated = None if defined is None else Measurement(arm, name, "test", defined, None, None, 0, "")
    return find(story, arm, name) or stated


def _drawable(measurement: Measurement | None) -> Measurement | None:
    """The measurement with an interval only where both its ends are finite; None when its value is not."""
    if measurement is None or not math.isfinite(measurement.value):
        return None
    low, high = measurement.low, measurement.high
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        return measurement
    return replace(measurement, low=None, high=None)


def _bubble(story: Story, arm: str, fast: Measurement, good: Measurement) -> go.Scatter:
    own, largest = find(story, arm, "parameters"), _most_parameters(story)
    size = 18 * math.sqrt(own.value / largest) if own is not None and largest > 0 else 12
    return go.Scatter(
        x=[fast.value],
        y=[good.value],
        mode="markers",
        marker=mark(arm, max(size, 6)),
        error_x=_bars(fast, arm),
        error_y=_bars(good, arm),
        hovertemplate=f"<b>{plotly_label(arm)}</b><br>{format_measurement(good)}<br>{format_measurement(fast)}"
        + (f"<br>{format_value(own)} parameters" if own else "")
        + "<extra></extra>",
    )


def _most_parameters(story: Story) -> float:
    counts = (find(story, arm, "parameters") for arm in arms_of(story))
    return max((count.value for count in counts if count is not None), default=0.0)


def _bars(measurement: Measurement, arm: str) -> dict[str, Any]:
    if measurement.low is None or measurement.high is None:
        return {"visible": False}
    above, below = [measurement.high - measurement.value], [measurement.value - measurement.low]
    return {
        "type": "data", "symmetric": False, "array": above, "arrayminus": below,
        "color": line_colour(arm), "thickness": 1.5, "width": 4,
    }  # fmt: skip


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
    inner = _SPEED_HEIGHT - _MARGIN["t"] - _MARGIN["b"]
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


# --- the gap that was closed -----------------------------------------------------------------------------------------


def recovered_figure(story: Story) -> Figure | None:
    """How far each trained arm came from the untrained student (0 %) to the teacher (100 %); None when not measured."""
    names = ("recovered_nll", "recovered_kl", "recovered_agreement")
    arms = [arm for arm in arms_of(story) if arm not in ("teacher", "untrained")]
    found = [(arm, [m for name in names if (m := _drawable(find(story, arm, name)))]) for arm in arms]
    found = [(arm, measured) for arm, measured in found if measured]
    if not found:
        return None
    height = 300
    figure = blank_figure(height, "share of the gap closed")
    everything = [m for _, measured in found for m in measured]
    ends = [number for m in everything for number in (m.value, m.low, m.high) if number is not None]
    figure.update_xaxes(range=[min(0.0, *ends) - 0.03, max(1.0, *ends) + 0.03], tickformat=".0%")
    present = [name for name in names if any(m.name == name for m in everything)]
    words = [name.removeprefix("recovered_").replace("nll", "NLL").replace("kl", "KL") for name in present]
    ticks = {"tickmode": "array", "tickvals": list(range(len(present))), "ticktext": words}
    figure.update_yaxes(range=[-0.6, len(present) - 0.4], **ticks)
    figure.update_layout(margin={**_MARGIN, "l": 84})
    for index, (arm, measured) in enumerate(found):
        figure.add_trace(_gap_marks(arm, measured, present, 0.12 * (2 * index - len(found) + 1)))
    for at, word, anchor in ((0, "untrained", "left"), (1, "teacher", "right")):
        figure.add_vline(x=at, line_width=1.5, line_color=line_colour(word), line_dash="dot")
        figure.add_annotation(x=at, y=len(present) - 0.45, text=word, showarrow=False, xanchor=anchor, yanchor="top")
    return Figure(
        title="How much of the gap each arm closed",
        caption="0 % is the untrained student, 100 % the teacher. Bars: 95 % intervals.",
        summary="; ".join(f"{m.arm}, {metric_of(m).label}: {format_measurement(m)}" for m in everything) + ".",
        height=height,
        spec=to_json(figure),
        columns=("arm", "quantity", "gap closed"),
        rows=tuple((m.arm, metric_of(m).label.removeprefix("Gap closed: "), format_measurement(m)) for m in everything),
        arms=tuple(arm for arm, _ in found),
    )


def _gap_marks(arm: str, measured: Sequence[Measurement], names: Sequence[str], shift: float) -> go.Scatter:
    bars = [_bars(m, arm) for m in measured]
    merged = {
        "type": "data", "symmetric": False, "color": line_colour(arm), "thickness": 1.5, "width": 4,
        "array": [bar.get("array", [0.0])[0] for bar in bars],
        "arrayminus": [bar.get("arrayminus", [0.0])[0] for bar in bars],
    }  # fmt: skip
    return go.Scatter(
        x=[m.value for m in measured],
        y=[names.index(m.name) + shift for m in measured],
        mode="markers",
        marker=mark(arm, 11),
        error_x=merged,
        customdata=[format_measurement(m) for m in measured],
        hovertemplate=f"<b>{plotly_label(arm)}</b><br>%{{customdata}}<extra></extra>",
    )


# --- what all pictures share -----------------------------------------------------------------------------------------


def blank_figure(height: int, x_title: str) -> go.Figure:
    """An empty picture in the house's style, `height` pixels high, on a transparent ground."""
    title = {"text": x_title, "standoff": 8, "font": {"size": 12}}
    axis = {"gridcolor": PALETTE["line"][0], "zeroline": False, "linecolor": PALETTE["line"][0], "automargin": False}
    return go.Figure(
        layout={
            "template": "none", "height": height, "margin": _MARGIN, "showlegend": False, "dragmode": False,
            "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": _FONT, "size": 12, "color": PALETTE["muted"][0]},
            "hoverlabel": {
                "bgcolor": PALETTE["surface"][0], "bordercolor": PALETTE["line"][0],
                "font": {"family": _FONT, "color": PALETTE["ink"][0]},
            },
            "xaxis": {**axis, "title": title, "tickformat": "~s", "nticks": 6},
            "yaxis": {**axis, "nticks": 6},
        }
    )  # fmt: skip


def line_colour(arm: str) -> str:
    """The light colour of an arm."""
    return PALETTE[arm_colour(arm)][0]


def mark(arm: str, size: float) -> dict[str, Any]:
    """An arm's mark: its shape in its colour; the untrained student's is hollow."""
    fill = PALETTE["surface"][0] if arm == "untrained" else line_colour(arm)
    return {
        "color": fill,
        "size": size,
        "symbol": _SYMBOLS.get(arm, "x"),
        "line": {"width": 2, "color": line_colour(arm)},
    }


def to_json(figure: go.Figure) -> str:
    """The picture as plotly's JSON, safe inside a script element."""
    text: str = figure.to_json()
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
