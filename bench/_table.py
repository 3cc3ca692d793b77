"""What the benchmarks write: rows of measured numbers as JSON, and the same rows as a table with bars and machine.

Refuses: to judge a row that has no bar.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

__all__ = ["Row", "describe_machine", "describe_versions", "print_rows", "rounds_row", "seeds_row", "write_rows"]

PACKAGES = ("potstill", "torch", "transformers", "accelerate")

BARS: dict[str, tuple[str, float]] = {
    "quickstart.minutes": ("<=", 10.0),
    "quickstart.peak_gb": ("<=", 5.0),
    "quickstart.student_kl": ("<=", 1.5),
    "quickstart.student_agreement": (">=", 0.42),
    "quickstart.kl_gain_low": (">", 0.0),
    "quickstart.agreement_gain_low": (">", 0.0),
    "help.seconds": ("<", 0.5),
    "step.speed_vs_trl": (">=", 2.0),
    "step.memory_vs_trl": ("<=", 0.6),
    "step.offline_vs_hard": ("<=", 1.1),
    "store.bytes_k16": ("<=", 42.0),
    "store.bytes_k64": ("<=", 140.0),
    "store.decode_k16": (">=", 500_000.0),
    "store.decode_k64": (">=", 200_000.0),
    "store.capture_vs_forward": (">=", 0.75),
    "store.grad_mse_vs_random": ("<=", 0.5),
    "store.gain_kept": (">=", 0.95),
    "store.kill_lost": ("<=", 0.0),
    "store.flips_missed": ("<=", 0.0),
    "loss.fkl_time_vs_trl": ("<=", 0.22),
    "loss.fkl_time_vs_liger": ("<=", 1.0),
    "loss.masked_time_vs_liger": ("<=", 0.6),
    "loss.jsd_time_vs_fkl": ("<=", 1.3),
    "loss.rkl_time_vs_fkl": ("<=", 1.3),
    "loss.ce_time_vs_torch": ("<=", 1.05),
    "loss.memory_vs_trl": ("<=", 0.25),
    "loss.memory_vs_liger": ("<=", 1.0),
    "loss.grad_error": ("<=", 0.005),
    "loss.grad_error_vs_liger": ("<=", 0.1),
    "intent.teacher_accuracy": (">=", 0.960),
    "intent.retention": (">=", 0.98),
    "intent.throughput_vs_teacher": (">=", 2.5),
    "intent.latency_vs_teacher": ("<=", 0.5),
    "intent.static_retention": (">=", 0.93),
    "intent.static_throughput_vs_teacher": (">=", 50.0),
    "intent.minutes": ("<=", 12.0),
    "intent.fewlabel_gain": (">=", 0.04),
    "intent.fewlabel_gain_low": (">", 0.0),
    "intent.time_vs_peer": ("<=", 1.0),
    "intent.quality_vs_peer": (">=", 1.0),
    "api.requests_per_s": (">=", 400.0),
    "api.storm_rate": (">=", 0.9),
    "api.storm_wasted": ("<=", 0.1),
    "api.kill_lost": ("<=", 0.0),
    "api.kill_resent": ("<=", 0.0),
    "api.kill_differs": ("<=", 0.0),
    "api.faults_silent": ("<=", 0.0),
    "api.budget_overshoot": ("<=", 0.0),
    "api.intent_retention": (">=", 0.97),
    "verify.escapes": ("<=", 0.0),
    "r1.gain": (">=", 0.05),
    "r1.gain_low": (">", 0.0),
    "distilbert.nll_above_full.no_kd": (">", 0.0),
    "distilbert.nll_above_full.no_cosine": (">", 0.0),
    "distilbert.nll_above_full.random_start": (">", 0.0),
    "distilbert.probe_below_full.no_kd": (">", 0.0),
    "distilbert.probe_below_full.no_cosine": (">", 0.0),
    "distilbert.probe_below_full.random_start": (">", 0.0),
}
"""What is to be reached on 2 cores with bf16 units and 24 GiB of memory."""

HOLDS: dict[str, Callable[[float, float], bool]] = {
    "<": lambda value, bar: value < bar,
    "<=": lambda value, bar: value <= bar,
    ">": lambda value, bar: value > bar,
    ">=": lambda value, bar: value >= bar,
}


T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""0.975 quantiles of Student's t with 1 to 9 degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Row:
    """One number. `low` and `high` are its interval, or the range over `n` repetitions; None where there is neither."""

    id: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    n: int = 1


def rounds_row(name: str, values: Sequence[float], unit: str) -> Row:
    """The median of repeated measurements with their range."""
    return Row(name, statistics.median(values), unit, min(values), max(values), len(values))


def seeds_row(name: str, values: Sequence[float], unit: str) -> Row:
    """The mean over at most 10 seeds with its 95 % t-interval, which one seed does not have.

    Student (1908), doi:10.2307/2331554. Raises ValueError for no seed, or for more.
    """
    if not 1 <= len(values) <= len(T_975) + 1:
        raise ValueError(f"{name}: got {len(values)} seeds, needs 1 to {len(T_975) + 1}")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Row(name, mean, unit)
    half = T_975[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return Row(name, mean, unit, mean - half, mean + half, len(values))


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as a JSON list; folders are made. Raises ValueError for a number that is not finite."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=2, allow_nan=False) + "\n", encoding="utf-8")


def print_rows(title: str, rows: Sequence[Row], facts: Mapping[str, str]) -> None:
    """Print the rows with their bars, and below them where the numbers come from."""
    table = Table("id", "value", "low .. high", "n", "bar", "", title=title, title_justify="left")
    for row in rows:
        sign, bar = BARS.get(row.id, ("", 0.0))
        reached = "" if not sign else "reached" if HOLDS[sign](row.value, bar) else "MISSED"
        value = f"{_short(row.value)} {row.unit}".strip()
        table.add_row(row.id, value, _range(row), str(row.n), f"{sign} {bar:g}" if sign else "", reached)
    console = Console(width=None if Console().is_terminal else 120, soft_wrap=True, highlight=False)
    console.print(table)
    for name, text in facts.items():
        console.print(f"{name}: {text}", markup=False)


def describe_machine() -> str:
    """Processor, usable cores, memory and system in one line."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    units = [name for name in ("amx_bf16", "avx512_bf16") if name in _cpu_field("flags").split()]
    model = _cpu_field("model name") or platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bf16 = ", ".join(units) or "bf16 units not known"
    return f"{model} ({bf16}), {cores} cores, {memory_gib:.0f} GiB, {platform.system()}"


def describe_versions() -> str:
    """Versions of this environment's packages in one line."""
    found = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return ", ".join([f"Python {platform.python_version()}", *found])


def _cpu_field(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def _range(row: Row) -> str:
    return "" if row.low is None or row.high is None else f"{_short(row.low)} .. {_short(row.high)}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
