"""One number that makes a classifier as sure as it is right: the temperature of its softmax.

Refuses to be fitted on anything but what it is given: the caller has only validation texts for it.

Suffixes: N texts, C classes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.errors import DataError
from potstill.evaluation.bootstrap import Floats

__all__ = ["HIGHEST", "LOWEST", "Scores", "fit_temperature", "log_sigmoid", "log_softmax"]

Scores = NDArray[np.floating[Any]]
"""What models answer with, in their own precision; float64 here as soon as it is computed with."""

LOWEST, HIGHEST = 0.05, 20.0
"""Bounds of a fitted temperature: where every validation text is right, the likelihood would have it 0."""


def fit_temperature(logits_NC: Scores, true_NC: NDArray[np.bool_], *, multi_label: bool = False) -> float:
    """The T that minimises the mean NLL of softmax(z / T), or with `multi_label` of sigmoid(z / T), label by label.

    true_NC marks the right class of each text, or its labels; all texts count. The NLL is convex in 1 / T, so that its
    slope, mean(E_q z - z_y), passes 0 once: found by bisection, within LOWEST..HIGHEST. Raises DataError where there is
    no text. Guo et al. (2017), arXiv:1706.04599, eq. 9.
    """
    if not len(logits_NC):
        raise DataError(
            "evaluation.calibrate: validation holds no labelled text, and a temperature is fitted on such texts. Label "
            "some, raise data.splits.validation, or set evaluation.calibrate to false."
        )
    wide_NC = logits_NC.astype(np.float64)
    low, high = math.log(1 / HIGHEST), math.log(1 / LOWEST)
    for _ in range(50):
        middle = (low + high) / 2
        rises = _slope(wide_NC, true_NC, math.exp(middle), multi_label=multi_label) > 0
        low, high = (low, middle) if rises else (middle, high)
    return math.exp(-(low + high) / 2)


def log_softmax(logits_NC: Scores) -> Floats:
    """log(exp(z_c) / sum_k exp(z_k)), float64 [N, C]."""
    shifted_NC = logits_NC.astype(np.float64) - logits_NC.max(-1, keepdims=True, initial=-np.inf)
    log_q_NC: Floats = shifted_NC - np.log(np.exp(shifted_NC).sum(-1, keepdims=True))
    return log_q_NC


def log_sigmoid(logits_NC: Scores) -> Floats:
    """log(1 / (1 + exp(-z))), float64, of the shape given."""
    log_q_NC: Floats = -np.logaddexp(0.0, -logits_NC.astype(np.float64))
    return log_q_NC


def _slope(logits_NC: Floats, true_NC: NDArray[np.bool_], inverse: float, *, multi_label: bool) -> float:
    """The derivative of the NLL by 1 / T, up to a positive factor."""
    log_q_NC = (log_sigmoid if multi_label else log_softmax)(logits_NC * inverse)
    return float(((np.exp(log_q_NC) - true_NC) * logits_NC).mean())
