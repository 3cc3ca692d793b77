"""The peers' sides of bench/loss.py: TRL, Liger, dense autograd, and torch's chunked linear cross-entropy.

Runs in a virtual environment of its own (bench/requirements-peers.txt) and imports nothing of potstill. Where a peer
has a choice, it gets the one that makes it faster. Refuses: goals that a peer does not have.
"""

from __future__ import annotations

import functools
import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from _sides import IGNORE, Goal, Loss, Problem, serve
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import kl_div, linear_cross_entropy, log_softmax

# The function around ChunkedDivergenceFunction through which TRL's own trainer calls it.
from trl.trainer.distillation_trainer import _chunked_divergence_loss

__all__ = ["SIDES"]

LIGER_ROWS = 256
"""Rows a chunk. Liger's default of 1024 is no faster on CPU, and needs nearly twice the memory."""

TORCH_ROWS = 512
"""Rows a chunk. Torch's own choice for setting A on CPU is 16, which takes several times as long."""


def require(goal: Goal, *kinds: str) -> None:
    """Raise ValueError for a goal that a peer would take for another one."""
    if goal.kind not in kinds:
        raise ValueError(f"{goal.kind} is not offered here: ask for one of {kinds}.")


def trl_loss(problem: Problem, goal: Goal) -> Tensor:
    """TRL's loss of a batch with one row; its mask says which positions count."""
    require(goal, "forward_kl", "reverse_kl", "jsd")
    mask_1N = (problem.targets_N != IGNORE).unsqueeze(0)
    states = problem.student_ND.unsqueeze(0), problem.teacher_ND.unsqueeze(0)
    heads = problem.student_VD, problem.teacher_VD
    loss: Tensor = _chunked_divergence_loss(*states, *heads, mask_1N, goal.beta, temperature=goal.temperature)[0]
    return loss


def liger_loss(problem: Problem, goal: Goal, *, compiled: bool) -> Tensor:
    """Liger's fused linear JSD without its hard-label part; at beta 0 and 1 it computes the two KLs themselves."""
    require(goal, "forward_kl", "reverse_kl", "jsd")
    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=goal.beta,
        ignore_index=IGNORE,
        temperature=goal.temperature,
        compiled=compiled,
        chunk_size=LIGER_ROWS,
    )
    loss: Tensor = module(
        problem.student_ND, problem.student_VD, problem.teacher_ND, problem.teacher_VD, problem.targets_N
    )
    return loss


def dense_loss(problem: Problem, goal: Goal) -> Tensor:
    """Forward KL by autograd over all logits: products in the dtype of the inputs, softmax in float32."""
    require(goal, "forward_kl")
    learned_N = problem.targets_N != IGNORE
    student_NV = problem.student_ND[learned_N] @ problem.student_VD.T
    teacher_NV = problem.teacher_ND[learned_N] @ problem.teacher_VD.T
    log_q = log_softmax(student_NV.float() / goal.temperature, dim=-1)
    log_p = log_softmax(teacher_NV.float() / goal.temperature, dim=-1)
    return kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def torch_loss(problem: Problem, goal: Goal) -> Tensor:
    """Torch's chunked linear cross-entropy."""
    require(goal, "cross_entropy")
    options = LinearCrossEntropyOptions(batch_chunk_size=TORCH_ROWS, chunking_method=None)
    return linear_cross_entropy(
        problem.student_ND, problem.student_VD, problem.targets_N, ignore_index=IGNORE, options=options
    )


SIDES: dict[str, Loss] = {
    "trl": trl_loss,
    "liger": functools.partial(liger_loss, compiled=False),
    "liger_compiled": functools.partial(liger_loss, compiled=True),
    "dense": dense_loss,
    "torch": torch_loss,
}

if __name__ == "__main__":
    serve(SIDES, ("trl", "liger-kernel", "torch"))
