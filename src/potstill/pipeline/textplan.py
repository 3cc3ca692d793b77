"""What a run over texts will do and cost, before any weight is loaded.

Refuses to promise: what is estimated says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from potstill.data import LabelledText
from potstill.errors import RecipeError
from potstill.pipeline import build
from potstill.pipeline.cast import Cast, cast_of
from potstill.pipeline.chain import blaming, load_chain
from potstill.pipeline.inspection import Inspection
from potstill.pipeline.labelling import plan_rows
from potstill.pipeline.texts import TextSurvey, survey_texts
from potstill.recipes import Recipe
from potstill.recipes.schema import Classification, FinetuneTeacher, OpenAITeacher, RecordedTeacher, StoredSignals

__all__ = ["known_labels", "text_rows"]

TRAINED_BYTES = 16
"""Weight, gradient and two moments in float32, a weight."""

SAMPLED_TEXTS = 400


def text_rows(recipe: Recipe, found: Inspection, *, measure: bool) -> Iterator[tuple[str, str, str]]:
    """(what, how much, from) of the plan. Raises what is wrong with the data; RecipeError for `measure`."""
    if measure:
        raise RecipeError(
            f"--measure: times packed rows, which task.kind={recipe.task.kind} has none of. Leave it out; a run with "
            "--set training.steps=10 shows the pace."
        )
    survey = survey_texts(recipe, labels=known_labels(recipe))
    cast = cast_of(recipe)
    if survey.labels:
        build.check_recorded(recipe, replace(cast, labels=survey.labels.names), survey.texts)
    if found.teachers:
        share = found.student_parameters / found.teacher_parameters
        how = "fine-tuned first" if isinstance(recipe.teacher, FinetuneTeacher) else recipe.teacher.dtype
        yield "teacher", f"{found.teacher_parameters / 1e6:,.1f}M parameters, {how}", "config"
        yield "student", f"{found.student_parameters / 1e6:,.1f}M parameters, {share:.0%} of the teacher", "config"
    else:
        if isinstance(recipe.teacher, RecordedTeacher):
            yield "teacher", "answers recorded in a file", "recipe"
        yield "student", f"{found.student_parameters / 1e6:,.1f}M parameters", "config"
    sizes = ", ".join(f"{len(texts):,} for {split}" for split, texts in survey.texts.items())
    yield "texts", sizes, "data"
    yield from _label_rows(recipe, survey)
    yield from _token_rows(cast, survey, found)
    rows = len(survey.texts["train"])
    steps = build.count_steps(recipe, rows)
    yield "training", f"{steps:,} steps of {recipe.training.batch_rows} texts", "recipe"
    if isinstance(recipe.teacher, FinetuneTeacher):
        labelled = sum(text.label is not None for text in survey.texts["train"])
        own = recipe.teacher.training
        first = build.steps_of(own, recipe.data.sequence_length, labelled)
        yield "training: teacher", f"{first:,} steps of {own.batch_rows} texts", "recipe"
    arms = "student and control" if recipe.has_control else "student (no control: the gain stays unknown)"
    yield "arms", arms + (", and a static classifier" if recipe.static else ""), "recipe"
    if isinstance(recipe.signals, StoredSignals) and survey.labels:
        yield "signals", f"{4 * len(survey.labels)} bytes a text; no teacher in training", "recipe"
    trained = max(found.student_parameters, found.teacher_parameters)
    yield "memory", f"{(TRAINED_BYTES * trained + 1e9) / 1e9:.1f} GB", "estimated"
    if isinstance(recipe.teacher, OpenAITeacher) and survey.labels:
        yield from plan_rows(recipe, replace(cast, labels=survey.labels.names), survey.texts)
    else:
        yield "money", "0: every model runs here", "recipe"


def known_labels(recipe: Recipe) -> tuple[str, ...] | None:
    """The classes that a ready teacher names, or that an assistant will be trained on; None of any other.

    Raises what is wrong with the assistant's data.
    """
    for assistant in load_chain(recipe)[:1]:
        with blaming(assistant):
            found = survey_texts(assistant, labels=known_labels(assistant)).labels
        return found.names if found else None
    return build.ready_labels(recipe)


def _label_rows(recipe: Recipe, survey: TextSurvey) -> Iterator[tuple[str, str, str]]:
    if survey.labels is None:
        return
    train = survey.texts["train"]
    labelled = sum(text.label is not None for text in train)
    without = f", {len(train) - labelled:,} without a label" if labelled < len(train) else ""
    yield "labels", f"{len(survey.labels)} classes, {labelled:,} labelled texts to train on{without}", "data"
    if isinstance(recipe.task, Classification) and recipe.task.out_of_scope:
        outside = sum(text.label == recipe.task.out_of_scope for text in survey.texts["test"])
        yield "out of scope", f"{outside:,} texts for test", "data"
    for what, count in survey.changed.items():
        yield "data", f"{count:,} {what}", "data"


def _token_rows(cast: Cast, survey: TextSurvey, found: Inspection) -> Iterator[tuple[str, str, str]]:
    """How long the texts are for the student, by some of them."""
    train: tuple[LabelledText, ...] = survey.texts["train"]
    some = train[:: max(1, len(train) // SAMPLED_TEXTS)]
    lengths = [len(one) for one in found.student_tokenizer([_words(text) for text in some])["input_ids"]]
    over = sum(length > cast.length for length in lengths)
    mean = sum(lengths) / max(1, len(lengths))
    yield "tokens", f"{mean:.0f} a text, {over / max(1, len(lengths)):.1%} with more than {cast.length}", "some texts"


def _words(text: LabelledText) -> str:
    whole = text.text if isinstance(text.text, str) else " ".join(text.text)
    return whole if text.pair is None else f"{whole} {text.pair}"
