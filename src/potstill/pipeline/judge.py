"""The evaluate stage: all arms, one at a time, on the same held-out rows and prompts.

Refuses to keep two arms in memory at once: the teacher's final states are read first and kept instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from potstill.data import PackedRows
from potstill.engines import TeacherEngine, find_folder, models_of, pick_device
from potstill.evaluation import DocumentScores, compare_arms, folder_bytes, measure_speed, reliability, score_arm
from potstill.losses import position_scores
from potstill.pipeline import build
from potstill.pipeline.disk import read_json, write_json_atomic
from potstill.pipeline.inspection import SPEED_TOKENS, count_parameters
from potstill.pipeline.lessons import read_lessons
from potstill.pipeline.memory import peak_memory_bytes, release_memory, reset_peak_memory, resident_memory_bytes
from potstill.pipeline.places import resolve_model
from potstill.pipeline.progress import Meter, metered
from potstill.pipeline.prompts import Prompt, make_prompts
from potstill.pipeline.rundir import Stage
from potstill.pipeline.stages import HELD_OUT
from potstill.recipes import Recipe
from potstill.types import Head, Lesson, Measurement, Mixture, Sampling, States, TeacherLogits

__all__ = ["evaluate"]


@dataclass(frozen=True, slots=True)
class _Questions:
    """The same for every arm: held-out rows with what the teacher says of them, and prompts."""

    lessons: Sequence[Lesson]
    prompts: Sequence[Prompt]

    @property
    def texts(self) -> list[str]:
        return [prompt.prompt for prompt in self.prompts]


@dataclass(frozen=True, slots=True)
class _Answers:
    scores: DocumentScores
    completions: Sequence[str]
    parameters: int


def evaluate(recipe: Recipe, stage: Stage, prepared: Path, arms: Mapping[str, Path]) -> None:
    """Score, time and sample the teacher, then every arm of `arms`: model folders of untrained, control, student."""
    rows = PackedRows(prepared / "test")
    count = min(len(rows), recipe.evaluation.max_rows or len(rows))
    questions: _Questions | None = None
    answers: dict[str, _Answers] = {}
    costs: list[Measurement] = []
    models = {"teacher": _teacher_models(recipe), **{arm: [str(folder)] for arm, folder in arms.items()}}
    with metered("evaluate", len(models) * count, "rows") as meter:
        for arm, places in models.items():
            engine = _load_arm(recipe, arm, places[0])
            questions = questions or _ask_teacher(recipe, engine, rows, prepared)
            answers[arm] = _answer(recipe, engine, questions, meter)
            costs += _sizes(arm, answers[arm].parameters, places)
            timed = recipe.evaluation.speed and bool(questions.texts)
            device = engine.model.device
            speed, peak_bytes = _time_arm(stage, arm, engine, questions) if timed else ([], 0)
            del engine  # the last reference: the next arm must not find it in memory
            release_memory()
            costs += speed
            if peak_bytes:
                costs.append(_measured(arm, "peak_memory_bytes", peak_bytes - _held_bytes(device), "bytes"))
    scores = {arm: answer.scores for arm, answer in answers.items()}
    found = compare_arms(scores, recipe.evaluation.resamples, recipe.seed)
    write_json_atomic(stage.folder / "measurements.json", [asdict(measurement) for measurement in (*found, *costs)])
    sure = {arm: [asdict(one) for one in reliability(found.bins_DM3.sum(0))] for arm, found in scores.items()}
    write_json_atomic(stage.folder / "calibration.json", sure)
    write_json_atomic(stage.folder / "samples.json", _samples(questions.prompts if questions else [], answers))
    stage.finish(rows=count, documents=len(scores["teacher"].documents))


def _teacher_models(recipe: Recipe) -> list[str]:
    """Folders or hub ids of all models that teach."""
    return [resolve_model(member.model, key) for key, member in build.teachers_of(recipe).items()]


def _load_arm(recipe: Recipe, arm: str, model: str) -> TeacherEngine:
    """The teacher as it taught; other arms in the precision of their training, and on its device: speeds compare."""
    if arm == "teacher":
        return build.build_teacher(recipe)
    device = pick_device(recipe.teacher.device, "teacher.device")
    return build.build_engine(model, recipe.training.precision, device, f"evaluate ({arm})")


def _ask_teacher(recipe: Recipe, teacher: TeacherEngine, rows: PackedRows, prepared: Path) -> _Questions:
    settings = recipe.evaluation
    lessons = list(read_lessons(teacher, rows, settings.max_rows, at_once=settings.batch_rows))
    documents: Any = read_json(prepared / HELD_OUT)
    prompts = make_prompts(
        documents,
        teacher.tokenizer,
        count=settings.sample_prompts,
        tokens=settings.sample_tokens,
        longest=recipe.data.sequence_length,
    )
    return _Questions(_with_own_head(lessons), prompts)


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


def _answer(recipe: Recipe, engine: TeacherEngine, questions: _Questions, meter: Meter) -> _Answers:
    def lessons() -> Iterator[Lesson]:
        for lesson in questions.lessons:
            yield lesson
            meter.advance(len(lesson.batch))

    scores = score_arm(engine, lessons(), position_scores)
    completions = engine.generate(questions.texts, Sampling(max_new_tokens=recipe.evaluation.sample_tokens))
    return _Answers(scores, completions, sum(map(count_parameters, models_of(engine))))


def _samples(prompts: Sequence[Prompt], answers: Mapping[str, _Answers]) -> list[dict[str, Any]]:
    return [
        {**asdict(prompt), "completions": {arm: answer.completions[index] for arm, answer in answers.items()}}
        for index, prompt in enumerate(prompts)
    ]


def _sizes(arm: str, parameters: int, models: Sequence[str]) -> list[Measurement]:
    found = [_measured(arm, "parameters", parameters, "")]
    places = [find_folder(model) for model in models]  # a teacher's may be a hub id
    sizes = [folder_bytes(place) for place in places if place]
    return [*found, _measured(arm, "folder_bytes", sum(sizes), "bytes")] if len(sizes) == len(places) else found


def _measured(arm: str, name: str, value: float, unit: str) -> Measurement:
    return Measurement(arm, name, "test", value, None, None, 1, unit)


@torch.inference_mode()
def _time_arm(stage: Stage, arm: str, engine: TeacherEngine, questions: _Questions) -> tuple[list[Measurement], int]:
    """Speed, and the largest memory in use meanwhile in bytes, 0 where that cannot be known."""
    stage.keep_peak()
    device = engine.model.device
    fresh = _reset_peak(device)
    speed = measure_speed(
        engine,
        questions.lessons[0].batch,
        questions.texts,
        new_tokens=SPEED_TOKENS,
    )
    return speed.measurements(arm), _peak_bytes(device) if fresh else 0


def _reset_peak(device: torch.device) -> bool:
    """Measure peak memory from now on; False where that cannot be done."""
    release_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    return reset_peak_memory()


def _peak_bytes(device: torch.device) -> int:
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_memory_bytes()


def _held_bytes(device: torch.device) -> int:
    """What is in use now."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else resident_memory_bytes()
