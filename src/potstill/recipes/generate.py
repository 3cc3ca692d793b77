"""What the teacher is asked to write: from which prompts, how often, and which of its answers the student learns from.

Refuses a prompt template that leaves out what it is to be filled with.
"""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.recipes.cleaning import Cleaning
from potstill.recipes.numbers import Count, Real, Whole
from potstill.recipes.part import Part
from potstill.recipes.verify import Verifier

__all__ = [
    "EvolvedPrompts",
    "Generate",
    "GridPrompts",
    "Keep",
    "Prompts",
    "RowPrompts",
    "SelfInstructPrompts",
    "TaskPrompts",
    "Writing",
]


class RowPrompts(Part):
    """The rows of `data.source`."""

    kind: Literal["rows"]
    template: str = "{prompt}"
    """What is asked: column names in braces are filled from the row. A row with messages is asked as it is."""


class TaskPrompts(Part):
    """Problems of the library reasoning-gym, as many as wanted, with its own judge of answers."""

    kind: Literal["reasoning_gym"]
    task: str
    """Its name there, for example chain_sum."""
    count: Count
    """Problems, held-out ones included."""
    settings: dict[str, str | int | float | bool] = Field({})
    """Of that task."""
    template: str = "{prompt}"
    """What is asked; {prompt} is the problem."""


class GridPrompts(Part):
    """One prompt for every combination of seeds, or for so many drawn at random (Phi: topic x audience x style)."""

    kind: Literal["grid"]
    axes: Annotated[dict[str, list[str]], Field(min_length=1)]
    """Names with their values: topic: [...], audience: [...]."""
    template: str
    """What is asked; the names of the axes in braces."""
    count: Count | None = None
    """Combinations drawn without repetition; null for all."""

    @model_validator(mode="after")
    def _all_axes_are_used(self) -> GridPrompts:
        named = {name for _, name, _, _ in Formatter().parse(self.template) if name}
        if named != set(self.axes):
            raise ValueError(
                f"template: names {sorted(named)}, and the axes are {sorted(self.axes)}; put each there in braces"
            )
        return self


class SelfInstructPrompts(Part):
    """New prompts that the teacher writes after the manner of the rows (Wang et al., 2022, arXiv:2212.10560)."""

    kind: Literal["self_instruct"]
    count: Count
    """Prompts wanted."""
    shown: Annotated[Whole, Field(ge=1, le=32)] = 8
    """Examples in a request."""
    written: Annotated[Whole, Field(ge=1, le=64)] = 8
    """New prompts asked for in a request."""
    template: str = "{prompt}"
    """Of the rows: column names in braces."""


class EvolvedPrompts(Part):
    """The rows, made harder or broader by the teacher, round by round (Xu et al., 2023, arXiv:2304.12244)."""

    kind: Literal["evolved"]
    rounds: Annotated[Whole, Field(ge=1, le=10)] = 2
    """Each row's prompt is rewritten so many times; every version is asked."""
    template: str = "{prompt}"
    """Of the rows: column names in braces."""


Prompts = Annotated[
    RowPrompts | TaskPrompts | GridPrompts | SelfInstructPrompts | EvolvedPrompts, Field(discriminator="kind")
]


class Writing(Part):
    """How answers are sampled."""

    max_tokens: Count = 1024
    """Longest answer, reasoning included."""
    temperature: Annotated[Real, Field(ge=0.0, le=2.0)] = 0.7
    """0 is greedy."""
    top_p: Annotated[Real, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus of the sampling."""
    stop: list[str] = Field([])
    """An answer ends before any of these."""


class Keep(Part):
    """Which of a prompt's right answers the student learns from (rejection sampling)."""

    rule: Literal["all", "shortest", "distinct"] = "all"
    """`distinct`: those least like each other, up to `most`."""
    most: Count | None = None
    """At most so many a prompt."""


class Generate(Part):
    """The teacher writes what the student learns (sequence-level KD: Kim and Rush, 2016, arXiv:1606.07947)."""

    prompts: Prompts = RowPrompts(kind="rows")
    """What is asked."""
    system: str | None = None
    """A system message before every prompt; null for none."""
    teach_system: bool = True
    """Whether the student sees that message too."""
    samples: Count = 1
    """Answers to each prompt."""
    sampling: Writing = Writing()
    """How they are drawn."""
    verify: Verifier | None = None
    """Which answers are right; null to take them all."""
    keep: Keep = Keep()
    """Which of the right ones are learned."""
    thinking: bool = True
    """Whether the student learns the teacher's reasoning, where there is any, before its answer."""
    cleaning: Cleaning = Cleaning()
    """What is removed from what the teacher wrote."""
    overlong: Annotated[Real, Field(ge=0.0, le=1.0)] = 0.05
    """Largest share of answers longer than `data.sequence_length`; with more the run stops, else these are left out."""
    held_out: Count | None = None
    """Prompts that are held out for the test; null: as `data.splits` says."""
