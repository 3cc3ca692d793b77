"""The evaluate stage: all arms, one at a time, on the same held-out rows and prompts.

Refuses to keep two arms in memory at once: the teacher's final states are read first and kept instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue

from potstill.data import PackedRows
from potstill.engines import models_of, pick_device
from potstill.evaluation import DocumentScores, compare_arms, measure_speed, reliability, score_arm
from potstill.losses import position_scores
from potstill.pipeline import build
from potstill.pipeline.cast import cast_of
from potstill.pipeline.disk import read_json, write_json_atomic
from potstill.pipeline.footprint import measure_peak, measure_sizes, peak_bytes, reset_peak
from potstill.pipeline.inspection import SPEED_TOKENS, count_parameters
from potstill.pipeline.memory import release_memory
from potstill.pipeline.places import resolve_model
from potstill.pipeline.progress import Meter, metered
from potstill.pipeline.prompts import Prompt, make_prompts
from potstill.pipeline.rows import Silent, held_out_batches, held_out_lessons
from potstill.pipeline.rundir import Stage
from potstill.pipeline.stages import HELD_OUT
from potstill.recipes import Recipe
from potstill.types import Head, Lesson, Measurement, Mixture, Offer, Sampling, States, TeacherLogits, Wants

__all__ = ["evaluate"]

NOT_MEASURED = (
    "the teacher is behind an API and was not measured on the held-out rows: what the student kept of it is not known, "
    "only what it gained"
)


@dataclass(frozen=True, slots=True)
class _Questions:
    """The same for every arm: held-out rows with what the teacher says of them, where there is one, and prompts."""

    lessons: Sequence[Lesson]
    prompts: Sequence[Prompt]
    taught: bool

    @property
    def texts(self) -> list[str]:
        return [prompt.prompt for prompt in self.prompts]


@dataclass(frozen=True, slots=True)
class _Answers:
    scores: DocumentScores
    completions: Sequence[str]
    parameters: int


def evaluate(recipe: Recipe, stage: Stage, prepared: Path, arms: Mapping[str, Path]) -> None:
    """Score, time and sample the teacher where it is here, then every arm of `arms`.

    These are model folders of untrained, control and student.
    """
    rows = len(PackedRows(prepared / "test"))
    count = min(rows, recipe.evaluation.max_rows or rows)
    questions: _Questions | None = None
    answers: dict[str, _Answers] = {}
    costs: list[Measurement] = []
    taught = _teacher_models(recipe)
    models = {**({"teacher": taught} if taught else {}), **{arm: [str(folder)] for arm, folder in arms.items()}}
    with metered("evaluate", len(models) * count, "rows") as meter:
        for arm, places in models.items():
            engine = _load_arm(recipe, arm, places[0])
            questions = questions or _ask_first(recipe, engine, prepared, teaches=bool(taught))
            answers[arm] = _answer(recipe, engine, questions, meter)
            costs += measure_sizes(arm, answers[arm].parameters, places)
            timed = recipe.evaluation.speed and (bool(questions.texts) or Offer.TEXT not in engine.offers)
            device = engine.model.device
            speed, peak = _time_arm(stage, arm, engine, questions) if timed else ([], 0)
            del engine  # the last reference: the next arm must not find it in memory
            release_memory()
            costs += speed
            costs += measure_peak(arm, peak, device)
    scores = {arm: answer.scores for arm, answer in answers.items()}
    found = compare_arms(scores, recipe.evaluation.resamples, recipe.seed)
    write_json_atomic(stage.folder / "measurements.json", [asdict(measurement) for measurement in (*found, *costs)])
    sure = {arm: [asdict(one) for one in reliability(found.bins_DM3.sum(0))] for arm, found in scores.items()}
    write_json_atomic(stage.folder / "calibration.json", sure)
    write_json_atomic(stage.folder / "samples.json", _samples(questions.prompts if questions else [], answers))
    notes: list[JsonValue] = [] if taught else [NOT_MEASURED]
    stage.finish(rows=count, documents=len(next(iter(scores.values())).documents), notes=notes)


def _teacher_models(recipe: Recipe) -> list[str]:
    """Folders or hub ids of all models that teach and are here."""
    return [resolve_model(member.model, key) for key, member in build.teachers_of(recipe).items()]


def _load_arm(recipe: Recipe, arm: str, model: str) -> Any:
    """The teacher as it taught; other arms in the precision of their training, and on its device: speeds compare."""
    if arm == "teacher":
        return build.build_teacher(recipe)
    device = pick_device(recipe.teacher.device, "teacher.device")
    return build.build_engine(model, recipe.training.precision, device, f"evaluate ({arm})", cast=cast_of(recipe))


def _ask_first(recipe: Recipe, first: Any, prepared: Path, *, teaches: bool) -> _Questions:
    """The questions, with what the first arm says of them where it is the teacher."""
    settings = recipe.evaluation
    batches = held_out_batches(
        recipe,
        cast_of(recipe),
        prepared,
        tokenizer=first.tokenizer,
        most=settings.max_rows,
        at_once=settings.batch_rows,
        split="test",
    )
    # Of masked rows, what the masks hide is asked, and no other position.
    asked = (replace(batch, taught_BT=None) for batch in batches)
    lessons = held_out_lessons(asked, first if teaches else Silent(), Wants(final=True))
    if Offer.TEXT not in first.offers:
        return _Questions(_with_own_head(lessons), [], teaches)
    documents: Any = read_json(prepared / HELD_OUT)
    prompts = make_prompts(
        documents,
        first.tokenizer,
        count=settings.sample_prompts,
        tokens=settings.sample_tokens,
        longest=recipe.data.sequence_length,
    )
    return _Questions(_with_own_head(lessons), prompts, teaches)


def _with_own_head(lessons: list[Lesson]) -> list[Lesson]:
    """The lessons with one copy of every head, so that they do not keep the teacher's embeddings alive."""
    copies: dict[int, Head] = {}

    def own(states: States) -> States:
        head, key = states.head, states.head.weight_VD.data_ptr()
        if key not in copies:
            bias_V = None if head.bias_V is None else head.bias_V.clone()
            copies[key] = replace(head, weight_VD=head.weight_VD.clone(), bias_V=bias_V)
        return replace(states, head=copies[key])

    def with_own(logits: TeacherLogits | None) -> TeacherLogits | None:
        if isinstance(logits, Mixture):
            return replace(logits, members=tuple(map(own, logits.members)))
        return own(logits) if isinstance(logits, States) else logits

    return [replace(lesson, signal=replace(lesson.signal, logits=with_own(lesson.signal.logits))) for lesson in lessons]


def _answer(recipe: Recipe, engine: Any, questions: _Questions, meter: Meter) -> _Answers:
    def lessons() -> Iterator[Lesson]:
        for lesson in questions.lessons:
            yield lesson
            meter.advance(len(lesson.batch))

    scores = score_arm(engine, lessons(), position_scores, alone=not questions.taught)
    sampling = Sampling(max_new_tokens=recipe.evaluation.sample_tokens)
    completions = engine.generate(questions.texts, sampling) if questions.texts else []
    return _Answers(scores, completions, sum(map(count_parameters, models_of(engine))))


def _samples(prompts: Sequence[Prompt], answers: Mapping[str, _Answers]) -> list[dict[str, Any]]:
    return [
        {**asdict(prompt), "completions": {arm: answer.completions[index] for arm, answer in answers.items()}}
        for index, prompt in enumerate(prompts)
    ]


@torch.inference_mode()
def _time_arm(stage: Stage, arm: str, engine: Any, questions: _Questions) -> tuple[list[Measurement], int]:
    """Speed, and the largest memory in use meanwhile in bytes, 0 where that cannot be known."""
    stage.keep_peak()
    device = engine.model.device
    fresh = reset_peak(device)
    speed = measure_speed(
        engine,
        questions.lessons[0].batch,
        questions.texts,
        new_tokens=SPEED_TOKENS,
    )
    return speed.measurements(arm), peak_bytes(device) if fresh else 0
