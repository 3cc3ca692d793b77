"""How fast and how large: prefill and decode of one arm, measured the same way for all.

Refuses to quote a single run: medians of several, after a warm-up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from potstill.types import Batch, Engine, Measurement, Reader, Sampling, Wants

__all__ = ["Speed", "folder_bytes", "measure_speed"]


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over `n` runs, smallest and largest: (median, low, high) tokens/s; decode is None without prompts."""

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float] | None
    n: int

    def measurements(self, arm: str) -> list[Measurement]:
        """As rows of measurements.json; low and high are the range seen, not an interval."""
        pairs = (("prefill_tokens_per_s", self.prefill), ("decode_tokens_per_s", self.decode))
        return [Measurement(arm, name, "test", *values, self.n, "tokens/s") for name, values in pairs if values]


def measure_speed(
    engine: Reader,
    batch: Batch,
    prompts: Sequence[str],
    *,
    new_tokens: int = 32,
    runs: int = 3,
) -> Speed:
    """Prefill: reading `batch` up to its final states. Decode: `new_tokens` greedy tokens for every prompt, if any.

    No completion may end early, so that every arm does the same work and its tokens need not be counted from text.
    """
    tokens = int((batch.segments_BT > 0).sum())
    prefill = _rates(lambda: engine.read(batch, Wants(final=True)), tokens, runs)
    if not prompts:
        return Speed(prefill, None, runs)
    sampling = Sampling(max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    decode = _rates(lambda: cast(Engine, engine).generate(prompts, sampling), len(prompts) * new_tokens, runs)
    return Speed(prefill, decode, runs)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _rates(work: Callable[[], object], tokens: int, runs: int) -> tuple[float, float, float]:
    """Median, smallest and largest tokens/s of `work`, which handles `tokens` of them a run."""
    work()
    _wait()
    rates = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        _wait()
        rates.append(tokens / (time.perf_counter() - began))
    return statistics.median(rates), min(rates), max(rates)


def _wait() -> None:
    """A GPU still works when its caller has returned; the clock must not stop before it has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
