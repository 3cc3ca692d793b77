"""What every side of bench/loss.py does alike, in a process of its own: time, memory and gradients of losses.

A side is a function from a problem and a goal to the mean loss over supervised positions. Potstill's side and the
peers' run this file in different environments, so it imports torch and the standard library only. Refuses: to measure
memory on anything but Linux, which tells the peak of a single call.

Suffixes: N positions, V vocabulary, D width of the student's states and head or of the teacher's.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["GOALS", "IGNORE", "Goal", "Loss", "Problem", "load_problem", "save_problem", "serve"]

IGNORE = -100
"""Target of a masked position, as transformers and both peers write it."""

MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


@dataclass(frozen=True, slots=True)
class Goal:
    """Which loss: a divergence of p (teacher) and q (student), both softened by the temperature, or cross-entropy.

    beta is the published one (arXiv:2306.13649) for `jsd`, and what both peers call the others: 0 is forward KL, 1 is
    reverse KL. Nothing is multiplied by T^2.
    """

    kind: str
    beta: float = 0.0
    temperature: float = 1.0


GOALS = {
    "fkl": Goal("forward_kl", 0.0),
    "rkl": Goal("reverse_kl", 1.0),
    "jsd": Goal("jsd", 0.5),
    "ce": Goal("cross_entropy"),
    "fkl_t2": Goal("forward_kl", 0.0, temperature=2.0),
    "rkl_t2": Goal("reverse_kl", 1.0, temperature=2.0),
    "jsd_t2": Goal("jsd", 0.5, temperature=2.0),
    "jsd_b01": Goal("jsd", 0.1),
    "jsd_b09": Goal("jsd", 0.9),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """Final hidden states and heads of student and teacher, and int64 targets with IGNORE where nothing is learned."""

    student_ND: Tensor
    student_VD: Tensor
    teacher_ND: Tensor
    teacher_VD: Tensor
    targets_N: Tensor

    def rows(self, count: int) -> Problem:
        """The first `count` positions of the same problem, with the same heads."""
        parts = (self.student_ND[:count].clone(), self.teacher_ND[:count].clone(), self.targets_N[:count].clone())
        return Problem(parts[0], self.student_VD, parts[1], self.teacher_VD, parts[2])


Loss = Callable[[Problem, Goal], Tensor]
"""The mean over supervised positions, 0-d, with a graph to the student's states and head."""


def save_problem(problem: Problem, path: Path) -> None:
    """Write the tensors, so that all sides read the same numbers."""
    torch.save({field.name: getattr(problem, field.name) for field in fields(problem)}, path)


def load_problem(path: Path) -> Problem:
    """Read the tensors; the student's ask for a gradient."""
    problem = Problem(**torch.load(path, weights_only=True))
    problem.student_ND.requires_grad_()
    problem.student_VD.requires_grad_()
    return problem


def serve(sides: Mapping[str, Loss], packages: Sequence[str]) -> None:
    """Be one side: do what the command line asks for, and print one JSON line."""
    arguments = read_arguments(sides)
    problems = {name: load_problem(arguments.folder / f"{name}.pt") for name, _ in map(split, arguments.cases)}

    def run(case: str) -> Tensor:
        name, goal = split(case)
        forget(problems[name])
        value = sides[arguments.side](problems[name], GOALS[goal])
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    for case in arguments.cases * arguments.warmup:
        run(case)
    if arguments.task == "time":
        results: Any = time_cases(arguments.cases, run, arguments.runs)
    elif arguments.task == "memory":
        results = {case: extra_bytes(case, run, problems[split(case)[0]]) for case in arguments.cases}
    elif arguments.task == "profile":
        results = {case: [matmul_share(case, run) for _ in range(arguments.runs)] for case in arguments.cases}
    else:
        results = write_gradients(arguments.folder / f"{arguments.side}.pt", arguments.cases, run, problems)
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps({"threads": torch.get_num_threads(), "versions": versions, "results": results}))


def read_arguments(sides: Mapping[str, Loss]) -> argparse.Namespace:
    """The command line of a side."""
    parser = argparse.ArgumentParser(description="One side of bench/loss.py, which calls this.")
    parser.add_argument("side", choices=sides)
    parser.add_argument("task", choices=("time", "memory", "profile", "gradients"))
    parser.add_argument("cases", nargs="+", metavar="PROBLEM:GOAL", help="for example A:fkl")
    parser.add_argument("--folder", type=Path, required=True, help="where PROBLEM.pt lies, and gradients go")
    parser.add_argument("--warmup", type=int, default=2, help="calls of every case that are not counted")
    parser.add_argument("--runs", type=int, default=5, help="calls of every case that are")
    return parser.parse_args()


def split(case: str) -> tuple[str, str]:
    """Name of the problem and of the goal."""
    problem, _, goal = case.partition(":")
    return problem, goal


def forget(problem: Problem) -> None:
    """Drop the gradients of an earlier call: adding to them would be work that is not the loss."""
    problem.student_ND.grad = problem.student_VD.grad = None


def time_cases(cases: Sequence[str], run: Callable[[str], Tensor], runs: int) -> dict[str, list[float]]:
    """Wall seconds of forward and backward, the cases in turn, so that a slow moment hits all of them."""
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(runs):
        for case in cases:
            began = time.perf_counter()
            run(case)
            seconds[case].append(time.perf_counter() - began)
    return seconds


def extra_bytes(case: str, run: Callable[[str], Tensor], problem: Problem) -> int:
    """Peak resident memory of a call less that before it: buffers and both gradients, without inputs and programs."""
    forget(problem)
    gc.collect()
    # What earlier calls left free in the heap is resident already, and would hide what this call needs.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    before = status_bytes("VmRSS")
    run(case)
    return status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    """A field of this process's status, which the kernel gives in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def matmul_share(case: str, run: Callable[[str], Tensor]) -> float:
    """Share of a call's wall time that passes within matrix products."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        began = time.perf_counter()
        run(case)
        seconds = time.perf_counter() - began
    spent_us = sum(event.self_cpu_time_total for event in profile.key_averages() if event.key in MATRIX_PRODUCTS)
    if not spent_us:
        raise SystemExit(f"{case}: the profiler saw none of {MATRIX_PRODUCTS}. Add the operator that multiplies now.")
    return float(spent_us) * 1e-6 / seconds


def write_gradients(
    path: Path, cases: Sequence[str], run: Callable[[str], Tensor], problems: Mapping[str, Problem]
) -> list[str]:
    """Save value and gradients of every case; returns the cases."""
    found = {}
    for case in cases:
        value, problem = run(case), problems[split(case)[0]]
        found[case] = {"value": value, "states": problem.student_ND.grad, "head": problem.student_VD.grad}
    torch.save(found, path)
    return list(cases)
