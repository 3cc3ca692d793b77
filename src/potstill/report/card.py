"""The model card: the student folder's README.md, as the Hugging Face hub reads it.

Refuses: naming a licence that nobody stated.
"""

from __future__ import annotations

from pathlib import Path

from potstill.report.page import known_facts, render, save_text
from potstill.report.story import Story

__all__ = ["write_card"]


def write_card(story: Story, student_folder: Path) -> Path:
    """Write `README.md` into the student's folder and return its path. Raises RunError where it cannot be written."""
    path = student_folder / "README.md"
    save_text(path, render("card.md.jinja", {**known_facts(story), "licence_note": _licence_note(story)}))
    return path


def _licence_note(story: Story) -> str:
    if story.license:
        return "The licence is stated above; the terms of the teacher and of the training data apply as well."
    return "The licence is not known to this card: the terms of the teacher and of the training data apply."
