"""What a run will do and cost, before any weight is loaded.

Refuses to promise: every figure says whether it was measured here or estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from potstill.data import encode_examples
from potstill.engines import LocalEngine, pick_device
from potstill.engines.local import DTYPES
from potstill.pipeline import build
from potstill.pipeline.calibration import Pace, measure_pace
from potstill.pipeline.chain import before, blaming, load_chain, phases_of, settle
from potstill.pipeline.disk import check_disk, check_writable, folder_bytes
from potstill.pipeline.fidelity import describe_fidelity
from potstill.pipeline.inspection import Inspection, check_store_room, inspect_recipe, stage_bytes
from potstill.pipeline.run import explain_run, is_trained
from potstill.pipeline.rundir import StageStatus, check_unlocked
from potstill.pipeline.scored import scoring_rows
from potstill.pipeline.survey import Survey, survey_data
from potstill.pipeline.textplan import text_rows
from potstill.pipeline.writingplan import writing_rows
from potstill.recipes import Recipe
from potstill.recipes.schema import LanguageModel, LayersStudent, MaskedLM, MixtureTeacher, StoredSignals
from potstill.students import fresh_model

__all__ = ["Estimate", "estimate_run", "print_plan"]

FORWARD, TRAIN = 2, 6
"""Floating-point operations per weight and token: reading, and reading with learning (Kaplan et al. 2020, table 1)."""

SURVEYED_DOCUMENTS = 20_000
"""A plan reads no more of the data than this; prepare reads all."""

ACTIVATION_BYTES = 34
"""Per position, width and layer (Korthikanti et al. 2022, arXiv:2205.05198, eq. 2, without dropout and attention)."""

READ_BYTES = 1e9
"""What reading takes beside the teacher's weights: a block of logits, and what they are made from."""

TRAINED_WEIGHT_BYTES = 16
"""Weight, gradient and two moments in float32."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A run in numbers. Where not all data was read (`complete` is False), its tokens and rows are lower bounds."""

    teacher_parameters: int
    student_parameters: int
    data_tokens: int
    train_rows: int
    steps: int
    train_tokens: int
    memory_bytes: int
    disk_bytes: int
    operations: float
    complete: bool
    record_bytes: int = 0
    """Of one position in a store of signals; 0 where none are stored."""


def print_plan(recipe: Recipe, *, measure: bool) -> None:
    """Print what will run and what it will take; with `measure`, time comes from short steps on this machine.

    The assistants that the run would begin with come first. Raises what the run itself would raise for this recipe and
    machine before it loads a model.
    """
    for number, phase in enumerate(phases_of(recipe)):
        with blaming(phase, f"phases[{number}]"):
            print_plan(phase, measure=measure)
    for assistant in load_chain(recipe)[:1]:
        with blaming(assistant):
            print_plan(assistant, measure=measure)
    check_writable(recipe.folder)
    check_unlocked(recipe.folder)
    found = inspect_recipe(recipe)
    if recipe.over_texts:
        _print_tables(recipe, explain_run(recipe), text_rows(recipe, found, measure=measure))
        return
    if recipe.generate:
        _print_tables(recipe, explain_run(recipe), writing_rows(recipe, found))
        return
    survey = survey_data(recipe, SURVEYED_DOCUMENTS)
    build.check_sources(recipe, survey.sources, complete=survey.complete)
    estimate = estimate_run(recipe, found, survey)
    statuses = explain_run(recipe)
    if any(status.state != "done" for status in statuses):
        check_store_room(recipe, found)
        check_disk(recipe.folder, estimate.disk_bytes - folder_bytes(recipe.folder), "this run")
    pace = None
    if measure and isinstance(recipe.task, LanguageModel) and found.teachers and not before(recipe):
        teacher = _timed_teacher(recipe, found)
        pace = measure_pace(recipe, teacher, survey, vocabulary=found.vocabulary, steps=estimate.steps)
    _print_tables(recipe, statuses, [*_size_rows(recipe, estimate), *_time_rows(recipe, estimate, pace)])


def _print_tables(recipe: Recipe, statuses: Sequence[StageStatus], rows: Iterable[tuple[str, str, str]]) -> None:
    rows = list(rows)  # whatever is wrong with them comes before the first line
    stages = Table("stage", "state", "why", title=f"{recipe.name}: {recipe.folder}", title_justify="left")
    for status in statuses:
        stages.add_row(status.stage, status.state, status.why)
    costs = Table("what", "how much", "from", title="plan", title_justify="left")
    for row in rows:
        costs.add_row(*row)
    console = Console()
    console.print(stages)
    console.print(costs)


def _timed_teacher(recipe: Recipe, found: Inspection) -> Any:
    """The teacher; for an assistant who is not trained yet, a random model of its size, which is as fast."""
    if all(map(is_trained, load_chain(recipe)[:1])):
        return build.build_teacher(settle(recipe))
    device = pick_device(recipe.teacher.device, "teacher.device")
    model = fresh_model(found.teachers[0].config, {}, recipe.seed)
    return LocalEngine(model.to(device, DTYPES[recipe.teacher.dtype]), found.tokenizer)


def estimate_run(recipe: Recipe, found: Inspection, survey: Survey) -> Estimate:
    """Sizes from the configs, tokens from some of the documents."""
    lengths = [
        len(encoded.ids)
        for encoded in encode_examples(survey.sampled, found.tokenizer, bare=isinstance(recipe.task, MaskedLM))
    ]
    mean = sum(lengths) / max(1, len(survey.sampled))
    there = mean * survey.documents["train"]
    share = min(1.0, (recipe.data.max_tokens or math.inf) / max(1.0, there))
    train_rows = max(1, round(share * there / recipe.data.sequence_length))
    steps = build.count_steps(recipe, train_rows)
    train_tokens = steps * recipe.training.batch_rows * recipe.data.sequence_length
    asked = any(term.needs for term in recipe.losses)
    arms = 2 if recipe.has_control else 1
    once = isinstance(recipe.signals, StoredSignals)
    read_tokens = min(train_tokens, train_rows * recipe.data.sequence_length) if once else train_tokens
    operations = float(train_tokens) * arms * TRAIN * found.student_parameters
    operations += float(read_tokens) * FORWARD * found.teacher_parameters if asked else 0.0
    needed = stage_bytes(recipe, found)
    return Estimate(
        teacher_parameters=found.teacher_parameters,
        student_parameters=found.student_parameters,
        data_tokens=round(share * mean * survey.documents.total()),
        train_rows=train_rows,
        steps=steps,
        train_tokens=train_tokens,
        memory_bytes=_memory_bytes(recipe, found),
        # Checkpoints of the first arm are gone when the second trains.
        disk_bytes=sum(needed.values()) - (needed["control"] if recipe.has_control else 0),
        operations=operations,
        complete=survey.complete or share < 1.0,
        record_bytes=found.record_bytes,
    )


def _memory_bytes(recipe: Recipe, found: Inspection) -> int:
    """Training holds most: the student with its optimiser, the teacher, and the student's activations."""
    text = found.student.config.get_text_config()
    positions = recipe.training.rows_at_once * recipe.data.sequence_length
    layers = 2 if recipe.training.gradient_checkpointing else text.num_hidden_layers
    teacher = found.teacher_parameters * (2 if recipe.teacher.dtype == "bf16" else 4)
    activations = ACTIVATION_BYTES * positions * text.hidden_size * layers
    training = TRAINED_WEIGHT_BYTES * found.student_parameters + activations
    # A teacher who has spoken before is not held in the training, but it is where it speaks and where it is evaluated.
    stored = isinstance(recipe.signals, StoredSignals)
    return int(max(training, teacher + READ_BYTES) if stored else training + teacher)


def _size_rows(recipe: Recipe, found: Estimate) -> Iterator[tuple[str, str, str]]:
    least = "" if found.complete else "at least "
    teachers = f", {len(teacher.members)} models" if isinstance(teacher := recipe.teacher, MixtureTeacher) else ""
    if found.teacher_parameters:
        yield "teacher", f"{found.teacher_parameters / 1e6:,.1f}M parameters, {teacher.dtype}{teachers}", "config"
    else:
        yield from scoring_rows(recipe, min(found.train_tokens, found.train_rows * recipe.data.sequence_length))
    share = found.teacher_parameters and found.student_parameters / found.teacher_parameters
    of_teacher = f", {share:.0%} of the teacher" if share else ""
    yield "student", f"{found.student_parameters / 1e6:,.1f}M parameters{of_teacher}", "config"
    yield "data", f"{least}{found.data_tokens:,} tokens, {found.train_rows:,} rows to train on", "some documents"
    least = least if recipe.training.epochs else ""
    yield "training", f"{least}{found.steps:,} steps, {found.train_tokens:,} tokens", "recipe"
    arms = "student and control" if recipe.has_control else "student (no control: the gain stays unknown)"
    yield "arms", arms, "recipe"
    if isinstance(signals := recipe.signals, StoredSignals):
        rows_tokens = found.train_rows * recipe.data.sequence_length if found.complete else found.train_tokens
        size = min(found.train_tokens, rows_tokens) * signals.share * found.record_bytes
        whole = found.complete or not recipe.training.epochs
        limit = "at most" if whole else "or more"
        yield (
            "signals",
            f"{signals.kind}, {found.record_bytes} bytes a position, {_bytes(size)} {limit}; no teacher in training",
            "recipe",
        )
    yield "memory", f"{found.memory_bytes / 1e9:.1f} GB", "estimated"
    yield "disk", f"{found.disk_bytes / 1e9:.1f} GB at most", "estimated"
    if found.teacher_parameters:
        yield "money", "0: every model runs here", "recipe"


def _bytes(size: float) -> str:
    """A size in the largest unit that it fills."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= one:
            return f"{size / one:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def _time_rows(recipe: Recipe, found: Estimate, pace: Pace | None) -> Iterator[tuple[str, str, str]]:
    if pace is None:
        more = "--measure turns them into minutes"
        if not isinstance(recipe.task, LanguageModel) or before(recipe):
            more = "--measure times language models without phases only"
        yield "time", f"{found.operations:.2g} operations; {more}", "estimated"
        return
    rows = found.steps * recipe.training.batch_rows
    if pace.fidelity:
        for measure, value, meaning in describe_fidelity(pace.fidelity):
            yield f"signals: {measure}", value, meaning
    minutes = {f"train {arm}": seconds * rows / 60 for arm, seconds in pace.training.items()}
    held_out = max(1, round(found.train_rows * recipe.data.splits.test))
    minutes["evaluate"] = pace.evaluation * min(held_out, recipe.evaluation.max_rows or held_out) / 60
    if pace.capture is not None:
        rows_once = min(rows, found.train_rows)
        minutes = {"capture (once)": pace.capture * rows_once / 60, **minutes}
    for name, took in minutes.items():
        yield f"time: {name}", f"{took:.1f} minutes", "measured here"
    student = recipe.student
    searching = isinstance(student, LayersStudent) and student.keep == "greedy"
    search = f", and up to {student.search.minutes:g} for the layers" if isinstance(student, LayersStudent) else ""
    extra = "without loading, speed and samples" + (search if searching else "")
    yield "time", f"{sum(minutes.values()):.1f} minutes {extra}", "measured here"
