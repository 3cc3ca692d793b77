"""What evaluation asks about next-token distributions, position by position, without holding all their logits.

Refuses truncated distributions: what a list leaves out would be missing in the scores.

Suffixes: N positions, n rows of one block, V vocabulary, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from potstill.losses.blocks import blocks, tiles
from potstill.losses.compiling import KERNELS, compile_varying, worth_compiling
from potstill.losses.divergence import forward_kl
from potstill.losses.fitting import refuse_unscorable
from potstill.losses.sides import Dense, DenseForm, Side, open_logits
from potstill.types import Head, Mixture, States

__all__ = ["head_logits", "position_scores"]


@torch.no_grad()
def position_scores(arm: States | Mixture, teacher: States | Mixture, targets_N: Tensor) -> dict[str, Tensor]:
    """`nll`, `kl_to_teacher` (forward, T = 1), `agreement`, `confidence` and `correct` of the arm, [N] each.

    With q the arm's distribution at T = 1: agreement is 1 where its most probable token is the teacher's, else 0;
    confidence is max_v q_v; correct is 1 where its most probable token is the one that came, else 0. targets_N int64
    [N]. No gradient. Ties go to the lower token number on both sides. Raises ValueError where shapes disagree.
    """
    refuse_unscorable(arm, teacher, targets_N)
    own, its = cast(Dense, open_logits(arm)), cast(Dense, open_logits(teacher))
    head = (arm if isinstance(arm, States) else arm.members[0]).head
    logits = targets_N.numel() * head.vocabulary
    score = _scores(own.form, its.form, worth_compiling(logits, targets_N.device.type))
    found = []
    for rows, parts in blocks(own, its):
        for tile in tiles(parts[0][0]):
            said = [tuple(part[tile] for part in side) for side in parts]
            found.append(score((said[0], own.shared), (said[1], its.shared), targets_N[rows][tile]))
    names = ("nll", "kl_to_teacher", "agreement", "confidence", "correct")
    return {name: torch.cat(values) for name, values in zip(names, zip(*found, strict=True), strict=True)}


def head_logits(rows_nD: Tensor, head: Head) -> Tensor:
    """Logits of some rows, [n, V], float32 (float64 for float64 rows). Holds all of [n, V]: call it on chunks."""
    side = Side.of(States(rows_nD, head))
    return side.finish(side.raw(slice(None), side.buffer(len(rows_nD))), side.bias_V)


@functools.lru_cache(KERNELS)
def _scores(arm: DenseForm, teacher: DenseForm, compiling: bool) -> Callable[..., tuple[Tensor, ...]]:
    def scores(arm_said: Any, teacher_said: Any, targets_n: Tensor) -> tuple[Tensor, ...]:
        logits_nV, teacher_nV = arm.logits(arm_said, 1.0), teacher.logits(teacher_said, 1.0)
        top_n, kind = logits_nV.argmax(-1), logits_nV.dtype
        # Both from one softmax: a second pass for the confidence would show in the time of an evaluation.
        chosen_n2 = logits_nV.log_softmax(-1).gather(-1, torch.stack([targets_n, top_n], -1))
        agreement, correct = (top_n == teacher_nV.argmax(-1)).to(kind), (top_n == targets_n).to(kind)
        return -chosen_n2[:, 0], forward_kl(logits_nV, teacher_nV), agreement, chosen_n2[:, 1].exp(), correct

    return compile_varying(scores, "position_scores") if compiling else scores
