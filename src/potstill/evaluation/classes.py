"""How good a classifier is, arm by arm: of texts with one class, with several labels, or with a class for every word.

Refuses to compare arms with other texts, and to let a missing label pass for a wrong one.

Suffixes: N answers (a text's, or a word's), D texts, C classes, M bins of confidence, R resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from potstill.errors import NonFiniteError
from potstill.evaluation.bootstrap import Floats
from potstill.evaluation.calibration import bin_sums, calibration_error
from potstill.evaluation.intervals import Quantity, measure, ratio
from potstill.evaluation.temperature import Scores, log_sigmoid, log_softmax
from potstill.types import Measurement

__all__ = [
    "TOLD_SLICES",
    "ClassRow",
    "Confusion",
    "Marks",
    "Truth",
    "added_confusions",
    "compare_classes",
    "mark",
    "tabulate_classes",
]

TOLD_SLICES = 50
"""More would be no slices but texts: a column that names each row, for example."""

Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Truth:
    """What the answers should be.

    true_NC     bool, the class of each answer (or its labels); a row of False where nobody labelled it
    labelled_N  bool
    text_N      int64, the text that an answer is of, 0..D - 1, in order
    slices      a word for every text, by which accuracy is told apart; empty where it has none
    """

    names: Sequence[str]
    true_NC: Flags
    labelled_N: Flags
    text_N: Numbers
    slices: Sequence[str]
    multi_label: bool = False

    @property
    def texts(self) -> int:
        """D."""
        return len(self.slices)

    @property
    def single(self) -> bool:
        """Whether every text has exactly one answer: then shares are of independent trials."""
        return np.array_equal(self.text_N, np.arange(self.texts))


@dataclass(frozen=True, slots=True)
class Marks:
    """What an arm's answers are worth, one by one. float64 where nothing else is said.

    said_NC     bool, the classes that it answered
    right_N     1 where it answered what is true (all labels), 0 else, also where nothing is known
    nll_N       -log q(true), nats; the mean over the labels where there are several; 0 where nothing is known
    kl_N        KL(teacher || arm), nats; the mean over the labels where there are several
    agrees_N    1 where it answered what the teacher did
    bins_DM3    confidence against accuracy: `calibration.bin_sums` of the labelled answers
    """

    said_NC: Flags
    right_N: Floats
    nll_N: Floats
    kl_N: Floats
    agrees_N: Floats
    bins_DM3: Floats


@dataclass(frozen=True, slots=True)
class ClassRow:
    """One class as one arm tells it; n answers are truly of it. A class that is never answered has precision 0."""

    label: str
    precision: float
    recall: float
    f1: float
    n: int


@dataclass(frozen=True, slots=True)
class Confusion:
    """How often student and teacher answered `predicted` where `true` was right."""

    true: str
    predicted: str
    student: int
    teacher: int


def mark(logits_NC: Scores, teacher_NC: Scores, truth: Truth, *, temperature: float = 1.0) -> Marks:
    """Hold an arm's logits, divided by `temperature`, against the truth and the teacher's logits.

    With one class an answer is the largest logit; with several labels those from 0 (probability 0.5) on. Confidence is
    the probability of the answer, label by label where there are several. Raises NonFiniteError naming the first text
    with a logit that is no finite number, ValueError for other shapes than the truth's.
    """
    for logits, whose in ((logits_NC, "the arm"), (teacher_NC, "the teacher")):
        _check(logits, truth, whose)
    arm_NC = logits_NC.astype(np.float64) / temperature
    if truth.multi_label:
        return _mark_labels(arm_NC, teacher_NC.astype(np.float64), truth)
    return _mark_class(arm_NC, teacher_NC.astype(np.float64), truth)


def compare_classes(marks: Mapping[str, Marks], truth: Truth, *, resamples: int, seed: int) -> list[Measurement]:
    """All measurements of all arms, the teacher among them, of slice "test", of every class and slice of the texts.

    accuracy, nll, macro_f1 (the mean over the classes that the labels name), micro_f1 (several labels), kl_to_teacher,
    agreement, retention = accuracy / the teacher's; precision, recall and f1 of the slices "class:NAME", accuracy of
    "slice:WORD"; paired gains of the student over control and untrained, positive where it is better; ece
    (`calibration_error`, without an interval: resampling lifts it). Shares of texts have exact intervals, all else
    has 95 % percentiles of draws of texts. What has no value is left out.
    """
    sizes = _Sizes.of(truth)
    counts = {arm: _Counts.of(one, truth, sizes.slice_NS) for arm, one in marks.items()}

    def statistic(weights_RD: Floats) -> Mapping[Quantity, Floats]:
        rows = {arm: one.values(weights_RD) for arm, one in counts.items()}
        return {quantity: values_R for arm in rows for quantity, values_R in _rows(arm, rows, truth, sizes)}

    cells = max((one.cells for one in counts.values()), default=0)
    found = measure(statistic, texts=truth.texts, resamples=resamples, seed=seed, cells=cells)
    shares = list(chain.from_iterable(_shares(arm, one, truth, sizes) for arm, one in marks.items()))
    exact = {(one.arm, one.name, one.slice) for one in shares}
    return [one for one in found if (one.arm, one.name, one.slice) not in exact] + shares


def tabulate_classes(marks: Marks, truth: Truth) -> list[ClassRow]:
    """Precision, recall and F1 of every class that the labels name, in the order of `truth.names`."""
    return [
        ClassRow(name, hits / max(said, 1), hits / true, 2 * hits / (said + true), true)
        for name, hits, said, true in _class_counts(marks, truth)
    ]


def added_confusions(student: Marks, teacher: Marks, truth: Truth) -> list[Confusion]:
    """The wrong answers that the student gives more often than its teacher, the most added first.

    Raises ValueError for several labels, where no label is answered in place of another.
    """
    if truth.multi_label:
        raise ValueError("with several labels no label stands in place of another")
    mine, others = (_wrong_answers(marks, truth) for marks in (student, teacher))
    found = [
        Confusion(truth.names[true], truth.names[said], count, others[true, said])
        for (true, said), count in mine.items()
        if count > others[true, said]
    ]
    return sorted(found, key=lambda one: (one.teacher - one.student, -one.student, one.true, one.predicted))


def _mark_class(arm_NC: Floats, teacher_NC: Floats, truth: Truth) -> Marks:
    log_q_NC, log_p_NC = log_softmax(arm_NC), log_softmax(teacher_NC)
    said_N = log_q_NC.argmax(-1)
    said_NC = said_N[:, None] == np.arange(arm_NC.shape[1])
    right_N = (said_NC & truth.true_NC).any(-1).astype(np.float64)
    confidence_N = np.exp(log_q_NC.max(-1))
    known = truth.labelled_N
    return Marks(
        said_NC=said_NC,
        right_N=right_N,
        nll_N=-np.where(truth.true_NC, log_q_NC, 0.0).sum(-1),
        kl_N=(np.exp(log_p_NC) * (log_p_NC - log_q_NC)).sum(-1),
        agrees_N=(said_N == log_p_NC.argmax(-1)).astype(np.float64),
        bins_DM3=bin_sums(confidence_N[known], right_N[known], truth.text_N[known], truth.texts),
    )


def _mark_labels(arm_NC: Floats, teacher_NC: Floats, truth: Truth) -> Marks:
    """Every label is a question of its own, with two answers."""
    yes_NC, no_NC = log_sigmoid(arm_NC), log_sigmoid(-arm_NC)
    said_NC, known = arm_NC >= 0, truth.labelled_N
    log_p = ((log_sigmoid(teacher_NC), yes_NC), (log_sigmoid(-teacher_NC), no_NC))
    hits_NC = (said_NC == truth.true_NC).astype(np.float64)
    confidence_NC = np.exp(np.maximum(yes_NC, no_NC))
    text_NC = np.broadcast_to(truth.text_N[:, None], said_NC.shape)
    return Marks(
        said_NC=said_NC,
        right_N=np.where(known, hits_NC.all(-1), 0.0),
        nll_N=np.where(known, -np.where(truth.true_NC, yes_NC, no_NC).mean(-1), 0.0),
        kl_N=np.sum([(np.exp(log_p) * (log_p - log_q)).mean(-1) for log_p, log_q in log_p], axis=0),
        agrees_N=(said_NC == (teacher_NC >= 0)).all(-1).astype(np.float64),
        bins_DM3=bin_sums(confidence_NC[known].ravel(), hits_NC[known].ravel(), text_NC[known].ravel(), truth.texts),
    )


def _check(logits_NC: Scores, truth: Truth, whose: str) -> None:
    if logits_NC.shape != truth.true_NC.shape:
        raise ValueError(f"{whose} answered {logits_NC.shape}, but {truth.true_NC.shape} was asked for")
    bad = np.flatnonzero(~np.isfinite(logits_NC).all(-1))
    if len(bad):
        raise NonFiniteError(
            f"evaluation: the scores that {whose} gives text {truth.text_N[bad[0]]} of the test split (and "
            f"{len(bad) - 1} more) are not finite. Look at these texts, or read the model in fp32."
        )


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The set cells of a table of answers by columns, sorted by column: the text of each, and where a column begins."""

    text_K: Numbers
    starts: Numbers
    columns: Numbers
    count: int

    @classmethod
    def of(cls, flags_NC: Flags, text_N: Numbers) -> _Pairs:
        column_K, answer_K = np.nonzero(flags_NC.T)
        starts = np.flatnonzero(np.diff(column_K, prepend=-1))
        return cls(text_N[answer_K], starts, column_K[starts], flags_NC.shape[1])

    def sums(self, weights_RD: Floats) -> Floats:
        """Set cells of every column in every resample, [R, C]."""
        sums_RC = np.zeros((len(weights_RD), self.count))
        if len(self.starts):
            sums_RC[:, self.columns] = np.add.reduceat(weights_RD[:, self.text_K], self.starts, axis=1)
        return sums_RC


@dataclass(frozen=True, slots=True)
class _Sizes:
    """How many texts and answers there are of what: of every class that the labels name, of every slice that is told.

    known are the texts with a labelled answer; slice_NS marks the labelled answers of each slice.
    """

    texts: int
    known: int
    nats: str
    classes: Sequence[int]
    slices: Mapping[str, int]
    slice_NS: Flags

    @classmethod
    def of(cls, truth: Truth) -> _Sizes:
        words_N = np.array(truth.slices, dtype=object)[truth.text_N]
        told = [word for word, _ in Counter(word for word in truth.slices if word).most_common(TOLD_SLICES)]
        columns = [(words_N == word) & truth.labelled_N for word in told]
        slice_NS = np.stack(columns, axis=1) if columns else np.zeros((len(words_N), 0), dtype=np.bool_)
        known = len(np.unique(truth.text_N[truth.labelled_N]))
        nats = "nats/label" if truth.multi_label else "nats/text" if truth.single else "nats/word"
        slices = dict(zip(told, slice_NS.sum(0).tolist(), strict=True))
        return cls(truth.texts, known, nats, truth.true_NC.sum(0).tolist(), slices, slice_NS)


@dataclass(frozen=True, slots=True)
class _Counts:
    """What one arm adds to every statistic, text by text."""

    columns_DK: Floats
    hits: _Pairs
    said: _Pairs
    true: _Pairs
    right_in_slice: _Pairs
    known_in_slice: _Pairs

    @classmethod
    def of(cls, marks: Marks, truth: Truth, slice_NS: Flags) -> _Counts:
        known_N = truth.labelled_N.astype(np.float64)
        sums = (known_N, marks.right_N, marks.nll_N, np.ones_like(known_N), marks.kl_N, marks.agrees_N)
        columns = [np.bincount(truth.text_N, values, truth.texts) for values in sums]
        said_NC = marks.said_NC & truth.labelled_N[:, None]
        right_NS = slice_NS & (marks.right_N > 0)[:, None]
        tables = (said_NC & truth.true_NC, said_NC, truth.true_NC, right_NS, slice_NS)
        return cls(np.stack(columns, axis=1), *(_Pairs.of(table, truth.text_N) for table in tables))

    @property
    def cells(self) -> int:
        """The most numbers that a single resample makes."""
        return max(len(pairs.text_K) + pairs.count for pairs in (self.said, self.true, self.known_in_slice))

    def values(self, weights_RD: Floats) -> dict[str, Floats]:
        """Every statistic of the arm in every resample: [R], or [R, C] and [R, S] for the F1 of classes and slices."""
        known, right, nll, answers, kl, agrees = (weights_RD @ self.columns_DK).T
        hits_RC, said_RC, true_RC = (pairs.sums(weights_RD) for pairs in (self.hits, self.said, self.true))
        f1_RC, named_RC = ratio(2 * hits_RC, said_RC + true_RC), true_RC > 0
        return {
            "accuracy": ratio(right, known),
            "nll": ratio(nll, known),
            "kl_to_teacher": ratio(kl, answers),
            "agreement": ratio(agrees, answers),
            "macro_f1": ratio(np.where(named_RC, f1_RC, 0.0).sum(-1), named_RC.sum(-1)),
            "micro_f1": ratio(2 * hits_RC.sum(-1), (said_RC + true_RC).sum(-1)),
            "f1_RC": np.where(named_RC, f1_RC, np.nan),
            "slices_RS": ratio(self.right_in_slice.sums(weights_RD), self.known_in_slice.sums(weights_RD)),
        }


Rows = list[tuple[Quantity, Floats]]
Values = Mapping[str, Floats]


def _rows(arm: str, values: Mapping[str, Values], truth: Truth, sizes: _Sizes) -> Rows:
    """What resampling bounds: the means of an arm, its gains, its classes' F1, its slices."""
    own = values[arm]
    found = [(Quantity(arm, name, sizes.known), own[name]) for name in ("accuracy", "macro_f1")]
    found += [(Quantity(arm, "micro_f1", sizes.known), own["micro_f1"])] if truth.multi_label else []
    found.append((Quantity(arm, "nll", sizes.known, sizes.nats), own["nll"]))
    if arm != "teacher":
        retention_R = ratio(own["accuracy"], values["teacher"]["accuracy"])
        found.append((Quantity(arm, "kl_to_teacher", sizes.texts, sizes.nats), own["kl_to_teacher"]))
        found.append((Quantity(arm, "agreement", sizes.texts), own["agreement"]))
        found.append((Quantity(arm, "retention", sizes.known), retention_R))
    for other in ("control", "untrained") if arm == "student" else ():
        found += _gains(own, values[other], other, sizes) if other in values else []
    classes = zip(truth.names, sizes.classes, own["f1_RC"].T, strict=True)
    found += [(Quantity(arm, "f1", n, slice=f"class:{name}"), f1_R) for name, n, f1_R in classes if n]
    slices = zip(sizes.slices.items(), own["slices_RS"].T, strict=True)
    return found + [(Quantity(arm, "accuracy", n, slice=f"slice:{word}"), one_R) for (word, n), one_R in slices]


def _gains(own: Values, other: Values, name: str, sizes: _Sizes) -> Rows:
    over, known, texts = f"gain_over_{name}", sizes.known, sizes.texts
    return [
        (Quantity("student", f"accuracy_{over}", known), own["accuracy"] - other["accuracy"]),
        (Quantity("student", f"macro_f1_{over}", known), own["macro_f1"] - other["macro_f1"]),
        (Quantity("student", f"nll_{over}", known, sizes.nats), other["nll"] - own["nll"]),
        (Quantity("student", f"agreement_{over}", texts), own["agreement"] - other["agreement"]),
        (Quantity("student", f"kl_{over}", texts, sizes.nats), other["kl_to_teacher"] - own["kl_to_teacher"]),
    ]


def _shares(arm: str, marks: Marks, truth: Truth, sizes: _Sizes) -> list[Measurement]:
    """What needs no resampling: the calibration error, and the shares of independent texts."""
    found = []
    if sizes.known:
        found.append(Quantity(arm, "ece", sizes.known).measured(calibration_error(marks.bins_DM3.sum(0))))
    if not truth.single:
        return found
    found += Quantity(arm, "accuracy", sizes.known).counted(int(marks.right_N.sum()))
    if arm != "teacher":
        found += Quantity(arm, "agreement", truth.texts).counted(int(marks.agrees_N.sum()))
    for name, hits, said, true in _class_counts(marks, truth):
        found += Quantity(arm, "precision", said, slice=f"class:{name}").counted(hits)
        found += Quantity(arm, "recall", true, slice=f"class:{name}").counted(hits)
    right_S = marks.right_N @ sizes.slice_NS
    for (word, n), right in zip(sizes.slices.items(), right_S.tolist(), strict=True):
        found += Quantity(arm, "accuracy", n, slice=f"slice:{word}").counted(int(right))
    return found


def _class_counts(marks: Marks, truth: Truth) -> Iterator[tuple[str, int, int, int]]:
    """Name, answered rightly, answered, true: of every class that the labels name."""
    said_NC = marks.said_NC & truth.labelled_N[:, None]
    counts = zip((said_NC & truth.true_NC).sum(0), said_NC.sum(0), truth.true_NC.sum(0), strict=True)
    for name, (hits, said, true) in zip(truth.names, counts, strict=True):
        if true:
            yield name, int(hits), int(said), int(true)


def _wrong_answers(marks: Marks, truth: Truth) -> Counter[tuple[int, int]]:
    """How often each class was answered for each other one."""
    wrong = truth.labelled_N & (marks.right_N == 0)
    return Counter(zip(truth.true_NC[wrong].argmax(-1).tolist(), marks.said_NC[wrong].argmax(-1).tolist(), strict=True))
