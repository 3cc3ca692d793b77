"""What a teacher has written: the files of the stage generate, which the stages after it read.

Importing this module is cheap. Refuses to hold more than a line of them at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from potstill.data import Split
from potstill.errors import RunError
from potstill.pipeline.disk import writing
from potstill.types import Example

__all__ = ["QUESTIONS", "ROWS", "UNVERIFIED", "Question", "read_questions", "read_rows", "write_lines"]

ROWS = "rows.jsonl"
"""What the student learns, and, of held-out prompts, what it is tested on."""

UNVERIFIED = "unverified.jsonl"
"""As many answers to the training prompts, drawn from all: what the control arm learns."""

QUESTIONS = "questions.jsonl"
"""The held-out prompts, whether or not the teacher has solved them."""


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out prompt that every arm answers.

    messages  what is asked, in the roles of a chat
    row       the columns that a verifier asks for
    leaked    whether training text that was removed had shared words with it
    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    row: Mapping[str, Any]
    leaked: bool = False


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line; returns how many."""
    count = 0
    with writing(path.parent), path.open("w", encoding="utf-8") as file:
        for line in lines:
            # Escaped to ASCII: U+2028 and its like end a line for some readers.
            file.write(json.dumps(line, sort_keys=True) + "\n")
            count += 1
    return count


def read_rows(path: Path) -> Iterator[tuple[Split, Example]]:
    """The conversations of a file, each with its split."""
    for line in _read_lines(path):
        written_by = str(line["provenance"]["written_by"])
        example = Example(line["id"], messages=tuple(line["messages"]), source=path.name, provenance=written_by)
        yield line["split"], example


def read_questions(folder: Path) -> list[Question]:
    """The held-out prompts, in order."""
    lines = _read_lines(folder / QUESTIONS)
    return [Question(line["id"], tuple(line["messages"]), line["row"], line["leaked"]) for line in lines]


def dump_question(question: Question) -> dict[str, Any]:
    """A held-out prompt as a line."""
    return asdict(question)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path}: cannot be read ({error}). Delete {path.parent} and run the same command again."
        ) from None
