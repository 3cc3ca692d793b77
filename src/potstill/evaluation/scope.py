"""Texts that belong to no class: are they told by low confidence, and at what threshold?

Refuses to choose the threshold on the texts by which it is judged: it comes from others, or not at all.

Suffixes: I texts within the classes' scope, O texts out of it, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from potstill.errors import DataError
from potstill.evaluation.bootstrap import Floats
from potstill.evaluation.intervals import Quantity, measure, ratio
from potstill.evaluation.temperature import Scores, log_sigmoid, log_softmax
from potstill.types import Measurement

__all__ = ["Confidences", "Threshold", "auroc", "choose_threshold", "measure_scope", "score_confidence"]


@dataclass(frozen=True, slots=True)
class Confidences:
    """The probability of the most probable class, for texts that are known to lie within scope or out of it."""

    within_I: Floats
    outside_O: Floats


@dataclass(frozen=True, slots=True)
class Threshold:
    """A text is taken for out of scope where its confidence is below `confidence`; what came of it where it was chosen.

    `reached` says whether the precision that was asked for was to be had.
    """

    confidence: float
    precision: float
    recall: float
    reached: bool


def score_confidence(logits_NC: Scores, temperature: float = 1.0, *, multi_label: bool = False) -> Floats:
    """The largest probability of softmax(z / temperature), or with `multi_label` of sigmoid(z / temperature), [N].

    Hendrycks and Gimpel (2017), arXiv:1610.02136.
    """
    log_q_NC = (log_sigmoid if multi_label else log_softmax)(logits_NC.astype(np.float64) / temperature)
    confidence_N: Floats = np.exp(log_q_NC.max(-1))
    return confidence_N


def choose_threshold(validation: Confidences, precision: float) -> Threshold:
    """The threshold of the highest recall of out-of-scope texts among those with at least this precision, 0 to 1.

    Where none has it, that of the best precision. Of equals the lower one, which turns fewer texts away. Raises
    DataError where validation holds no text out of scope, or none within.
    """
    _check(validation, "validation")
    levels = np.unique(np.concatenate([validation.within_I, validation.outside_O]))
    candidates = np.append(levels[1:], np.nextafter(levels[-1], np.inf))
    caught = np.searchsorted(np.sort(validation.outside_O), candidates, side="left")
    flagged = caught + np.searchsorted(np.sort(validation.within_I), candidates, side="left")
    precisions, recalls = caught / flagged, caught / len(validation.outside_O)
    reached = precisions >= precision
    order = np.lexsort((candidates, -precisions, -recalls) if reached.any() else (candidates, -recalls, -precisions))
    best = next(index for index in order if reached[index] or not reached.any())
    return Threshold(float(candidates[best]), float(precisions[best]), float(recalls[best]), bool(reached[best]))


def measure_scope(
    test: Mapping[str, Confidences], thresholds: Mapping[str, Threshold], *, resamples: int, seed: int
) -> list[Measurement]:
    """oos_auroc, oos_threshold, oos_recall and oos_precision of every arm on test texts; all arms on the same ones.

    Recall and precision have exact intervals, the AUROC 95 % percentiles of draws of texts. Precision is left out where
    no text is below the threshold. Raises DataError where test holds no text out of scope, or none within.
    """
    for confidences in test.values():
        _check(confidences, "test")
    sizes = [(len(one.within_I), len(one.outside_O)) for one in test.values()]
    within, outside = sizes[0]

    def statistic(weights_RD: Floats) -> Mapping[Quantity, Floats]:
        apart = (weights_RD[:, :within], weights_RD[:, within:])
        return {Quantity(arm, "oos_auroc", within + outside): auroc(one, *apart) for arm, one in test.items()}

    found = measure(statistic, texts=within + outside, resamples=resamples, seed=seed)
    for arm, one in test.items():
        line = thresholds[arm].confidence
        caught, turned_away = int((one.outside_O < line).sum()), int((one.within_I < line).sum())
        found.append(Quantity(arm, "oos_threshold", within + outside, "").measured(line))
        found += Quantity(arm, "oos_recall", outside).counted(caught)
        found += Quantity(arm, "oos_precision", caught + turned_away).counted(caught)
    return found


def auroc(confidences: Confidences, within_RI: Floats, outside_RO: Floats) -> Floats:
    """P(an outside text has less confidence than a text within), ties counted half, for weighted texts; [R].

    NaN where one side has no weight. Mann and Whitney (1947), doi:10.1214/aoms/1177730491; as a measure of out-of-scope
    detection Hendrycks and Gimpel (2017), arXiv:1610.02136.
    """
    order = np.argsort(np.concatenate([confidences.within_I, confidences.outside_O]), kind="stable")
    levels = np.concatenate([confidences.within_I, confidences.outside_O])[order]
    starts = np.flatnonzero(np.diff(levels, prepend=-np.inf))
    nothing_RI, nothing_RO = np.zeros_like(within_RI), np.zeros_like(outside_RO)
    inner_RD = np.concatenate([within_RI, nothing_RO], axis=1)[:, order]
    outer_RD = np.concatenate([nothing_RI, outside_RO], axis=1)[:, order]
    inner_RL, outer_RL = (np.add.reduceat(weights, starts, axis=1) for weights in (inner_RD, outer_RD))
    below_RL = np.cumsum(outer_RL, axis=1) - outer_RL
    wins_R = (inner_RL * (below_RL + 0.5 * outer_RL)).sum(-1)
    return ratio(wins_R, within_RI.sum(-1) * outside_RO.sum(-1))


def _check(confidences: Confidences, split: str) -> None:
    for texts, what in ((confidences.outside_O, "out of scope"), (confidences.within_I, "of a class")):
        if not len(texts):
            raise DataError(
                f"task.out_of_scope: the {split} split has no labelled text that is {what}, and both kinds are needed "
                f"to measure how they are told apart. Give {split} such texts, or leave task.out_of_scope out."
            )
