"""Who learns: layers of the teacher, a pretrained model, fresh weights; beside them a static-embedding classifier.

Refuses a list of layers that says one twice, or a rule without a number.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.recipes.numbers import Count, Layer, Positive
from potstill.recipes.part import Part
from potstill.recipes.training import Training

__all__ = [
    "CausalConfig",
    "FreshStudent",
    "LayersStudent",
    "PretrainedStudent",
    "Search",
    "StaticStudent",
    "Student",
]


class Search(Part):
    """Budget of the greedy layer search."""

    rows: Count = 4
    """Held-out rows on which the teacher-student KL is measured."""
    minutes: Positive = 5.0
    """When the time is up, the rest goes by the last rises seen (before a first full round: by block influence)."""
    shortlist: Count = 6
    """Candidates tried a round after the first: those whose removal raised the KL least when last tried."""


class LayersStudent(Part):
    """Some layers of the teacher, or of another model, with its embeddings, final norm and head."""

    kind: Literal["layers"]
    model: str | None = None
    """Whose layers: a hub id, a folder, a .gguf file, or `sample:NAME`; null for the teacher's. It judges itself which
    of them matter. Over tokens it must have the vocabulary of the teacher, if that is a model here."""
    keep: Literal["greedy", "even"] | list[Layer] = "greedy"
    """0-based layer numbers, or `even`, or `greedy` (remove one by one the layer whose removal hurts least)."""
    count: Count | None = None
    """How many layers stay; needed for `greedy` and `even`."""
    search: Search = Search()
    """Budget of `greedy`."""
    architecture: Literal["teacher", "distilbert"] = "teacher"
    """`distilbert` turns layers of a BERT into a DistilBERT: no token types, no pooler, the same numbers."""

    @model_validator(mode="after")
    def _count_goes_with_rule(self) -> LayersStudent:
        if isinstance(self.keep, str) and self.count is None:
            raise ValueError(f"keep: {self.keep} needs count, the number of layers to keep, for example `count: 15`")
        if not isinstance(self.keep, str):
            if not self.keep:
                raise ValueError("keep: an empty list keeps no layer; name at least one")
            if sorted(set(self.keep)) != list(self.keep):
                raise ValueError(f"keep: {self.keep} must be ascending, each layer once; sort it")
            if self.count is not None and self.count != len(self.keep):
                raise ValueError(f"count: {self.count} but keep lists {len(self.keep)} layers; leave count out")
        return self


class PretrainedStudent(Part):
    """Any pretrained model of the kind that the task asks for; over tokens, with the teacher's vocabulary."""

    kind: Literal["model"]
    model: str
    """A hub id, a folder, a .gguf file, or `sample:NAME`."""


class CausalConfig(Part):
    """Sizes of a fresh student; whatever is not named is taken from the teacher's config."""

    num_hidden_layers: Count | None = None
    """Blocks."""
    hidden_size: Count | None = None
    """Width of the residual stream."""
    intermediate_size: Count | None = None
    """Width of the feed-forward layers."""
    num_attention_heads: Count | None = None
    """Heads of a block; must divide hidden_size."""
    num_key_value_heads: Count | None = None
    """Key-value heads of a block (grouped queries); must divide num_attention_heads."""
    head_dim: Count | None = None
    """Width of a head, where the architecture has it as a size of its own. Default: hidden_size / heads."""
    tie_word_embeddings: bool | None = None
    """Whether the head is the embedding matrix."""


class FreshStudent(Part):
    """A student of the teacher's architecture with other sizes and random weights."""

    kind: Literal["config"]
    config: CausalConfig = CausalConfig()
    """Its sizes."""


Student = Annotated[LayersStudent | PretrainedStudent | FreshStudent, Field(discriminator="kind")]


class StaticStudent(Part):
    """A classifier without attention, beside the student: the mean of static token embeddings and a linear layer.

    The embeddings are distilled from the teacher's encoder by model2vec; then all of it learns from the same lessons.
    """

    dimensions: Count = 256
    """Width of a token's embedding."""
    training: Training
    """How it is trained."""

    @model_validator(mode="after")
    def _has_no_layers(self) -> StaticStudent:
        if self.training.lora is not None:
            raise ValueError("training.lora: a static classifier has no layers for adapters; leave lora out")
        return self
