"""Runs that are killed at random moments, and then go on to their end."""

from __future__ import annotations

import time
from multiprocessing.context import ForkServerContext
from random import Random

from potstill.pipeline.run import run_recipe
from potstill.recipes import Recipe

__all__ = ["finish_killed", "finish_undisturbed"]


def finish_undisturbed(processes: ForkServerContext, recipe: Recipe) -> float:
    """Runs the recipe to its end in a process of its own. Returns its seconds."""
    began = time.perf_counter()
    process = processes.Process(target=run_recipe, args=(recipe,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return time.perf_counter() - began


def finish_killed(processes: ForkServerContext, recipe: Recipe, kills: int, seconds: float) -> int:
    """Runs the recipe, killed so many times, then to its end. Returns how many kills met a working process.

    Moments are drawn from the first half of the `seconds` that it takes undisturbed: on a fast machine, too, the first
    one meets it at work.
    """
    draw, met = Random(0), 0
    for _ in range(kills):
        process = processes.Process(target=run_recipe, args=(recipe,))
        process.start()
        process.join(seconds * draw.uniform(0.05, 0.5))
        met += process.is_alive()
        process.kill()
        process.join()
    finish_undisturbed(processes, recipe)
    return met
