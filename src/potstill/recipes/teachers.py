"""Who teaches: one model, the student of another run, or several models averaged.

Refuses a mixture in which nobody has a say.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.recipes.numbers import Real
from potstill.recipes.part import Part

__all__ = ["LocalTeacher", "Member", "MixtureTeacher", "Precision", "RunTeacher", "Teacher"]

Precision = Literal["bf16", "fp32"]
Say = Annotated[Real, Field(ge=0.0, le=1e6)]


class LocalTeacher(Part):
    """A Hugging Face causal language model in this process."""

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
    """Several Hugging Face causal language models with one tokenizer, whose next-token probabilities are averaged."""

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


Teacher = Annotated[LocalTeacher | RunTeacher | MixtureTeacher, Field(discriminator="kind")]
