"""Comparing a student with a teacher who listed some tokens only: the listed ones and, as one class, all the others.

Refuses to soften: a temperature cannot be applied to a truncated list, so both sides come at the list's own.

Suffixes: n rows of one block, V vocabulary, K listed tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from potstill.losses.divergence import expectation

__all__ = ["buckets", "tail_bucket_kl"]


def tail_bucket_kl(student_logits_nV: Tensor, ids_nK: Tensor, logprobs_nK: Tensor, tail_n: Tensor | None) -> Tensor:
    """Forward KL over the K listed tokens and one class for the rest, [n], nats; logits are softened already.

        sum_k p_k (log p_k - log q_k) + p_rest (log p_rest - log q_rest)

    Without a tail the second part is absent: with p a sampled estimate that sums to 1 the gradient, q - p, is unbiased.
    With one it is the KL of the coarser distributions, a lower bound of the dense KL. Listed probabilities of 0 add 0.
    """
    log_total_n = student_logits_nV.logsumexp(-1)
    log_q_nK = student_logits_nV.gather(-1, ids_nK) - log_total_n.unsqueeze(-1)
    value_n = expectation(logprobs_nK.exp(), logprobs_nK - log_q_nK)
    if tail_n is None:
        return value_n
    log_rest_n = _rest(student_logits_nV, ids_nK, logprobs_nK) - log_total_n
    return value_n + expectation(tail_n.exp().unsqueeze(-1), (tail_n - log_rest_n).unsqueeze(-1))


def buckets(
    student_logits_nV: Tensor, ids_nK: Tensor, logprobs_nK: Tensor, tail_n: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both sides as logits of K + 1 classes, [n, K + 1]: the listed tokens, then all others together."""
    rest_n = _rest(student_logits_nV, ids_nK, logprobs_nK)
    tail_n = torch.full_like(rest_n, -math.inf) if tail_n is None else tail_n
    # A token listed with probability 0 fills up the row: it counts as unlisted on both sides.
    student_nK = student_logits_nV.gather(-1, ids_nK).masked_fill(logprobs_nK == -math.inf, -math.inf)
    return torch.cat([student_nK, rest_n.unsqueeze(-1)], -1), torch.cat([logprobs_nK, tail_n.unsqueeze(-1)], -1)


def _rest(logits_nV: Tensor, ids_nK: Tensor, logprobs_nK: Tensor) -> Tensor:
    """Log-sum-exp over the unlisted tokens, [n]. Not log(1 - listed): that cancels where the list has nearly all."""
    # What fills up a row points to the likeliest listed token instead, so that it may repeat a listed one.
    filler_nK = logprobs_nK == -math.inf
    first_n1 = ids_nK.gather(-1, logprobs_nK.argmax(-1, keepdim=True))
    ids_nK = torch.where(filler_nK, first_n1, ids_nK)
    nothing_n1 = filler_nK.all(-1, keepdim=True)
    hidden_nK = logits_nV.gather(-1, ids_nK).masked_fill(~nothing_n1, -math.inf)
    return logits_nV.scatter(-1, ids_nK, hidden_nK).logsumexp(-1)
