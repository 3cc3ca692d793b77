"""Divergences from a mixture once more, in forms that compile to half the passes over a block of logits.

Values and first derivatives are those of `divergence`, which is the definition; second derivatives are not, so only
`chunked` may use these: it takes first ones. With u the log-ratio of the two sides and L = log(M / p), each is a sum
f(p, q) whose slope c = df/dq is known, and everything but the probabilities can be held constant. Refuses small
weights, at which float32 would lose L beside u: there the definition itself is used.

Suffixes: N positions, V vocabulary. p = teacher, q = student, softened.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from potstill.losses.divergence import (
    Divergence,
    expectation,
    jsd,
    log_probabilities,
    log_ratio,
    normalised_jsd,
    skew_forward_kl,
    skew_reverse_kl,
)

__all__ = ["FUSED"]

LEAST_WEIGHT = 0.05
"""Share of the mixture's first side below which log(M / p) is left to the definition."""

LARGEST_GAP = 80.0
"""e^80 is finite in float32, and e^-80 of a probability is nothing beside it."""


def _jsd(student_NV: Tensor, teacher_NV: Tensor, temperature: float | Tensor = 1.0, *, beta: float = 0.5) -> Tensor:
    """The slope is c = (1 - beta) log(q / M)."""
    if not LEAST_WEIGHT <= beta < 1.0:
        return jsd(student_NV, teacher_NV, temperature, beta=beta)
    log_q, log_p = log_probabilities(student_NV, teacher_NV, temperature)
    gap_NV, mixture_NV = _over_first(log_p, log_q, beta)
    from_teacher_N = expectation(log_p.exp(), -mixture_NV)
    return beta * from_teacher_N + (1.0 - beta) * expectation(log_q.exp(), gap_NV - mixture_NV)


def _normalised_jsd(
    student_NV: Tensor, teacher_NV: Tensor, temperature: float | Tensor = 1.0, *, beta: float = 0.5
) -> Tensor:
    """The slope is c = log(q / M) / beta."""
    if not LEAST_WEIGHT <= beta < 1.0:
        return normalised_jsd(student_NV, teacher_NV, temperature, beta=beta)
    return _jsd(student_NV, teacher_NV, temperature, beta=beta) / (beta * (1.0 - beta))


def _skew_forward_kl(
    student_NV: Tensor, teacher_NV: Tensor, temperature: float | Tensor = 1.0, *, alpha: float = 0.1
) -> Tensor:
    """The slope is c = -(1 - alpha) p / M."""
    if not LEAST_WEIGHT <= alpha < 1.0:
        return skew_forward_kl(student_NV, teacher_NV, temperature, alpha=alpha)
    log_q, log_p = log_probabilities(student_NV, teacher_NV, temperature)
    _, mixture_NV = _over_first(log_p, log_q, alpha)
    return expectation(log_p.exp(), -mixture_NV) + _slope(log_q.exp(), (alpha - 1.0) * torch.expm1(-mixture_NV))


def _skew_reverse_kl(
    student_NV: Tensor, teacher_NV: Tensor, temperature: float | Tensor = 1.0, *, alpha: float = 0.1
) -> Tensor:
    """The slope is c = log(q / M) - alpha q / M."""
    if not LEAST_WEIGHT <= alpha < 1.0:
        return skew_reverse_kl(student_NV, teacher_NV, temperature, alpha=alpha)
    log_q, log_p = log_probabilities(student_NV, teacher_NV, temperature)
    _, mixture_NV = _over_first(log_q, log_p, alpha)
    q_NV = log_q.exp()
    return expectation(q_NV, -mixture_NV) + _slope(q_NV, -alpha * torch.expm1(-mixture_NV))


FUSED: Mapping[str, Divergence] = MappingProxyType(
    {
        "jsd": _jsd,
        "normalised_jsd": _normalised_jsd,
        "skew_forward_kl": _skew_forward_kl,
        "skew_reverse_kl": _skew_reverse_kl,
    }
)
"""By the names of `DIVERGENCES`."""


def _over_first(log_a: Tensor, log_b: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Both constant: u = log(b / a) and log(M / a) for M = w a + (1 - w) b; 0 at equality."""
    gap_NV = log_ratio(log_b, log_a).detach().clamp(max=LARGEST_GAP)
    return gap_NV, torch.log1p((1.0 - weight) * torch.expm1(gap_NV))


def _slope(q_NV: Tensor, slope_NV: Tensor) -> Tensor:
    """Zero, [N], whose derivative with respect to q is the slope, up to a constant that no softmax feels.

    Slopes are given without theirs (expm1 in place of exp): float32 would lose a small difference beside it.
    """
    return ((q_NV - q_NV.detach()) * slope_NV).sum(-1)
