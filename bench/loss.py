"""Distillation losses over a vocabulary: potstill against TRL, Liger, dense autograd and torch, on the same numbers.

First values and gradients are held against the peers', in float32: where they disagree nothing is timed, and the exit
code is 1. Then every side runs in processes of its own, the sides in turn (one round, then the next), so that a machine
that slows down slows all. Setting A: 1,024 positions, width 576, 49,152 tokens, bfloat16. Setting B: 2,048 positions of
which half are masked, widths 576 and 960; of the peers only Liger, the faster one, runs there. Refuses: to compare
processes that have different numbers of threads.

    python bench/loss.py --json runs/bench/loss.json [--peer-python PATH] [--runs 5] [--warmup 2] [--rounds 3] [--smoke]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _peer import peer_python
from _problems import agreement_of, exact_gradients, float64_probabilities, write_problems
from _sides import GOALS, Problem
from _table import Row, describe_machine, describe_versions, print_rows, rounds_row, write_rows
from torch import Tensor

from potstill.losses import can_compile

__all__ = ["main"]

HERE = Path(__file__).resolve().parent
OURS = "potstill"
TOLERANCE = 1e-4
"""Largest relative difference to a peer's value and gradients, with float32 inputs."""

TIMED = {
    OURS: ("A:fkl", "A:rkl", "A:jsd", "A:ce", "B:fkl"),
    "trl": ("A:fkl",),
    "liger": ("A:fkl", "B:fkl"),
    "torch": ("A:ce",),
}
"""Sides of every round, and their cases."""

TIMED_ONCE = {"dense": ("A:fkl",), "liger_compiled": ("A:fkl", "B:fkl")}
"""Sides of the first round only: no bar rests on them."""

WEIGHED = (OURS, "trl", "liger", "dense")
"""Sides whose memory is measured, for A:fkl."""

FAULTY = 0.05
"""Relative error of our bfloat16 gradients beyond which something is wrong, and not rounding."""

DIVERGENCES = ("fkl", "rkl", "jsd", "fkl_t2", "rkl_t2", "jsd_t2", "jsd_b01", "jsd_b09")
CHECKED = {"trl": DIVERGENCES, "liger": DIVERGENCES, "dense": ("fkl", "fkl_t2"), "torch": ("ce",)}
"""Sides that must agree with ours, and in which goals."""

TIME_RATIOS = {
    "loss.fkl_time_vs_trl": ("A:fkl", "trl", "A:fkl"),
    "loss.fkl_time_vs_liger": ("A:fkl", "liger", "A:fkl"),
    "loss.masked_time_vs_liger": ("B:fkl", "liger", "B:fkl"),
    "loss.jsd_time_vs_fkl": ("A:jsd", OURS, "A:fkl"),
    "loss.rkl_time_vs_fkl": ("A:rkl", OURS, "A:fkl"),
    "loss.ce_time_vs_torch": ("A:ce", "torch", "A:ce"),
}
"""Row id: our case, over whose, and which of theirs."""

Medians = dict[tuple[str, str], list[float]]
"""By side and case: the median seconds of every round."""


@dataclass(frozen=True, slots=True)
class Stand:
    """Where the sides meet: the folder with the problems, the peers' interpreter, how often each case runs."""

    folder: Path
    peer: Path
    warmup: int
    runs: int

    def ask(self, side: str, task: str, cases: Sequence[str], *, warmup: int | None = None) -> dict[str, Any]:
        """Run one side in a fresh process and read its line. Exits where it fails or had other cores than the rest."""
        script = (
            [sys.executable, str(HERE / "our_loss.py")]
            if side == OURS
            else [str(self.peer), str(HERE / "peer_loss.py")]
        )
        counts = ["--warmup", str(self.warmup if warmup is None else warmup), "--runs", str(self.runs)]
        print(f"{side}: {task} {' '.join(cases)}", file=sys.stderr)
        command = [*script, side, task, *cases, "--folder", str(self.folder), *counts]
        finished = subprocess.run(command, check=False, capture_output=True, text=True)
        if finished.returncode:
            raise SystemExit(f"{finished.stderr[-4000:]}\n{side} failed; its last words are above")
        answer: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
        if answer["threads"] != torch.get_num_threads():
            raise SystemExit(
                f"{side} used {answer['threads']} threads, not {torch.get_num_threads()}: set OMP_NUM_THREADS"
            )
        return answer

    def gradients(
        self, side: str, problem: str, goals: Sequence[str]
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
        """Value and gradients of one side by goal, and the versions of its packages."""
        answer = self.ask(side, "gradients", [f"{problem}:{goal}" for goal in goals], warmup=0)
        found = torch.load(self.folder / f"{side}.pt", weights_only=True)
        return {case.partition(":")[2]: parts for case, parts in found.items()}, answer["versions"]


def main() -> None:
    """Check, measure, write the rows, print the table."""
    arguments = read_arguments()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="potstill-bench-") as folder:
        stand = Stand(Path(folder), arguments.peer_python or peer_python(), arguments.warmup, arguments.runs)
        rows, facts = compare(stand, arguments)
    write_rows(rows, arguments.json)
    title = "SMOKE TEST: these numbers mean nothing" if arguments.smoke else "losses over a vocabulary"
    facts |= {"minutes": f"{(time.perf_counter() - began) / 60:.1f}", "json": str(arguments.json)}
    print_rows(title, rows, facts)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare the losses over a vocabulary with TRL, Liger and torch.")
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    parser.add_argument(
        "--peer-python", type=Path, help="interpreter with the peers; default: bench/.venv-peers, made if needed"
    )
    parser.add_argument("--runs", type=int, default=5, help="timed calls of every case in a process")
    parser.add_argument("--warmup", type=int, default=2, help="calls before them")
    parser.add_argument("--rounds", type=int, default=3, help="times that each side runs")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to try the bench itself")
    return parser.parse_args()


def compare(stand: Stand, arguments: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Rows and where they come from."""
    problem = write_problems(stand.folder, smoke=arguments.smoke)
    parity, versions = check_parity(stand)
    error = error_rows(stand, problem)
    skipped = () if can_compile("cpu") else ("liger_compiled",)
    medians = time_sides(stand, arguments.rounds, skipped)
    rows = [
        *(rounds_row(name, ratios(medians, *parts), "x") for name, parts in TIME_RATIOS.items()),
        *memory_rows(stand),
        *error,
        rounds_row("loss.matmul_share", stand.ask(OURS, "profile", ["A:fkl"])["results"]["A:fkl"], "share"),
        *parity,
        *(rounds_row(f"loss.seconds.{case}.{side}", values, "s") for (side, case), values in medians.items()),
    ]
    return rows, describe(versions, arguments)


def check_parity(stand: Stand) -> tuple[list[Row], dict[str, str]]:
    """Largest relative difference to each peer, and the peers' versions. Exits where one is beyond the tolerance."""
    ours, _ = stand.gradients(OURS, "check", sorted({goal for goals in CHECKED.values() for goal in goals}))
    rows: list[Row] = []
    complaints: list[str] = []
    versions: dict[str, str] = {}
    for side, goals in CHECKED.items():
        theirs, versions = stand.gradients(side, "check", goals)
        errors = {
            (goal, part): distance(ours[goal][part], theirs[goal][part]) for goal in goals for part in theirs[goal]
        }
        rows.append(Row(f"loss.parity_error.{side}", max(errors.values()), "relative", n=len(errors)))
        # Negated, so that NaN is a complaint too.
        beyond = {key: error for key, error in errors.items() if not error <= TOLERANCE}
        complaints += [f"{side} {goal} {part}: {error:.2e}" for (goal, part), error in beyond.items()]
    if complaints:
        raise SystemExit(f"potstill and its peers disagree by more than {TOLERANCE:g}:\n" + "\n".join(complaints))
    return rows, versions


def error_rows(stand: Stand, problem: Problem) -> list[Row]:
    """Error of gradients against float64's, the worse of states and head. Exits where ours are wrong."""
    p_NV, q_NV = float64_probabilities(problem)
    goals = [case.partition(":")[2] for case in TIMED[OURS] if case.startswith("A:")]
    ours, _ = stand.gradients(OURS, "error", goals)
    theirs, _ = stand.gradients("liger", "error", ["fkl"])
    exact = {goal: exact_gradients(problem, GOALS[goal], p_NV, q_NV) for goal in goals}
    errors, liger = (
        {goal: worst_part(ours[goal], exact[goal]) for goal in goals},
        worst_part(theirs["fkl"], exact["fkl"]),
    )
    if not all(error <= FAULTY for error in errors.values()):  # so that NaN is caught too
        raise SystemExit(f"potstill's gradients in setting A are wrong; relative errors: {errors}")
    return [
        Row("loss.grad_error", errors["fkl"], "relative"),
        Row("loss.grad_error_vs_liger", errors["fkl"] / liger, "x"),
        *(Row(f"loss.grad_error.{goal}", errors[goal], "relative") for goal in goals[1:]),
        Row("loss.grad_error.liger", liger, "relative"),
        Row("loss.agreement", agreement_of(p_NV, q_NV), "share", n=len(p_NV)),
    ]


def worst_part(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """The larger distance of the parts of `exact`."""
    return max(distance(found[part], exact[part]) for part in exact)


def distance(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of `exact`."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def time_sides(stand: Stand, rounds: int, skipped: Sequence[str]) -> Medians:
    """The sides in turn, as often as there are rounds; those of TIMED_ONCE in the first."""
    medians: Medians = defaultdict(list)
    once = {side: cases for side, cases in TIMED_ONCE.items() if side not in skipped}
    for sides in (TIMED | once, *[TIMED] * (rounds - 1)):
        for side, cases in sides.items():
            results = stand.ask(side, "time", cases)["results"]
            for case, seconds in results.items():
                medians[side, case].append(median(seconds))
    return medians


def ratios(medians: Medians, our_case: str, side: str, case: str) -> list[float]:
    """Ours over theirs, round by round."""
    return [a / b for a, b in zip(medians[OURS, our_case], medians[side, case], strict=True)]


def memory_rows(stand: Stand) -> list[Row]:
    """Peak memory of one call beyond its inputs, of every side in a process that does nothing else, and ratios."""
    peaks = {side: float(stand.ask(side, "memory", ["A:fkl"])["results"]["A:fkl"]) for side in WEIGHED}
    return [
        *(Row(f"loss.memory_vs_{side}", peaks[OURS] / peaks[side], "x") for side in ("trl", "liger")),
        *(Row(f"loss.extra_bytes.{side}", peak, "bytes") for side, peak in peaks.items()),
    ]


def describe(versions: Mapping[str, str], arguments: argparse.Namespace) -> dict[str, str]:
    """Where the numbers come from."""
    compiled = "potstill's side, and Liger's named so" if can_compile("cpu") else "nothing: no compiler works here"
    return {
        "settings": "A: 1,024 positions, width 576; B: 2,048, half masked, widths 576 and 960; 49,152 tokens, bf16",
        "peers": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "versions": describe_versions(),
        "compiled": compiled,
        "machine": f"{describe_machine()}, {torch.get_num_threads()} threads",
        "rounds": f"{arguments.rounds} of {arguments.runs} calls after {arguments.warmup}; low .. high over rounds",
    }


if __name__ == "__main__":
    main()
