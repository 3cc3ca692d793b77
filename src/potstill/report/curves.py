"""The learning curves: what each arm's training and validation looked like, step by step.

Refuses: drawing two arms' training losses in one panel. They are different objectives, on different scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import plotly.graph_objects as go

from potstill.report.figures import Figure, blank_figure, line_colour, mark, to_json
from potstill.report.numbers import format_duration
from potstill.report.story import ARMS, CurvePoint, Story
from potstill.report.text import plotly_label
from potstill.report.wording import wording_of

__all__ = ["training_figures", "validation_figures"]

_DASHES = ("dot", "dash", "dashdot", "longdash")
_SHARES = ("agreement", "accuracy")
_MOST_POINTS = 400
_HEIGHT = 260
_LABELS = {
    "nll": ("NLL", "Nats per {words.per}"),
    "kl_to_teacher": ("KL to the teacher", "Nats per {words.per}"),
    "agreement": ("agreement with the teacher", "Share of {words.places}"),
    "perplexity": ("perplexity", "Tokens"),
    "accuracy": ("accuracy", "Share of {words.places}"),
}


def training_figures(story: Story) -> list[Figure]:
    """A panel for each arm that was trained, with its own training loss."""
    return [
        _training_figure(arm, logged)
        for arm, points in _recorded(story)
        if (logged := [point for point in points if point.loss is not None])
    ]


def validation_figures(story: Story) -> list[Figure]:
    """A panel for each quantity that was validated during training, all arms in it."""
    curves = _recorded(story)
    names = dict.fromkeys(name for _, points in curves for point in points for name in point.validation)
    return [_validation_figure(story, name, curves) for name in names]


def _recorded(story: Story) -> list[tuple[str, Sequence[CurvePoint]]]:
    return [(arm, story.curves[arm]) for arm in sorted(story.curves, key=_arm_order) if story.curves[arm]]


def _training_figure(arm: str, logged: Sequence[CurvePoint]) -> Figure:
    kept, group = _thin(logged)
    kinds = tuple(dict.fromkeys(kind for point in logged for kind in point.terms))
    figure = blank_figure(_HEIGHT, "tokens seen")
    figure.add_trace(_curve(arm, kept, lambda point: point.loss, name="weighted sum"))
    for index, kind in enumerate(kinds if len(kinds) > 1 else ()):
        dash = _DASHES[index % len(_DASHES)]
        figure.add_trace(_curve(arm, kept, _term(kind), name=kind, dash=dash))
    if len(kinds) > 1:
        figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0})
    averaged = f" Each point is the mean of {group} steps." if group > 1 else ""
    return Figure(
        title=f"{arm.capitalize()}: training loss",
        caption=f"Its own objective ({', '.join(kinds) or 'loss'}), so not comparable with another arm's.{averaged}",
        summary=f"Training loss of the {arm} arm, from {_short(logged[0].loss)} to {_short(logged[-1].loss)} "
        f"over {logged[-1].tokens:,} tokens.",
        height=_HEIGHT,
        spec=to_json(figure),
        columns=("step", "tokens", "time", "loss", *kinds),
        rows=tuple(
            (*_when(point), _short(point.loss), *(_short(point.terms.get(kind)) for kind in kinds))
            for point in _spread(logged)
        ),
        arms=(arm,),
    )


def _validation_figure(story: Story, name: str, curves: Sequence[tuple[str, Sequence[CurvePoint]]]) -> Figure:
    figure, rows, ends = blank_figure(_HEIGHT, "tokens seen"), [], []
    label, unit = _LABELS.get(name, (name, "As logged"))
    rows_of = "texts" if wording_of(story.task).documents == "texts" else "rows"
    figure.update_yaxes(tickformat=".0%" if name in _SHARES else None)
    for arm, points in curves:
        measured = [point for point in points if name in point.validation]
        if measured:
            kept, _ = _thin(measured)
            figure.add_trace(_curve(arm, kept, lambda point: point.validation.get(name), name=arm, markers=True))
            rows += [(arm, *_when(point), _short(point.validation[name])) for point in _spread(measured)]
            ends.append(f"{arm} ends at {_short(measured[-1].validation[name])}")
    return Figure(
        title=f"Validation: {label}",
        caption=f"{unit.format(words=wording_of(story.task))}, on the same validation {rows_of} for every arm.",
        summary=f"{label} on the validation split during training: {'; '.join(ends)}.",
        height=_HEIGHT,
        spec=to_json(figure),
        columns=("arm", "step", "tokens", "time", label),
        rows=tuple(rows),
        arms=tuple(dict.fromkeys(row[0] for row in rows)),
    )


def _curve(
    arm: str,
    points: Sequence[CurvePoint],
    read: Callable[[CurvePoint], float | None],
    *,
    name: str,
    dash: str = "solid",
    markers: bool = False,
) -> go.Scatter:
    return go.Scatter(
        x=[point.tokens for point in points],
        y=[_finite(read(point)) for point in points],
        customdata=[[f"{point.step:,}", format_duration(point.seconds)] for point in points],
        name=plotly_label(name),
        mode="lines+markers" if markers else "lines",
        line={"color": line_colour(arm), "width": 2 if dash == "solid" else 1.5, "dash": dash},
        marker=mark(arm, 6),
        hovertemplate="<b>%{y:.4g}</b> " + plotly_label(name)
        + "<br>step %{customdata[0]}, %{x:,} tokens, %{customdata[1]}<extra></extra>",
    )  # fmt: skip


def _term(kind: str) -> Callable[[CurvePoint], float | None]:
    return lambda point: point.terms.get(kind)


def _thin(points: Sequence[CurvePoint]) -> tuple[list[CurvePoint], int]:
    """At most `_MOST_POINTS` points, each the mean of as many steps as the second value says."""
    group = math.ceil(len(points) / _MOST_POINTS)
    return [_mean(points[start : start + group]) for start in range(0, len(points), group)], group


def _mean(points: Sequence[CurvePoint]) -> CurvePoint:
    last = points[-1]
    losses = [point.loss for point in points if point.loss is not None]
    return CurvePoint(
        step=last.step,
        tokens=last.tokens,
        seconds=last.seconds,
        loss=math.fsum(losses) / len(losses) if losses else None,
        terms=_mean_of(point.terms for point in points),
        validation=_mean_of(point.validation for point in points),
    )


def _mean_of(records: Iterable[Mapping[str, float]]) -> dict[str, float]:
    held: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            held.setdefault(name, []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in held.items()}


def _spread(points: Sequence[CurvePoint], most: int = 12) -> list[CurvePoint]:
    """About `most` of the points, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def _when(point: CurvePoint) -> tuple[str, str, str]:
    return f"{point.step:,}", f"{point.tokens:,}", format_duration(point.seconds)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:#.4g}"


def _arm_order(arm: str) -> tuple[int, str]:
    return (ARMS.index(arm) if arm in ARMS else len(ARMS), arm)
