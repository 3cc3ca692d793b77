"""Held-out likelihood, distance to the teacher and agreement, per document, for every arm on the same positions.

Refuses to compare arms that were scored on different documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from potstill.evaluation.bootstrap import Floats, Resampling
from potstill.types import Head, Lesson, Measurement, Reader, Wants

__all__ = ["DocumentScores", "Scorer", "compare_arms", "score_arm"]

Scorer = Callable[[tuple[Tensor, Head], tuple[Tensor, Head], Tensor], Mapping[str, Tensor]]
"""(arm's final states and head, teacher's, targets) -> values per position: nll, kl_to_teacher, agreement; each [N]."""

NAMES = ("nll", "kl_to_teacher", "agreement")


@dataclass(frozen=True, slots=True)
class DocumentScores:
    """Sums per document [D], float64, in the order of `documents`; `counts_D` positions each."""

    documents: tuple[str, ...]
    counts_D: Floats
    sums: Mapping[str, Floats]


def score_arm(reader: Reader, lessons: Iterable[Lesson], scorer: Scorer) -> DocumentScores:
    """Score one arm on lessons whose signals hold the teacher's final states and head."""
    totals: dict[str, NDArray[np.float64]] = {}
    for lesson in lessons:
        said = reader.read(lesson.batch, Wants(final=True))
        signal = lesson.signal
        if said.final_ND is None or said.head is None or signal.final_ND is None or signal.head is None:
            raise ValueError("scoring needs final hidden states and heads of both sides")
        device = said.final_ND.device
        values = scorer((said.final_ND, said.head), (signal.final_ND, signal.head), lesson.batch.targets_N.to(device))
        table_N4 = np.stack([values[name].double().cpu().numpy() for name in NAMES], axis=1)
        for document, row in zip(_documents(lesson), table_N4, strict=True):
            total = totals.setdefault(document, np.zeros(len(NAMES) + 1))
            total[0] += 1
            total[1:] += row
    stacked = np.stack(list(totals.values())) if totals else np.zeros((0, len(NAMES) + 1))
    return DocumentScores(tuple(totals), stacked[:, 0], {name: stacked[:, i + 1] for i, name in enumerate(NAMES)})


def compare_arms(scores: Mapping[str, DocumentScores], resamples: int, seed: int) -> list[Measurement]:
    """All quality measurements of all arms, `teacher` and `untrained` among them, with paired 95 % intervals.

    Retention is the geometric mean probability of the true token, arm / teacher; recovered_* are shares of the gap
    between the untrained student and the teacher that an arm closed; *_gain_over_X is positive where the student is
    better than arm X. Raises ValueError when arms were scored on different documents.
    """
    teacher = scores["teacher"]
    if any(arm.documents != teacher.documents for arm in scores.values()):
        raise ValueError("the arms were scored on different documents and cannot be compared")
    resampling = Resampling(teacher.counts_D, resamples, seed)
    means = {arm: {name: resampling.means(s.sums[name]) for name in NAMES} for arm, s in scores.items()}
    n = len(teacher.documents)
    found: list[Measurement] = []
    for arm in scores:
        found += [_measurement(arm, name, values, n, unit) for name, values, unit in _arm_values(arm, means)]
    for other in ("control", "untrained"):
        if other in scores and "student" in scores:
            found += [
                _measurement("student", *row[:2], n, row[2]) for row in _gains(means["student"], means[other], other)
            ]
    return found


Means = Mapping[str, Floats]


def _arm_values(arm: str, means: Mapping[str, Means]) -> list[tuple[str, Floats, str]]:
    own, teacher, untrained = means[arm], means["teacher"], means["untrained"]
    rows = [("nll", own["nll"], "nats/token"), ("perplexity", np.exp(own["nll"]), "")]
    if arm == "teacher":
        return rows
    rows += [
        ("kl_to_teacher", own["kl_to_teacher"], "nats/token"),
        ("agreement", own["agreement"], "share"),
        ("retention", np.exp(teacher["nll"] - own["nll"]), "share"),
    ]
    if arm == "untrained":
        return rows
    perfect = {"nll": teacher["nll"], "kl_to_teacher": 0.0, "agreement": 1.0}
    short = {"nll": "nll", "kl_to_teacher": "kl", "agreement": "agreement"}
    for name in NAMES:
        # A gap of nothing has no share: NaN in the resamples, and no measurement for the sample.
        with np.errstate(divide="ignore", invalid="ignore"):
            share = (untrained[name] - own[name]) / (untrained[name] - perfect[name])
        rows.append((f"recovered_{short[name]}", share, "share"))
    return rows


def _gains(student: Means, other: Means, name: str) -> list[tuple[str, Floats, str]]:
    return [
        (f"kl_gain_over_{name}", other["kl_to_teacher"] - student["kl_to_teacher"], "nats/token"),
        (f"nll_gain_over_{name}", other["nll"] - student["nll"], "nats/token"),
        (f"agreement_gain_over_{name}", student["agreement"] - other["agreement"], "share"),
    ]


def _measurement(arm: str, name: str, values_R: Floats, n: int, unit: str) -> Measurement:
    value, low, high = Resampling.interval(values_R)
    bounds = (low, high) if n > 1 and np.isfinite(low) else (None, None)
    return Measurement(arm, name, "test", value, *bounds, n, unit)


def _documents(lesson: Lesson) -> list[str]:
    """The document of every supervised position, in batch order."""
    batch = lesson.batch
    rows_N, _ = batch.supervised_BT.nonzero(as_tuple=True)
    segments_N = batch.segments_BT[batch.supervised_BT]
    return [batch.examples[row][segment - 1] for row, segment in zip(rows_N.tolist(), segments_N.tolist(), strict=True)]
