"""metrics.jsonl: one line a step, always; the same lines to trackers when a recipe asks for them.

Refuses to keep lines of steps that a resumed training takes again.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from potstill.errors import MissingExtra
from potstill.pipeline.disk import write_text_atomic

__all__ = ["MetricsLog", "check_trackers", "read_metrics", "start_trackers"]


class MetricsLog:
    """Appends lines to a JSONL file; a torn last line (killed while writing) is dropped when a training continues."""

    def __init__(self, path: Path, trackers: Accelerator | None = None) -> None:
        """`trackers` is what `start_trackers` gave."""
        self._path, self._trackers = path, trackers

    def rewind(self, step: int) -> None:
        """Keep the lines up to and with `step`."""
        lines = [line for line in read_metrics(self._path) if line["step"] <= step]
        write_text_atomic(self._path, "".join(json.dumps(line) + "\n" for line in lines))

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one step's numbers."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._trackers is not None:
            numbers = {name: value for name, value in line.items() if name != "step"}
            self._trackers.log(numbers, step=line["step"])

    def close(self) -> None:
        """Let the trackers write what they hold back."""
        if self._trackers is not None:
            self._trackers.end_training()


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


def check_trackers(names: Sequence[str]) -> None:
    """Raises MissingExtra for a tracker that is not installed."""
    for index, name in enumerate(names):
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(
                f"training.trackers[{index}]: {name} is not installed. Run `pip install 'potstill[{name}]'`, "
                "or remove it."
            )


def start_trackers(names: Sequence[str], run: str, folder: Path) -> Accelerator | None:
    """An accelerator with these trackers started, None without names. Raises MissingExtra."""
    if not names:
        return None
    check_trackers(names)
    accelerator = Accelerator(log_with=list(names), project_dir=str(folder))
    accelerator.init_trackers(run)
    return accelerator
