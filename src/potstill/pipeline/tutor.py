"""The stage finetune: the teacher is trained on the labels first, in a stage of its own, and kept for other runs.

Refuses to train again what a run beside this one has trained of the same model, data and settings.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.engines import load_tokenizer
from potstill.errors import DataError
from potstill.pipeline import build
from potstill.pipeline.cast import Cast, cast_of
from potstill.pipeline.chain import runs_folder
from potstill.pipeline.course import Course, begin, take
from potstill.pipeline.disk import hash_file, read_json, sync_tree, write_json_atomic
from potstill.pipeline.objective import Answers, build_objective
from potstill.pipeline.places import resolve_model
from potstill.pipeline.rows import TaskRows, held_out_batches, open_rows
from potstill.pipeline.rundir import Stage
from potstill.pipeline.stopping import Stopping
from potstill.recipes import Recipe
from potstill.recipes.losses import CrossEntropy
from potstill.recipes.schema import FinetuneTeacher, Training
from potstill.students import save_student
from potstill.training import RowSource
from potstill.types import Lesson

__all__ = ["TEACHER", "finetune"]

TEACHER = "teacher"
"""Folder name of the trained model within the stage, and of the folder of such models beside the runs."""

FACTS = "facts.json"
"""What is to be told of a kept teacher, and the hashes of its files."""


def finetune(recipe: Recipe, stage: Stage, prepared: Path, *, fingerprint: str, stopping: Stopping) -> None:
    """Train `teacher.model` on hard labels; or take it from beside the runs, where it was trained before.

    Raises Interrupted, after saving, when somebody asks to stop while it trains.
    """
    kept = runs_folder(recipe) / f"{TEACHER}s" / fingerprint
    facts = _facts_of(kept)
    if facts is not None:
        _link(kept, stage.folder)
        stage.finish(TEACHER, "metrics.jsonl", **{**facts, "found": str(kept)})
        return
    _train(recipe, stage, prepared, kept, stopping=stopping)


def _train(recipe: Recipe, stage: Stage, prepared: Path, kept: Path, *, stopping: Stopping) -> None:
    spec = recipe.teacher
    if not isinstance(spec, FinetuneTeacher):
        raise ValueError(f"teacher.kind={spec.kind} is not trained first")
    settings, cast = spec.training, cast_of(recipe, prepared)
    accelerator = begin(settings, recipe.seed)
    place = resolve_model(spec.model, "teacher.model")
    tokenizer = load_tokenizer(place, "teacher.model")
    model = cast.load(place, "fp32", accelerator.device, "teacher.model", fresh_head=True)
    if spec.learns == "head":
        _freeze_body(model)
    rows = open_rows(recipe, cast, prepared, tokenizer=tokenizer, training=settings)
    rows = labelled_rows(rows, cast, settings, "teacher.kind=finetune")
    steps = build.steps_of(settings, recipe.data.sequence_length, len(rows))
    objective = _objective(recipe, cast, model)
    held_out = held_out_batches(
        recipe,
        cast,
        prepared,
        tokenizer=tokenizer,
        most=settings.validation_rows,
        at_once=min(settings.rows_at_once, settings.validation_rows),
        split="validation",
    )
    course = Course(
        build.build_trainable(recipe, model, settings),
        objective.to(accelerator.device),
        RowSource(
            rows.rows,
            seed=recipe.seed,
            batch_rows=settings.batch_rows,
            rows_at_once=settings.rows_at_once,
            order=rows.order,
            prepare=rows.prepare,
        ),
        accelerator,
        steps,
        [Lesson(batch) for batch in held_out],
        objective,
        settings.batch_rows * (1 if recipe.over_texts else recipe.data.sequence_length),
        "texts" if recipe.over_texts else "tokens",
    )

    def save() -> Sequence[str]:
        save_student(model, tokenizer, stage.folder / TEACHER)
        return [TEACHER]

    new_head = type(model).__name__ not in (model.config.architectures or ())
    facts = {"model": spec.model, "learns": spec.learns, "new_head": new_head, "rows": len(rows), **rows.facts}
    take(
        course,
        settings,
        stage,
        label="finetune the teacher",
        tracked=f"{recipe.name}-teacher",
        stopping=stopping,
        save=save,
        facts=facts,
    )
    _keep(stage.folder, kept, {**facts, "steps": steps})


def labelled_rows(rows: TaskRows, cast: Cast, training: Training, key: str) -> TaskRows:
    """The rows that hard labels can teach: of texts those that are labelled, else all. Raises DataError for none."""
    found = rows.labelled(training, cast.seed)
    if not len(found):
        raise DataError(
            f"{key}: no training text has a label, so that there is nothing to learn without a teacher. Check "
            "data.label, or give labelled texts."
        )
    return found


def _objective(recipe: Recipe, cast: Cast, model: Any) -> Any:
    vocabulary = len(cast.labels) or model.get_output_embeddings().weight.shape[0]
    return build_objective([CrossEntropy(kind="cross_entropy")], Answers.of(recipe, vocabulary), model.config, None)


def _freeze_body(model: Any) -> None:
    """Leave learning to the head: whatever does not belong to the body that the model has in common with others.

    A pooler lies within the body, but is drawn and saved with a head.
    """
    body = {id(weight) for name, weight in model.base_model.named_parameters() if not name.startswith("pooler.")}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in body)


def _keep(folder: Path, kept: Path, facts: dict[str, Any]) -> None:
    """A copy beside the runs, whole or absent; files are linked where the disk can, so that it takes no room."""
    part = kept.with_name(f".{kept.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _link(folder, part)
    write_json_atomic(part / FACTS, {"facts": facts, "files": _hashes(part)})
    sync_tree(part)
    if _facts_of(kept) is None:
        shutil.rmtree(kept, ignore_errors=True)  # what lost a file would be in the way for ever
    try:
        part.rename(kept)
    except OSError:
        if _facts_of(kept) is None:
            raise
        shutil.rmtree(part)  # another run was first


def _facts_of(kept: Path) -> dict[str, Any] | None:
    """What is to be told of the teacher that is kept there; None where none is, or not all of it, as it was."""
    match read_json(kept / FACTS) if (kept / FACTS).is_file() else None:
        case {"facts": dict(facts), "files": dict(hashes)} if hashes == _hashes(kept):
            return facts
    return None


def _hashes(folder: Path) -> dict[str, str]:
    """Of the model's files and of its log: they are linked into runs, where a change would be one of all of them."""
    return {str(path.relative_to(folder)): hash_file(path) for path in _files(folder)}


def _files(folder: Path) -> list[Path]:
    return [path for path in (*sorted((folder / TEACHER).rglob("*")), folder / "metrics.jsonl") if path.is_file()]


def _link(source: Path, target: Path) -> None:
    """The model and its log, as links to the same bytes, or as copies on another disk."""
    for path in _files(source):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        try:
            os.link(path, place)
        except OSError:
            shutil.copyfile(path, place)
