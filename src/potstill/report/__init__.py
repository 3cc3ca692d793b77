"""The page: a finished run, told to people.

Refuses: measuring. It shows what was measured, and says what was not.
"""

from __future__ import annotations

from potstill.report.card import write_card
from potstill.report.explain import name_task
from potstill.report.generation import GenerationFacts
from potstill.report.page import write_report
from potstill.report.story import (
    ClassFacts,
    ClassRow,
    Confusion,
    CurvePoint,
    DataFacts,
    PhaseFacts,
    ReliabilityPoint,
    Sample,
    SignalFacts,
    SliceRow,
    StageCost,
    Story,
    TaskFacts,
    TeacherTraining,
)

__all__ = [
    "ClassFacts",
    "ClassRow",
    "Confusion",
    "CurvePoint",
    "DataFacts",
    "GenerationFacts",
    "PhaseFacts",
    "ReliabilityPoint",
    "Sample",
    "SignalFacts",
    "SliceRow",
    "StageCost",
    "Story",
    "TaskFacts",
    "TeacherTraining",
    "name_task",
    "write_card",
    "write_report",
]
