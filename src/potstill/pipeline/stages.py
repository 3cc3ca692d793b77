"""From words and a teacher to packed rows and a student's first weights: the stages prepare and initialise.

Refuses to hold anything between stages: a stage that starts after a crash finds all it needs on disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import JsonValue

from potstill.data import Cleaning, Encoded, PackedRows, PackedStats, encode_examples
from potstill.data.pack import RowWriter
from potstill.engines import load_tokenizer, models_of, pick_device
from potstill.errors import DataError, RecipeError
from potstill.pipeline import build
from potstill.pipeline.cast import cast_of
from potstill.pipeline.disk import write_json_atomic
from potstill.pipeline.inspection import count_parameters
from potstill.pipeline.layers import choose_layers
from potstill.pipeline.places import STUDENT, resolve_model
from potstill.pipeline.progress import Meter, metered
from potstill.pipeline.prompts import dump_examples
from potstill.pipeline.rows import CONTROL
from potstill.pipeline.rundir import Stage
from potstill.pipeline.survey import SPLITS, Placed, survey_data
from potstill.pipeline.texts import open_texts, prepare_texts
from potstill.pipeline.written import UNVERIFIED, read_rows
from potstill.recipes import Recipe
from potstill.recipes.schema import (
    FreshStudent,
    LayersStudent,
    MaskedLM,
    MixtureTeacher,
    PretrainedStudent,
    RecordedTeacher,
)
from potstill.signals import shared_vocabulary
from potstill.students import cut_layers, fresh_model, save_student, to_distilbert
from potstill.types import Role

__all__ = ["HELD_OUT", "initialise", "open_tokenizer", "prepare"]

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
    tokenizer = open_tokenizer(recipe)
    framed = isinstance(recipe.task, MaskedLM)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    length, budget = recipe.data.sequence_length, recipe.data.max_tokens
    thinking = recipe.generate is None or recipe.generate.thinking
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
                    overlong="drop" if recipe.generate else "split",
                )
            )
            for split in _splits_of(recipe)
        }
        survey = survey_data(
            recipe,
            through=lambda documents: _counted(
                _pack(documents, tokenizer, writers, budget, bare=framed, thinking=thinking), meter
            ),
        )
        build.check_sources(recipe, survey.sources)
        if CONTROL in writers:
            unverified = read_rows(recipe.folder / "generate" / UNVERIFIED)
            own = {"train": writers[CONTROL]}
            deque(_pack(unverified, tokenizer, own, budget, bare=False, thinking=thinking), maxlen=0)
        stats = {split: writer.finish() for split, writer in writers.items()}
    _check_overlong(recipe, stats)
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
        overlong={split: found.overlong for split, found in stats.items() if found.overlong},
    )


def _splits_of(recipe: Recipe) -> tuple[str, ...]:
    """The folders of rows: of what a teacher wrote, the control arm has its own."""
    return (*SPLITS, CONTROL) if recipe.generate and recipe.has_control else SPLITS


def open_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer of the run: the teacher's where there is one here, else the student's own."""
    for key, first in build.teachers_of(recipe).items():
        return load_tokenizer(resolve_model(first.model, key), key)
    own = getattr(recipe.student, "model", None)
    if own is None:
        raise RecipeError(
            f"student.kind: {recipe.student.kind} is made from the teacher's model, but teacher.kind="
            f"{recipe.teacher.kind} has none here. Use student.kind=model, or layers of a student.model."
        )
    return load_tokenizer(resolve_model(own, "student.model"), "student.model")


def _check_overlong(recipe: Recipe, stats: Mapping[str, PackedStats]) -> None:
    """Raises DataError where too many of the teacher's answers do not fit: those left out are not a random sample."""
    if recipe.generate is None:
        return
    for split, found in stats.items():
        if found.overlong_share > recipe.generate.overlong:
            raise DataError(
                f"data.sequence_length: {found.overlong:,} of {found.conversations:,} {split} answers "
                f"({found.overlong_share:.1%}) end beyond {recipe.data.sequence_length} tokens and would be left out. "
                "Raise it, lower generate.sampling.max_tokens, or accept it with generate.overlong."
            )


def initialise(recipe: Recipe, stage: Stage, prepared: Path) -> None:
    """Make the student's first weights: the same for the student, the control arm and the untrained arm."""
    if isinstance(recipe.teacher, MixtureTeacher) and not recipe.over_texts:
        # Here too: the recipe may weigh its teachers otherwise than when these were prepared.
        build.check_sources(recipe, set().union(*(PackedRows(prepared / split).sources() for split in SPLITS)))
    if isinstance(recipe.teacher, RecordedTeacher):
        build.check_recorded(
            recipe, cast_of(recipe, prepared), {split: open_texts(prepared, split) for split in SPLITS}
        )
    teacher = build.build_teacher(recipe, prepared) if build.teachers_of(recipe) else None
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
    models = (*models_of(teacher), student) if teacher else (student,)
    heads = [int(model.get_output_embeddings().weight.shape[0]) for model in models]
    return min(int(shared_vocabulary(teacher.tokenizer if teacher else tokenizer, tokenizer)), *heads)


def _make_student(recipe: Recipe, teacher: Any, prepared: Path) -> tuple[Any, Any, dict[str, JsonValue]]:
    """The student, its tokenizer, and what is to be told of how it was made."""
    student = recipe.student
    if isinstance(student, PretrainedStudent):
        return _load_own(recipe, student.model, prepared, torch.device("cpu"))
    if isinstance(student, FreshStudent):
        whole, sizes = models_of(teacher)[0], student.config.model_dump(exclude_none=True)
        made = fresh_model(whole.config, sizes, recipe.seed, kind=build.AUTO_CLASSES[Role(recipe.task.kind)])
        return made, teacher.tokenizer, {}
    return _cut_student(recipe, student, teacher, prepared)


def _cut_student(
    recipe: Recipe, student: LayersStudent, teacher: Any, prepared: Path
) -> tuple[Any, Any, dict[str, JsonValue]]:
    """Layers of the teacher, or of the student's own model, which then judges itself which of them matter."""
    facts: dict[str, JsonValue] = {}
    if student.model is not None:
        device = pick_device(recipe.training.device, "training.device")
        model, tokenizer, facts = _load_own(recipe, student.model, prepared, device)
        teacher = cast_of(recipe, prepared).engine(model, tokenizer)
    choice = choose_layers(student, teacher, None if recipe.over_texts else PackedRows(prepared / "validation"))
    facts |= {"layers": list(choice.keep), "removed": [list(step) for step in choice.removed]}
    cut = cut_layers(models_of(teacher)[0], choice.keep)
    return to_distilbert(cut) if student.architecture == "distilbert" else cut, teacher.tokenizer, facts


def _load_own(
    recipe: Recipe, named: str, prepared: Path, device: torch.device
) -> tuple[Any, Any, dict[str, JsonValue]]:
    """The model that `student.model` names, its tokenizer, and whether its head is new."""
    model, cast = resolve_model(named, "student.model"), cast_of(recipe, prepared)
    loaded = cast.load(model, "fp32", device, "student.model", fresh_head=True)
    drawn = not cast.causal and type(loaded).__name__ not in (loaded.config.architectures or ())
    return loaded, load_tokenizer(model, "student.model"), {"head": "fresh"} if drawn else {}


def _pack(
    documents: Iterator[Placed],
    tokenizer: Any,
    writers: Mapping[str, RowWriter],
    budget: float | None,
    *,
    bare: bool,
    thinking: bool,
) -> Iterator[Placed]:
    """Write documents to the rows of their splits and hand them on, until the train split has `budget` tokens."""
    while batch := list(islice(documents, ENCODED_AT_ONCE)):
        encoded: dict[str, list[Encoded]] = {example.id: [] for _, example in batch}
        for page in encode_examples((example for _, example in batch), tokenizer, bare=bare, thinking=thinking):
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
