"""The numbers of bench/loss.py: hidden states and heads of a student and of a teacher that nearly agrees with it.

Refuses: to need a model. Logits are normal with the deviation that gives real models' entropies (about 3 nats), which
makes bfloat16 as coarse as it is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from _sides import IGNORE, Goal, Problem, save_problem
from torch import Tensor

__all__ = ["agreement_of", "exact_gradients", "float64_probabilities", "write_problems"]

LOGIT_DEVIATION = 4.0
SEQUENCES = 8
ERROR_ROWS = 384
"""Rows whose gradients are compared with float64's: as many as make potstill compile, and all logits fit the memory."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Shapes of a problem, and how far the teacher's logits are from the student's (standard deviation)."""

    rows: int
    vocabulary: int
    student_width: int
    teacher_width: int
    masked: bool = False
    gap: float = 0.05
    dtype: torch.dtype = torch.bfloat16


SETTINGS = {
    "A": Setting(1024, 49_152, 576, 576),
    "B": Setting(2048, 49_152, 576, 960, masked=True),
    # Far apart, so that float32 values are not all cancellation.
    "check": Setting(48, 512, 32, 48, masked=True, gap=1.0, dtype=torch.float32),
}

SMOKE_SETTINGS = SETTINGS | {
    "A": Setting(128, 1024, 576, 576),
    "B": Setting(128, 1024, 576, 960, masked=True),
}


def write_problems(folder: Path, *, smoke: bool) -> Problem:
    """Write A, B, check and error (the first rows of A) for all sides; returns error."""
    for seed, (name, setting) in enumerate((SMOKE_SETTINGS if smoke else SETTINGS).items()):
        problem = make_problem(setting, seed)
        save_problem(problem, folder / f"{name}.pt")
        if name == "A":
            error = problem.rows(ERROR_ROWS)
            save_problem(error, folder / "error.pt")
    return error


def make_problem(setting: Setting, seed: int) -> Problem:
    """A student with random states and head; a teacher with the same logits plus noise, in a basis of its own."""
    chance = torch.Generator().manual_seed(seed)
    rows, vocabulary, width = setting.rows, setting.vocabulary, setting.student_width

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=chance)

    student_ND, student_VD = normal(rows, width), normal(vocabulary, width) * LOGIT_DEVIATION / width**0.5
    more = setting.teacher_width - width
    basis_DD = torch.linalg.qr(normal(setting.teacher_width, setting.teacher_width)).Q
    wide_ND = torch.cat([student_ND, normal(rows, more)], dim=1)
    wide_VD = torch.cat([student_VD, torch.zeros(vocabulary, more)], dim=1)
    wide_VD += normal(vocabulary, setting.teacher_width) * setting.gap / setting.teacher_width**0.5
    targets_N = torch.randint(vocabulary, (rows,), generator=chance)
    if setting.masked:  # the first half of every sequence is a prompt
        length = rows // SEQUENCES
        targets_N[torch.arange(rows) % length < length // 2] = IGNORE
    dtype = setting.dtype
    teacher_ND, teacher_VD = (wide_ND @ basis_DD).to(dtype), (wide_VD @ basis_DD).to(dtype)
    return Problem(student_ND.to(dtype), student_VD.to(dtype), teacher_ND, teacher_VD, targets_N)


def float64_probabilities(problem: Problem) -> tuple[Tensor, Tensor]:
    """Teacher's and student's next-token distributions, p and q, float64 [N, V] each."""
    teacher_NV = problem.teacher_ND.double() @ problem.teacher_VD.double().T
    student_NV = problem.student_ND.double() @ problem.student_VD.double().T
    return teacher_NV.softmax(-1), student_NV.softmax(-1)


def agreement_of(p_NV: Tensor, q_NV: Tensor) -> float:
    """Mean over positions of sum_v min(p_v, q_v): the mass on which teacher and student agree."""
    return float(torch.minimum(p_NV, q_NV).sum(-1).mean())


def exact_gradients(problem: Problem, goal: Goal, p_NV: Tensor, q_NV: Tensor) -> dict[str, Tensor]:
    """Gradients of the mean loss of an unmasked problem at temperature 1, by the formulas, in the dtype of p and q."""
    gradient_NV = logit_gradients(goal, p_NV, q_NV, problem.targets_N) / len(q_NV)
    states_ND, weight_VD = problem.student_ND.to(q_NV.dtype), problem.student_VD.to(q_NV.dtype)
    return {"states": gradient_NV @ weight_VD, "head": gradient_NV.T @ states_ND}


def logit_gradients(goal: Goal, p_NV: Tensor, q_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Gradient of the student's logits, one row a position: a - q sum_v a_v, with the a of each divergence."""
    if goal.kind == "cross_entropy":
        gradient_NV = q_NV.clone()
        gradient_NV[torch.arange(len(q_NV)), targets_N] -= 1.0
        return gradient_NV
    if goal.kind == "forward_kl":
        return q_NV - p_NV
    mixture_NV = p_NV if goal.kind == "reverse_kl" else goal.beta * p_NV + (1.0 - goal.beta) * q_NV
    a_NV = q_NV * (q_NV / mixture_NV).log() * (1.0 if goal.kind == "reverse_kl" else 1.0 - goal.beta)
    return a_NV - q_NV * a_NV.sum(-1, keepdim=True)
