"""Held-out rows with what the teacher says about them: asked now, or kept beside a run whose training has no teacher.

Refuses to keep a head twice: all lessons share it, and it is mapped, not read, when they are opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from potstill.data import PackedRows
from potstill.types import Batch, Head, Lesson, Mixture, Reader, Signal, States, Wants

__all__ = ["Inputs", "open_head", "open_lessons", "read_lessons", "write_head", "write_lessons"]

WEIGHTS = "weights"


@dataclass(frozen=True, slots=True)
class Inputs:
    """What training reads: the folders of prepare, initialise and, where signals are stored, capture.

    vocabulary  tokens that teacher and student share
    """

    prepared: Path
    initial: Path
    vocabulary: int
    captured: Path | None = None


class _Member(BaseModel):
    """Of one teacher's head, what is no tensor."""

    model_config = ConfigDict(frozen=True)

    scale: float
    softcap: float | None


class _Members(BaseModel):
    members: list[_Member]


def read_lessons(teacher: Reader, rows: PackedRows, most: int | None, *, at_once: int) -> Iterator[Lesson]:
    """The first `most` rows (None: all) with what the teacher says about them: its next-token distributions."""
    for batch in _batches(rows, most, at_once):
        yield Lesson(batch, teacher.read(batch, Wants(final=True)))


def write_lessons(lessons: Sequence[Lesson], path: Path) -> None:
    """Keep what the teacher said in these lessons, bit for bit, as safetensors; the rows themselves are kept elsewhere.

    Raises ValueError where it did not speak in final hidden states.
    """
    tensors: dict[str, Tensor] = {}
    kept: list[_Member] = []
    for number, lesson in enumerate(lessons):
        said = lesson.signal.logits
        if not isinstance(said, States | Mixture):
            raise ValueError("only lessons of a teacher that gives its final hidden states can be kept whole")
        members = said.members if isinstance(said, Mixture) else (said,)
        if isinstance(said, Mixture):
            tensors[f"{number}.{WEIGHTS}"] = said.weights_NM.contiguous()
        for place, member in enumerate(members):
            tensors[f"{number}.rows.{place}"] = member.rows_ND.contiguous()
        if not kept:
            for place, member in enumerate(members):
                tensors |= {f"head.{place}.{name}": part for name, part in _parts(member.head).items()}
                kept.append(_Member(scale=member.head.scale, softcap=member.head.softcap))
    save_file(tensors, path, metadata={"heads": _Members(members=kept).model_dump_json()})


def open_lessons(
    path: Path, rows: PackedRows, most: int | None, *, at_once: int, device: torch.device | str = "cpu"
) -> list[Lesson]:
    """The same rows as `read_lessons` reads, with what `write_lessons` kept of the teacher, on `device`."""
    lessons = []
    with safe_open(path, framework="pt", device=str(device)) as file:
        names = set(file.keys())
        members = _Members.model_validate_json(file.metadata()["heads"]).members
        heads = [_head(file, place, one) for place, one in enumerate(members)]
        for number, batch in enumerate(_batches(rows, most, at_once)):
            states = [States(file.get_tensor(f"{number}.rows.{place}"), head) for place, head in enumerate(heads)]
            mixed = f"{number}.{WEIGHTS}" in names
            said = Mixture(tuple(states), file.get_tensor(f"{number}.{WEIGHTS}")) if mixed else states[0]
            lessons.append(Lesson(batch, Signal(said)))
    return lessons


def _batches(rows: PackedRows, most: int | None, at_once: int) -> Iterator[Batch]:
    count = len(rows) if most is None else min(most, len(rows))
    for start in range(0, count, at_once):
        yield rows.batch(range(start, min(start + at_once, count)))


def write_head(head: Head, path: Path) -> None:
    """Keep an output layer as safetensors."""
    tensors = {f"head.0.{name}": part for name, part in _parts(head).items()}
    kept = _Members(members=[_Member(scale=head.scale, softcap=head.softcap)])
    save_file(tensors, path, metadata={"heads": kept.model_dump_json()})


def open_head(path: Path, device: torch.device | str = "cpu") -> Head:
    """The output layer that `write_head` kept, on `device`."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        return _head(file, 0, _Members.model_validate_json(file.metadata()["heads"]).members[0])


def _parts(head: Head) -> dict[str, Tensor]:
    parts = {"weight": head.weight_VD.contiguous()}
    return parts if head.bias_V is None else parts | {"bias": head.bias_V.contiguous()}


def _head(file: Any, place: int, one: _Member) -> Head:
    bias = f"head.{place}.bias"
    bias_V = file.get_tensor(bias) if bias in file.keys() else None  # noqa: SIM118  (a handle, not a mapping)
    return Head(file.get_tensor(f"head.{place}.weight"), bias_V, one.scale, one.softcap)
