"""Held-out likelihood, distance to the teacher, agreement and calibration of every arm on the same positions.

Refuses to compare arms that were scored on different documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from potstill.errors import NonFiniteError
from potstill.evaluation.bootstrap import Floats, Resampling
from potstill.evaluation.calibration import BINS, bin_sums
from potstill.types import Lesson, Measurement, Mixture, Reader, States, Wants

__all__ = ["DocumentScores", "Scorer", "compare_arms", "score_arm"]

Scorer = Callable[[States | Mixture, States | Mixture, Tensor], Mapping[str, Tensor]]
"""(what the arm thinks, what the teacher said, targets) -> by name, for each position, [N]: nll, kl_to_teacher and
agreement; confidence, the arm's largest probability; correct, 1 where its most probable token came.
"""

NAMES = ("nll", "kl_to_teacher", "agreement")


@dataclass(frozen=True, slots=True)
class DocumentScores:
    """Sums per document [D], float64, in the order of `documents`; `counts_D` positions each.

    bins_DM3  positions, confidence and correct, summed per document and bin of confidence: `calibration.bin_sums`
    """

    documents: tuple[str, ...]
    counts_D: Floats
    sums: Mapping[str, Floats]
    bins_DM3: Floats


def score_arm(reader: Reader, lessons: Iterable[Lesson], scorer: Scorer, *, alone: bool = False) -> DocumentScores:
    """Score one arm on lessons whose signals hold the teacher's final states and head.

    `alone`: there is no teacher, and the arm stands in for it, so that what compares with one means nothing.
    Raises ValueError where either side lacks them, NonFiniteError naming the documents whose scores are no numbers.
    """
    totals: dict[str, Floats] = {}
    for lesson in lessons:
        said = reader.read(lesson.batch, Wants(final=True)).logits
        teacher = said if alone else lesson.signal.logits
        if not isinstance(said, States | Mixture) or not isinstance(teacher, States | Mixture):
            raise ValueError("scoring needs final hidden states and heads of both sides")
        device = (said if isinstance(said, States) else said.members[0]).rows_ND.device
        values = scorer(said, teacher, lesson.batch.targets_N.to(device))
        for document, sums in _sums_per_document(_documents(lesson), values):
            totals[document] = totals.get(document, 0.0) + sums
    columns = 1 + len(NAMES)
    table = np.stack(list(totals.values())) if totals else np.zeros((0, columns + 3 * BINS))
    _refuse_nonfinite(tuple(totals), table)
    by_name = {name: table[:, i + 1] for i, name in enumerate(NAMES)}
    return DocumentScores(tuple(totals), table[:, 0], by_name, table[:, columns:].reshape(-1, BINS, 3))


def _sums_per_document(documents: Sequence[str], values: Mapping[str, Tensor]) -> Iterator[tuple[str, Floats]]:
    """(document, its number of positions, its sums of NAMES, its flattened bins), each document once."""
    numbers = {document: number for number, document in enumerate(dict.fromkeys(documents))}
    group_N = np.array([numbers[document] for document in documents], dtype=np.int64)
    wide = {name: values[name].double().cpu().numpy() for name in (*NAMES, "confidence", "correct")}
    columns = [np.bincount(group_N, weights, len(numbers)) for weights in (None, *(wide[name] for name in NAMES))]
    bins_DM3 = bin_sums(wide["confidence"], wide["correct"], group_N, len(numbers))
    table = np.concatenate([np.stack(columns, axis=1), bins_DM3.reshape(len(numbers), 3 * BINS)], axis=1)
    yield from zip(numbers, table, strict=True)


def compare_arms(scores: Mapping[str, DocumentScores], resamples: int, seed: int) -> list[Measurement]:
    """All quality measurements of all arms, `untrained` among them, with paired 95 % intervals.

    Without a `teacher` there is nothing that compares with it.
    Retention is the geometric mean probability of the true token, arm / teacher; recovered_* are shares of the gap
    between the untrained student and the teacher that an arm closed, and are left out where there is no gap;
    *_gain_over_X is positive where the student is better than arm X. ece is the expected calibration error
    (`calibration_error`), recomputed for every resample. One document gives values without intervals.
    Raises ValueError when arms were scored on different documents or positions.
    """
    lead = "teacher" if "teacher" in scores else "untrained"
    first = scores[lead]
    for name, arm in scores.items():
        if arm.documents != first.documents or not np.array_equal(arm.counts_D, first.counts_D):
            raise ValueError(f"the {lead} and {name} were scored on different documents and cannot be compared")
    resampling = Resampling(first.counts_D, resamples, seed)
    means = {arm: _means(s, resampling) for arm, s in scores.items()}
    n = len(first.documents)
    found = [_measurement(arm, row, n) for arm in scores for row in _arm_values(arm, means)]
    for other in ("control", "untrained"):
        if other in scores and "student" in scores:
            gains = _gains(means["student"], means[other], other)
            told = [row for row in gains if "teacher" in scores or row[0].startswith("nll_")]
            found += [_measurement("student", row, n) for row in told]
    # Left out: shares of a gap of nothing, and a perplexity beyond the largest float64. Neither is a number in JSON.
    return [measurement for measurement in found if np.isfinite(measurement.value)]


def _means(scores: DocumentScores, resampling: Resampling) -> dict[str, Floats]:
    """Every quantity of one arm in the sample and in every resample."""
    means = {name: resampling.means(scores.sums[name]) for name in NAMES}
    gaps_DM = scores.bins_DM3[:, :, 2] - scores.bins_DM3[:, :, 1]
    return {**means, "ece": np.sum([np.abs(resampling.means(gap_D)) for gap_D in gaps_DM.T], axis=0)}


Means = Mapping[str, Floats]
Row = tuple[str, Floats, str]
"""A statistic's name, its value in the sample and in every resample, its unit."""


def _arm_values(arm: str, means: Mapping[str, Means]) -> list[Row]:
    own, teacher = means[arm], means.get("teacher")
    with np.errstate(over="ignore"):
        rows = [("nll", own["nll"], "nats/token"), ("perplexity", np.exp(own["nll"]), ""), ("ece", own["ece"], "share")]
    if arm == "teacher" or teacher is None:
        return rows
    rows += [
        ("kl_to_teacher", own["kl_to_teacher"], "nats/token"),
        ("agreement", own["agreement"], "share"),
        ("retention", np.exp(teacher["nll"] - own["nll"]), "share"),
    ]
    return rows if arm == "untrained" else rows + _recovered(own, means["untrained"], teacher)


def _recovered(own: Means, untrained: Means, teacher: Means) -> list[Row]:
    """Shares of the gap from the untrained student to the teacher; NaN where the teacher is not ahead."""
    closed_and_gap = {
        "recovered_nll": (untrained["nll"] - own["nll"], untrained["nll"] - teacher["nll"]),
        "recovered_kl": (untrained["kl_to_teacher"] - own["kl_to_teacher"], untrained["kl_to_teacher"]),
        "recovered_agreement": (own["agreement"] - untrained["agreement"], 1.0 - untrained["agreement"]),
    }
    return [
        (name, np.divide(closed, gap, out=np.full_like(gap, np.nan), where=gap > 0), "share")
        for name, (closed, gap) in closed_and_gap.items()
    ]


def _gains(student: Means, other: Means, name: str) -> list[Row]:
    return [
        (f"kl_gain_over_{name}", other["kl_to_teacher"] - student["kl_to_teacher"], "nats/token"),
        (f"nll_gain_over_{name}", other["nll"] - student["nll"], "nats/token"),
        (f"agreement_gain_over_{name}", student["agreement"] - other["agreement"], "share"),
    ]


def _measurement(arm: str, row: Row, n: int) -> Measurement:
    name, values_R, unit = row
    value, low, high = Resampling.interval(values_R)
    bounded = n > 1 and bool(np.isfinite([low, high]).all())
    # Resampling adds noise to every bin of a calibration error and so lifts it: the quantiles would bound nothing.
    bounded = bounded and name != "ece"
    return Measurement(arm, name, "test", value, low if bounded else None, high if bounded else None, n, unit)


def _refuse_nonfinite(documents: tuple[str, ...], table: Floats) -> None:
    bad = [document for document, row in zip(documents, table, strict=True) if not np.isfinite(row).all()]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise NonFiniteError(
            f"evaluation: the scores of {', '.join(bad[:5])}{more} are not finite, so no mean of this arm would be. "
            "Look at these documents, or read the model in fp32."
        )


def _documents(lesson: Lesson) -> list[str]:
    """The document of every supervised position, in batch order."""
    batch = lesson.batch
    rows_N, _ = batch.supervised_BT.nonzero(as_tuple=True)
    segments_N = batch.segments_BT[batch.supervised_BT]
    return [batch.examples[row][segment - 1] for row, segment in zip(rows_N.tolist(), segments_N.tolist(), strict=True)]
