"""From words and a teacher to packed rows and a student's first weights: the stages prepare and initialise.

Refuses to hold anything between stages: a stage that starts after a crash finds all it needs on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import JsonValue

from potstill.data import Cleaning, PackedRows, encode_examples, write_rows
from potstill.engines import TeacherEngine, load_model, load_tokenizer, models_of
from potstill.pipeline import build
from potstill.pipeline.disk import write_json_atomic
from potstill.pipeline.inspection import count_parameters
from potstill.pipeline.layers import choose_layers
from potstill.pipeline.places import STUDENT, resolve_model
from potstill.pipeline.progress import Meter, metered
from potstill.pipeline.prompts import dump_examples
from potstill.pipeline.rundir import Stage
from potstill.pipeline.survey import SPLITS, read_split, survey_data
from potstill.recipes import Recipe
from potstill.recipes.schema import FreshStudent, LayersStudent, MixtureTeacher
from potstill.signals import shared_vocabulary
from potstill.students import cut_layers, fresh_model, save_student

__all__ = ["HELD_OUT", "initialise", "prepare"]

HELD_OUT = "held_out.json"
"""Some documents of the test split as they are, for the prompts of the report."""

Item = TypeVar("Item")


def prepare(recipe: Recipe, stage: Stage) -> None:
    """Turn the user's rows into packed token rows, split by document, and keep some held-out documents to show."""
    key, first = next(iter(build.teachers_of(recipe).items()))
    tokenizer = load_tokenizer(resolve_model(first.model, key), key)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    with metered("prepare: read", None, "documents") as meter:
        survey = survey_data(recipe, seen=meter.advance)
    build.check_sources(recipe, survey.sources)
    write_json_atomic(stage.folder / HELD_OUT, dump_examples(survey.held_out))
    documents: dict[str, JsonValue] = {}
    tokens: dict[str, JsonValue] = {}
    rows: dict[str, JsonValue] = {}
    with metered("prepare: pack", survey.documents.total(), "documents") as meter:
        for split in SPLITS:
            encoded = encode_examples(_counted(read_split(recipe, split), meter), tokenizer)
            length = recipe.data.sequence_length
            stats = write_rows(encoded, stage.folder / split, sequence_length=length, pad_id=pad, seed=recipe.seed)
            documents[split], tokens[split], rows[split] = stats.documents, stats.tokens, stats.rows
    stage.finish(documents=documents, tokens=tokens, rows=rows, cleaning=_describe(survey.cleaning))


def initialise(recipe: Recipe, stage: Stage, prepared: Path) -> None:
    """Make the student's first weights: the same for the student, the control arm and the untrained arm."""
    if isinstance(recipe.teacher, MixtureTeacher):
        # Here too: the recipe may weigh its teachers otherwise than when these were prepared.
        build.check_sources(recipe, set().union(*(PackedRows(prepared / split).sources() for split in SPLITS)))
    teacher = build.build_teacher(recipe)
    teachers = models_of(teacher)
    student, tokenizer, facts = _make_student(recipe, teacher, prepared)
    heads = [model.get_output_embeddings().weight.shape[0] for model in (*teachers, student)]
    save_student(student, tokenizer, stage.folder / STUDENT)
    stage.finish(
        vocabulary=min(shared_vocabulary(teacher.tokenizer, tokenizer), *heads),
        parameters=count_parameters(student),
        teacher_parameters=sum(map(count_parameters, teachers)),
        **facts,
    )


def _make_student(recipe: Recipe, teacher: TeacherEngine, prepared: Path) -> tuple[Any, Any, dict[str, JsonValue]]:
    """The student, its tokenizer, and what is to be told of how it was made."""
    student = recipe.student
    if isinstance(student, LayersStudent):
        choice = choose_layers(student, teacher, PackedRows(prepared / "validation"))
        facts: dict[str, JsonValue] = {"layers": list(choice.keep), "removed": [list(step) for step in choice.removed]}
        return cut_layers(teacher.model, choice.keep), teacher.tokenizer, facts
    if isinstance(student, FreshStudent):
        sizes = student.config.model_dump(exclude_none=True)
        return fresh_model(teacher.model.config, sizes, recipe.seed), teacher.tokenizer, {}
    model = resolve_model(student.model, "student.model")
    loaded = load_model(model, "fp32", torch.device("cpu"), "student.model")
    return loaded, load_tokenizer(model, "student.model"), {}


def _counted(items: Iterable[Item], meter: Meter) -> Iterator[Item]:
    for item in items:
        yield item
        meter.advance(1)


def _describe(cleaning: Cleaning) -> dict[str, JsonValue]:
    counts = {"kept": cleaning.kept, "dropped": cleaning.dropped, "mended": cleaning.mended}
    return {f"{what}: {why}": count for what, counter in counts.items() for why, count in counter.items()}
