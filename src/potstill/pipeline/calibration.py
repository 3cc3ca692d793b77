"""How fast this machine is at what the recipe asks: one short step of each arm, on some of its own words.

Refuses to guess from parameter counts: the real models are loaded and run in micro-batches of the real size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from potstill.data import PackedRows, encode_examples, write_rows
from potstill.engines import TeacherEngine, head_of, models_of, pick_device
from potstill.losses import Objective
from potstill.pipeline import build
from potstill.pipeline.capture import make_transcript, sample_fidelity
from potstill.pipeline.fidelity import Fidelity
from potstill.pipeline.objective import Answers, build_objective, terms_of, wants_of
from potstill.pipeline.recall import salt_for, spec_for, temperature_of
from potstill.pipeline.survey import Survey
from potstill.pipeline.transcribe import capture_rows
from potstill.recipes import Recipe
from potstill.recipes.schema import StoredSignals
from potstill.signals import Stamp, StoredReader, encoding_of, open_store
from potstill.types import Batch, Lesson, Reader, Signal, Wants

__all__ = ["Pace", "measure_pace"]

MOST_ROWS = 8
"""Larger micro-batches are not faster a row, and a plan should not take minutes."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds a packed row: of training, by arm, and of evaluation, all arms together (without speed and prompts).

    capture   of the teacher's reading, where signals are stored; encoding included
    fidelity  how near to the teacher's own words those are that are stored
    """

    training: dict[str, float]
    evaluation: float
    capture: float | None = None
    fidelity: Fidelity | None = None


def measure_pace(recipe: Recipe, teacher: TeacherEngine, survey: Survey, *, vocabulary: int, steps: int) -> Pace:
    """Time one step of every arm of a training of `steps` after a warm-up, and one reading by teacher and student."""
    device = pick_device(recipe.training.device, "training.device")
    student = build.build_stand_in(recipe, teacher.model).float().to(device)
    stored = isinstance(recipe.signals, StoredSignals)
    build.compile_blocks(recipe, steps, student, () if stored else models_of(teacher))
    trainable = build.build_trainable(recipe, student)
    with TemporaryDirectory() as folder:
        rows = _pack(recipe, survey, teacher.tokenizer, Path(folder) / "rows")
        batch = rows.batch(range(min(len(rows), MOST_ROWS, recipe.training.rows_at_once)))
        echo = _Echo.of(recipe, teacher, batch, vocabulary=vocabulary, folder=Path(folder)) if stored else None
        speaker, mark = (echo.reader, echo.reader.mark) if echo else (teacher, lambda batch: batch)
        batch = mark(batch).to(device)
        arms = ["student", "control"] if recipe.has_control else ["student"]
        training = {}
        for arm in arms:
            answers = Answers.of(recipe, vocabulary)
            objective = build_objective(terms_of(recipe, arm), answers, student.config, teacher.model.config).to(device)
            training[arm] = _time(lambda: _step(trainable, objective, batch, speaker)) / len(batch)  # noqa: B023
    reading = {
        "teacher": _time(lambda: teacher.read(batch, Wants(final=True))) / len(batch),
        "student": _time(lambda: _look(trainable, batch)) / len(batch),
    }
    # The teacher reads twice: for the distances to it, and to be scored itself; untrained is an arm as well.
    evaluation = 2 * reading["teacher"] + (1 + len(arms)) * reading["student"]
    if echo is None:
        return Pace(training, evaluation)
    return Pace(training, evaluation, echo.seconds, _fidelity(recipe, trainable, teacher, batch, vocabulary=vocabulary))


@dataclass(frozen=True, slots=True)
class _Echo:
    """A small store of what the teacher says about one batch, and how long a row of it took to capture."""

    reader: StoredReader
    seconds: float

    @staticmethod
    def of(recipe: Recipe, teacher: TeacherEngine, batch: Batch, *, vocabulary: int, folder: Path) -> _Echo:
        spec = spec_for(recipe, vocabulary, teacher.model.config)
        encoding = encoding_of(spec, head_of(teacher.model).sliced(vocabulary))
        transcript = make_transcript(recipe, teacher, encoding, vocabulary)
        stamp, seconds = Stamp("", "", spec.fingerprint), 0.0
        for turn in ("warming", "timed"):
            store = open_store(folder / turn, stamp, encoding.stride)
            began = time.perf_counter()
            capture_rows(transcript, _OneBatch(batch), range(len(batch)), store=store)
            seconds = (time.perf_counter() - began) / len(batch)
        reader = StoredReader(store, encoding, temperature=temperature_of(recipe), salt=salt_for(recipe))
        return _Echo(reader, seconds)


@dataclass(frozen=True, slots=True)
class _OneBatch:
    """A batch as rows that can be asked for by number."""

    whole: Batch

    def batch(self, row_numbers: Sequence[int]) -> Batch:
        """All of it: whoever asks wants no less."""
        return self.whole.rows(row_numbers[0], row_numbers[-1] + 1)


def _fidelity(recipe: Recipe, student: Any, teacher: TeacherEngine, batch: Batch, *, vocabulary: int) -> Fidelity:
    row = replace(batch.rows(0, 1), taught_BT=None)
    lesson = Lesson(row, teacher.read(row, Wants(final=True)).to(row.ids_BT.device))
    return sample_fidelity(student, lesson, spec_for(recipe, vocabulary, teacher.model.config), temperature_of(recipe))


def _pack(recipe: Recipe, survey: Survey, tokenizer: Any, folder: Path) -> PackedRows:
    """Some documents of the data, packed as the run will pack them."""
    encoded = encode_examples(survey.sampled, tokenizer)
    write_rows(encoded, folder, sequence_length=recipe.data.sequence_length, pad_id=0, seed=recipe.seed)
    return PackedRows(folder)


def _step(trainable: Any, objective: Objective, batch: Batch, teacher: Reader) -> None:
    said = teacher.read(batch, wants_of(objective)) if objective.needs else Signal()
    lesson = Lesson(batch, said.to(batch.ids_BT.device))
    share, _ = objective(trainable(batch, objective.wants()[0]), lesson, objective.counts([batch]))
    share.backward()
    trainable.zero_grad()


@torch.no_grad()
def _look(trainable: Any, batch: Batch) -> None:
    trainable(batch)


def _time(work: Callable[[], Any]) -> float:
    """Seconds of the second time: the first one warms up."""
    work()
    _wait()
    began = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
