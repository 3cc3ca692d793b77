"""The page: one HTML file that works offline, and the same facts as Markdown.

Refuses: the network. Everything is inlined, and the page's own content policy forbids every request.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from potstill.errors import RunError
from potstill.report.curves import training_figures, validation_figures
from potstill.report.facts import Cell, arm_rows, arms_of, gain_rows, signal_rows, tiles
from potstill.report.figures import (
    PALETTE,
    arm_colour,
    dark_twins,
    packed_plotly,
    plotly_size,
    recovered_figure,
    speed_figures,
)
from potstill.report.headline import write_caveat, write_headline
from potstill.report.metrics import GAINS, METRICS, format_duration
from potstill.report.reliability import reliability_figure
from potstill.report.story import ARMS, Story
from potstill.report.text import cell, fenced, scalar, visible

__all__ = ["known_facts", "render", "save_text", "write_report"]


def write_report(story: Story, folder: Path) -> Path:
    """Write `index.html` and `report.md` into `folder`, and return the path of the former.

    The same story gives the same bytes. Raises RunError where the folder cannot be written.
    """
    facts = {**known_facts(story), **_pictures(story)}
    save_text(folder / "report.md", render("report.md.jinja", facts))
    save_text(folder / "index.html", render("page.html.jinja", facts))
    return folder / "index.html"


def known_facts(story: Story) -> dict[str, Any]:
    """What the templates of page, Markdown and card share: the story, and everything computed from it as text."""
    return {
        "story": story,
        "headline": write_headline(story),
        "caveat": write_caveat(story),
        "tiles": tiles(story),
        "arms": arms_of(story),
        "rows": arm_rows(story),
        "gain_tables": [(over, title, gain_rows(story, over)) for over, title in _GAIN_TITLES],
        "trained_tokens": max((point.tokens for point in story.curves.get("student", ())), default=0),
        "sampled": _sampled_arms(story),
        "stages": _stage_rows(story),
        "splits": _split_rows(story),
        "arms_explained": _explain_arms(story),
        "definitions": _definitions(),
        "stored": signal_rows(story.signals) if story.signals else [],
    }


_GAIN_TITLES = (
    ("control", "What distillation added: the student against the control arm"),
    ("untrained", "What training added: the student against its untrained self"),
)


def render(template: str, facts: dict[str, Any]) -> str:
    """A template of this room, filled. HTML is escaped by default, Markdown through the filters of `text`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "cell": cell,
        "fenced": fenced,
        "scalar": scalar,
        "role": arm_colour,
        "number": _number,
    }
    return environment.get_template(template).render(facts)


def _shown(value: Any) -> Any:
    """What a template prints: plain text with nothing unseen in it; markup of our own as it is."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def save_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all. Raises RunError when the disk or its permissions say no."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(text.encode("utf-8", "replace"))
        partial.replace(path)
    except OSError as problem:
        raise RunError(
            f"report: cannot write {path}: {problem.strerror or problem}. "
            "Free the disk or allow writing there, then run the same command again."
        ) from problem


def _pictures(story: Story) -> dict[str, Any]:
    learning, speed = [training_figures(story), validation_figures(story)], speed_figures(story)
    recovered, reliability = recovered_figure(story), reliability_figure(story)
    drawn = any([*learning, speed, recovered, reliability])
    return {
        "learning": learning,
        "speed": speed,
        "recovered": recovered,
        "reliability": reliability,
        "plotly_size": plotly_size(),
        "packed": packed_plotly() if drawn else "",
        "style": render("style.css.jinja", {"palette": PALETTE}),
        "script": render("script.js.jinja", {"twins": dark_twins()}),
    }


def _number(shown: Cell | None) -> str:
    return "not measured" if shown is None else f"{shown.value} {shown.interval}".rstrip()


def _sampled_arms(story: Story) -> list[str]:
    seen = {arm for sample in story.samples for arm in sample.completions}
    return [arm for arm in ARMS if arm in seen] + sorted(seen.difference(ARMS))


def _stage_rows(story: Story) -> list[tuple[str, str, str]]:
    rows = [
        (
            cost.stage,
            format_duration(cost.seconds),
            "not recorded" if cost.peak_gb is None else f"{cost.peak_gb:.2f} GB",
        )
        for cost in story.stages
    ]
    if rows:
        peaks = [cost.peak_gb for cost in story.stages if cost.peak_gb is not None]
        total = format_duration(sum(cost.seconds for cost in story.stages))
        rows.append(("together", total, f"{max(peaks):.2f} GB at most" if peaks else "not recorded"))
    return rows


def _split_rows(story: Story) -> list[tuple[str, str, str, str]]:
    if story.data is None:
        return []
    held = (story.data.documents, story.data.tokens, story.data.rows)
    splits = dict.fromkeys(split for counts in held for split in counts)
    return [(split, *(_count(counts.get(split)) for counts in held)) for split in splits]  # type: ignore[misc]


def _count(value: int | None) -> str:
    return "not recorded" if value is None else f"{value:,}"


def _explain_arms(story: Story) -> str:
    control = (
        "control is the same initial student, trained on the same batches in the same order with hard labels only, so "
        "that the difference to it is what the teacher's signal added"
        if story.has_control
        else "a control arm (the same student trained on hard labels only) was not run, so that what distillation "
        "added beyond plain training is unknown"
    )
    return (
        "Teacher is the large model; untrained is the student as it was made, before any training; "
        f"{control}; student is the distilled model."
    )


def _definitions() -> list[tuple[str, str]]:
    return [
        *((metric.label, metric.meaning) for metric in METRICS),
        ("Gains", "Paired on the same documents: " + "; ".join(_paired()) + ". Positive: the student is better."),
        *_READING,
    ]


def _paired() -> Iterable[str]:
    return (gain.meaning for gain in GAINS if gain.name.endswith("_over_control"))


_READING = (
    (
        "Intervals",
        "95 % bootstrap intervals: whole held-out documents are drawn again with replacement, many times, and the "
        "number is computed on each draw. Both sides of a gain and of a gap share each draw. Another set of documents "
        "would move a number about so far. A gain whose interval holds 0 is not shown to differ from chance. Intervals "
        "of speeds, where given, are over repeated timings.",
    ),
    (
        "n",
        "How many observations a number rests on; for quality these are the documents that are resampled.",
    ),
    (
        "What the intervals leave out",
        "The luck of training: one seed was run, and another seed, order of data or learning rate could move each arm.",
    ),
    (
        "What is not measured",
        "Downstream tasks, factual accuracy, calibration of whole answers, safety, other domains or languages than the "
        "held-out split, and speed on other machines, batch sizes or serving software.",
    ),
)
