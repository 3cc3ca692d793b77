"""The stages train and control: the student and the control arm, alike in everything but what they minimise.

Refuses to keep a teacher in memory that nobody asks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from potstill.data import PackedRows
from potstill.engines import load_model, load_tokenizer, models_of, pick_device
from potstill.pipeline import build
from potstill.pipeline.capture import HELD_OUT_LESSONS, open_reader, validated_at_once
from potstill.pipeline.lessons import Inputs, open_lessons, read_lessons
from potstill.pipeline.memory import keep_freed_memory
from potstill.pipeline.metrics import MetricsLog, start_trackers
from potstill.pipeline.places import STUDENT
from potstill.pipeline.progress import Meter, metered
from potstill.pipeline.rundir import Stage
from potstill.pipeline.stopping import Stopping
from potstill.recipes import Recipe
from potstill.students import save_student
from potstill.training import Callbacks, CheckpointStore, RowSource, Training, train
from potstill.types import Batch, Lesson, Reader

__all__ = ["Arm", "Inputs", "train_arm"]

Arm = Literal["student", "control"]


@dataclass(frozen=True, slots=True)
class _Lessons:
    """Where the arm's lessons come from.

    teacher   who speaks, None where the arm asks nobody
    mark      where a teacher speaks who does not everywhere
    held_out  validation lessons
    models    what runs in every step, to be compiled
    """

    teacher: Reader | None
    mark: Callable[[Batch], Batch] | None
    held_out: list[Lesson]
    models: tuple[Any, ...] = ()


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


def _assemble(recipe: Recipe, inputs: Inputs, arm: Arm, rows: PackedRows, *, steps: int) -> tuple[Training, Any]:
    """All parts of the training, and the student's model itself, which is what is saved at the end."""
    device = pick_device(recipe.training.device, "training.device")
    if device.index is not None:
        torch.cuda.set_device(device)  # accelerate takes the current one
    accelerator = Accelerator(cpu=device.type == "cpu")
    student = load_model(str(inputs.initial / STUDENT), "fp32", accelerator.device, "student")
    objective = build.build_objective(
        build.terms_of(recipe, arm),
        inputs.vocabulary,
        student.config,
        build.teacher_config(recipe),
        everywhere=recipe.signals.everywhere,
    ).to(accelerator.device)
    asks = bool(objective.needs)
    if inputs.captured:
        lessons = _stored_lessons(recipe, inputs, accelerator.device, asks=asks)
    else:
        lessons = _online(recipe, inputs, asks=asks)
    build.compile_blocks(recipe, steps, student, lessons.models)
    training = Training(
        build.build_trainable(recipe, student),
        objective,
        RowSource(
            rows,
            seed=recipe.seed,
            batch_rows=recipe.training.batch_rows,
            rows_at_once=recipe.training.rows_at_once,
            teacher=lessons.teacher,
            wants=build.wants_of(objective),
            mark=lessons.mark,
            rank=(accelerator.process_index, accelerator.num_processes),
        ),
        accelerator,
        lessons.held_out,
        build.build_examiner(inputs.vocabulary),
    )
    return training, student


def _online(recipe: Recipe, inputs: Inputs, *, asks: bool) -> _Lessons:
    """Lessons of a teacher in this process; one who is asked about held-out rows only is let go after that."""
    teacher = build.build_teacher(recipe)
    held_out = PackedRows(inputs.prepared / "validation")
    most, at_once = recipe.training.validation_rows, validated_at_once(recipe)
    validation = list(read_lessons(teacher, held_out, most, at_once=at_once))
    return _Lessons(teacher if asks else None, None, validation, models_of(teacher) if asks else ())


def _stored_lessons(recipe: Recipe, inputs: Inputs, device: torch.device, *, asks: bool) -> _Lessons:
    """Lessons of a teacher who has spoken: no model of it is loaded."""
    captured = cast(Path, inputs.captured)
    rows = PackedRows(inputs.prepared / "validation")
    most, at_once = recipe.training.validation_rows, validated_at_once(recipe)
    validation = open_lessons(captured / HELD_OUT_LESSONS, rows, most, at_once=at_once, device=device)
    if not asks:
        return _Lessons(None, None, validation)
    reader = open_reader(recipe, captured, device)
    return _Lessons(reader, None if recipe.signals.everywhere else reader.mark, validation)


def _callbacks(log: MetricsLog, meter: Meter, tokens_a_step: int, *, stopping: Stopping) -> Callbacks:
    def rewind(step: int) -> None:
        log.rewind(step)
        meter.skip(step * tokens_a_step)

    def after_step(line: dict[str, Any]) -> None:
        log.log(line)
        meter.advance(tokens_a_step, f"loss {line['loss']:.3f}")

    return Callbacks(after_step, stopping.asked, rewind)
