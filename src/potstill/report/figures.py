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

from potstill.report.facts import arms_of
from potstill.report.metrics import metric_of
from potstill.report.numbers import format_measurement
from potstill.report.story import ARMS, Story, find
from potstill.report.text import plotly_label
from potstill.types import Measurement

__all__ = [
    "MARGIN",
    "PALETTE",
    "Figure",
    "arm_colour",
    "blank_figure",
    "dark_twins",
    "drawable",
    "error_bars",
    "line_colour",
    "mark",
    "packed_plotly",
    "plotly_size",
    "recovered_figure",
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
    "static": ("#a02c6b", "#ee8fc0"),
    "other": ("#8052a0", "#c39ae0"),
}
"""Role: (light, dark). One colour an arm, everywhere; shapes and dashes say the same without colour."""

_SYMBOLS = {
    "teacher": "diamond",
    "untrained": "circle",
    "control": "square",
    "student": "circle",
    "static": "triangle-up",
}
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
MARGIN = {"l": 52, "r": 14, "t": 12, "b": 46}
"""Pixels around every picture, where it does not say otherwise."""


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


def recovered_figure(story: Story) -> Figure | None:
    """How far each trained arm came from the untrained student (0 %) to the teacher (100 %); None when not measured."""
    names = ("recovered_nll", "recovered_kl", "recovered_agreement")
    arms = [arm for arm in arms_of(story) if arm not in ("teacher", "untrained")]
    found = [(arm, [m for name in names if (m := drawable(find(story, arm, name)))]) for arm in arms]
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
    figure.update_layout(margin={**MARGIN, "l": 84})
    for index, (arm, measured) in enumerate(found):
        figure.add_trace(_gap_marks(arm, measured, present, 0.12 * (2 * index - len(found) + 1)))
    for at, word, anchor in ((0, "untrained", "left"), (1, "teacher", "right")):
        figure.add_vline(x=at, line_width=1.5, line_color=line_colour(word), line_dash="dot")
        figure.add_annotation(x=at, y=len(present) - 0.45, text=word, showarrow=False, xanchor=anchor, yanchor="top")
    return Figure(
        title="How much of the gap each arm closed",
        caption="0 % is the untrained student, 100 % the teacher. Bars: 95 % intervals.",
        summary="; ".join(f"{m.arm}, {metric_of(m, story.task).label}: {format_measurement(m)}" for m in everything)
        + ".",
        height=height,
        spec=to_json(figure),
        columns=("arm", "quantity", "gap closed"),
        rows=tuple(
            (m.arm, metric_of(m, story.task).label.removeprefix("Gap closed: "), format_measurement(m))
            for m in everything
        ),
        arms=tuple(arm for arm, _ in found),
    )


def _gap_marks(arm: str, measured: Sequence[Measurement], names: Sequence[str], shift: float) -> go.Scatter:
    bars = [error_bars(m, arm) for m in measured]
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


def drawable(measurement: Measurement | None) -> Measurement | None:
    """The measurement with an interval only where both its ends are finite; None when its value is not."""
    if measurement is None or not math.isfinite(measurement.value):
        return None
    low, high = measurement.low, measurement.high
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        return measurement
    return replace(measurement, low=None, high=None)


def error_bars(measurement: Measurement, arm: str) -> dict[str, Any]:
    """The measurement's interval as bars in its arm's colour; invisible where there is none."""
    if measurement.low is None or measurement.high is None:
        return {"visible": False}
    above, below = [measurement.high - measurement.value], [measurement.value - measurement.low]
    return {
        "type": "data", "symmetric": False, "array": above, "arrayminus": below,
        "color": line_colour(arm), "thickness": 1.5, "width": 4,
    }  # fmt: skip


def blank_figure(height: int, x_title: str) -> go.Figure:
    """An empty picture in the house's style, `height` pixels high, on a transparent ground."""
    title = {"text": x_title, "standoff": 8, "font": {"size": 12}}
    axis = {"gridcolor": PALETTE["line"][0], "zeroline": False, "linecolor": PALETTE["line"][0], "automargin": False}
    return go.Figure(
        layout={
            "template": "none", "height": height, "margin": MARGIN, "showlegend": False, "dragmode": False,
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
