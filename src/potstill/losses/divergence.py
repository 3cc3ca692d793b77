"""Divergences between a teacher's and a student's next-token distributions, and the hard-label loss.

Suffixes: N positions, V vocabulary. p = teacher, q = student, both softened by the temperature. Values are nats, one
per position. Refuses to know of chunks, heads, masks or weights: `chunked` feeds it blocks of logits.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["cross_entropy", "forward_kl", "reverse_kl"]


def forward_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), [N], in the dtype of the logits.

    Hinton et al. (2015), arXiv:1503.02531. Zero where the distributions agree; the gradient with respect to the
    student's logits is (q - p) / temperature.
    """
    log_p = (teacher_logits_NV / temperature).log_softmax(-1)
    log_q = (student_logits_NV / temperature).log_softmax(-1)
    return _expectation(log_p, log_p, log_q)


def reverse_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p) = sum_v q_v (log q_v - log p_v), [N], in the dtype of the logits.

    Gu et al. (2023), arXiv:2306.08543, eq. 1. Zero where the distributions agree; the gradient with respect to the
    student's logits is q (log(q/p) - KL) / temperature.
    """
    log_p = (teacher_logits_NV / temperature).log_softmax(-1)
    log_q = (student_logits_NV / temperature).log_softmax(-1)
    return _expectation(log_q, log_q, log_p)


def cross_entropy(student_logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """-log q_y for the token y that really came, [N], at temperature 1. targets_N int64, all within [0, V)."""
    log_q = student_logits_NV.log_softmax(-1)
    return -log_q.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)


def _expectation(log_weight: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum_v exp(log_weight) (log_a - log_b), where a weight of exactly 0 contributes 0 even if its logs are -inf."""
    weight = log_weight.exp()
    # The difference is cleared before the product: after it, the product's gradient would still be 0 * NaN.
    return (weight * (log_a - log_b).where(weight > 0, 0.0)).sum(-1)
