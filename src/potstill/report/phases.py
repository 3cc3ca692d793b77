"""The trainings that came before: what each taught, from whom, and what its main measure was before and after.

Refuses: comparing phases with each other. Each was measured on its own task and texts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from potstill.report.headline import main_measure
from potstill.report.metrics import metric_of
from potstill.report.numbers import format_measurement
from potstill.report.story import PhaseFacts, Story, find

__all__ = ["PhaseRow", "phase_rows"]


@dataclass(frozen=True, slots=True)
class PhaseRow:
    """One training as text: `before` and `after` are the main measure of its first and last weights."""

    phase: PhaseFacts
    measure: str
    before: str
    after: str
    page: str


def phase_rows(story: Story) -> list[PhaseRow]:
    """One row a phase, in order; the link is relative to this run's report."""
    return [_row(story, phase) for phase in story.phases]


def _row(story: Story, phase: PhaseFacts) -> PhaseRow:
    own = replace(story, task=phase.facts, measurements=phase.measurements)
    main = main_measure(own)
    page = f"../{phase.folder}/report/index.html"
    if main is None:
        return PhaseRow(phase, "nothing was measured", "", "", page)
    before = find(own, "untrained", main.name)
    first = format_measurement(before) if before else "not measured"
    return PhaseRow(phase, metric_of(main, phase.facts).label, first, format_measurement(main), page)
