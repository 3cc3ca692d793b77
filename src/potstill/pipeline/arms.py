"""The stages train and control: the student and the control arm, alike in everything but what they minimise.

Refuses to keep a teacher in memory that nobody asks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from potstill.data import PackedRows
from potstill.engines import load_tokenizer, models_of, needs_eager
from potstill.engines.local import load_config
from potstill.losses import Objective
from potstill.pipeline import build
from potstill.pipeline.answers import AnswerReader, open_answers
from potstill.pipeline.capture import open_held_out, open_reader, validated_at_once
from potstill.pipeline.cast import cast_of
from potstill.pipeline.course import Course, begin, take
from potstill.pipeline.lessons import Inputs
from potstill.pipeline.objective import Answers, build_examiner, build_objective, terms_of, wants_of
from potstill.pipeline.places import STUDENT
from potstill.pipeline.rows import CONTROL, Silent, TaskRows, held_out_batches, held_out_lessons, open_rows
from potstill.pipeline.rundir import Stage
from potstill.pipeline.stopping import Stopping
from potstill.pipeline.tutor import labelled_rows
from potstill.recipes import Recipe
from potstill.recipes.schema import RecordedTeacher
from potstill.students import save_sentence_encoder, save_student
from potstill.training import RowSource
from potstill.types import Batch, Lesson, Reader, Role

__all__ = ["Arm", "Inputs", "Lessons", "lessons_for", "open_teacher", "train_arm"]

Arm = Literal["student", "control"]


@dataclass(frozen=True, slots=True)
class Lessons:
    """Where the arm's lessons come from.

    teacher   who speaks, None where the arm asks nobody
    prepare   what is done to a batch before, given the number of rows drawn before it
    held_out  validation lessons
    models    what runs in every step, to be compiled
    """

    teacher: Reader | None
    prepare: Callable[[Batch, int], Batch] | None
    held_out: list[Lesson]
    models: tuple[Any, ...] = ()


def train_arm(recipe: Recipe, stage: Stage, inputs: Inputs, arm: Arm, *, stopping: Stopping) -> None:
    """Train the student, or the control arm: same initial weights, same batches, hard labels alone.

    Where texts are unlabelled, the control arm takes as many steps, on the labelled ones. Raises Interrupted, after
    saving, when somebody asks to stop while it trains.
    """
    course, student, tokenizer, overlong = _assemble(recipe, inputs, arm)
    # Small models that are often asked one text at a time: float32 is what their users run.
    low = recipe.training.precision == "bf16" and not recipe.over_texts
    dtype = torch.bfloat16 if low else None

    def save() -> list[str]:
        save_student(student, tokenizer, stage.folder / STUDENT, dtype)
        if Role(recipe.task.kind) is Role.ENCODER:
            own = cast_of(recipe)
            save_sentence_encoder(
                stage.folder / STUDENT, pooling=own.pooling, normalise=own.normalise, length=own.length
            )
        return [STUDENT]

    take(
        course,
        recipe.training,
        stage,
        label=f"train {arm}",
        tracked=f"{recipe.name}-{arm}",
        stopping=stopping,
        save=save,
        facts=overlong,
    )


def _assemble(recipe: Recipe, inputs: Inputs, arm: Arm) -> tuple[Course, Any, Any, dict[str, int]]:
    """All parts of the training; the student's model itself, which is what is saved; its tokenizer; facts."""
    settings = recipe.training
    accelerator = begin(settings, recipe.seed)
    role, folder = cast_of(recipe, inputs.prepared), str(inputs.initial / STUDENT)
    configs = load_config(folder, "student"), build.teacher_config(recipe)
    answers = Answers.of(recipe, inputs.vocabulary)
    objective = build_objective(terms_of(recipe, arm), answers, *configs).to(accelerator.device)
    examiner = build_examiner(answers, *configs)
    tokenizer = load_tokenizer(folder, "student")
    student = role.load(folder, "fp32", accelerator.device, "student", eager=needs_eager(objective.wants()[0]))
    rows = open_rows(recipe, role, inputs.prepared, tokenizer=tokenizer, training=settings)
    steps = build.count_steps(recipe, len(rows))
    if arm == "control" and recipe.generate:
        rows = TaskRows(PackedRows(inputs.prepared / CONTROL))
    elif arm == "control":
        rows = labelled_rows(rows, role, settings, "control.enabled: true")
    lessons = lessons_for(recipe, inputs, (objective, examiner), tokenizer=tokenizer, device=accelerator.device)
    build.compile_blocks(recipe, steps, student, lessons.models)
    source = RowSource(
        rows.rows,
        seed=recipe.seed,
        batch_rows=settings.batch_rows,
        rows_at_once=settings.rows_at_once,
        teacher=lessons.teacher,
        wants=wants_of(objective),
        order=rows.order,
        prepare=rows.prepare or lessons.prepare,
        rank=(accelerator.process_index, accelerator.num_processes),
    )
    trainable = build.build_trainable(recipe, student)
    held_out = lessons.held_out
    units = settings.batch_rows * (1 if recipe.over_texts else recipe.data.sequence_length)
    unit = "texts" if recipe.over_texts else "tokens"
    course = Course(trainable, objective, source, accelerator, steps, held_out, examiner, units, unit)
    return course, student, tokenizer, rows.facts


def lessons_for(
    recipe: Recipe,
    inputs: Inputs,
    objectives: tuple[Objective, Objective],
    *,
    tokenizer: Any,
    device: torch.device,
) -> Lessons:
    """Lessons of the recipe's teacher for a student with this tokenizer: beside it, stored, or recorded.

    `objectives` are the student's own and the examiner's. Of a teacher in this process who is asked about held-out rows
    only, nothing is kept after that.
    """
    objective, examiner = objectives
    asks, role = bool(objective.needs), cast_of(recipe, inputs.prepared)
    if inputs.captured and role.causal:
        return _stored_lessons(recipe, inputs, device, asks=asks)
    teacher: Reader = Silent()
    models: tuple[Any, ...] = ()
    if recipe.generate is None:
        teacher, models = open_teacher(recipe, inputs, eager=needs_eager(wants_of(objective)))
    batches = held_out_batches(
        recipe,
        role,
        inputs.prepared,
        tokenizer=tokenizer,
        most=recipe.training.validation_rows,
        at_once=validated_at_once(recipe),
        split="validation",
    )
    mark = teacher.mark if isinstance(teacher, AnswerReader) and teacher.has_gaps else None
    held_out = held_out_lessons(map(mark, batches) if mark else batches, teacher, wants_of(examiner))
    prepare = (lambda batch, _: mark(batch)) if mark else None
    return Lessons(teacher if asks else None, prepare, held_out, models if asks else ())


def open_teacher(recipe: Recipe, inputs: Inputs, *, eager: bool = False) -> tuple[Reader, tuple[Any, ...]]:
    """Who speaks, and the models that this takes."""
    if isinstance(recipe.teacher, RecordedTeacher):
        return build.open_recorded(recipe.teacher, cast_of(recipe, inputs.prepared)), ()
    if inputs.captured:
        return open_answers(recipe, inputs), ()
    teacher = build.build_teacher(recipe, inputs.prepared, eager=eager)
    return teacher, models_of(teacher)


def _stored_lessons(recipe: Recipe, inputs: Inputs, device: torch.device, *, asks: bool) -> Lessons:
    """Lessons of a teacher who has spoken: no model of it is loaded."""
    validation = open_held_out(recipe, inputs, device)
    if not asks:
        return Lessons(None, None, validation)
    reader = open_reader(recipe, cast(Path, inputs.captured), device)
    return Lessons(reader, None if recipe.signals.everywhere else lambda batch, _: reader.mark(batch), validation)
