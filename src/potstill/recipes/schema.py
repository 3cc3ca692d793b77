"""What a recipe may say: frozen models, one per kind, unknown keys refused.

Importing this module must stay cheap: no torch, no transformers. Refuses: class paths, secrets, free-form dictionaries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.recipes.losses import CrossEntropy, LossTerm
from potstill.recipes.numbers import Count, Fraction, Layer, Positive, Real, Share, Whole
from potstill.recipes.part import Part
from potstill.recipes.signals import OnlineSignals, Signals, StoredSignals
from potstill.recipes.teachers import LocalTeacher, Member, MixtureTeacher, Precision, RunTeacher, Teacher

__all__ = [
    "CausalConfig",
    "ConstantSchedule",
    "Control",
    "CosineSchedule",
    "CrossEntropy",
    "Data",
    "Evaluation",
    "FreshStudent",
    "LayersStudent",
    "LocalTeacher",
    "LossTerm",
    "Member",
    "MixtureTeacher",
    "OnlineSignals",
    "PretrainedStudent",
    "Recipe",
    "Report",
    "RunTeacher",
    "Search",
    "Signals",
    "Splits",
    "StoredSignals",
    "Student",
    "Teacher",
    "Training",
    "WSDSchedule",
]


class Splits(Part):
    """Shares of the documents that are held out. The rest is for training."""

    validation: Share = 0.02
    """Share of documents for validation: layer search and loss curves."""
    test: Share = 0.03
    """Share of documents for the final evaluation. Nothing else ever sees them."""

    @model_validator(mode="after")
    def _something_is_left(self) -> Splits:
        if self.validation + self.test >= 1.0:
            raise ValueError(
                f"validation {self.validation} + test {self.test} leave no document to train on; lower one of them"
            )
        return self


class Data(Part):
    """Where the words come from and how they are packed."""

    source: str
    """A file (.jsonl, .parquet, .csv, .txt), a folder of such files, a Hugging Face `datasets` id, or `sample:NAME`."""
    config: str | None = None
    """Configuration of a Hugging Face data set that has several, for example wikitext-103-raw-v1."""
    split: str = "train"
    """Split to read, for a Hugging Face id."""
    format: Literal["auto", "jsonl", "parquet", "csv", "text"] = "auto"
    """File format; `auto` goes by the ending."""
    text: str = "text"
    """Name of the column that holds plain text."""
    messages: str = "messages"
    """Name of the column that holds chat messages; used where a row has it."""
    max_documents: Count | None = None
    """Read at most so many documents."""
    max_tokens: Annotated[Real, Field(gt=0.0, le=1e18)] | None = None
    """Stop reading with the document that brings the training rows to so many tokens. 3e9 is a number here."""
    sequence_length: Annotated[Whole, Field(ge=8, le=2**24)] = 512
    """Tokens a packed row holds."""
    splits: Splits = Splits()
    """Which documents are held out: by content, so that equal documents share a split."""


class Search(Part):
    """Budget of the greedy layer search."""

    rows: Count = 4
    """Held-out rows on which the teacher-student KL is measured."""
    minutes: Positive = 5.0
    """When the time is up, the rest goes by the last rises seen (before a first full round: by block influence)."""
    shortlist: Count = 6
    """Candidates tried a round after the first: those whose removal raised the KL least when last tried."""


class LayersStudent(Part):
    """Some of the teacher's layers, with its embeddings, final norm and head."""

    kind: Literal["layers"]
    keep: Literal["greedy", "even"] | list[Layer] = "greedy"
    """0-based layer numbers, or `even`, or `greedy` (remove one by one the layer whose removal hurts least)."""
    count: Count | None = None
    """How many layers stay; needed for `greedy` and `even`."""
    search: Search = Search()
    """Budget of `greedy`."""

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
    """Any pretrained causal language model with the teacher's vocabulary."""

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


Schedule = Annotated[CosineSchedule | ConstantSchedule | WSDSchedule, Field(discriminator="kind")]


class Checkpoints(Part):
    """When the training state is saved, so that nothing is lost."""

    every_minutes: Positive | None = 5.0
    """Wall time between checkpoints; null for none by time."""
    every_steps: Count | None = None
    """Steps between checkpoints; null for none by steps."""
    keep: Count = 2
    """Older ones are deleted. With 2, a damaged newest one costs one interval, not the run."""


class Training(Part):
    """One optimiser, one schedule, one loop. Give exactly one of tokens, steps, epochs."""

    tokens: Annotated[Real, Field(gt=0.0, le=1e18)] | None = None
    """Stop after so many packed positions (a batch has rows x sequence_length of them). 3e12 is a number here."""
    steps: Count | None = None
    """Stop after so many optimiser steps."""
    epochs: Annotated[Real, Field(gt=0.0, le=1e6)] | None = None
    """Stop when every row was seen so many times."""
    batch_rows: Count = 8
    """Packed rows per optimiser step, over all devices."""
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
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: slower, less memory."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the blocks of student and teacher (torch.compile): slower start, faster steps. `auto`: where it pays."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    validate_every: Count | None = None
    """Steps between validation losses; default: about ten times in the run."""
    validation_rows: Count = 8
    """Held-out rows on which the validation losses are computed."""
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


class Control(Part):
    """The arm that every claim is held against: same initial student, same batches, hard labels only."""

    enabled: bool = True
    """Without it the report says in its first line that the gain from distillation is unknown."""


class Evaluation(Part):
    """Questions to teacher, untrained student, control and student alike."""

    max_rows: Count | None = 128
    """Packed held-out rows to score; null for all."""
    batch_rows: Count = 8
    """Rows read at once."""
    resamples: Annotated[Whole, Field(ge=100, le=10**6)] = 2000
    """Bootstrap resamples over documents."""
    sample_prompts: Annotated[Whole, Field(ge=0, le=64)] = 4
    """Held-out documents whose beginnings every arm continues greedily, side by side in the report."""
    sample_tokens: Annotated[Whole, Field(ge=1, le=4096)] = 48
    """Tokens of a prompt that is cut from a text, and of every continuation."""
    speed: bool = True
    """Measure prefill and decode tokens/s, and the memory they take, of every arm; needs prompts."""


class Report(Part):
    """The page."""

    title: str | None = None
    """What it is called; default: the name."""


class Recipe(Part):
    """One distillation, from words to report."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run; letters, digits, dot, dash, underscore."""
    description: str = ""
    """What it is for, in a sentence; stands in the report."""
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0
    """Of everything that is random: splits, order, initial weights."""
    run_dir: Path | None = None
    """Where the run lives. Default: runs/NAME."""
    data: Data
    teacher: Teacher
    student: Student
    losses: Annotated[list[LossTerm], Field(min_length=1)]
    signals: Signals = OnlineSignals(kind="online")
    training: Training
    control: Control = Control()
    evaluation: Evaluation = Evaluation()
    report: Report = Report()

    @model_validator(mode="after")
    def _terms_are_distinct(self) -> Recipe:
        kinds = [term.kind for term in self.losses]
        for index, kind in enumerate(kinds):
            if kind in kinds[:index]:
                raise ValueError(f"losses[{index}].kind: {kind} is there twice; merge the two terms into one weight")
        return self

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run_dir if self.run_dir is not None else Path("runs") / self.name
