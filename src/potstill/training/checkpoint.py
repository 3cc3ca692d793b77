"""Training state on disk: written aside, checked, renamed into place; read back only when every byte is as written.

Refuses to load a damaged checkpoint; falls back to the one before and says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potstill.errors import CheckpointError, RunError

__all__ = ["CheckpointStore", "random_state", "restore_random_state"]

_log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{9,})")


class CheckpointStore:
    """Checkpoints `step-N` of one training under a folder, the newest `keep` of them.

    What is being written or deleted is called `part-N`, so that a `step-N` cut short by a crash cannot come about.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        """`folder` is created when the first checkpoint is saved; `keep` is at least 1."""
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write `state` (nested dicts and lists of tensors and plain values) as the checkpoint after `step` steps.

        A whole checkpoint of that step is left as it is: exact training comes to the same state. Raises RunError where
        the disk is full or the folder cannot be written; the checkpoints before stay.
        """
        final, part = self._path(step), self._part(step)
        if final.exists() and _damage(final) is None:
            return final
        try:
            self._clear_parts()
            _write(part, step, state)
            if final.exists():
                shutil.rmtree(final)
            part.rename(final)
            _sync_folder(self.folder)
            for old in self.steps()[: -self.keep]:
                self._delete(old)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            shutil.rmtree(part, ignore_errors=True)
            reason = str(error).partition("\n")[0]
            raise RunError(
                f"training.checkpoint: the state after step {step} cannot be written to {self.folder} ({reason}). "
                "Free some space or permit writing, and run the same command again."
            ) from error
        return final

    def steps(self) -> list[int]:
        """Steps that a checkpoint exists of, ascending; whole or not."""
        matches = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in matches if match)

    def load_newest(self) -> tuple[int, dict[str, Any]] | None:
        """(step, state) of the newest whole checkpoint, None where there is none at all.

        A damaged or truncated one is named, set aside as `damaged-N` and passed over. Raises CheckpointError when there
        are checkpoints but none is whole.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self._path(step)
            reason = _damage(path)
            if reason is None:
                return step, torch.load(path / "state.pt", map_location="cpu", weights_only=True)
            _log.warning("checkpoint %s is damaged (%s): falling back to the one before", path, reason)
            aside = self.folder / f"damaged-{step:09d}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        if steps:
            raise CheckpointError(
                f"training.checkpoint: none of the {len(steps)} checkpoints in {self.folder} is whole. They are set "
                "aside as damaged-*; run the same command again to train from the start."
            )
        return None

    def clear(self) -> None:
        """Delete all checkpoints, the oldest first: the training is finished and its student saved."""
        for step in self.steps():
            self._delete(step)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"

    def _part(self, step: int) -> Path:
        return self.folder / f"part-{step:09d}"

    def _delete(self, step: int) -> None:
        shutil.rmtree(self._part(step), ignore_errors=True)
        shutil.rmtree(self._path(step).rename(self._part(step)))

    def _clear_parts(self) -> None:
        """Delete what crashes left of writing and deleting."""
        for left in self.folder.glob("part-*"):
            shutil.rmtree(left)


def random_state() -> dict[str, Any]:
    """The state of every random number generator in use."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set every generator to what `random_state` saw."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _write(part: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write the state and a note of its size and hash, all of it on the disk when this returns."""
    part.mkdir(parents=True)
    with (part / "state.pt").open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    note = {"step": step, "bytes": (part / "state.pt").stat().st_size, "blake2b": _hash(part / "state.pt")}
    with (part / "checkpoint.json").open("w", encoding="utf-8") as file:
        json.dump(note, file)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(part)


def _damage(path: Path) -> str | None:
    """Why this checkpoint is not whole, None if it is."""
    try:
        note = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
        size = (path / "state.pt").stat().st_size
        if size != note["bytes"]:
            return f"state.pt has {size} bytes, {note['bytes']} were written"
        return None if _hash(path / "state.pt") == note["blake2b"] else "state.pt is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
