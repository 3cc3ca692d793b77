"""The stage capture: the teacher reads, once, what the training will need and the store lacks.

Refuses to load a teacher who has nothing to add.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue, ValidationError
from safetensors import SafetensorError

from potstill.data import PackedRows
from potstill.engines import TeacherEngine, head_of, load_model, pick_device
from potstill.errors import Interrupted, StoreError
from potstill.pipeline import build
from potstill.pipeline.disk import PARTIAL, check_disk
from potstill.pipeline.fidelity import Fidelity, measure_fidelity
from potstill.pipeline.lessons import Inputs, open_head, open_lessons, read_lessons, write_head, write_lessons
from potstill.pipeline.memory import release_memory
from potstill.pipeline.places import STUDENT
from potstill.pipeline.progress import metered
from potstill.pipeline.recall import (
    HEAD,
    PLAN,
    cache_folder,
    has_head,
    load_plan,
    place_for,
    salt_for,
    spec_for,
    stamp_for,
    temperature_of,
)
from potstill.pipeline.rundir import RunDir, Stage
from potstill.pipeline.stopping import Stopping
from potstill.pipeline.transcribe import Captured, Transcript, capture_rows, piece_windows, texts_to_read
from potstill.recipes import Recipe
from potstill.recipes.schema import OpenAITeacher, StoredSignals
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
from potstill.signals.pieces import KEY_BYTES
from potstill.training import first_rows
from potstill.types import Lesson, Mixture, States, Wants

__all__ = [
    "HELD_OUT_LESSONS",
    "Wanted",
    "capture",
    "capture_facts",
    "capture_part",
    "check_room",
    "count_wanted",
    "keep_plan",
    "make_transcript",
    "open_held_out",
    "open_reader",
    "open_signals",
    "rows_to_train",
    "sample_fidelity",
    "validated_at_once",
]

HELD_OUT_LESSONS = "validation.safetensors"
"""What the teacher says about the validation rows: whole, so that every arm's curves are drawn with one ruler."""

CHECKED_PIECES = 4096
"""Pieces whose checksums are compared at once."""

FIDELITY_BYTES = 4e9
"""Memory that measuring the fidelity may take: four of the student's heads in float32."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the training needs of the store: keys uint8 [pieces, 16] and which of them are missing, bool [pieces]; their
    positions, and the tokens of those that are missing.
    """

    keys_P16: NDArray[np.uint8]
    missing_P: NDArray[np.bool_]
    positions: int
    tokens: int

    @property
    def missing(self) -> int:
        """Pieces that are missing."""
        return int(self.missing_P.sum())


def rows_to_train(recipe: Recipe, rows: PackedRows) -> Sequence[int]:
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
    store, encoding = open_signals(recipe, inputs.vocabulary)
    rows = PackedRows(inputs.prepared / "train")
    numbers = rows_to_train(recipe, rows)
    wanted = count_wanted(recipe, rows, numbers, store)
    check_room(store, wanted.tokens * encoding.stride)
    planned_P = keep_plan(stage.folder, wanted)
    teacher, headless = None, encoding.spec.kind == "hidden" and not has_head(store)
    if wanted.missing or headless or not _has_lessons(recipe, inputs, stage.folder):
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
                planned=planned_P,
                meter=meter,
                stopping=stopping.asked,
            )
    if stopping.asked() and count_wanted(recipe, rows, numbers, store).missing:
        raise Interrupted(f"stopped after {done.pieces} of {wanted.missing} pieces; the same command continues.")
    del teacher
    release_memory()
    facts = capture_facts(store, wanted, done, captured=int(planned_P.sum()))
    stage.finish(HELD_OUT_LESSONS, PLAN, **facts, **_how_true(recipe, inputs, stage, encoding))


def capture_part(recipe: Recipe, inputs: Inputs, part: tuple[int, int], stopping: Stopping) -> Captured:
    """Do one of several parts of a capture, beside other processes that do the others; the run folder is only read.

    Raises Interrupted where somebody asked to stop before all of the part was done.
    """
    store, encoding = open_signals(recipe, inputs.vocabulary)
    rows = PackedRows(inputs.prepared / "train")
    numbers = rows_to_train(recipe, rows)
    check_room(store, count_wanted(recipe, rows, numbers, store).tokens * encoding.stride // part[1])
    teacher = build.build_teacher(recipe)
    transcript = make_transcript(recipe, teacher, encoding, inputs.vocabulary)
    with metered(f"capture {part[0] + 1}/{part[1]}", None, "tokens") as meter, stopping.held():
        done = capture_rows(transcript, rows, numbers, store=store, part=part, meter=meter, stopping=stopping.asked)
    left = sum(map(len, texts_to_read(rows, numbers, store, salt=salt_for(recipe), part=part)))
    if left and stopping.asked():
        raise Interrupted(
            f"stopped after {done.pieces} pieces of this part, {left} are left; the same command continues."
        )
    return done


def open_held_out(recipe: Recipe, inputs: Inputs, device: torch.device) -> list[Lesson]:
    """The validation rows with what a finished capture kept of the teacher about them, on `device`.

    Of a teacher behind an API that is what its store knows of them.
    """
    captured = cast(Path, inputs.captured)
    rows = PackedRows(inputs.prepared / "validation")
    most, at_once = recipe.training.validation_rows, validated_at_once(recipe)
    if not isinstance(recipe.teacher, OpenAITeacher):
        return open_lessons(captured / HELD_OUT_LESSONS, rows, most, at_once=at_once, device=device)
    reader = open_reader(recipe, captured, device)
    return [
        Lesson(marked, reader.read(marked, Wants(final=True)).to(device))
        for start in range(0, min(most, len(rows)), at_once)
        for marked in [reader.mark(rows.batch(range(start, min(start + at_once, most, len(rows)))))]
    ]


def open_reader(recipe: Recipe, captured: Path, device: torch.device) -> StoredReader:
    """The store that a finished capture filled, as a teacher. Raises StoreError where it is gone or of another one.

    A head goes to `device` once, since every lesson has it.
    """
    facts: Mapping[str, Any] = RunDir(captured.parent).manifest(captured.name).facts
    store, spec = reopen_store(facts["store"], cache=cache_folder()), SignalSpec.from_json(facts["spec"])
    head = open_head(store.get_file(HEAD), device) if spec.kind == "hidden" else None
    return StoredReader(store, encoding_of(spec, head), temperature=temperature_of(recipe), salt=salt_for(recipe))


def make_transcript(recipe: Recipe, teacher: TeacherEngine, encoding: Encoding, vocabulary: int) -> Transcript:
    """How the recipe wants its teacher's words taken down."""
    signals = cast(StoredSignals, recipe.signals)
    return Transcript(teacher, encoding, vocabulary, signals.positions, signals.batch_tokens, salt_for(recipe))


def sample_fidelity(student: Any, lesson: Lesson, spec: SignalSpec, temperature: float) -> Fidelity:
    """How near to the teacher's words those are that are stored, by what this student would learn from either."""
    said = lesson.signal.logits
    if not isinstance(said, States | Mixture):
        raise ValueError("the fidelity of stored signals is measured against a teacher's own words")
    with torch.no_grad():
        view = student(lesson.batch)
    return measure_fidelity(States(view.final_ND, view.head), said, spec, temperature=temperature)


def open_signals(recipe: Recipe, vocabulary: int) -> tuple[Store, Encoding]:
    """The store of this recipe's teacher, as it is, and how its records are made."""
    spec = spec_for(recipe, vocabulary, build.teacher_config(recipe))
    stamp, encoding = stamp_for(recipe, spec), encoding_of(spec)
    return open_store(place_for(recipe, stamp), stamp, encoding.stride, cache=cache_folder()), encoding


def count_wanted(recipe: Recipe, rows: PackedRows, numbers: Sequence[int], store: Store) -> Wanted:
    """What is needed and what of it is missing, after everything that is there has been compared with its checksums."""
    share = cast(StoredSignals, recipe.signals).share
    positions = tokens = 0
    keys, missing = [], []
    for batch, found in piece_windows(rows, numbers, salt_for(recipe)):
        supervised_BT = batch.supervised_BT
        absent = _absent(store, list(found))
        keys.append(np.frombuffer(b"".join(found), np.uint8).reshape(-1, KEY_BYTES))
        missing.append(np.array([key in absent for key in found], np.bool_))
        tokens += sum(found[key].stop - found[key].start for key in absent)
        counts = (int(supervised_BT[one.row, one.start : one.stop].sum()) for one in found.values())
        positions += sum(math.ceil(share * count) for count in counts)
    return Wanted(np.concatenate(keys), np.concatenate(missing), positions, tokens)


def _absent(store: Store, keys: Sequence[bytes]) -> set[bytes]:
    """Those of the keys that are not there, or damaged: reading sets these aside."""
    while True:
        absent = set(store.missing(keys))
        present = [key for key in keys if key not in absent]
        try:
            for start in range(0, len(present), CHECKED_PIECES):
                store.read(present[start : start + CHECKED_PIECES])
        except StoreError:
            if set(store.missing(keys)) == absent:  # it could not be set aside
                raise
        else:
            return absent


def keep_plan(folder: Path, wanted: Wanted) -> NDArray[np.bool_]:
    """What was missing when the stage began, if that was in an earlier attempt; else what is missing now, kept."""
    keys_P16, planned_P = load_plan(folder)
    if np.array_equal(keys_P16, wanted.keys_P16) and not (wanted.missing_P & ~planned_P).any():
        return planned_P
    partial = folder / f".{PLAN}{PARTIAL}"
    with partial.open("wb") as file:
        np.savez(file, keys=wanted.keys_P16, planned=wanted.missing_P)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / PLAN)
    return wanted.missing_P


def check_room(store: Store, needed_bytes: int) -> None:
    """Refuse, before the teacher reads, what the disk of a store here has no room for."""
    if not is_remote(store.place):
        check_disk(Path(store.place), needed_bytes, "what the teacher will say", "signals.store")


def _has_lessons(recipe: Recipe, inputs: Inputs, folder: Path) -> bool:
    """Whether the held-out lessons are there, and whole."""
    try:
        return bool(_held_out(recipe, inputs, folder))
    except (OSError, SafetensorError, ValidationError, KeyError, TypeError):
        return False


def _held_out(recipe: Recipe, inputs: Inputs, folder: Path) -> list[Lesson]:
    rows = PackedRows(inputs.prepared / "validation")
    most, at_once = recipe.training.validation_rows, validated_at_once(recipe)
    return open_lessons(folder / HELD_OUT_LESSONS, rows, most, at_once=at_once)


def _keep_lessons(recipe: Recipe, teacher: TeacherEngine, folder: Path, inputs: Inputs) -> None:
    """What the teacher says about the validation rows, beside the run: the ruler of its curves."""
    rows = PackedRows(inputs.prepared / "validation")
    most, at_once = recipe.training.validation_rows, validated_at_once(recipe)
    partial = folder / f".{HELD_OUT_LESSONS}{PARTIAL}"
    write_lessons(list(read_lessons(teacher, rows, most, at_once=at_once)), partial)
    partial.replace(folder / HELD_OUT_LESSONS)


def _keep_head(teacher: TeacherEngine, store: Store, folder: Path, vocabulary: int) -> None:
    """What turns stored hidden states into logits: once a store."""
    partial = folder / f".{HEAD}{PARTIAL}"
    write_head(head_of(teacher.model).sliced(vocabulary), partial)
    store.put_file(HEAD, partial)
    partial.unlink()


def capture_facts(store: Store, wanted: Wanted, done: Captured, *, captured: int) -> dict[str, JsonValue]:
    """What the report tells of the store. `captured` pieces were missing when the stage began, in whichever attempt."""
    return {
        "store": store.place,
        "pieces": len(np.unique(wanted.keys_P16, axis=0)),
        "captured": captured,
        "positions": wanted.positions,
        "stored_positions": store.num_records,
        "stored_bytes": store.num_bytes,
        "read_tokens": done.tokens,
        "capture_seconds": round(done.seconds, 3),
        "quarantined": asdict(store.quarantined),
    }


def _how_true(recipe: Recipe, inputs: Inputs, stage: Stage, encoding: Encoding) -> dict[str, JsonValue]:
    """The encoding, and its fidelity on held-out rows, by the student as it begins."""
    facts: dict[str, JsonValue] = {"stride": encoding.stride, "spec": encoding.spec.to_json(), "fidelity": None}
    device = pick_device(recipe.training.device, "training.device")
    model = load_model(str(inputs.initial / STUDENT), "fp32", device, "student")
    if 4 * 4 * model.get_output_embeddings().weight.numel() > FIDELITY_BYTES:
        return facts
    lesson = _held_out(recipe, inputs, stage.folder)[0]
    lesson = Lesson(lesson.batch.to(device), lesson.signal.to(device))
    student = build.build_trainable(recipe, model)
    return facts | {"fidelity": asdict(sample_fidelity(student, lesson, encoding.spec, temperature_of(recipe)))}
