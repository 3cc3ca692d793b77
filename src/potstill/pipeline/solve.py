"""The evaluate stage of a student that learned what a teacher wrote: every arm answers the held-out prompts.

The same prompts, sampling and verifier for untrained, control and student, and for the teacher behind its API. Refuses
to keep two arms in memory at once, and to grade an answer that did not come to its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from potstill.data import PackedRows
from potstill.engines import models_of, pick_device
from potstill.engines.local import NO_ROOM
from potstill.evaluation import PASS, compare_likelihoods, compare_solvers, measure_speed
from potstill.losses import position_scores
from potstill.pipeline import build
from potstill.pipeline.authors import check_spent, opened_author
from potstill.pipeline.cast import cast_of
from potstill.pipeline.disk import write_json_atomic
from potstill.pipeline.footprint import measure_peak, measure_sizes, peak_bytes, reset_peak
from potstill.pipeline.grading import Grader, opened_grader
from potstill.pipeline.inspection import SPEED_TOKENS, count_parameters
from potstill.pipeline.memory import release_memory
from potstill.pipeline.progress import metered
from potstill.pipeline.prompts import render_prompt
from potstill.pipeline.questions import USER
from potstill.pipeline.rundir import Stage
from potstill.pipeline.stopping import Stopping
from potstill.pipeline.written import Question, read_questions
from potstill.recipes import Recipe
from potstill.recipes.generate import Generate
from potstill.types import Completion, Measurement, Request, Sampling, States, Wants

__all__ = ["evaluate_answers", "teacher_requests"]

CLEAN, LEAKED = "never leaked", "leaked"
"""Slices of the held-out prompts: training text that shared words with these was removed, or there was none."""

SHOWN_CHARACTERS = 2000
"""Of an answer in the report."""

CUT = " [did not come to an end]"
"""After such an answer in the report."""

UNKNOWN, REFUSED = "unknown", "refused"

_WRONG = {
    UNKNOWN: "of which the verifier could not say whether they are right",
    "length": "that did not come to an end (evaluation.answers.max_tokens, or the model's positions)",
    NO_ROOM: "to prompts that fill the model's positions, so that none could be given,",
    REFUSED: "that were refused or not given",
}
"""Why an answer counts as wrong that was not judged so."""

_OPEN, _CLOSE = "<think>", "</think>"

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Solved:
    """What came of one arm.

    answers  the first to each prompt, as the report shows them
    right_P  of each prompt's answers the share that is right [P]
    counted  answers that count as wrong: why, and how many
    """

    answers: Sequence[str]
    right_P: Floats
    counted: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Found:
    """What evaluation collects, arm by arm."""

    solved: dict[str, _Solved] = field(default_factory=dict)
    nll: dict[str, Floats] = field(default_factory=dict)
    counts_D: list[Floats] = field(default_factory=list)
    costs: list[Measurement] = field(default_factory=list)


def evaluate_answers(
    recipe: Recipe, stage: Stage, folder: Path, arms: Mapping[str, Path], *, stopping: Stopping
) -> None:
    """Ask and verify the teacher, then every arm of `arms`: model folders of untrained, control, student."""
    questions, found = read_questions(folder / "generate"), _Found()
    asked = _asked(recipe, questions)
    with closing(opened_grader(_spec(recipe))) as grader:
        found.solved["teacher"] = _ask_teacher(recipe, asked, grader, stopping)
        with metered("evaluate", len(arms), "arms") as meter:
            for arm, place in arms.items():
                _examine(recipe, stage, (arm, place), asked, found=found, grader=grader, prepared=folder / "prepare")
                meter.advance(1)
    rows = [*_compare(recipe, asked, found), *found.costs]
    write_json_atomic(stage.folder / "measurements.json", [asdict(row) for row in rows])
    write_json_atomic(stage.folder / "calibration.json", {})
    write_json_atomic(stage.folder / "samples.json", _samples(recipe, asked, found))
    judged = found.solved if _spec(recipe).verify is not None else {}
    notes = _notes({arm: solved.counted for arm, solved in judged.items()})
    stage.finish(prompts=len(asked), attempts=recipe.evaluation.attempts, notes=[*notes])


def _spec(recipe: Recipe) -> Generate:
    if recipe.generate is None:
        raise ValueError("the recipe asks no teacher to write")
    return recipe.generate


def teacher_requests(recipe: Recipe, questions: Sequence[Question]) -> list[Request]:
    """What the teacher is asked about the held-out prompts: as every arm is, but with its own system message always.

    A student that does not see that message in training is tested without it.
    """
    spec, settings = _spec(recipe), recipe.evaluation
    hidden = None if spec.teach_system else spec.system
    system = () if hidden is None else ({"role": "system", "content": hidden},)
    return [
        Request(
            messages=(*system, *question.messages),
            max_tokens=settings.answers.max_tokens,
            temperature=settings.answers.temperature,
            top_p=settings.answers.top_p,
            stop=tuple(settings.answers.stop),
            sample=number,
            user=str(question.row.get(USER) or ""),
        )
        for question in _asked(recipe, questions)
        for number in range(settings.attempts)
    ]


def _asked(recipe: Recipe, questions: Sequence[Question]) -> Sequence[Question]:
    """The prompts that need answers: without a verifier, those that the report shows."""
    return questions if _spec(recipe).verify is not None else questions[: recipe.evaluation.sample_prompts]


def _ask_teacher(recipe: Recipe, questions: Sequence[Question], grader: Grader, stopping: Stopping) -> _Solved:
    """Its answers, from the ledger: the stage generate has asked for them already."""
    requests = teacher_requests(recipe, questions)
    with (
        metered("evaluate (teacher)", len(requests), "answers") as meter,
        opened_author(recipe, meter.advance, stopping) as author,
        stopping.held(),
    ):
        found = author.ask(requests)
        check_spent(recipe, author.tally, partial=False)
        said = [_said(answer or Completion("", finish=REFUSED), recipe.evaluation.answers.stop) for answer in found]
    return _grade(questions, said, recipe.evaluation.attempts, grader)


def _examine(
    recipe: Recipe,
    stage: Stage,
    arm_and_place: tuple[str, Path],
    questions: Sequence[Question],
    *,
    found: _Found,
    grader: Grader,
    prepared: Path,
) -> None:
    """Answers, likelihood, size and speed of one arm."""
    arm, place = arm_and_place
    device = pick_device(recipe.training.device, "training.device")
    engine = build.build_engine(
        str(place), recipe.training.precision, device, f"evaluate ({arm})", cast=cast_of(recipe)
    )
    settings = recipe.evaluation
    sampling = Sampling(
        max_new_tokens=settings.answers.max_tokens,
        temperature=settings.answers.temperature,
        top_p=settings.answers.top_p,
    )
    prompts = [render_prompt(question.messages, engine.tokenizer) for question in questions]
    torch.manual_seed(recipe.seed)
    asked = [one for one in prompts for _ in range(settings.attempts)]
    answers = zip(engine.answer(asked, sampling), asked, strict=True)
    said = [_said(answer, settings.answers.stop, prompt) for answer, prompt in answers]
    found.solved[arm] = _grade(questions, said, settings.attempts, grader)
    _score(recipe, engine, prepared, arm=arm, found=found)
    found.costs.extend(measure_sizes(arm, sum(map(count_parameters, models_of(engine))), [str(place)]))
    if settings.speed:
        found.costs.extend(_time(stage, arm, engine, prompts, prepared=prepared))
    del engine  # the last reference: the next arm must not find it in memory
    release_memory()


def _said(answer: Completion, stops: Sequence[str], prompt: str = "") -> Completion:
    """What is said after the reasoning, where there is any, and before what an answer ends at; and how it finished.

    One that stopped while it was thinking finished as cut off. A `prompt` may have begun the thinking.
    """
    text, finish = answer.text, answer.finish
    for stop in stops:
        text, found, _ = text.partition(stop)
        finish = "stop" if found else finish
    begun = prompt.rstrip().endswith(_OPEN) or text.lstrip().startswith(_OPEN)
    only_thought = (begun and _CLOSE not in text) or bool(answer.reasoning and not text)
    if only_thought and finish == "stop":
        finish = "length"
    return Completion(text.rpartition(_CLOSE)[2].strip(), finish=finish)


def _grade(questions: Sequence[Question], said: Sequence[Completion], attempts: int, grader: Grader) -> _Solved:
    """An answer that did not end by itself is no answer, whoever gave it: what it has of one counts for nothing."""
    asked = [question for question in questions for _ in range(attempts)]
    texts = [answer.text if answer.finish == "stop" else "" for answer in said]
    verdicts = grader.grade([(text, question.row) for text, question in zip(texts, asked, strict=True)])
    right = [verdict.right is True and answer.finish == "stop" for verdict, answer in zip(verdicts, said, strict=True)]
    unknown = [verdict.right is None for verdict in verdicts]
    counted = Counter(answer.finish for answer in said if answer.finish != "stop")
    counted[UNKNOWN] = sum(answer.finish == "stop" and unclear for answer, unclear in zip(said, unknown, strict=True))
    right_P = np.array(right, np.float64).reshape(-1, attempts).mean(1)
    return _Solved([_shown(answer) for answer in said[::attempts]], right_P, +counted)


def _shown(answer: Completion) -> str:
    return answer.text[:SHOWN_CHARACTERS] + (CUT if answer.finish != "stop" else "")


@torch.inference_mode()
def _score(recipe: Recipe, engine: Any, prepared: Path, *, arm: str, found: _Found) -> None:
    """The nll of what the teacher wrote about held-out prompts, summed by document."""
    rows, settings = PackedRows(prepared / "test"), recipe.evaluation
    most = min(len(rows), settings.max_rows or len(rows))
    sums: dict[str, list[float]] = {}
    for start in range(0, most, settings.batch_rows):
        batch = rows.batch(range(start, min(start + settings.batch_rows, most)))
        said = engine.read(batch, Wants(final=True)).logits
        if not isinstance(said, States):
            raise ValueError(f"{arm} gives no states")
        nll_N = position_scores(said, said, batch.targets_N.to(said.rows_ND.device))["nll"].double().cpu().tolist()
        for name, value in zip(_documents(batch), nll_N, strict=True):
            sums.setdefault(name, []).append(value)
    found.nll[arm] = np.array([sum(values) for values in sums.values()], np.float64)
    if not found.counts_D:
        found.counts_D.append(np.array([len(values) for values in sums.values()], np.float64))


def _documents(batch: Any) -> Iterator[str]:
    """The document of every supervised position, in batch order."""
    rows_N, _ = batch.supervised_BT.nonzero(as_tuple=True)
    segments_N = batch.segments_BT[batch.supervised_BT]
    for row, segment in zip(rows_N.tolist(), segments_N.tolist(), strict=True):
        yield batch.examples[row][segment - 1]


@torch.inference_mode()
def _time(stage: Stage, arm: str, engine: Any, prompts: Sequence[str], *, prepared: Path) -> list[Measurement]:
    stage.keep_peak()
    device = engine.model.device
    fresh = reset_peak(device)
    batch = PackedRows(prepared / "test").batch([0])
    speed = measure_speed(engine, batch, prompts[:4], new_tokens=SPEED_TOKENS).measurements(arm)
    return [*speed, *measure_peak(arm, peak_bytes(device) if fresh else 0, device)]


def _compare(recipe: Recipe, questions: Sequence[Question], found: _Found) -> list[Measurement]:
    settings = recipe.evaluation
    leaked_P = np.array([question.leaked for question in questions], np.float64)
    within = {CLEAN: 1.0 - leaked_P, LEAKED: leaked_P} if leaked_P.any() else None
    right = {arm: solved.right_P for arm, solved in found.solved.items()}
    likelihoods = compare_likelihoods(found.nll, found.counts_D[0], resamples=settings.resamples, seed=recipe.seed)
    if _spec(recipe).verify is None:
        return likelihoods
    passes = compare_solvers(right, resamples=settings.resamples, seed=recipe.seed, within=within)
    return [*passes, *likelihoods]


def _samples(recipe: Recipe, questions: Sequence[Question], found: _Found) -> list[dict[str, Any]]:
    """The first prompts with every arm's first answer."""
    shown = []
    for number, question in enumerate(questions[: recipe.evaluation.sample_prompts]):
        answers = {arm: solved.answers[number] for arm, solved in found.solved.items()}
        reference = str(question.row.get("answer", ""))[:SHOWN_CHARACTERS]
        shown.append({"prompt": str(question.messages[-1]["content"]), "reference": reference, "completions": answers})
    return shown


def _notes(counted: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Of every reason for which answers count as wrong, how many of which arm."""
    reasons = list(dict.fromkeys([*_WRONG, *(reason for found in counted.values() for reason in found)]))
    notes = []
    for reason in reasons:
        arms = ", ".join(f"{arm} {found[reason]:,}" for arm, found in counted.items() if found.get(reason))
        told = _WRONG.get(reason, f"that finished with {reason}")
        notes += [f"{PASS} counts answers {told} as wrong: {arms}"] if arms else []
    return notes
