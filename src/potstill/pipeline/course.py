"""One training from its first step to a saved model: the student's, the control arm's, a teacher's, a static one's.

Refuses to know what is learned: parts come in, a finished stage goes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from potstill.engines import pick_device
from potstill.losses import Objective
from potstill.pipeline import build
from potstill.pipeline.memory import keep_freed_memory
from potstill.pipeline.metrics import MetricsLog, start_trackers
from potstill.pipeline.progress import Meter, metered
from potstill.pipeline.rundir import Stage
from potstill.pipeline.stopping import Stopping
from potstill.recipes.schema import Training as Settings
from potstill.training import Callbacks, CheckpointStore, RowSource, Training, train
from potstill.types import Lesson

__all__ = ["Course", "begin", "take"]


@dataclass(frozen=True, slots=True)
class Course:
    """What takes part in a training.

    step_units  tokens or texts a step, for the progress line; `unit` says which
    """

    student: nn.Module
    objective: Objective
    source: RowSource
    accelerator: Accelerator
    steps: int
    held_out: Sequence[Lesson]
    examiner: Objective
    step_units: int
    unit: str = "tokens"


def begin(settings: Settings, seed: int) -> Accelerator:
    """Random numbers and devices for a training in this process."""
    keep_freed_memory()
    set_seed(seed)
    device = pick_device(settings.device, "training.device")
    if device.index is not None:
        torch.cuda.set_device(device)  # accelerate takes the current one
    return Accelerator(cpu=device.type == "cpu")


def take(
    course: Course,
    settings: Settings,
    stage: Stage,
    *,
    label: str,
    tracked: str,
    stopping: Stopping,
    save: Callable[[], Sequence[str]],
    facts: dict[str, Any] | None = None,
) -> None:
    """Train, have the result saved, and finish the stage. `save` returns what it wrote, relative to the stage.

    `label` stands before the progress, `tracked` names the run in trackers. Continues where an earlier attempt was
    stopped. Raises Interrupted, after saving, when somebody asks to stop while it trains.
    """
    plan = build.build_plan(settings, course.steps)
    training = Training(
        course.student, course.objective, course.source, course.accelerator, course.held_out, course.examiner
    )
    store = CheckpointStore(stage.folder / "checkpoints", settings.checkpoint.keep)
    log = MetricsLog(stage.folder / "metrics.jsonl", start_trackers(settings.trackers, tracked, stage.folder))
    # Closed however the training ends: a tracker holds back what was logged last.
    with closing(log), metered(label, plan.steps * course.step_units, course.unit) as meter, stopping.held():
        train(training, plan, store, _callbacks(log, meter, course.step_units, stopping=stopping))
    stage.finish(
        *save(),
        "metrics.jsonl",
        steps=plan.steps,
        tokens=training.positions,
        seconds=round(training.seconds, 3),
        **(facts or {}),
    )
    store.clear()  # not before the stage is finished: until then they are what a crash would continue from


def _callbacks(log: MetricsLog, meter: Meter, step_units: int, *, stopping: Stopping) -> Callbacks:
    def rewind(step: int) -> None:
        log.rewind(step)
        meter.skip(step * step_units)

    def after_step(line: dict[str, Any]) -> None:
        log.log(line)
        meter.advance(step_units, f"loss {line['loss']:.3f}")

    return Callbacks(after_step, stopping.asked, rewind)
