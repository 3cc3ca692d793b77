"""The model card: a model folder's README.md, as the Hugging Face hub reads it.

Refuses: naming a licence that nobody stated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from potstill.report.headline import write_static_headline
from potstill.report.page import known_facts, render, save_text
from potstill.report.story import Story
from potstill.report.terms import TermsFacts, note_licence
from potstill.report.wording import wording_of

__all__ = ["write_card"]


def write_card(
    story: Story, folder: Path, arm: Literal["student", "static"] = "student", *, terms: Sequence[TermsFacts] = ()
) -> Path:
    """Write the `README.md` of the student's folder, or of the static classifier's, and return its path.

    `terms` are those of the teachers, which bind whoever gets the model. Raises RunError where it cannot be written.
    """
    path, facts = folder / "README.md", known_facts(story)
    facts |= {"terms": terms, "licence_note": note_licence(story.license, terms)}
    if arm == "static":
        facts |= {"headline": write_static_headline(story), "caveat": ""}
    library = "model2vec" if arm == "static" else wording_of(story.task).library
    save_text(
        path,
        render("card.md.jinja", {**facts, "arm": arm, "library": library}),
    )
    return path
