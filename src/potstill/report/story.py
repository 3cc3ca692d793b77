"""What the page tells: everything that a finished run knows about itself, as plain frozen records.

The hallway fills a `Story` from the run folder. Refuses: reading files, and guessing what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from potstill.report.generation import GenerationFacts
from potstill.types import Measurement

__all__ = [
    "ARMS",
    "ClassFacts",
    "ClassRow",
    "Confusion",
    "CurvePoint",
    "DataFacts",
    "PhaseFacts",
    "ReliabilityPoint",
    "Sample",
    "SignalFacts",
    "SliceRow",
    "StageCost",
    "Story",
    "TaskFacts",
    "TeacherTraining",
    "find",
    "kind_of",
]

ARMS = ("teacher", "untrained", "control", "student", "static")
"""Who is asked the same questions, in the order of every table and picture."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One line of an arm's training log.

    tokens      packed positions seen since the start of the training
    seconds     wall time since the start of the training
    loss        the arm's own weighted objective at this step; None on a line that only validates
    terms       {loss kind: value}, unweighted
    validation  {name: value} on the validation split; empty on most lines
    """

    step: int
    tokens: int
    seconds: float
    loss: float | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    validation: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """A held-out document's beginning, how it really went on, and each arm's greedy continuation: {arm: text}.

    For a task over texts: a held-out text, its label, and each arm's answer.
    """

    prompt: str
    reference: str
    completions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class StageCost:
    """Wall time and peak resident memory (GB = 10^9 bytes; None where it was not recorded) of one stage."""

    stage: str
    seconds: float
    peak_gb: float | None = None


@dataclass(frozen=True, slots=True)
class DataFacts:
    """Where the words came from. documents, tokens, rows, labelled: {split: count}; cleaning: {what happened: count}.

    labelled is empty where labels play no part.
    """

    source: str
    documents: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    cleaning: Mapping[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    labelled: Mapping[str, int] = field(default_factory=dict)

    @property
    def unlabelled(self) -> int:
        """Training texts without a label; 0 where labels were not counted."""
        return self.documents.get("train", 0) - self.labelled["train"] if "train" in self.labelled else 0


@dataclass(frozen=True, slots=True)
class ReliabilityPoint:
    """The n positions at which an arm was `low` to `high` sure: its mean confidence, and the share it had right."""

    low: float
    high: float
    confidence: float
    accuracy: float
    n: int


@dataclass(frozen=True, slots=True)
class SignalFacts:
    """What the teacher said, as it was stored and learned from.

    kind               in words, for example "16 sampled tokens a position"
    store              where they lie: a folder or address
    pieces, positions, bytes  that this run reads; bytes as stored, with everything around them
    bytes_per_token    bytes a position
    captured, found    pieces that this run asked the teacher for, and that lay there before
    rule               positions at which the teacher was asked, in words, for example "30 % at random"
    capture_tokens_per_s      tokens (texts, of a task over texts) that the teacher read and that were stored; None
                where nothing was captured
    quarantined        damaged blocks and files that were put aside in the store, since it was begun
    biased             whether the student learned from an estimate that is wrong on average
    bias               in words, why it is, or why it is not
    fidelity           (measure, value, meaning): stored signals against dense ones on a sample of positions
    """

    kind: str
    store: str
    pieces: int
    positions: int
    bytes: int
    bytes_per_token: float
    captured: int
    found: int
    rule: str = "all"
    capture_tokens_per_s: float | None = None
    quarantined: int = 0
    biased: bool = False
    bias: str = ""
    fidelity: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """What the student was to do.

    kind          language_model, masked_lm, classification, token_classification, embedding; of a language model that
                  answers prompts as its teacher wrote: written where these answers were verified, else unverified
    labels        their names, in order; empty where there are none
    multi_label   whether a text bears any number of labels, instead of exactly one
    pooling       how the states of all tokens become one: "cls" or "mean"; empty where they do not
    normalise     whether vectors have length 1
    out_of_scope  the label of texts that belong to no class; None where there is none
    precision     at which the recall of out-of-scope texts was asked for
    price         in words, what a query's cost follows from; empty where no price was stated
    length        most tokens of a text; None where texts are packed
    """

    kind: str
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    pooling: str = ""
    normalise: bool = False
    out_of_scope: str | None = None
    precision: float | None = None
    price: str = ""
    length: int | None = None


@dataclass(frozen=True, slots=True)
class TeacherTraining:
    """How the teacher was made before it taught: trained on hard labels, all its weights or its head alone.

    learns  "all", "head", or "body" for all but the token embeddings; steps, seconds None where they were not recorded
    """

    base_model: str
    learns: str
    steps: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ClassRow:
    """How one arm did on one class, which n held-out texts (words) bear; None for a share of nothing."""

    label: str
    precision: float | None
    recall: float | None
    f1: float | None
    n: int


@dataclass(frozen=True, slots=True)
class ClassFacts:
    """Every class under every arm: {arm: a row a label}."""

    labels: tuple[str, ...]
    arms: Mapping[str, tuple[ClassRow, ...]]


@dataclass(frozen=True, slots=True)
class Confusion:
    """Held-out texts of class `true` that were taken for `predicted`, counted for student and teacher."""

    true: str
    predicted: str
    student: int
    teacher: int


@dataclass(frozen=True, slots=True)
class SliceRow:
    """The held-out texts of one kind: each arm's accuracy, as measurements of the slice `slice:VALUE`."""

    value: str
    measurements: tuple[Measurement, ...]


@dataclass(frozen=True, slots=True)
class PhaseFacts:
    """A training that came before this one.

    task          what the student learned, in words
    teacher       from whom
    objective     the losses in one line
    folder        the phase's run folder, relative to this run's
    measurements  of the phase's own evaluation
    facts         its task, by which its measurements are to be read
    """

    name: str
    task: str
    teacher: str
    objective: str
    folder: str
    measurements: tuple[Measurement, ...] = ()
    facts: TaskFacts | None = None


@dataclass(frozen=True, slots=True)
class Story:
    """One run, ready to be told.

    title           the page's name
    teacher         the teacher as the recipe has it: an id or folder, the members of a mixture, or whose student it is
    student         noun phrase that can follow "The", for example "15-layer student"
    student_origin  one sentence: how the student was made before training; empty where there is nothing to say
    objective       the losses in one line, for example "forward_kl (T = 2) + 0.1 cross_entropy"
    recipe          the resolved recipe as YAML
    has_control     whether the run trained the control arm
    versions        {package: version}
    machine         one line of text
    notes           counted warnings, for example "3 rows unusable: empty text"
    base_model      the teacher's id on the Hugging Face hub, when it has one
    license         the student's licence identifier, when known
    reliability     {arm: confidence against accuracy on the test split, least confident first}
    signals         the teacher's stored signals; None where it was asked during training, or not at all
    task            what the student was to do; None for the next token
    classes, confusions, slices  where the task has classes: each of them, pairs that the student confuses more often
                    than its teacher, and kinds of texts
    phases          trainings that came before this one, in order
    teacher_training  how the teacher was made; None where it was ready
    generation      what the teacher has written; None where it did not write
    """

    title: str
    teacher: str
    student: str
    recipe: str
    has_control: bool
    measurements: tuple[Measurement, ...]
    description: str = ""
    student_origin: str = ""
    objective: str = ""
    curves: Mapping[str, tuple[CurvePoint, ...]] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    stages: tuple[StageCost, ...] = ()
    data: DataFacts | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    notes: tuple[str, ...] = ()
    base_model: str | None = None
    license: str | None = None
    reliability: Mapping[str, tuple[ReliabilityPoint, ...]] = field(default_factory=dict)
    signals: SignalFacts | None = None
    task: TaskFacts | None = None
    classes: ClassFacts | None = None
    confusions: tuple[Confusion, ...] = ()
    slices: tuple[SliceRow, ...] = ()
    phases: tuple[PhaseFacts, ...] = ()
    teacher_training: TeacherTraining | None = None
    generation: GenerationFacts | None = None


def kind_of(task: TaskFacts | None) -> str:
    """The task's kind; `language_model` where none is named, and `multi_label` where a text bears several labels."""
    if task is None:
        return "language_model"
    return "multi_label" if task.multi_label else task.kind


def find(story: Story, arm: str, name: str) -> Measurement | None:
    """The measurement `name` of `arm` on the test slice, or None when nobody measured it."""
    for measurement in story.measurements:
        if (measurement.arm, measurement.name, measurement.slice) == (arm, name, "test"):
            return measurement
    return None
