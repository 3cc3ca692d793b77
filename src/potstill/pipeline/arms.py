"""The stages train and control: the student and the control arm, alike in everything but what they minimise.

Refuses to keep a teacher in memory that nobody asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from potstill.data import PackedRows
from potstill.engines import load_model, load_tokenizer, models_of, pick_device
from potstill.pipeline import build
from potstill.pipeline.memory import keep_freed_memory
from potstill.pipeline.metrics import MetricsLog, start_trackers
from potstill.pipeline.places import STUDENT
from potstill.pipeline.progress import Meter, metered
from potstill.pipeline.rundir import Stage
from potstill.pipeline.stopping import Stopping
from potstill.recipes import Recipe
from potstill.students import save_student
from potstill.training import Callbacks, CheckpointStore, RowSource, Training, train
from potstill.types import Lesson, Reader, Wants

__all__ = ["Arm", "Inputs", "read_lessons", "train_arm"]

Arm = Literal["student", "control"]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What training reads: the folders of prepare and initialise, and how many tokens teacher and student share."""

    prepared: Path
    initial: Path
    vocabulary: int


def train_arm(recipe: Recipe, stage: Stage, inputs: Inputs, arm: Arm, *, stopping: Stopping) -> None:
    """Train the student, or the control arm: same initial weights, same batches, hard labels alone.

    Raises Interrupted, after saving, when somebody asks to stop while it trains.
    """
    keep_freed_memory()
    set_seed(recipe.seed)
    rows = PackedRows(inputs.prepared / "train")
    plan = build.build_plan(recipe, rows)
    training, student = _assemble(recipe, inputs, arm, rows, steps=plan.steps)
    store = CheckpointStore(stage.folder / "checkpoints", recipe.training.checkpoint.keep)
    trackers = start_trackers(recipe.training.trackers, f"{recipe.name}-{arm}", stage.folder)
    log = MetricsLog(stage.folder / "metrics.jsonl", trackers)
    tokens_a_step = recipe.training.batch_rows * recipe.data.sequence_length
    # Closed however the training ends: a tracker holds back what was logged last.
    with closing(log), metered(f"train {arm}", plan.steps * tokens_a_step, "tokens") as meter, stopping.held():
        train(training, plan, store, _callbacks(log, meter, tokens_a_step, stopping=stopping))
    dtype = torch.bfloat16 if recipe.training.precision == "bf16" else None
    save_student(student, load_tokenizer(str(inputs.initial / STUDENT), "student"), stage.folder / STUDENT, dtype)
    stage.finish(
        STUDENT, "metrics.jsonl", steps=plan.steps, tokens=training.positions, seconds=round(training.seconds, 3)
    )
    store.clear()  # not before the stage is finished: until then they are what a crash would continue from


def read_lessons(teacher: Reader, rows: PackedRows, most: int | None, *, at_once: int) -> Iterator[Lesson]:
    """The first `most` rows (None: all) with what the teacher says about them: its next-token distributions."""
    count = len(rows) if most is None else min(most, len(rows))
    for start in range(0, count, at_once):
        batch = rows.batch(range(start, min(start + at_once, count)))
        yield Lesson(batch, teacher.read(batch, Wants(final=True)))


def _assemble(recipe: Recipe, inputs: Inputs, arm: Arm, rows: PackedRows, *, steps: int) -> tuple[Training, Any]:
    """All parts of the training, and the student's model itself, which is what is saved at the end."""
    device = pick_device(recipe.training.device, "training.device")
    if device.index is not None:
        torch.cuda.set_device(device)  # accelerate takes the current one
    accelerator = Accelerator(cpu=device.type == "cpu")
    student = load_model(str(inputs.initial / STUDENT), "fp32", accelerator.device, "student")
    teacher = build.build_teacher(recipe)
    objective = build.build_objective(
        build.terms_of(recipe, arm), inputs.vocabulary, student.config, teacher.model.config
    ).to(accelerator.device)
    build.compile_blocks(recipe, steps, student, models_of(teacher) if objective.needs else ())
    held_out = PackedRows(inputs.prepared / "validation")
    # In batches of the training's shape: another one would be compiled once more.
    at_once = min(recipe.training.rows_at_once, recipe.training.validation_rows)
    validation = read_lessons(teacher, held_out, recipe.training.validation_rows, at_once=at_once)
    training = Training(
        build.build_trainable(recipe, student),
        objective,
        RowSource(
            rows,
            seed=recipe.seed,
            batch_rows=recipe.training.batch_rows,
            rows_at_once=recipe.training.rows_at_once,
            teacher=teacher if objective.needs else None,
            wants=build.wants_of(objective),
            rank=(accelerator.process_index, accelerator.num_processes),
        ),
        accelerator,
        list(validation),
        build.build_examiner(inputs.vocabulary),
    )
    return training, student


def _callbacks(log: MetricsLog, meter: Meter, tokens_a_step: int, *, stopping: Stopping) -> Callbacks:
    def rewind(step: int) -> None:
        log.rewind(step)
        meter.skip(step * tokens_a_step)

    def after_step(line: dict[str, Any]) -> None:
        log.log(line)
        meter.advance(tokens_a_step, f"loss {line['loss']:.3f}")

    return Callbacks(after_step, stopping.asked, rewind)
