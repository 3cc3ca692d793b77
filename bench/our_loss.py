"""Potstill's side of bench/loss.py: `distillation_loss` as its users call it.

Refuses: to time anything that a user would not pay for; gathering the supervised rows is part of it.
"""

from __future__ import annotations

from _sides import IGNORE, Goal, Problem, serve
from torch import Tensor

from potstill.losses import HeadTerm, distillation_loss
from potstill.types import Head, States

__all__ = ["potstill_loss"]


def potstill_loss(problem: Problem, goal: Goal) -> Tensor:
    """Sum over the supervised rows, divided by their count."""
    student_ND, teacher_ND, targets_N = problem.student_ND, problem.teacher_ND, problem.targets_N
    learned_N = targets_N != IGNORE
    if not learned_N.all():
        student_ND, teacher_ND, targets_N = (part[learned_N] for part in (student_ND, teacher_ND, targets_N))
    settings = {"beta": goal.beta} if goal.kind == "jsd" else {}
    term = HeadTerm(goal.kind, temperature=goal.temperature, times_temperature_squared=False, settings=settings)
    student, teacher = States(student_ND, Head(problem.student_VD)), States(teacher_ND, Head(problem.teacher_VD))
    result = distillation_loss(student, targets_N, [term], teacher=teacher if term.needs_teacher else None)
    return result.total / result.count


if __name__ == "__main__":
    serve({"potstill": potstill_loss}, ("potstill", "torch"))
