"""The reliability picture: how often each arm was right where it was so sure.

Refuses: drawing a bin that no answer fell into.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from potstill.report.figures import PALETTE, Figure, blank_figure, line_colour, mark, to_json
from potstill.report.story import ARMS, ReliabilityPoint, Story
from potstill.report.text import plotly_label
from potstill.report.wording import wording_of

__all__ = ["reliability_figure"]

_HEIGHT = 300


def reliability_figure(story: Story) -> Figure | None:
    """Accuracy against confidence of the most probable answer, all arms; None where nothing was measured.

    Guo et al. (2017), arXiv:1706.04599, figure 1. The diagonal is what a calibrated model would show.
    """
    drawn = [(arm, points) for arm in _arms(story) if (points := _drawable(story.reliability[arm]))]
    if not drawn:
        return None
    words = wording_of(story.task)
    figure = blank_figure(_HEIGHT, f"confidence: probability of the most probable {words.answer}")
    figure.update_xaxes(range=[-0.02, 1.02], tickformat=".0%")
    figure.update_yaxes(range=[-0.02, 1.02], tickformat=".0%")
    line = {"color": PALETTE["muted"][0], "width": 1.5, "dash": "dot"}
    figure.add_trace(go.Scatter(x=[0, 1], y=[0, 1], mode="lines", line=line, hoverinfo="skip"))
    for arm, points in drawn:
        figure.add_trace(_marks(arm, points, words.places))
    return Figure(
        title="Calibration: right as often as it says?",
        caption=f"Share of {words.answers} predicted right (up) against confidence. On the dotted line an arm is as "
        f"often right as it says; below it, it is too sure. Area of a mark: share of the {words.places}.",
        summary="; ".join(f"{arm} {_lean(points)}" for arm, points in drawn) + ".",
        height=_HEIGHT,
        spec=to_json(figure),
        columns=("arm", "bin", "mean confidence", "right", words.places),
        rows=tuple((arm, *_row(point)) for arm, points in drawn for point in points),
        arms=tuple(arm for arm, _ in drawn),
    )


def _arms(story: Story) -> tuple[str, ...]:
    known = tuple(arm for arm in ARMS if arm in story.reliability)
    return (*known, *sorted(story.reliability.keys() - set(ARMS)))


def _drawable(points: Sequence[ReliabilityPoint]) -> list[ReliabilityPoint]:
    return [point for point in points if point.n > 0 and math.isfinite(point.confidence + point.accuracy)]


def _marks(arm: str, points: Sequence[ReliabilityPoint], places: str) -> go.Scatter:
    most = max(point.n for point in points)
    style = mark(arm, 0)
    return go.Scatter(
        x=[point.confidence for point in points],
        y=[point.accuracy for point in points],
        customdata=[_row(point) for point in points],
        mode="lines+markers",
        line={"color": line_colour(arm), "width": 1.5},
        marker={**style, "size": [max(15 * math.sqrt(point.n / most), 4) for point in points]},
        hovertemplate=f"<b>{plotly_label(arm)}</b>, confidence %{{customdata[0]}}<br>right %{{customdata[2]}}, sure "
        f"%{{customdata[1]}}<br>%{{customdata[3]}} {places}<extra></extra>",
    )


def _row(point: ReliabilityPoint) -> tuple[str, str, str, str]:
    bounds = f"{point.low * 100:.1f} to {point.high * 100:.1f} %"
    return bounds, f"{point.confidence * 100:.1f} %", f"{point.accuracy * 100:.1f} %", f"{point.n:,}"


def _lean(points: Sequence[ReliabilityPoint]) -> str:
    """In words, how sure an arm is on average and how often right."""
    count = sum(point.n for point in points)
    sure = math.fsum(point.confidence * point.n for point in points) / count
    right = math.fsum(point.accuracy * point.n for point in points) / count
    return f"is {sure * 100:.1f} % sure on average and right {right * 100:.1f} % of the time"
