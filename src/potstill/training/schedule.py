"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state.

Refuses steps outside the run.
"""

from __future__ import annotations

import math
from typing import Literal

__all__ = ["learning_rate_factor"]


def learning_rate_factor(
    step: int,
    steps: int,
    kind: Literal["cosine", "linear", "constant", "wsd"],
    *,
    warmup: float,
    decay: float = 0.0,
    final: float = 0.0,
) -> float:
    """Factor on the peak learning rate for optimiser step `step` (0-based) of `steps`, in [0, 1].

    `warmup` and `decay` are shares of the steps. Linear warm-up never gives 0 (a step with rate 0 is wasted): the first
    step has 1 / (warm-up steps + 1). For the same reason the fall reaches `final` only just after the last step.
    Linear: Devlin et al. (2018), arXiv:1810.04805, appendix A.2, down to `final`.
    Cosine: Loshchilov and Hutter (2016), arXiv:1608.03983, eq. 5, without restarts.
    WSD (warm-up, stable, decay): Hu et al. (2024), arXiv:2404.06395, section 4, with linear decay.
    Raises ValueError for a step outside 0..steps-1.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step {step} is outside of the run's 0..{steps - 1}")
    warm = round(warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    if kind == "constant":
        return 1.0
    start = warm if kind in ("cosine", "linear") else steps - max(1, round(decay * steps))
    if step < start:
        return 1.0
    progress = (step - start + 1) / (steps - start + 1)
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if kind == "cosine" else 1.0 - progress
    return final + (1.0 - final) * shape
