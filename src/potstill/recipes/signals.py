"""What is kept of a teacher: nothing (it is asked as lessons come), or its words about every position, in a store.

Refuses a name that hides a bias: what is renormalised is called so.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.recipes.numbers import Count, Positive, Share
from potstill.recipes.part import Part

__all__ = [
    "AllPositions",
    "DenseSignals",
    "HiddenSignals",
    "HighestEntropyPositions",
    "OnlineSignals",
    "Positions",
    "RandomPositions",
    "SampledSignals",
    "Signals",
    "StoredSignals",
    "TopKRenormalisedSignals",
    "TopKSignals",
    "TruncatedSignals",
]


class AllPositions(Part):
    """Every supervised position."""

    kind: Literal["all"]


class RandomPositions(Part):
    """Some supervised positions of every document, drawn once."""

    kind: Literal["random"]
    share: Share
    """Share of a document's supervised positions, rounded up."""


class HighestEntropyPositions(Part):
    """Those supervised positions of every document at which the teacher is least sure of the next token."""

    kind: Literal["highest_entropy"]
    share: Share
    """Share of a document's supervised positions, rounded up."""


Positions = Annotated[AllPositions | RandomPositions | HighestEntropyPositions, Field(discriminator="kind")]


class OnlineSignals(Part):
    """Nothing is kept: the teacher sits beside the student and is asked in every step."""

    kind: Literal["online"]

    @property
    def everywhere(self) -> bool:
        """Whether the teacher speaks at every supervised position."""
        return True


class StoredSignals(Part):
    """The teacher reads every document once, before the training, which then does without it."""

    kind: str
    store: str | None = None
    """Folder, or s3://, gs:// or az:// place, of the store. Default: a folder of `signals` beside the run folder, named
    after teacher and encoding, so that further students find it."""
    positions: Positions = AllPositions(kind="all")
    """At which positions the teacher speaks; terms that compare with it count these only, hard labels count all."""
    batch_tokens: Count = 4096
    """Tokens that the teacher reads at once, padding included."""

    @property
    def everywhere(self) -> bool:
        """Whether the teacher speaks at every supervised position."""
        return isinstance(self.positions, AllPositions)

    @property
    def share(self) -> float:
        """Of a document's supervised positions, those at which the teacher speaks."""
        return 1.0 if isinstance(self.positions, AllPositions) else self.positions.share


class TruncatedSignals(StoredSignals):
    """Some tokens a position."""

    k: Count = 16
    """Tokens a position."""
    temperatures: Annotated[list[Positive], Field(min_length=1)] | None = None
    """Distillation temperatures for which the store is good. Default: those of the losses."""

    @model_validator(mode="after")
    def _temperatures_differ(self) -> TruncatedSignals:
        if self.temperatures and len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(f"temperatures: {self.temperatures} has one twice; name each once")
        return self


class SampledSignals(TruncatedSignals):
    """Exactly k tokens: the likely ones with their probability, some of the others drawn for all of them. Unbiased."""

    kind: Literal["sampled"]


class TopKSignals(TruncatedSignals):
    """The k likeliest tokens, and the probability of all others together."""

    kind: Literal["topk"]


class TopKRenormalisedSignals(TruncatedSignals):
    """The k likeliest tokens as if there were no others: biased, and students become too sure. For comparison."""

    kind: Literal["topk_renormalised"]


class HiddenSignals(StoredSignals):
    """The teacher's final hidden states, exact for every loss: 2 bytes a unit of its width."""

    kind: Literal["hidden"]


class DenseSignals(StoredSignals):
    """All logits: 4 bytes a token of the vocabulary, for small ones; a teacher's whole answer to a text."""

    kind: Literal["dense"]
    features: bool = False
    """For tasks over texts: keep also what the losses compare behind the answers: hidden states, queries, keys and
    values of every token, in 2 bytes a number. Teacher and student must have one tokenizer then."""


Signals = Annotated[
    OnlineSignals | SampledSignals | TopKSignals | TopKRenormalisedSignals | HiddenSignals | DenseSignals,
    Field(discriminator="kind"),
]
