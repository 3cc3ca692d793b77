"""The model card: a model folder's README.md, as the Hugging Face hub reads it.

Refuses: naming a licence that nobody stated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from potstill.report.headline import write_static_headline
from potstill.report.page import known_facts, render, save_text
from potstill.report.story import Story
from potstill.report.wording import wording_of

__all__ = ["write_card"]


def write_card(story: Story, folder: Path, arm: Literal["student", "static"] = "student") -> Path:
    """Write the `README.md` of the student's folder, or of the static classifier's, and return its path.

    Raises RunError where it cannot be written.
    """
    path, facts = folder / "README.md", known_facts(story)
    if arm == "static":
        facts |= {"headline": write_static_headline(story), "caveat": ""}
    library = "model2vec" if arm == "static" else wording_of(story.task).library
    save_text(
        path,
        render("card.md.jinja", {**facts, "arm": arm, "library": library, "licence_note": _licence_note(story)}),
    )
    return path


def _licence_note(story: Story) -> str:
    if story.license:
        return "The licence is stated above; the terms of the teacher and of the training data apply as well."
    return "The licence is not known to this card: the terms of the teacher and of the training data apply."
