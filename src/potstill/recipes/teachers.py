"""Who teaches: a model, as it is or trained first; the student of another run; several averaged; recorded answers.

Refuses a mixture in which nobody has a say.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from potstill.recipes.endpoints import OpenAITeacher
from potstill.recipes.numbers import Real
from potstill.recipes.part import Part
from potstill.recipes.training import Precision, Training

__all__ = [
    "FinetuneTeacher",
    "LocalTeacher",
    "Member",
    "MixtureTeacher",
    "OpenAITeacher",
    "RecordedTeacher",
    "RunTeacher",
    "Teacher",
]

Say = Annotated[Real, Field(ge=0.0, le=1e6)]


class LocalTeacher(Part):
    """A Hugging Face model in this process, of the kind that the task asks for."""

    kind: Literal["local"]
    model: str
    """A hub id, a folder, a .gguf file, or `sample:NAME`."""
    dtype: Precision = "bf16"
    """Weights and arithmetic of the teacher."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""


class RunTeacher(Part):
    """The student of another recipe, an assistant between a large teacher and a small student. It is run first."""

    kind: Literal["run"]
    recipe: str
    """The assistant's recipe: a file, relative to the recipe that names it, or the name of a shipped recipe."""
    dtype: Precision = "bf16"
    """Weights and arithmetic of the assistant as a teacher."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""


class Member(Part):
    """One of several teachers that are averaged."""

    model: str
    """A hub id, a folder, a .gguf file, or `sample:NAME`."""
    weight: Say = 1.0
    """Its say, relative to the other members' at the same position; 0 for none."""
    sources: dict[str, Say] = Field({})
    """Its say on documents from files (or hub data sets) of these names, `*` and `?` allowed; the first that fits."""

    def weight_for(self, source: str) -> float:
        """Its say on a document from this source: that of the first pattern that fits, else `weight`."""
        return next((say for pattern, say in self.sources.items() if fnmatchcase(source, pattern)), self.weight)


class MixtureTeacher(Part):
    """Several Hugging Face models whose probabilities are averaged: language models of one tokenizer, classifiers."""

    kind: Literal["mixture"]
    members: Annotated[list[Member], Field(min_length=2)]
    """Two or more models; the first gives tokenizer, chat template, layers and hidden states."""
    dtype: Precision = "bf16"
    """Weights and arithmetic of every member."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ...: of every member."""

    @model_validator(mode="after")
    def _somebody_speaks(self) -> MixtureTeacher:
        if not any(member.weight for member in self.members):
            raise ValueError("members: every weight is 0, so that nobody speaks where no source is named; raise one")
        return self


class FinetuneTeacher(Part):
    """A model that is first trained on the labels, in a stage of its own, and then teaches."""

    kind: Literal["finetune"]
    model: str
    """A hub id, a folder, or `sample:NAME`: an encoder, with or without a head for the task."""
    learns: Literal["all", "head"] = "all"
    """Which weights are trained: all, or only the head that the task asks for and the model lacks."""
    training: Training
    """How it is trained: on hard labels."""
    dtype: Precision = "bf16"
    """Weights and arithmetic of the teacher when it teaches."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""


class RecordedTeacher(Part):
    """Answers that were given elsewhere, by any model or API, in a file; no model of the teacher is here."""

    kind: Literal["recorded"]
    path: str
    """A file with a row a text: .jsonl, .parquet or .csv."""
    match: Literal["text", "id"] = "text"
    """What tells which text of the data a row is about; the order of rows plays no part."""
    text: str = "text"
    """With `match: text`: the column of the text."""
    text_pair: str | None = None
    """With `match: text`: the column of a second text."""
    probabilities: str | None = None
    """Column with the probability of every class: {label: probability}, or a list in the order of `task.labels`."""
    label: str | None = None
    """Column with the label that was answered, where there are no probabilities."""

    device: ClassVar[str] = "auto"
    dtype: ClassVar[Precision] = "fp32"

    @model_validator(mode="after")
    def _one_answer(self) -> RecordedTeacher:
        if (self.probabilities is None) == (self.label is None):
            raise ValueError("needs exactly one of probabilities, label: the column that holds the answers")
        return self


Teacher = Annotated[
    LocalTeacher | OpenAITeacher | FinetuneTeacher | RecordedTeacher | RunTeacher | MixtureTeacher,
    Field(discriminator="kind"),
]
