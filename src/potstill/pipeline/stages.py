"""From words and a teacher to packed rows and a student's first weights: the stages prepare and initialise.

Refuses to hold anything between stages: a stage that starts after a crash finds all it needs on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import JsonValue

from potstill.data import Cleaning, Encoded, PackedRows, Split, encode_examples
from potstill.data.pack import RowWriter
from potstill.engines import load_tokenizer, models_of
from potstill.pipeline import build
from potstill.pipeline.cast import cast_of
from potstill.pipeline.disk import write_json_atomic
from potstill.pipeline.inspection import count_parameters
from potstill.pipeline.layers import choose_layers
from potstill.pipeline.places import STUDENT, resolve_model
from potstill.pipeline.progress import Meter, metered
from potstill.pipeline.prompts import dump_examples
from potstill.pipeline.rundir import Stage
from potstill.pipeline.survey import SPLITS, Placed, survey_data
from potstill.pipeline.texts import open_texts, prepare_texts
from potstill.recipes import Recipe
from potstill.recipes.schema import FreshStudent, MaskedLM, MixtureTeacher, PretrainedStudent, RecordedTeacher
from potstill.signals import shared_vocabulary
from potstill.students import cut_layers, fresh_model, save_student, to_distilbert
from potstill.types import Role

__all__ = ["HELD_OUT", "initialise", "prepare"]

HELD_OUT = "held_out.json"
"""Some documents of the test split as they are, for the prompts of the report."""

ENCODED_AT_ONCE = 256
"""Documents that go through the tokenizer together, which is fastest with many."""

Item = TypeVar("Item")


def prepare(recipe: Recipe, stage: Stage) -> None:
    """Turn the user's rows into packed token rows, split by document, and keep some held-out documents to show.

    One pass over the source fills all splits; it ends where the train split has `data.max_tokens`.
    """
    if recipe.over_texts:
        prepare_texts(recipe, stage, labels=build.ready_labels(recipe))
        return
    key, first = next(iter(build.teachers_of(recipe).items()))
    tokenizer = load_tokenizer(resolve_model(first.model, key), key)
    framed = isinstance(recipe.task, MaskedLM)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    length, budget = recipe.data.sequence_length, recipe.data.max_tokens
    with ExitStack() as stack:
        meter = stack.enter_context(metered("prepare", None, "documents"))
        writers = {
            split: stack.enter_context(
                RowWriter(
                    stage.folder / split,
                    sequence_length=length,
                    pad_id=pad,
                    seed=recipe.seed,
                    frame=(tokenizer.cls_token_id, tokenizer.sep_token_id) if framed else None,
                )
            )
            for split in SPLITS
        }
        survey = survey_data(
            recipe, through=lambda documents: _counted(_pack(documents, tokenizer, writers, budget, bare=framed), meter)
        )
        build.check_sources(recipe, survey.sources)
        stats = {split: writer.finish() for split, writer in writers.items()}
    write_json_atomic(stage.folder / HELD_OUT, dump_examples(survey.held_out))
    stage.finish(
        documents={split: found.documents for split, found in stats.items()},
        tokens={split: found.tokens for split, found in stats.items()},
        rows={split: found.rows for split, found in stats.items()},
        cleaning=_describe(survey.cleaning),
        reading={
            "source_rows": survey.cleaning.rows,
            "documents_used": survey.documents.total(),
            "stopped_at_max_tokens": budget is not None and stats["train"].tokens >= budget,
        },
    )


def initialise(recipe: Recipe, stage: Stage, prepared: Path) -> None:
    """Make the student's first weights: the same for the student, the control arm and the untrained arm."""
    if isinstance(recipe.teacher, MixtureTeacher) and not recipe.over_texts:
        # Here too: the recipe may weigh its teachers otherwise than when these were prepared.
        build.check_sources(recipe, set().union(*(PackedRows(prepared / split).sources() for split in SPLITS)))
    recorded = isinstance(recipe.teacher, RecordedTeacher)
    if recorded:
        build.check_recorded(
            recipe, cast_of(recipe, prepared), {split: open_texts(prepared, split) for split in SPLITS}
        )
    teacher = None if recorded else build.build_teacher(recipe, prepared)
    student, tokenizer, facts = _make_student(recipe, teacher, prepared)
    save_student(student, tokenizer, stage.folder / STUDENT)
    stage.finish(
        vocabulary=_answers(recipe, prepared, teacher, student, tokenizer=tokenizer),
        parameters=count_parameters(student),
        teacher_parameters=sum(map(count_parameters, models_of(teacher))) if teacher else None,
        **facts,
    )


def _answers(recipe: Recipe, prepared: Path, teacher: Any, student: Any, *, tokenizer: Any) -> int:
    """Tokens that teacher and student share; classes; or components of the teacher's vectors."""
    cast = cast_of(recipe, prepared)
    if cast.role is Role.ENCODER:
        return int(models_of(teacher)[0].config.get_text_config().hidden_size)
    if recipe.over_texts:
        return len(cast.labels)
    heads = [int(model.get_output_embeddings().weight.shape[0]) for model in (*models_of(teacher), student)]
    return min(int(shared_vocabulary(teacher.tokenizer, tokenizer)), *heads)


def _make_student(recipe: Recipe, teacher: Any, prepared: Path) -> tuple[Any, Any, dict[str, JsonValue]]:
    """The student, its tokenizer, and what is to be told of how it was made."""
    student = recipe.student
    if isinstance(student, PretrainedStudent):
        model = resolve_model(student.model, "student.model")
        cast = cast_of(recipe, prepared)
        loaded = cast.load(model, "fp32", torch.device("cpu"), "student.model", fresh_head=True)
        drawn = not cast.causal and type(loaded).__name__ not in (loaded.config.architectures or ())
        return loaded, load_tokenizer(model, "student.model"), {"head": "fresh"} if drawn else {}
    whole = models_of(teacher)[0]
    if isinstance(student, FreshStudent):
        sizes = student.config.model_dump(exclude_none=True)
        made = fresh_model(whole.config, sizes, recipe.seed, kind=build.AUTO_CLASSES[Role(recipe.task.kind)])
        return made, teacher.tokenizer, {}
    choice = choose_layers(student, teacher, None if recipe.over_texts else PackedRows(prepared / "validation"))
    facts: dict[str, JsonValue] = {"layers": list(choice.keep), "removed": [list(step) for step in choice.removed]}
    cut = cut_layers(whole, choice.keep)
    return to_distilbert(cut) if student.architecture == "distilbert" else cut, teacher.tokenizer, facts


def _pack(
    documents: Iterator[Placed],
    tokenizer: Any,
    writers: Mapping[Split, RowWriter],
    budget: float | None,
    *,
    bare: bool,
) -> Iterator[Placed]:
    """Write documents to the rows of their splits and hand them on, until the train split has `budget` tokens."""
    while batch := list(islice(documents, ENCODED_AT_ONCE)):
        encoded: dict[str, list[Encoded]] = {example.id: [] for _, example in batch}
        for page in encode_examples((example for _, example in batch), tokenizer, bare=bare):
            encoded[page.id].append(page)
        for split, example in batch:
            for page in encoded[example.id]:
                writers[split].add(page)
            yield split, example
            if budget is not None and writers["train"].tokens >= budget:
                return


def _counted(items: Iterable[Item], meter: Meter) -> Iterator[Item]:
    for item in items:
        yield item
        meter.advance(1)


def _describe(cleaning: Cleaning) -> dict[str, JsonValue]:
    counts = {"kept": cleaning.kept, "dropped": cleaning.dropped, "mended": cleaning.mended}
    return {f"{what}: {why}": count for what, counter in counts.items() for why, count in counter.items()}
