"""From finished runs to rows of the table: what was measured, how long it took, what a teacher adds to few labels.

Refuses to time a run whose teacher, or whose answers, another run has made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _table import Row, seeds_row

__all__ = ["CLAIMS", "Measured", "claim_rows", "fewlabel_rows", "measured_rows", "minutes_rows", "read_run"]

Measured = Mapping[tuple[str, str], Mapping[str, Any]]
"""Of one run, over the whole test split: by arm and name, a measurement as evaluate writes it."""

CLAIMS = {
    "intent.teacher_accuracy": ("teacher", "accuracy"),
    "intent.retention": ("student", "retention"),
    "intent.throughput_vs_teacher": ("student", "throughput_vs_teacher"),
    "intent.latency_vs_teacher": ("student", "latency_vs_teacher"),
    "intent.static_retention": ("static", "retention"),
    "intent.static_throughput_vs_teacher": ("static", "throughput_vs_teacher"),
}
"""What has a bar, and where it stands."""

BESIDE = {
    "accuracy": ("untrained", "control", "student", "static"),
    "accuracy_gain_over_control": ("student",),
    "agreement": ("control", "student", "static"),
    "ece_calibrated": ("teacher", "control", "student", "static"),
    "oos_auroc": ("teacher", "control", "student", "static"),
    "throughput_per_s": ("teacher", "student", "static"),
    "latency_p50_ms": ("teacher", "student", "static"),
}
"""What is told beside it, by name: of which arms."""

GAIN = "accuracy_gain_over_control"


def read_run(run: Path) -> Measured:
    """What the run's evaluation measured over the whole test split."""
    rows = json.loads((run / "evaluate" / "measurements.json").read_text(encoding="utf-8"))
    return {(row["arm"], row["name"]): row for row in rows if row["slice"] == "test"}


def claim_rows(seeds: Sequence[Measured]) -> list[Row]:
    """The rows with bars, then those beside them that every seed has. Raises KeyError where a claim is not there."""
    beside = {f"intent.{name}.{arm}": (arm, name) for name, arms in BESIDE.items() for arm in arms}
    there = {name: key for name, key in beside.items() if all(key in seed for seed in seeds)}
    return measured_rows(seeds, CLAIMS | there)


def measured_rows(seeds: Sequence[Measured], wanted: Mapping[str, tuple[str, str]]) -> list[Row]:
    """Means over seeds of measurements, by the name of their row. Raises KeyError where one was not measured."""
    rows = []
    for name, key in wanted.items():
        found = [seed[key] for seed in seeds]
        rows.append(seeds_row(name, [float(one["value"]) for one in found], str(found[0]["unit"])))
    return rows


def minutes_rows(run: Path) -> list[Row]:
    """Minutes of all stages together, and of each; nothing where a stage took over what another run has made.

    Attempts that were interrupted count; what a process takes to begin, some seconds, does not.
    """
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(run.glob("*/manifest.json"))]
    if any(_took_over(manifest["facts"]) for manifest in manifests):
        return []
    minutes = {manifest["stage"]: manifest["wall_s"] / 60 for manifest in manifests}
    whole = Row("intent.minutes", sum(minutes.values()), "min")
    return [whole, *(Row(f"intent.minutes.{stage}", spent, "min") for stage, spent in minutes.items())]


def fewlabel_rows(ready: Sequence[Measured], own: Sequence[Measured]) -> list[Row]:
    """What a teacher adds to few labels: one that was ready, which has the bar, and one that learned from the same few.

    A gain is the student's accuracy less that of its control arm, seed by seed. Who was not run has no row.
    """
    gains = measured_rows(ready, {"intent.fewlabel_gain": ("student", GAIN)}) if ready else []
    low = [Row("intent.fewlabel_gain_low", gain.low, gain.unit, n=gain.n) for gain in gains if gain.low is not None]
    arms = {
        f"intent.fewlabel.{kind}.{arm}": (seeds, (arm, "accuracy"))
        for kind, seeds in (("ready_teacher", ready), ("own_teacher", own))
        for arm in ("teacher", "control", "student")
    }
    beside = [row for name, (seeds, key) in arms.items() if seeds for row in measured_rows(seeds, {name: key})]
    gains_own = measured_rows(own, {"intent.fewlabel_gain.own_teacher": ("student", GAIN)}) if own else []
    return [*gains, *low, *gains_own, *beside]


def _took_over(facts: Mapping[str, Any]) -> bool:
    """Whether the stage found a trained teacher, or some of the teacher's answers, made by another run."""
    return "found" in facts or facts.get("captured", 0) < facts.get("pieces", 0)
