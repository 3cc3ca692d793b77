"""How fast this machine is at what the recipe asks: one short step of each arm, on random tokens.

Refuses to guess from parameter counts: the real models are loaded and run in micro-batches of the real size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from potstill.engines import TeacherEngine, TrainableCausal, models_of, pick_device
from potstill.losses import Objective
from potstill.pipeline import build
from potstill.pipeline.survey import Survey
from potstill.recipes import Recipe
from potstill.types import Batch, Lesson, Reader, Signal, Wants

__all__ = ["Pace", "measure_pace"]

MOST_ROWS = 8
"""Larger micro-batches are not faster a row, and a plan should not take minutes."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds a packed row: of training, by arm, and of evaluation, all arms together (without speed and prompts)."""

    training: dict[str, float]
    evaluation: float


def measure_pace(recipe: Recipe, teacher: TeacherEngine, survey: Survey, *, vocabulary: int, steps: int) -> Pace:
    """Time one step of every arm of a training of `steps` after a warm-up, and one reading by teacher and student."""
    device = pick_device(recipe.training.device, "training.device")
    student = build.build_stand_in(recipe, teacher.model).float().to(device)
    build.compile_blocks(recipe, steps, student, models_of(teacher))
    trainable = build.build_trainable(recipe, student)
    batch = _random_batch(recipe, vocabulary, min(survey.sources)).to(device)
    arms = ["student", "control"] if recipe.control.enabled else ["student"]
    training = {}
    for arm in arms:
        terms = build.terms_of(recipe, arm)
        objective = build.build_objective(terms, vocabulary, student.config, teacher.model.config).to(device)
        training[arm] = _time(lambda: _step(trainable, objective, batch, teacher)) / len(batch)  # noqa: B023
    reading = {
        "teacher": _time(lambda: teacher.read(batch, Wants(final=True))) / len(batch),
        "student": _time(lambda: _look(trainable, batch)) / len(batch),
    }
    # The teacher reads twice: for the distances to it, and to be scored itself; untrained is an arm as well.
    return Pace(training, 2 * reading["teacher"] + (1 + len(arms)) * reading["student"])


def _step(trainable: TrainableCausal, objective: Objective, batch: Batch, teacher: Reader) -> None:
    said = teacher.read(batch, build.wants_of(objective)) if objective.needs else Signal()
    lesson = Lesson(batch, said.to(batch.ids_BT.device))
    share, _ = objective(trainable(batch, objective.layers()[0]), lesson, objective.counts([batch]))
    share.backward()
    trainable.zero_grad()


@torch.no_grad()
def _look(trainable: TrainableCausal, batch: Batch) -> None:
    trainable(batch)


def _time(work: Callable[[], Any]) -> float:
    """Seconds of the second time: the first one warms up."""
    work()
    _wait()
    began = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _random_batch(recipe: Recipe, vocabulary: int, source: str) -> Batch:
    shape = (min(MOST_ROWS, recipe.training.rows_at_once), recipe.data.sequence_length)
    ids_BT = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    return Batch(ids_BT, ids_BT.roll(-1, 1), torch.ones_like(ids_BT), sources=((source,),) * shape[0])
