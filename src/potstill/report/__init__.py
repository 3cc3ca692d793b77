"""The page: a finished run, told to people.

Refuses: measuring. It shows what was measured, and says what was not.
"""

from __future__ import annotations

from potstill.report.card import write_card
from potstill.report.page import write_report
from potstill.report.story import (
    CurvePoint,
    DataFacts,
    ReliabilityPoint,
    Sample,
    SignalFacts,
    StageCost,
    Story,
)

__all__ = [
    "CurvePoint",
    "DataFacts",
    "ReliabilityPoint",
    "Sample",
    "SignalFacts",
    "StageCost",
    "Story",
    "write_card",
    "write_report",
]
