"""What the parts of bench/store.py share: a prepared run with its real teacher, and stores of its words.

Captures are those of the stage `capture`: its own transcript, its own `capture_rows`, real packed rows. Refuses to make
a store by any other code than that which users run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from potstill.data import PackedRows
from potstill.engines import TeacherEngine
from potstill.pipeline import build
from potstill.pipeline.capture import make_transcript
from potstill.pipeline.recall import spec_for, stamp_for
from potstill.pipeline.transcribe import Transcript, capture_rows
from potstill.recipes import Recipe, load_recipe
from potstill.signals import Store, encoding_of, open_store
from potstill.training import first_rows

__all__ = ["FORMS", "Stand", "capture_into", "folder_bytes", "open_stand", "transcript_of"]

FORMS = {
    "k16": "{kind: sampled, k: 16}",
    "k64": "{kind: sampled, k: 64}",
    "topk_k16": "{kind: topk, k: 16}",
    "topk_k64": "{kind: topk, k: 64}",
    "hidden": "{kind: hidden}",
}
"""By name: what a recipe says as `signals`."""


@dataclass(frozen=True, slots=True)
class Stand:
    """A run whose stage initialise is done, its teacher, and its training rows. `run` is its folder."""

    run: Path
    recipe: Recipe
    teacher: TeacherEngine
    rows: PackedRows
    vocabulary: int

    def numbers(self, count: int) -> list[int]:
        """The rows that a training of `count` rows would draw, ascending."""
        return first_rows(len(self.rows), self.recipe.seed, count)


def open_stand(run: Path) -> Stand:
    """Load what a run folder says: its recipe, teacher and rows."""
    from potstill.pipeline.run import inputs_of

    recipe = load_recipe(run / "recipe.yaml")
    inputs = inputs_of(recipe)
    rows = PackedRows(inputs.prepared / "train")
    return Stand(run, recipe, build.build_teacher(recipe), rows, inputs.vocabulary)


def transcript_of(stand: Stand, form: str) -> tuple[Recipe, Transcript]:
    """The recipe with that form of signals, and how its capture takes the teacher's words down."""
    recipe = load_recipe(stand.run / "recipe.yaml", [f"signals={FORMS[form]}"])
    spec = spec_for(recipe, stand.vocabulary, build.teacher_config(recipe))
    return recipe, make_transcript(recipe, stand.teacher, encoding_of(spec), stand.vocabulary)


def capture_into(stand: Stand, form: str, numbers: Sequence[int], folder: Path) -> tuple[Store, float]:
    """A fresh store in `folder` of what the teacher says about these rows, and the seconds from reading to the disk."""
    shutil.rmtree(folder, ignore_errors=True)
    recipe, transcript = transcript_of(stand, form)
    store = open_store(folder, stamp_for(recipe, transcript.encoding.spec), transcript.encoding.stride)
    began = time.perf_counter()
    capture_rows(transcript, stand.rows, numbers, store=store)
    return store, time.perf_counter() - began


def folder_bytes(folder: Path) -> int:
    """Bytes of all files of a store: shards with their headers, indices, checksums and notes, and the manifest."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
