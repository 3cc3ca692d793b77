"""The stage capture: the teacher reads, once, what the training will need and the store lacks.

Refuses to load a teacher who has nothing to add.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue

from potstill.data import PackedRows
from potstill.engines import TeacherEngine, TrainableCausal, head_of, load_model, pick_device
from potstill.errors import Interrupted, StoreError
from potstill.pipeline import build
from potstill.pipeline.disk import PARTIAL, check_disk
from potstill.pipeline.fidelity import Fidelity, measure_fidelity
from potstill.pipeline.lessons import Inputs, open_head, open_lessons, read_lessons, write_head, write_lessons
from potstill.pipeline.memory import release_memory
from potstill.pipeline.places import STUDENT
from potstill.pipeline.progress import metered
from potstill.pipeline.recall import cache_folder, place_for, salt_for, spec_for, stamp_for, temperature_of
from potstill.pipeline.rundir import RunDir, Stage
from potstill.pipeline.stopping import Stopping
from potstill.pipeline.transcribe import Captured, Transcript, capture_rows, piece_windows
from potstill.recipes import Recipe
from potstill.recipes.schema import StoredSignals
from potstill.signals import (
    Encoding,
    SignalSpec,
    Store,
    StoredReader,
    encoding_of,
    is_remote,
    open_store,
    reopen_store,
)
from potstill.training import first_rows
from potstill.types import Lesson, Mixture, States

__all__ = [
    "HELD_OUT_LESSONS",
    "capture",
    "capture_part",
    "make_transcript",
    "open_reader",
    "rows_to_train",
    "sample_fidelity",
    "validated_at_once",
]

HELD_OUT_LESSONS = "validation.safetensors"
"""What the teacher says about the validation rows: whole, so that every arm's curves are drawn with one ruler."""

PLANNED = "planned.npy"
"""Which pieces were missing when the stage began, so that an interrupted one goes on in the same batches."""

HEAD = "head.safetensors"
"""Name of the teacher's head among the files of a store of hidden states."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the training needs of the store: pieces, positions in them, and what is missing of it, with its tokens."""

    pieces: int
    positions: int
    tokens: int
    missing_P: NDArray[np.bool_]

    @property
    def missing(self) -> int:
        """Pieces that are missing."""
        return int(self.missing_P.sum())


def rows_to_train(recipe: Recipe, rows: PackedRows) -> list[int]:
    """Numbers of the rows that the training will draw: a store need not know more."""
    count = build.count_steps(recipe, len(rows)) * recipe.training.batch_rows
    return first_rows(len(rows), recipe.seed, count)


def validated_at_once(recipe: Recipe) -> int:
    """Validation rows that are read together: in batches of the training's shape, as another would be compiled too."""
    return min(recipe.training.rows_at_once, recipe.training.validation_rows)


def capture(recipe: Recipe, stage: Stage, inputs: Inputs, stopping: Stopping) -> None:
    """Complete the store of what the teacher says about the rows that will be trained on, and keep held-out lessons.

    What was stored by earlier runs and other processes is used as it is, after its checksums are found right. Raises
    Interrupted, after all that was read is stored, when somebody asks to stop.
    """
    store, encoding = _open(recipe, inputs.vocabulary)
    if not is_remote(store.place):  # there it would mean to fetch all of it; what is read is compared in any case
        store.quarantine(store.verify())
    rows = PackedRows(inputs.prepared / "train")
    numbers = rows_to_train(recipe, rows)
    wanted = _count(recipe, rows, numbers, store)
    _check_room(store, wanted.tokens * encoding.stride)
    teacher, headless = None, encoding.spec.kind == "hidden" and not _has_head(store)
    if wanted.missing or headless or not (stage.folder / HELD_OUT_LESSONS).exists():
        teacher = build.build_teacher(recipe)
        _keep_lessons(recipe, teacher, stage.folder, inputs)
    if teacher and headless:
        _keep_head(teacher, store, stage.folder, inputs.vocabulary)
    done = Captured()
    if teacher and wanted.missing:
        transcript = make_transcript(recipe, teacher, encoding, inputs.vocabulary)
        with metered("capture", wanted.tokens, "tokens") as meter, stopping.held():
            done = capture_rows(
                transcript,
                rows,
                numbers,
                store=store,
                planned=_keep_plan(stage.folder / PLANNED, wanted.missing_P),
                meter=meter,
                stopping=stopping.asked,
            )
    if stopping.asked() and _count(recipe, rows, numbers, store).missing:
        raise Interrupted(f"stopped after {done.pieces} of {wanted.missing} pieces; the same command continues.")
    del teacher
    release_memory()
    stage.finish(HELD_OUT_LESSONS, **_facts(store, wanted, done), **_how_true(recipe, inputs, stage, encoding))


def capture_part(recipe: Recipe, inputs: Inputs, part: tuple[int, int], stopping: Stopping) -> Captured:
    """Do one of several parts of a capture, beside other processes that do the others; the run folder is only read."""
    store, encoding = _open(recipe, inputs.vocabulary)
    rows = PackedRows(inputs.prepared / "train")
    numbers = rows_to_train(recipe, rows)
    teacher = build.build_teacher(recipe)
    transcript = make_transcript(recipe, teacher, encoding, inputs.vocabulary)
    with metered(f"capture {part[0] + 1}/{part[1]}", None, "tokens") as meter, stopping.held():
        return capture_rows(transcript, rows, numbers, store=store, part=part, meter=meter, stopping=stopping.asked)


def open_reader(recipe: Recipe, captured: Path) -> StoredReader:
    """The store that a finished capture filled, as a teacher. Raises StoreError where it is gone or of another one."""
    facts: Mapping[str, Any] = RunDir(captured.parent).manifest(captured.name).facts
    store, spec = reopen_store(facts["store"], cache=cache_folder()), SignalSpec.from_json(facts["spec"])
    head = open_head(store.get_file(HEAD)) if spec.kind == "hidden" else None
    return StoredReader(store, encoding_of(spec, head), temperature=temperature_of(recipe), salt=salt_for(recipe))


def make_transcript(recipe: Recipe, teacher: TeacherEngine, encoding: Encoding, vocabulary: int) -> Transcript:
    """How the recipe wants its teacher's words taken down."""
    signals = cast(StoredSignals, recipe.signals)
    return Transcript(teacher, encoding, vocabulary, signals.positions, signals.batch_tokens, salt_for(recipe))


def sample_fidelity(student: TrainableCausal, lesson: Lesson, spec: SignalSpec, temperature: float) -> Fidelity:
    """How near to the teacher's words those are that are stored, by what this student would learn from either."""
    said = lesson.signal.logits
    if not isinstance(said, States | Mixture):
        raise ValueError("the fidelity of stored signals is measured against a teacher's own words")
    with torch.no_grad():
        view = student(lesson.batch)
    return measure_fidelity(States(view.final_ND, view.head), said, spec, temperature=temperature)


def _open(recipe: Recipe, vocabulary: int) -> tuple[Store, Encoding]:
    spec = spec_for(recipe, vocabulary, build.teacher_config(recipe))
    stamp, encoding = stamp_for(recipe, spec), encoding_of(spec)
    return open_store(place_for(recipe, stamp), stamp, encoding.stride, cache=cache_folder()), encoding


def _count(recipe: Recipe, rows: PackedRows, numbers: Sequence[int], store: Store) -> _Wanted:
    share = cast(StoredSignals, recipe.signals).share
    pieces = positions = tokens = 0
    missing = []
    for batch, found in piece_windows(rows, numbers, salt_for(recipe)):
        supervised_BT = batch.supervised_BT
        absent = set(store.missing(list(found)))
        pieces += len(found)
        missing += [key in absent for key in found]
        tokens += sum(found[key].stop - found[key].start for key in absent)
        counts = (int(supervised_BT[one.row, one.start : one.stop].sum()) for one in found.values())
        positions += sum(math.ceil(share * count) for count in counts)
    return _Wanted(pieces, positions, tokens, np.array(missing, dtype=np.bool_))


def _keep_plan(path: Path, missing_P: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What was missing when the stage began, if that was in an earlier attempt; else what is missing now, kept."""
    if path.exists():
        planned_P: NDArray[np.bool_] = np.load(path)
        if len(planned_P) == len(missing_P) and not (missing_P & ~planned_P).any():
            return planned_P
    partial = path.with_name(f".{path.name}{PARTIAL}")
    with partial.open("wb") as file:
        np.save(file, missing_P)
    partial.replace(path)
    return missing_P


def _check_room(store: Store, needed_bytes: int) -> None:
    """Refuse, before the teacher reads, what the disk of a store here has no room for."""
    if not is_remote(store.place):
        check_disk(Path(store.place), needed_bytes, "what the teacher will say", "signals.store")


def _keep_lessons(recipe: Recipe, teacher: TeacherEngine, folder: Path, inputs: Inputs) -> None:
    """What the teacher says about the validation rows, beside the run: the ruler of its curves."""
    rows = PackedRows(inputs.prepared / "validation")
    most, at_once = recipe.training.validation_rows, validated_at_once(recipe)
    partial = folder / f".{HELD_OUT_LESSONS}{PARTIAL}"
    write_lessons(list(read_lessons(teacher, rows, most, at_once=at_once)), partial)
    partial.replace(folder / HELD_OUT_LESSONS)


def _has_head(store: Store) -> bool:
    try:
        return store.get_file(HEAD).is_file()
    except StoreError:  # absent or damaged
        return False


def _keep_head(teacher: TeacherEngine, store: Store, folder: Path, vocabulary: int) -> None:
    """What turns stored hidden states into logits: once a store."""
    partial = folder / f".{HEAD}{PARTIAL}"
    write_head(head_of(teacher.model).sliced(vocabulary), partial)
    store.put_file(HEAD, partial)
    partial.unlink()


def _facts(store: Store, wanted: _Wanted, done: Captured) -> dict[str, JsonValue]:
    """What the report tells of the store, and by what the next run knows whether it is still what it was."""
    return {
        "store": store.place,
        "pieces": wanted.pieces,
        "captured": done.pieces,
        "positions": wanted.positions,
        "stored_positions": store.num_records,
        "stored_bytes": store.num_bytes,
        "read_tokens": done.tokens,
        "capture_seconds": round(done.seconds, 3),
        "stored_pieces": store.num_pieces,
        "quarantined": asdict(store.quarantined),
    }


def _how_true(recipe: Recipe, inputs: Inputs, stage: Stage, encoding: Encoding) -> dict[str, JsonValue]:
    """The encoding, and its fidelity on held-out rows, by the student as it begins."""
    rows = PackedRows(inputs.prepared / "validation")
    most, at_once = recipe.training.validation_rows, validated_at_once(recipe)
    lessons = open_lessons(stage.folder / HELD_OUT_LESSONS, rows, most, at_once=at_once)
    device = pick_device(recipe.training.device, "training.device")
    model = load_model(str(inputs.initial / STUDENT), "fp32", device, "student")
    student = build.build_trainable(recipe, model)
    lesson = Lesson(lessons[0].batch.to(device), lessons[0].signal.to(device))
    found = sample_fidelity(student, lesson, encoding.spec, temperature_of(recipe))
    return {"stride": encoding.stride, "spec": encoding.spec.to_json(), "fidelity": asdict(found)}
