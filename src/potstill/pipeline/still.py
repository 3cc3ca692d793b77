"""The stage static: a static-embedding classifier beside the student, taught by the same teacher.

Refuses a teacher that has no encoder here to distil embeddings from.
"""

from __future__ import annotations

from collections.abc import Sequence

from potstill.engines import models_of
from potstill.errors import RecipeError
from potstill.pipeline import build
from potstill.pipeline.arms import open_teacher
from potstill.pipeline.cast import cast_of
from potstill.pipeline.course import Course, begin, take
from potstill.pipeline.lessons import Inputs
from potstill.pipeline.memory import release_memory
from potstill.pipeline.objective import Answers, build_examiner, build_objective
from potstill.pipeline.places import STUDENT
from potstill.pipeline.rows import held_out_batches, held_out_lessons, open_rows
from potstill.pipeline.rundir import Stage
from potstill.pipeline.stopping import Stopping
from potstill.recipes import Recipe
from potstill.recipes.losses import VocabularyTerm
from potstill.recipes.schema import RecordedTeacher, StaticStudent
from potstill.students import (
    StaticAnswers,
    StaticClassifier,
    StaticTokens,
    distil_static,
    save_static,
    tokenizer_of_rows,
)
from potstill.training import RowSource
from potstill.types import Wants

__all__ = ["train_static"]


def train_static(recipe: Recipe, stage: Stage, inputs: Inputs, *, stopping: Stopping) -> None:
    """Distil the teacher's tokens into vectors, then train these with a linear layer on the teacher's answers.

    Losses over layers are left out: there are none. Raises Interrupted, after saving, when somebody asks to stop.
    """
    spec = recipe.static
    if spec is None:
        raise ValueError("the recipe asks for no static student")
    settings, cast = spec.training, cast_of(recipe, inputs.prepared)
    accelerator = begin(settings, recipe.seed)
    tokens = _tokens(recipe, spec, inputs)
    tokenizer, model = tokenizer_of_rows(tokens.tokenizer), StaticClassifier(tokens, len(cast.labels))
    answers = Answers.of(recipe, inputs.vocabulary)
    terms = [term for term in recipe.losses if isinstance(term, VocabularyTerm)]
    objective, examiner = build_objective(terms, answers, None, None), build_examiner(answers, None, None)
    rows = open_rows(recipe, cast, inputs.prepared, tokenizer=tokenizer, training=settings)
    teacher, _ = open_teacher(recipe, inputs)
    held_out = held_out_batches(
        recipe,
        cast,
        inputs.prepared,
        tokenizer=tokenizer,
        most=settings.validation_rows,
        at_once=min(settings.rows_at_once, settings.validation_rows),
        split="validation",
    )
    source = RowSource(
        rows.rows,
        seed=recipe.seed,
        batch_rows=settings.batch_rows,
        rows_at_once=settings.rows_at_once,
        teacher=teacher if objective.needs else None,
        wants=Wants(final=True),
        order=rows.order,
    )
    steps = build.steps_of(settings, recipe.data.sequence_length, len(rows))
    lessons = held_out_lessons(held_out, teacher, Wants(final=True))
    course = Course(model, objective, source, accelerator, steps, lessons, examiner, settings.batch_rows, "texts")

    def save() -> Sequence[str]:
        save_static(StaticAnswers(model, tokens.tokenizer, cast.labels, cast.multi_label), stage.folder / STUDENT)
        return [STUDENT]

    label, tracked = "train static", f"{recipe.name}-static"
    take(course, settings, stage, label=label, tracked=tracked, stopping=stopping, save=save, facts=rows.facts)


def _tokens(recipe: Recipe, spec: StaticStudent, inputs: Inputs) -> StaticTokens:
    """The teacher's tokens with a vector each; the teacher is let go."""
    if isinstance(recipe.teacher, RecordedTeacher):
        raise RecipeError(
            "static: embeddings are distilled from the teacher's encoder, but teacher.kind=recorded has none here. "
            "Remove static, or use another teacher."
        )
    teacher = build.build_teacher(recipe, inputs.prepared)
    tokens = distil_static(models_of(teacher)[0].float(), teacher.tokenizer, dimensions=spec.dimensions)
    del teacher
    release_memory()
    return tokens
