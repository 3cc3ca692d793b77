"""The teacher's terms, as the model card tells them.

Refuses to judge: what a rule says and what a recipe states stand side by side, word for word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["TermsFacts", "note_licence"]


@dataclass(frozen=True, slots=True)
class TermsFacts:
    """What the terms of one teacher say.

    access      host of its API, or in words that it ran here
    rule, who   id of the rule, and whose terms they are
    use         in words, whether a model may be trained on its answers
    source      where the terms stand; None where nothing is known
    effective, checked  ISO dates: since when (None if unknown), and when they were last looked at
    permission  what the recipe states, word for word; None where it states nothing
    """

    model: str
    access: str
    rule: str
    who: str
    use: str
    clause: str
    source: str | None
    effective: str | None
    checked: str
    obligations: tuple[str, ...] = ()
    permission: str | None = None


def note_licence(license: str | None, terms: Sequence[TermsFacts]) -> str:
    """A sentence on the licence of a student: what is known of it, and what stands above it."""
    if license:
        known = "The licence is stated above; the terms of the teacher and of the training data apply as well."
    else:
        known = "The licence is not known to this card: the terms of the teacher and of the training data apply."
    if not any(one.obligations or one.permission for one in terms):
        return known
    return f"{known} What the teacher's terms ask for stands under \"Teacher's terms\" and holds whatever the licence."
