"""Divergences between a teacher's and a student's next-token distributions, and the hard-label loss.

Suffixes: N positions, V vocabulary. p = teacher, q = student, both softened by the temperature. Logits may be of any
float dtype; values are nats, one per position [N], float32 (float64 for float64 logits). Every divergence is zero where
the distributions agree, and its gradient with respect to the student's logits is (a_v - q_v sum_u a_u) / temperature,
with the a that its docstring names. A token whose logit is -inf on both sides is no token: it changes nothing.
Refuses to know of chunks, heads, masks or weights: `chunked` feeds it blocks of logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

__all__ = [
    "DIVERGENCES",
    "Divergence",
    "adaptive_kl",
    "alpha_beta",
    "cross_entropy",
    "expectation",
    "forward_kl",
    "jsd",
    "log_probabilities",
    "log_ratio",
    "normalised_jsd",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "symmetric_kl",
    "total_variation",
]

Divergence = Callable[..., Tensor]
"""f(student_logits_NV, teacher_logits_NV, temperature, *, settings by name) -> values [N]."""


def forward_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), [N].

    a = -p: the gradient is (q - p) / temperature. Raises ValueError for a temperature that is not above 0 and for
    shapes that differ, as all divergences do. Hinton et al. (2015), arXiv:1503.02531.
    """
    log_q, log_p = log_probabilities(student_logits_NV, teacher_logits_NV, temperature)
    return expectation(log_p.exp(), log_p - log_q)


def reverse_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """KL(q || p) = sum_v q_v (log q_v - log p_v), [N].

    a = q log(q / p). Infinite where the teacher alone rules a token out. Gu et al. (2023), arXiv:2306.08543, eq. 1.
    """
    log_q, log_p = log_probabilities(student_logits_NV, teacher_logits_NV, temperature)
    return expectation(log_q.exp(), log_q - log_p)


def symmetric_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """(KL(p || q) + KL(q || p)) / 2 = 1/2 sum_v (q_v - p_v) (log q_v - log p_v), [N].

    a = (q log(q / p) - p) / 2. Infinite where one side alone rules a token out. Half of the J of Kullback and Leibler
    (1951), doi:10.1214/aoms/1177729694.
    """
    log_q, log_p = log_probabilities(student_logits_NV, teacher_logits_NV, temperature)
    return 0.5 * ((log_q.exp() - log_p.exp()) * log_ratio(log_q, log_p)).sum(-1)


def jsd(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float | Tensor = 1.0, *, beta: float = 0.5
) -> Tensor:
    """Generalised JSD: beta KL(p || M) + (1 - beta) KL(q || M) with M = beta p + (1 - beta) q, [N].

    a = (1 - beta) q log(q / M). The published beta weighs the teacher; elsewhere the same letter may weigh the student.
    At beta 0 and 1 it is 0, as the definition says and without a jump: take forward_kl and reverse_kl by their names,
    or `normalised_jsd`. Raises ValueError for beta outside [0, 1]. Agarwal et al. (2023), arXiv:2306.13649.
    """
    _demand(0.0 <= beta <= 1.0, "jsd", "0 <= beta <= 1 (0.5 weighs both sides alike)", beta=beta)
    log_q, log_p = log_probabilities(student_logits_NV, teacher_logits_NV, temperature)
    if beta in (0.0, 1.0):
        return 0.0 * log_q.exp().sum(-1)  # a zero that still has a graph
    return _divergence_from_mixture(log_q, log_p, beta, weights=(beta, 1.0 - beta))


def normalised_jsd(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float | Tensor = 1.0, *, beta: float = 0.5
) -> Tensor:
    """Generalised JSD divided by beta (1 - beta), [N]: as steep at equality as a KL, for every beta.

    a = q log(q / M) / beta. Its limits, and its values there, are forward_kl at beta 0 and reverse_kl at beta 1.
    Raises ValueError for beta outside [0, 1]. Agarwal et al. (2023), arXiv:2306.13649, who give the limit at beta 0.
    """
    _demand(0.0 <= beta <= 1.0, "normalised_jsd", "0 <= beta <= 1 (0.5 weighs both sides alike)", beta=beta)
    if beta in (0.0, 1.0):
        return (reverse_kl if beta else forward_kl)(student_logits_NV, teacher_logits_NV, temperature)
    log_q, log_p = log_probabilities(student_logits_NV, teacher_logits_NV, temperature)
    return _divergence_from_mixture(log_q, log_p, beta, weights=(1.0 / (1.0 - beta), 1.0 / beta))


def skew_forward_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float | Tensor = 1.0, *, alpha: float = 0.1
) -> Tensor:
    """KL(p || M) with M = alpha p + (1 - alpha) q, [N]. alpha 0 is forward_kl.

    a = -(1 - alpha) p q / M. At most -log alpha. Raises ValueError for alpha outside [0, 1). Ko et al. (2024),
    arXiv:2402.03898.
    """
    _demand(0.0 <= alpha < 1.0, "skew_forward_kl", "0 <= alpha < 1 (0 is forward_kl)", alpha=alpha)
    if alpha == 0.0:
        return forward_kl(student_logits_NV, teacher_logits_NV, temperature)
    log_q, log_p = log_probabilities(student_logits_NV, teacher_logits_NV, temperature)
    return expectation(log_p.exp(), -_log_mixture_ratios(log_ratio(log_q, log_p), _log_odds(alpha))[0])


def skew_reverse_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float | Tensor = 1.0, *, alpha: float = 0.1
) -> Tensor:
    """KL(q || M) with M = (1 - alpha) p + alpha q, [N]. alpha 0 is reverse_kl.

    a = q (log(q / M) - alpha q / M). At most -log alpha, also where the teacher alone rules a token out. Raises
    ValueError for alpha outside [0, 1). Ko et al. (2024), arXiv:2402.03898.
    """
    _demand(0.0 <= alpha < 1.0, "skew_reverse_kl", "0 <= alpha < 1 (0 is reverse_kl)", alpha=alpha)
    if alpha == 0.0:
        return reverse_kl(student_logits_NV, teacher_logits_NV, temperature)
    log_q, log_p = log_probabilities(student_logits_NV, teacher_logits_NV, temperature)
    return expectation(log_q.exp(), -_log_mixture_ratios(log_ratio(log_p, log_q), _log_odds(alpha))[0])


def total_variation(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """1/2 sum_v |p_v - q_v|, [N], in [0, 1].

    a = 1/2 q sign(q - p). Not smooth at equality, where the gradient is 0: the middle one of its subgradients. Wen et
    al. (2023), arXiv:2307.15190.
    """
    log_q, log_p = log_probabilities(student_logits_NV, teacher_logits_NV, temperature)
    return 0.5 * (log_q.exp() - log_p.exp()).abs().sum(-1)


def alpha_beta(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    alpha: float,
    beta: float,
) -> Tensor:
    """-1/(alpha beta) sum_v [p^alpha q^beta - (alpha p^s + beta q^s) / s] with s = alpha + beta, [N].

    a = (q^s - p^alpha q^beta) / alpha. (1, 0) is forward_kl, (0, 1) reverse_kl. Without a jump, beta 0 is the limit
    1/alpha^2 sum [p^alpha log(p^alpha / q^alpha) - p^alpha + q^alpha], and alpha 0 its mirror image with 1/beta^2.
    Rounding errors grow as 1/s. Raises ValueError where one of them is below 0, or both are 0. Wang et al. (2025),
    arXiv:2505.04560; Cichocki et al. (2011), doi:10.3390/e13010134.
    """
    total = alpha + beta
    fits = alpha >= 0.0 and beta >= 0.0 and 0.0 < total < math.inf
    _demand(fits, "alpha_beta", "both at least 0 and one above 0 ((1, 0) is forward_kl)", alpha=alpha, beta=beta)
    log_q, log_p = log_probabilities(student_logits_NV, teacher_logits_NV, temperature)
    # The same sum, sorted into two differences that need no division by a zero and lose no digits where p ~ q.
    gain_NV = _power(log_q, beta) * _power_difference(log_q, log_p, alpha)
    loss_NV = _power(log_p, alpha) * _power_difference(log_q, log_p, beta)
    return (gain_NV - loss_NV).sum(-1) / total


def adaptive_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float | Tensor = 1.0, *, mu: float = 0.5
) -> Tensor:
    """(w_head KL(p || q) + w_tail KL(q || p)) / (w_head + w_tail), [N], with w the sum of |p_v - q_v|, held constant.

    The head is the smallest set of the teacher's most probable tokens whose mass reaches mu, with all that tie with its
    last (the authors' code leaves the one that crosses mu out, unless it is the first); the tail is the rest.
    a = (w_tail q log(q / p) - w_head p) / (w_head + w_tail), for weights without a gradient. Sorts the vocabulary.
    Raises ValueError for mu outside (0, 1). Wu et al. (2024), arXiv:2404.02657.
    """
    _demand(0.0 < mu < 1.0, "adaptive_kl", "0 < mu < 1 (0.5 is published)", mu=mu)
    log_q, log_p = log_probabilities(student_logits_NV, teacher_logits_NV, temperature)
    q, p = log_q.exp(), log_p.exp()
    head_share_N = _head_share(q.detach(), p.detach(), mu)
    forward_N, reverse_N = expectation(p, log_p - log_q), expectation(q, log_q - log_p)
    return head_share_N * forward_N + (1.0 - head_share_N) * reverse_N


DIVERGENCES: Mapping[str, Divergence] = MappingProxyType(
    {
        function.__name__: function
        for function in (
            forward_kl,
            reverse_kl,
            symmetric_kl,
            jsd,
            normalised_jsd,
            skew_forward_kl,
            skew_reverse_kl,
            total_variation,
            alpha_beta,
            adaptive_kl,
        )
    }
)
"""Every divergence by the name that a recipe calls it."""


def cross_entropy(student_logits_NV: Tensor, targets_N: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - eps) log q_y - eps mean_v log q_v for the token y that really came and eps = label_smoothing, [N].

    At temperature 1. targets_N int64, all within [0, V). The mean is over tokens: a logit of -inf is padding. Raises
    ValueError for a smoothing outside [0, 1). Szegedy et al. (2015), arXiv:1512.00567, section 7.
    """
    eps = label_smoothing
    _demand(0.0 <= eps < 1.0, "cross_entropy", "0 <= label_smoothing < 1 (0 is none)", label_smoothing=eps)
    log_q = _wide(student_logits_NV).log_softmax(-1)
    hard_N = -log_q.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)
    if eps == 0.0:
        return hard_N
    token_NV = log_q > -math.inf
    uniform_N = -log_q.where(token_NV, 0.0).sum(-1) / token_NV.sum(-1)
    return (1.0 - eps) * hard_N + eps * uniform_N


def _demand(fits: bool, name: str, needed: str, **got: float) -> None:
    if not fits:  # spelled out only now: a compiler may hold the numbers as symbols, which no string can show
        told = ", ".join(f"{setting}={value}" for setting, value in got.items())
        raise ValueError(f"{name}: got {told}, needs {needed}.")


def _wide(logits_NV: Tensor) -> Tensor:
    """In bfloat16 a softmax loses up to a quarter of the gradient where the two sides nearly agree."""
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))


def _softened(student_NV: Tensor, teacher_NV: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Both sides' logits divided by the temperature. As a tensor it goes unchecked: reading it would stop a trace."""
    if student_NV.shape != teacher_NV.shape:
        raise ValueError(
            f"student logits {tuple(student_NV.shape)} and teacher logits {tuple(teacher_NV.shape)} differ: needs "
            "[N, V] on both sides; slice padded heads to the shared tokens first."
        )
    student_NV, teacher_NV = _wide(student_NV), _wide(teacher_NV)
    if not isinstance(temperature, Tensor):
        _demand(
            0.0 < temperature < math.inf, "softening", "a finite number above 0 (1 is none)", temperature=temperature
        )
        if temperature == 1.0:
            return student_NV, teacher_NV
    return student_NV / temperature, teacher_NV / temperature


def log_probabilities(student_NV: Tensor, teacher_NV: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """(log q, log p)."""
    student_NV, teacher_NV = _softened(student_NV, teacher_NV, temperature)
    return student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)


def expectation(weight_NV: Tensor, value_NV: Tensor) -> Tensor:
    """sum_v weight_v value_v, where a weight of exactly 0 contributes 0 even if its value is infinite or NaN."""
    return _product(weight_NV, value_NV).sum(-1)


def _product(weight_NV: Tensor, value_NV: Tensor) -> Tensor:
    """The product, where a weight of exactly 0 gives 0 even if its value is infinite or NaN."""
    # The value is cleared before the product: after it, the product's gradient would still be 0 * NaN.
    return weight_NV * value_NV.where(weight_NV > 0, 0.0)


def log_ratio(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log(a / b), and 0 where both are 0."""
    return (log_a - log_b).where(torch.maximum(log_a, log_b) > -math.inf, 0.0)


def _log_odds(weight: float) -> float:
    """log((1 - weight) / weight)."""
    return math.log1p(-weight) - math.log(weight)


def _log_mixture_ratios(gap_NV: Tensor, log_odds: float) -> tuple[Tensor, Tensor]:
    """log(M / a) and log(M / b) for M = w a + (1 - w) b, given gap = log(b / a) and log_odds = log((1 - w) / w).

    log(M / a) = log w - log(w a / M), where w a / M, the share of a in M, is a sigmoid: nothing overflows, the
    derivatives are sigmoids too, a tiny w costs no digits, and at a gap of 0 both are 0, for w is a's share there.
    """
    first_NV, second_NV = _log_shares(gap_NV + log_odds)
    log_weight, log_rest = _log_shares(gap_NV.new_full((), log_odds))
    return log_weight - first_NV, log_rest - second_NV


def _log_shares(odds_NV: Tensor) -> tuple[Tensor, Tensor]:
    """logsigmoid(-x) and logsigmoid(x) of log-odds x, for the price of one."""
    rises_NV = odds_NV > 0
    # No abs(): its derivative at 0 would be 0, and 0 is where the two sides agree.
    tail_NV = torch.where(rises_NV, -odds_NV, odds_NV).exp().log1p()
    return -odds_NV.where(rises_NV, 0.0) - tail_NV, odds_NV.where(~rises_NV, 0.0) - tail_NV


def _divergence_from_mixture(log_q: Tensor, log_p: Tensor, beta: float, *, weights: tuple[float, float]) -> Tensor:
    """weights[0] KL(p || M) + weights[1] KL(q || M) for M = beta p + (1 - beta) q, [N]; in one sum, for one pass."""
    over_p, over_q = _log_mixture_ratios(log_ratio(log_q, log_p), _log_odds(beta))
    p, q = log_p.exp(), log_q.exp()
    return -(weights[0] * _product(p, over_p) + weights[1] * _product(q, over_q)).sum(-1)


def _power(log_a: Tensor, exponent: float) -> Tensor:
    """a^exponent, where 0^0 = 1."""
    return (exponent * log_a).exp() if exponent else torch.ones_like(log_a)


def _power_difference(log_a: Tensor, log_b: Tensor, exponent: float) -> Tensor:
    """(a^exponent - b^exponent) / exponent, log(a / b) for exponent 0, and 0 where a = b = 0."""
    gap_NV = log_ratio(log_a, log_b)
    if exponent == 0.0:
        return gap_NV
    # From the larger of the two downwards nothing overflows. No abs(): its derivative at 0 would be 0, not 1.
    rises_NV = gap_NV > 0
    fall_NV = torch.expm1(exponent * torch.where(rises_NV, -gap_NV, gap_NV)) / exponent
    return torch.where(rises_NV, -_power(log_a, exponent), _power(log_b, exponent)) * fall_NV


def _head_share(q: Tensor, p: Tensor, mu: float) -> Tensor:
    """w_head / (w_head + w_tail) of `adaptive_kl`, [N]; 0 where p = q, where it is multiplied with 0."""
    descending_NV = p.sort(-1, descending=True).values
    mass_before_NV = descending_NV.cumsum(-1) - descending_NV
    smallest_N1 = descending_NV.where(mass_before_NV < mu, math.inf).amin(-1, keepdim=True)
    error_NV = (p - q).abs()
    head_N = error_NV.where(p >= smallest_N1, 0.0).sum(-1)
    return head_N / error_NV.sum(-1).clamp(min=torch.finfo(p.dtype).tiny)
