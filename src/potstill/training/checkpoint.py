"""Training state on disk: written aside, checked, renamed into place; read back only when every byte is as written.

Refuses to load a damaged checkpoint; falls back to the one before and says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potstill.errors import CheckpointError

__all__ = ["CheckpointStore", "random_state", "restore_random_state"]

_log = logging.getLogger(__name__)


class CheckpointStore:
    """Checkpoints `step-N` of one training under a folder, the newest `keep` of them."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        """`folder` is created when the first checkpoint is saved."""
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write `state` (nested dicts and lists of tensors and plain values) as the checkpoint after `step` steps."""
        final = self.folder / f"step-{step:09d}"
        part = self.folder / f"part-{step:09d}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        with (part / "state.pt").open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        note = {"step": step, "bytes": (part / "state.pt").stat().st_size, "blake2b": _hash(part / "state.pt")}
        with (part / "checkpoint.json").open("w") as file:
            json.dump(note, file)
            file.flush()
            os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)
        part.rename(final)
        _sync_folder(self.folder)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"step-{old:09d}")
        return final

    def steps(self) -> list[int]:
        """Steps that a checkpoint exists of, ascending; whole or not."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def load_newest(self) -> tuple[int, dict[str, Any]] | None:
        """(step, state) of the newest whole checkpoint, None where there is none at all.

        A damaged or truncated one is named, set aside as `damaged-N` and passed over. Raises CheckpointError when there
        are checkpoints but none is whole.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self.folder / f"step-{step:09d}"
            reason = _damage(path)
            if reason is None:
                return step, torch.load(path / "state.pt", map_location="cpu", weights_only=True)
            _log.warning("checkpoint %s is damaged (%s): falling back to the one before", path, reason)
            shutil.rmtree(self.folder / f"damaged-{step:09d}", ignore_errors=True)
            path.rename(self.folder / f"damaged-{step:09d}")
        if steps:
            raise CheckpointError(
                f"training.checkpoint: none of the {len(steps)} checkpoints in {self.folder} is whole. They are set aside "
                "as damaged-*; run the same command again to train from the start."
            )
        return None

    def clear(self) -> None:
        """Delete all checkpoints: the training is finished and its student saved."""
        shutil.rmtree(self.folder, ignore_errors=True)


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


def _damage(path: Path) -> str | None:
    """Why this checkpoint is not whole, None if it is."""
    try:
        note = json.loads((path / "checkpoint.json").read_text())
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
