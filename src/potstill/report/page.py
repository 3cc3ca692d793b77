"""The page: one HTML file that works offline, and the same facts as Markdown.

Refuses: the network. Everything is inlined, and the page's own content policy forbids every request.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from potstill.errors import RunError
from potstill.report.classes import class_figure, confusion_rows, slice_arms, slice_rows
from potstill.report.curves import training_figures, validation_figures
from potstill.report.explain import define, explain_arms, sum_up_price, task_rows
from potstill.report.facts import Cell, arm_rows, arms_of, cell_of, gain_rows, signal_rows
from potstill.report.figures import PALETTE, arm_colour, dark_twins, packed_plotly, plotly_size, recovered_figure
from potstill.report.generation import generation_rows
from potstill.report.headline import write_caveat, write_headline
from potstill.report.numbers import format_duration
from potstill.report.phases import phase_rows
from potstill.report.reliability import reliability_figure
from potstill.report.story import ARMS, Story, kind_of
from potstill.report.text import cell, fenced, scalar, visible
from potstill.report.tiles import tiles
from potstill.report.tradeoff import speed_figures
from potstill.report.wording import wording_of

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
        "words": wording_of(story.task),
        "kind": kind_of(story.task),
        "headline": write_headline(story),
        "caveat": write_caveat(story),
        "task": task_rows(story),
        "tiles": tiles(story),
        "arms": arms_of(story),
        "rows": arm_rows(story),
        "scope": arm_rows(story, scope=True),
        "confusions": confusion_rows(story.confusions),
        "slice_arms": slice_arms(story),
        "slices": [(value, [cell_of(one) for one in measured], n) for value, measured, n in slice_rows(story)],
        "phases": phase_rows(story),
        "gain_tables": [(over, title, gain_rows(story, over)) for over, title in _gain_titles(story)],
        "trained_tokens": max((point.tokens for point in story.curves.get("student", ())), default=0),
        "sampled": _sampled_arms(story),
        "stages": _stage_rows(story),
        "price": sum_up_price(story),
        "split_columns": _split_columns(story),
        "splits": _split_rows(story),
        "arms_explained": explain_arms(story),
        "definitions": define(story),
        "stored": _signal_rows(story),
        "written": generation_rows(story.generation) if story.generation else [],
    }


def _gain_titles(story: Story) -> tuple[tuple[str, str], ...]:
    control = ("control", "What distillation added: the student against the control arm")
    untrained = ("untrained", "What training added: the student against its untrained self")
    if kind_of(story.task) == "written":
        control = ("control", "What verification added: the student against the control arm")
    # Without hard labels, or a verifier, there is no control arm to be missed.
    if kind_of(story.task) in ("embedding", "unverified"):
        return (untrained,) if gain_rows(story, "untrained") else ()
    return control, untrained


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
    recovered, reliability, classes = recovered_figure(story), reliability_figure(story), class_figure(story)
    drawn = any([*learning, speed, recovered, reliability, classes])
    return {
        "learning": learning,
        "speed": speed,
        "recovered": recovered,
        "reliability": reliability,
        "classes": classes,
        "plotly_size": plotly_size(),
        "packed": packed_plotly() if drawn else "",
        "style": render("style.css.jinja", {"palette": PALETTE}),
        "script": render("script.js.jinja", {"twins": dark_twins()}),
    }


def _signal_rows(story: Story) -> list[tuple[str, str]]:
    if story.signals is None:
        return []
    return signal_rows(story.signals, texts=wording_of(story.task).documents == "texts")


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


def _split_counts(story: Story) -> list[tuple[str, Mapping[str, int]]]:
    """What was counted of each split, with its name."""
    if story.data is None:
        return []
    if wording_of(story.task).documents == "texts":
        return [("texts", story.data.documents), ("labelled", story.data.labelled)]
    return [("documents", story.data.documents), ("tokens", story.data.tokens), ("packed rows", story.data.rows)]


def _split_columns(story: Story) -> list[str]:
    return ["split", *(name for name, counts in _split_counts(story) if counts or name != "labelled")]


def _split_rows(story: Story) -> list[tuple[str, ...]]:
    held = [counts for name, counts in _split_counts(story) if counts or name != "labelled"]
    splits = dict.fromkeys(split for counts in held for split in counts)
    return [(split, *(_count(counts.get(split)) for counts in held)) for split in splits]


def _count(value: int | None) -> str:
    return "not recorded" if value is None else f"{value:,}"
