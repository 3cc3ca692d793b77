"""What a recipe may say: frozen models, one per kind, unknown keys refused.

Importing this module must stay cheap: no torch, no transformers. Refuses: class paths, secrets, free-form dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from potstill.recipes.generate import Generate, Writing
from potstill.recipes.losses import CrossEntropy, LossTerm
from potstill.recipes.numbers import Count, Real, Share, Whole
from potstill.recipes.part import Part
from potstill.recipes.signals import OnlineSignals, Signals, StoredSignals
from potstill.recipes.students import (
    CausalConfig,
    FreshStudent,
    LayersStudent,
    PretrainedStudent,
    Search,
    StaticStudent,
    Student,
)
from potstill.recipes.tasks import (
    Classification,
    Embedding,
    LanguageModel,
    MaskedLM,
    Task,
    TextTask,
    TokenClassification,
)
from potstill.recipes.teachers import (
    FinetuneTeacher,
    LocalTeacher,
    Member,
    MixtureTeacher,
    OpenAITeacher,
    RecordedTeacher,
    RunTeacher,
    Teacher,
)
from potstill.recipes.training import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    Precision,
    Training,
    WSDSchedule,
)

__all__ = [
    "CausalConfig",
    "Classification",
    "ConstantSchedule",
    "Control",
    "CosineSchedule",
    "CrossEntropy",
    "Data",
    "Embedding",
    "Evaluation",
    "FinetuneTeacher",
    "FreshStudent",
    "Generate",
    "LanguageModel",
    "LayersStudent",
    "LinearSchedule",
    "LocalTeacher",
    "LossTerm",
    "MaskedLM",
    "Member",
    "MixtureTeacher",
    "Noise",
    "OnlineSignals",
    "OpenAITeacher",
    "Phase",
    "Precision",
    "PretrainedStudent",
    "Price",
    "Recipe",
    "RecordedTeacher",
    "Report",
    "RunTeacher",
    "Search",
    "Signals",
    "Splits",
    "StaticStudent",
    "StoredSignals",
    "Student",
    "Task",
    "Teacher",
    "TextTask",
    "TokenClassification",
    "Training",
    "WSDSchedule",
]


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


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


class Noise(Part):
    """Copies of the training texts with slips in them; each has the label and the teacher's answer of its own text."""

    copies: Count = 1
    """Copies of every training text."""
    share: Share = 0.1
    """Share of the words that a slip befalls: left out, swapped with the next, or a letter lost, doubled or swapped."""


class Data(Part):
    """Where the words come from and how they are packed."""

    source: str = ""
    """A file (.jsonl, .parquet, .csv, .txt), a folder of such files, a Hugging Face `datasets` id, or `sample:NAME`.
    Left out only where `generate.prompts` makes its own prompts."""
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
    label: str = "label"
    """For tasks over texts: the column of the label; of a list of labels; or, with one for every word, of that list.
    `text` is then the column of the text, or of the list of words."""
    text_pair: str | None = None
    """For tasks over texts: the column of a second text."""
    split_by: str = "split"
    """For tasks over texts: the column that says train, validation or test, where there is one. A file or data set that
    comes in such parts is used as it is; parts that it lacks are taken from its training part, by `splits`."""
    slice: str | None = None
    """For tasks over texts: a column by whose values the evaluation is told apart."""
    unlabelled: str | None = None
    """For tasks over texts: more training texts, without labels: traffic logs, for example. As `source`."""
    labels_per_class: Count | None = None
    """For classification: keep the labels of so many training texts a class; the others count as unlabelled."""
    noise: Noise | None = None
    """For classification: augmentation by text noise; null for none."""


class Control(Part):
    """The arm that every claim is held against: same initial student, same batches, hard labels only."""

    enabled: bool = True
    """Without it the report says in its first line that the gain from distillation is unknown."""


class Price(Part):
    """What 1,000 queries cost follows from the price of a machine, or is that of an API."""

    machine_usd_per_hour: Annotated[Real, Field(gt=0.0)]
    """Price of a machine such as this one, kept busy."""
    teacher_usd_per_1000: Annotated[Real, Field(gt=0.0)] | None = None
    """What the teacher's API charges for 1,000 queries; null where the teacher runs on such a machine too."""


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
    """Measure speed and memory of every arm: prefill and decode tokens/s (which needs prompts); for tasks over texts,
    latency at one text and texts/s at 32."""
    max_documents: Count | None = None
    """For tasks over texts: texts to score; null for all."""
    calibrate: bool = True
    """For classification: fit a temperature on the validation split, and report calibration with it and without."""
    answers: Writing = Writing(temperature=0.0)
    """With `generate`: how every arm, the teacher too, answers the held-out prompts. Greedy, where nothing is said."""
    attempts: Count = 1
    """With `generate`: answers to each held-out prompt; more of them need a temperature above 0."""
    precision: Share = 0.9
    """For classification: the precision at which the recall of out-of-scope texts is reported, the threshold being
    chosen on the validation split."""
    price: Price | None = None
    """For tasks over texts: what queries cost, for the report; null to leave cost out."""

    @field_validator("answers", mode="before")
    @classmethod
    def _greedy_unless_told(cls, given: object) -> object:
        return {"temperature": 0.0, **given} if isinstance(given, Mapping) else given


class Report(Part):
    """The page."""

    title: str | None = None
    """What it is called; default: the name."""


class Phase(Part):
    """A training that comes before the recipe's own; what it does not say is as the recipe has it."""

    name: Annotated[str, Field(pattern=NAME)]
    """Of the phase; its run lives in phases/NAME within the run folder."""
    task: Task | None = None
    """What the student learns to do."""
    data: Data | None = None
    """From which words."""
    teacher: Teacher | None = None
    """From whom."""
    losses: Annotated[list[LossTerm], Field(min_length=1)] | None = None
    """What it minimises."""
    signals: Signals | None = None
    """What is kept of the teacher."""
    training: Training | None = None
    """How."""
    control: Control | None = None
    """The control arm, which begins where the student of the phase begins."""
    evaluation: Evaluation | None = None
    """How it is measured."""


class Recipe(Part):
    """One distillation, from words to report."""

    name: Annotated[str, Field(pattern=NAME)]
    """Name of the run; letters, digits, dot, dash, underscore."""
    description: str = ""
    """What it is for, in a sentence; stands in the report."""
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0
    """Of everything that is random: splits, order, initial weights."""
    run_dir: Path | None = None
    """Where the run lives. Default: runs/NAME."""
    task: Task = LanguageModel(kind="language_model")
    """What the student is to do."""
    data: Data = Data()
    teacher: Teacher
    generate: Generate | None = None
    """For language models: the teacher writes answers, and the student learns from these instead of from the data."""
    student: Student
    static: StaticStudent | None = None
    """For classification: a static-embedding classifier beside the student, for thousands of queries a second."""
    losses: Annotated[list[LossTerm], Field(min_length=1)]
    signals: Signals = OnlineSignals(kind="online")
    training: Training
    phases: list[Phase] = Field([])
    """Trainings that come before this one, in order; each begins with the student that the one before has left."""
    control: Control = Control()
    evaluation: Evaluation = Evaluation()
    report: Report = Report()

    @model_validator(mode="after")
    def _terms_are_distinct(self) -> Recipe:
        for place, losses in (("", self.losses), *((f"phases[{i}].", one.losses) for i, one in enumerate(self.phases))):
            kinds = [term.kind for term in losses or ()]
            for index, kind in enumerate(kinds):
                if kind in kinds[:index]:
                    raise ValueError(
                        f"{place}losses[{index}].kind: {kind} is there twice; merge the two terms into one weight"
                    )
        return self

    @model_validator(mode="after")
    def _phases_are_distinct(self) -> Recipe:
        names = [phase.name for phase in self.phases]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(f"phases[{index}].name: {name} is there twice; each phase has a folder of its name")
        return self

    @model_validator(mode="after")
    def _attempts_differ(self) -> Recipe:
        if self.evaluation.attempts > 1 and not self.evaluation.answers.temperature:
            raise ValueError(
                f"evaluation.attempts: {self.evaluation.attempts} greedy answers would all be the same; raise "
                "evaluation.answers.temperature, or ask once"
            )
        return self

    @model_validator(mode="after")
    def _words_come_from_somewhere(self) -> Recipe:
        made = self.generate is not None and self.generate.prompts.kind in ("grid", "reasoning_gym")
        if not self.data.source and not made:
            raise ValueError("data.source: is not there; name a file, a folder, a Hugging Face id or sample:NAME")
        if self.data.source and made:
            raise ValueError(
                f"data.source: {self.data.source!r} would not be read, since generate.prompts makes its own prompts; "
                "leave it out, or use `rows`"
            )
        return self

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run_dir if self.run_dir is not None else Path("runs") / self.name

    @property
    def over_texts(self) -> bool:
        """Whether the task is over texts, one at a time; else it is over the tokens of packed rows."""
        return isinstance(self.task, TextTask)

    @property
    def has_control(self) -> bool:
        """Whether there is a control arm: where hard labels can be learned, and the recipe does not switch it off.

        Of what a teacher writes, the control arm learns answers that nobody verified; where none are verified, there
        is no such arm.
        """
        unlike = self.generate is None or self.generate.verify is not None
        return self.control.enabled and unlike and not isinstance(self.task, Embedding)
