"""How a student learns: length, optimiser, schedule, precision, checkpoints. Refuses two lengths, or none."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.recipes.numbers import Count, Fraction, Positive, Real, Whole
from potstill.recipes.part import Part

__all__ = [
    "Checkpoints",
    "ConstantSchedule",
    "CosineSchedule",
    "LinearSchedule",
    "LowRank",
    "Precision",
    "Schedule",
    "Training",
    "WSDSchedule",
]


Precision = Literal["bf16", "fp32"]


class _Schedule(Part):
    warmup: Fraction = 0.05
    """Share of the steps over which the learning rate rises linearly to its peak."""


class CosineSchedule(_Schedule):
    """Half a cosine from the peak down to `final` times the peak."""

    kind: Literal["cosine"]
    final: Annotated[Real, Field(ge=0.0, le=1.0)] = 0.1
    """Share of the peak rate that is left at the end."""


class ConstantSchedule(_Schedule):
    """Warm up, then stay."""

    kind: Literal["constant"]


class LinearSchedule(_Schedule):
    """A straight line from the peak down to `final` times the peak."""

    kind: Literal["linear"]
    final: Annotated[Real, Field(ge=0.0, le=1.0)] = 0.0
    """Share of the peak rate that is left at the end."""


class WSDSchedule(_Schedule):
    """Warm-up, stable, decay: linear decay to `final` times the peak over the last `decay` share of the steps."""

    kind: Literal["wsd"]
    decay: Annotated[Real, Field(gt=0.0, le=1.0)] = 0.2
    """Share of the steps over which the rate falls."""
    final: Annotated[Real, Field(ge=0.0, le=1.0)] = 0.0
    """Share of the peak rate that is left at the end."""

    @model_validator(mode="after")
    def _phases_fit(self) -> WSDSchedule:
        if self.warmup + self.decay > 1.0:
            raise ValueError(f"warmup {self.warmup} + decay {self.decay} exceed 1, the whole run; lower one of them")
        return self


Schedule = Annotated[CosineSchedule | LinearSchedule | ConstantSchedule | WSDSchedule, Field(discriminator="kind")]


class Checkpoints(Part):
    """When the training state is saved, so that nothing is lost."""

    every_minutes: Positive | None = 5.0
    """Wall time between checkpoints; null for none by time."""
    every_steps: Count | None = None
    """Steps between checkpoints; null for none by steps."""
    keep: Count = 2
    """Older ones are deleted. With 2, a damaged newest one costs one interval, not the run."""


class LowRank(Part):
    """Low-rank adapters (LoRA: Hu et al., 2021, arXiv:2106.09685): they alone learn, and end up in the weights.

    A layer W x becomes W x + (alpha / rank) B A x; B and A are small, and B begins as zeros.
    """

    rank: Annotated[Whole, Field(ge=1, le=4096)] = 16
    """Rows of A, columns of B."""
    alpha: Annotated[Whole, Field(ge=1, le=2**20)] = 32
    """Over the rank: the factor of what the adapters add."""
    dropout: Fraction = 0.0
    """Of their input, while they learn."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Every linear layer of the blocks, or those whose names end so: [q_proj, v_proj]. Never the output layer."""


class Training(Part):
    """One optimiser, one schedule, one loop. Give exactly one of tokens, steps, epochs."""

    tokens: Annotated[Real, Field(gt=0.0, le=1e18)] | None = None
    """Stop after so many packed positions (a batch has rows x sequence_length of them). 3e12 is a number here."""
    steps: Count | None = None
    """Stop after so many optimiser steps."""
    epochs: Annotated[Real, Field(gt=0.0, le=1e6)] | None = None
    """Stop when every row was seen so many times."""
    batch_rows: Count = 8
    """Packed rows (texts, where the task is over texts) per optimiser step, over all devices."""
    group_by_length: bool = True
    """Over texts: those of a batch are of like length, which saves padding. With false they are drawn at random:
    slower, and closer to the teacher after few steps. Then micro_batch_rows saves padding within the batch."""
    micro_batch_rows: Count | None = None
    """Rows that go through the model at once; the rest accumulates. Default: batch_rows."""
    learning_rate: Positive = 5e-4
    """Its peak, which the schedule scales."""
    schedule: Schedule = CosineSchedule(kind="cosine")
    """How the learning rate goes over the steps."""
    weight_decay: Annotated[Real, Field(ge=0.0)] = 0.01
    """Of matrices only; norms and biases are not decayed."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: Positive = 1e-8
    """AdamW's addition to the denominator."""
    clip_norm: Positive | None = 1.0
    """Largest global gradient norm; null switches clipping off."""
    precision: Precision = "bf16"
    """bf16: autocast over fp32 master weights. fp32: everything in fp32."""
    dropout: Fraction | None = None
    """Share that layers and attention drop at random while they learn; null: what the model's config says (encoders
    mostly 0.1). A student that copies vectors learned more with 0, and faster."""
    freeze_embeddings: bool = False
    """Leave the token embeddings (and a head that is tied to them) as they begin: of a short batch's step they take
    a large part."""
    lora: LowRank | None = None
    """For language models: train adapters instead of the weights, with a tenth of the optimiser's memory; null to train
    the weights themselves. Needs a rate some ten times as high. What is saved has the adapters merged."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: slower, less memory."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the blocks of student and teacher (torch.compile): slower start, faster steps. `auto`: where it pays."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    validate_every: Count | None = None
    """Steps between validation losses; default: about ten times in the run."""
    validation_rows: Count = 8
    """Held-out rows (texts) on which the validation losses are computed."""
    checkpoint: Checkpoints = Checkpoints()
    """When the training state is saved."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field([])
    """Beside metrics.jsonl, which is always written."""

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        given = [name for name in ("tokens", "steps", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of tokens, steps, epochs; got {', '.join(given) or 'none'}")
        if self.micro_batch_rows is not None and self.batch_rows % self.micro_batch_rows:
            raise ValueError(
                f"micro_batch_rows: {self.micro_batch_rows} must divide batch_rows: {self.batch_rows}; "
                f"try {max(d for d in range(1, self.micro_batch_rows + 1) if self.batch_rows % d == 0)}"
            )
        return self

    @property
    def rows_at_once(self) -> int:
        """Rows of one micro-batch."""
        return self.micro_batch_rows or self.batch_rows
