"""metrics.jsonl: one line a step, always; the same lines to trackers when a recipe asks for them.

Refuses to keep lines of steps that a resumed training takes again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill.errors import MissingExtra

__all__ = ["MetricsLog", "read_metrics"]


class MetricsLog:
    """Appends lines to a JSONL file; a torn last line (killed while writing) is dropped when a training continues."""

    def __init__(self, path: Path, trackers: Any = None) -> None:
        """`trackers` is an accelerate Accelerator whose trackers are initialised, or None."""
        self._path, self._trackers = path, trackers

    def rewind(self, step: int) -> None:
        """Keep the lines up to and with `step`."""
        lines = [line for line in read_metrics(self._path) if line["step"] <= step]
        part = self._path.with_name(f".{self._path.name}.partial")
        part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        part.replace(self._path)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one step's numbers."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._trackers is not None:
            numbers = {name: value for name, value in line.items() if name != "step"}
            self._trackers.log(numbers, step=line["step"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; none where there is no file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # torn by a crash in the middle of a write
            continue
    return lines


def start_trackers(names: list[str], run: str, folder: Path) -> Any:
    """An accelerator with these trackers started, None without names. Raises MissingExtra for one that is not installed."""
    if not names:
        return None
    from accelerate import Accelerator
    from accelerate.tracking import is_tensorboard_available, is_trackio_available, is_wandb_available

    available = {
        "tensorboard": is_tensorboard_available,
        "wandb": is_wandb_available,
        "trackio": is_trackio_available,
    }
    for index, name in enumerate(names):
        if not available[name]():
            raise MissingExtra(
                f"training.trackers[{index}]: {name} is not installed. Run `pip install 'potstill[{name}]'`, or remove it."
            )
    accelerator = Accelerator(log_with=names, project_dir=str(folder))
    accelerator.init_trackers(run)
    return accelerator
