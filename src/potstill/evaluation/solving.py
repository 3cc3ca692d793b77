"""How often every arm answers held-out prompts rightly, and how likely it finds the teacher's answers there.

Refuses to compare arms that were asked other prompts, or other tokens.

Suffixes: P prompts, R resamples (row 0 is the sample itself).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain

import numpy as np

from potstill.evaluation.bootstrap import Floats
from potstill.evaluation.intervals import Quantity, Statistic, exact_interval, measure, ratio
from potstill.types import Measurement

__all__ = ["PASS", "compare_likelihoods", "compare_solvers"]

PASS = "pass_at_1"
"""The share of answers that are right, prompt by prompt and then their mean (Chen et al., 2021, arXiv:2107.03374)."""

OTHERS = ("control", "untrained")


def compare_solvers(
    right: Mapping[str, Floats], *, resamples: int, seed: int, within: Mapping[str, Floats] | None = None
) -> list[Measurement]:
    """pass@1 of every arm over all prompts, what of the teacher's the others keep, and the student's gains.

    right    by arm, for each prompt the share of its answers that are right [P], float64
    within   by slice, which prompts it holds (1 or 0) [P]: pass@1 of every arm over these alone

    Intervals are of the paired bootstrap over prompts; of pass@1 exact, where each prompt was answered once. Raises
    ValueError where arms have other numbers of prompts.
    """
    counts = {len(right_P) for right_P in right.values()}
    if len(counts) > 1:
        raise ValueError(f"arms were asked {sorted(counts)} prompts: ask all of them the same")
    prompts = counts.pop() if counts else 0
    found = measure(_passes(right, np.ones(prompts), "test"), texts=prompts, resamples=resamples, seed=seed)
    for name, member_P in (within or {}).items():
        if member_P.any():
            only = _passes(right, member_P, name, gains=False)
            found += measure(only, texts=prompts, resamples=resamples, seed=seed)
    once = all(np.isin(right_P, (0.0, 1.0)).all() for right_P in right.values())
    return [_exact(one) if once and one.name == PASS else one for one in found]


def _exact(share: Measurement) -> Measurement:
    low, high = exact_interval(round(share.value * share.n), share.n)
    return replace(share, low=low, high=high)


def compare_likelihoods(nll: Mapping[str, Floats], tokens_D: Floats, *, resamples: int, seed: int) -> list[Measurement]:
    """The nll of every arm a token, and the student's gains, from sums over documents [D] of `tokens_D` tokens each."""

    def statistic(weights_RD: Floats) -> Mapping[Quantity, Floats]:
        total_R = weights_RD @ tokens_D
        means = {arm: ratio(weights_RD @ sums_D, total_R) for arm, sums_D in nll.items()}
        gains = _gains("nll", means, len(tokens_D), "nats/token", sign=-1.0)
        each = ((Quantity(arm, "nll", len(tokens_D), "nats/token"), values_R) for arm, values_R in means.items())
        return dict(chain(each, gains))

    return measure(statistic, texts=len(tokens_D), resamples=resamples, seed=seed)


def _passes(right: Mapping[str, Floats], member_P: Floats, name: str, *, gains: bool = True) -> Statistic:
    n = int(member_P.sum())

    def statistic(weights_RP: Floats) -> Mapping[Quantity, Floats]:
        held_RP = weights_RP * member_P
        asked_R = held_RP.sum(-1)
        means = {arm: ratio(held_RP @ right_P, asked_R) for arm, right_P in right.items()}
        found = {Quantity(arm, PASS, n, slice=name): values_R for arm, values_R in means.items()}
        if not gains:
            return found
        for arm, values_R in means.items():
            if arm != "teacher" and "teacher" in means:
                found[Quantity(arm, "retention", n, slice=name)] = ratio(values_R, means["teacher"])
        return found | dict(_gains("pass", means, n, "share"))

    return statistic


def _gains(
    name: str, means: Mapping[str, Floats], n: int, unit: str, *, sign: float = 1.0
) -> Iterator[tuple[Quantity, Floats]]:
    """What the student is ahead of other arms; positive is better."""
    for other in OTHERS:
        if other in means and "student" in means:
            gain_R = sign * (means["student"] - means[other])
            yield Quantity("student", f"{name}_gain_over_{other}", n, unit), gain_R
