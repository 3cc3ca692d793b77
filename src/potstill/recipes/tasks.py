"""What the student is to do: which class of model it is, and what its answers are.

Refuses shares of masked tokens that exceed the whole.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.recipes.numbers import Real, Share
from potstill.recipes.part import Part

__all__ = [
    "Classification",
    "Embedding",
    "LanguageModel",
    "MaskedLM",
    "Pooling",
    "Task",
    "TextTask",
    "TokenClassification",
]

Within = Annotated[Real, Field(ge=0.0, le=1.0)]
Overlong = Literal["truncate", "drop", "refuse"]
Pooling = Literal["cls", "mean"]


class LanguageModel(Part):
    """Say the next token: a causal language model."""

    kind: Literal["language_model"]


class MaskedLM(Part):
    """Say which token a mask hides: an encoder with its language model head. Masks are drawn anew in every epoch."""

    kind: Literal["masked_lm"]
    masked: Share = 0.15
    """Share of the tokens that are to be said. Special tokens are never among them."""
    by_mask: Within = 0.8
    """Of these, the share that is replaced by the mask token."""
    by_random: Within = 0.1
    """Of these, the share that is replaced by a random token; the rest stays as it is."""

    @model_validator(mode="after")
    def _shares_fit(self) -> MaskedLM:
        if self.by_mask + self.by_random > 1.0:
            raise ValueError(f"by_mask {self.by_mask} + by_random {self.by_random} exceed 1; lower one of them")
        return self


class TextTask(Part):
    """A task over texts, one at a time."""

    kind: str
    overlong: Overlong = "truncate"
    """What becomes of a text of more tokens than `data.sequence_length`: cut or left out, both counted, or refused."""


class Classification(TextTask):
    """Say which class a text is of; or, with `multi_label`, which of the labels it bears."""

    kind: Literal["classification"]
    multi_label: bool = False
    """Whether a text bears any number of labels, instead of exactly one."""
    labels: Annotated[list[str], Field(min_length=2)] | None = None
    """Their names, in order. Default: those of a ready teacher, else those of the data in alphabetical order."""
    out_of_scope: str | None = None
    """The label of texts that belong to no class: no class of its own, but found by low confidence. In training such a
    text counts as unlabelled."""
    pooling: Pooling = "cls"
    """What becomes of the states of all tokens: the first token's, or their mean. `mean` needs an architecture that has
    a setting for it."""


class TokenClassification(TextTask):
    """Say a class for every word."""

    kind: Literal["token_classification"]
    labels: Annotated[list[str], Field(min_length=2)] | None = None
    """Their names, in order. Default: those of a ready teacher, else those of the data in alphabetical order."""


class Embedding(TextTask):
    """Give a text a vector: a sentence encoder."""

    kind: Literal["embedding"]
    pooling: Pooling = "mean"
    """How the states of all tokens become one vector: the first token's, or their mean."""
    normalise: bool = True
    """Scale vectors to length 1."""


Task = Annotated[
    LanguageModel | MaskedLM | Classification | TokenClassification | Embedding, Field(discriminator="kind")
]
