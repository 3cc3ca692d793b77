"""What the answers to test texts come to, task by task: measurements, tables, and some answers side by side.

Refuses to let the test texts choose anything: temperatures and thresholds come from validation texts.

Suffixes: N answers, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.data import LabelledText
from potstill.errors import DataError
from potstill.evaluation import (
    HIGHEST,
    LOWEST,
    TOLD_SLICES,
    Confidences,
    Marks,
    Quantity,
    Threshold,
    Truth,
    added_confusions,
    calibration_error,
    choose_threshold,
    compare_classes,
    compare_embeddings,
    compare_likeness,
    fit_temperature,
    likeness,
    mark,
    marks_entities,
    measure_entities,
    measure_scope,
    reliability,
    score_confidence,
    tabulate_classes,
)
from potstill.recipes import Recipe
from potstill.recipes.schema import TextTask
from potstill.recipes.tasks import Classification, Embedding
from potstill.types import Measurement

__all__ = ["Findings", "Questions", "Said", "find", "heard_by_all", "needs_validation", "raw_text"]

Scores = NDArray[np.float32]

SHOWN = 256
"""Texts whose nearest neighbour is told, for some of them to be shown."""


@dataclass(frozen=True, slots=True)
class Questions:
    """The same texts for every arm; names of the classes, in order."""

    test: Sequence[LabelledText]
    validation: Sequence[LabelledText]
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Said:
    """An arm's scores, a row an answer: [N, C] logits of classes, or [N, D] vectors, of pairs the second texts last."""

    test: Scores
    validation: Scores


@dataclass(frozen=True, slots=True)
class Findings:
    """What there is to write: measurements, JSON files by name, notes, each arm's answers to the first test texts."""

    measurements: Sequence[Measurement]
    files: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    told: Mapping[str, Sequence[str]] = field(default_factory=dict)


def find(recipe: Recipe, questions: Questions, said: Mapping[str, Said]) -> Findings:
    """All that `said` tells, the teacher's answers among it. Raises DataError where an arm lacks answers."""
    if isinstance(recipe.task, Embedding):
        return _find_vectors(recipe, questions, said)
    if isinstance(recipe.task, Classification):
        return _find_classes(recipe, recipe.task, questions, said)
    return _find_words(recipe, questions, said)


def heard_by_all(questions: Questions, said: Mapping[str, Said]) -> tuple[Questions, dict[str, Said], list[str]]:
    """The texts that an API has answered, with what every arm said of these, and what is to be noted of the others.

    Raises DataError where it has answered no test text.
    """
    test_N, validation_N = (np.isfinite(part).all(-1) for part in (said["teacher"].test, said["teacher"].validation))
    if not test_N.any():
        raise DataError("evaluation: the teacher has answered no test text. Look at it: `potstill ledger export`.")
    kept = Questions(_chosen(questions.test, test_N), _chosen(questions.validation, validation_N), questions.labels)
    heard = {arm: Said(one.test[test_N], one.validation[validation_N]) for arm, one in said.items()}
    lost = {"test": int((~test_N).sum()), "validation": int((~validation_N).sum())}
    what = "texts have no answer of the teacher: they are left out for all arms"
    return kept, heard, [f"{count:,} {split} {what}" for split, count in lost.items() if count]


def _chosen(texts: Sequence[LabelledText], which_N: Any) -> Sequence[LabelledText]:
    return [text for text, chosen in zip(texts, which_N, strict=True) if chosen]


def needs_validation(recipe: Recipe) -> bool:
    """Whether something is chosen on validation texts."""
    task = recipe.task
    return isinstance(task, Classification) and (recipe.evaluation.calibrate or task.out_of_scope is not None)


def raw_text(text: LabelledText) -> str:
    """The text as a user would send it: words with spaces between, a second text after the first."""
    first = text.text if isinstance(text.text, str) else " ".join(text.text)
    return first if text.pair is None else f"{first} {text.pair}"


def _find_classes(recipe: Recipe, task: Classification, questions: Questions, said: Mapping[str, Said]) -> Findings:
    truth, outside = _truth(questions.test, questions.labels, task), _outside(questions.test, task)
    inside = _select(truth, ~outside)
    teacher = said["teacher"].test
    marks = {arm: mark(one.test[~outside], teacher[~outside], inside) for arm, one in said.items()}
    temperatures, notes = _temperatures(recipe, task, questions, said)
    found = _compare(recipe, marks, inside)
    for arm, (temperature, texts) in temperatures.items():
        calibrated = mark(said[arm].test[~outside], teacher[~outside], inside, temperature=temperature)
        found.append(Quantity(arm, "temperature", texts, "").measured(temperature))
        if inside.labelled_N.any():
            error = calibration_error(calibrated.bins_DM3.sum(0))
            found.append(Quantity(arm, "ece_calibrated", int(inside.labelled_N.sum())).measured(error))
    told = {arm: _told(one.test, questions.labels, task) for arm, one in said.items()}
    if task.out_of_scope is not None:
        factors = {arm: temperatures.get(arm, (1.0, 0))[0] for arm in said}
        rows, more = _find_scope(recipe, task, questions, {arm: (one, factors[arm]) for arm, one in said.items()})
        found, notes = [*found, *rows], [*notes, *more]
    return Findings(found, _tables(marks, inside, found), [*_label_notes(inside), *notes], told)


def _find_words(recipe: Recipe, questions: Questions, said: Mapping[str, Said]) -> Findings:
    whole = _word_truth(questions.test, questions.labels)
    for arm, one in said.items():
        if len(one.test) != len(whole.text_N):
            raise DataError(
                f"data.sequence_length: {arm} answered {len(one.test)} of the {len(whole.text_N)} words of the test "
                "split: some texts are too long for it. Raise data.sequence_length, or shorten these texts."
            )
    # A word that some arm did not read, as it stood beyond the end of a text that was cut, is no mistake of its.
    read = np.logical_and.reduce([_read(one.test) for one in said.values()])
    truth = _select(whole, read, texts_stay=True)
    marks = {arm: mark(one.test[read], said["teacher"].test[read], truth) for arm, one in said.items()}
    found = _compare(recipe, marks, truth)
    if marks_entities(questions.labels):
        classes = {arm: one.said_NC.argmax(-1) for arm, one in marks.items()}
        found += measure_entities(classes, truth, resamples=recipe.evaluation.resamples, seed=recipe.seed)
    unread = int((~read).sum())
    cut = [f"{unread} words of the test split stand where some arm no longer reads, and were left out for all arms"]
    told = {arm: _told_words(one.test, whole) for arm, one in said.items()}
    return Findings(found, _tables(marks, truth, found), [*_label_notes(truth), *(cut if unread else ())], told)


def _find_vectors(recipe: Recipe, questions: Questions, said: Mapping[str, Said]) -> Findings:
    count = len(questions.test)
    how: Any = {"resamples": recipe.evaluation.resamples, "seed": recipe.seed}
    found = compare_embeddings({arm: one.test[:count] for arm, one in said.items()}, **how)
    judged = {number: value for number, text in enumerate(questions.test) if (value := _judged(text)) is not None}
    if judged:
        paired = {number: place for place, number in enumerate(n for n, t in enumerate(questions.test) if t.pair)}
        firsts, seconds = list(judged), [count + paired[number] for number in judged]
        cosines = {arm: likeness(one.test[firsts], one.test[seconds], arm) for arm, one in said.items()}
        found += compare_likeness(cosines, np.array(list(judged.values())), **how)
    return Findings(found, told={arm: _told_nearest(one.test[:count], questions.test) for arm, one in said.items()})


def _compare(recipe: Recipe, marks: Mapping[str, Marks], truth: Truth) -> list[Measurement]:
    return compare_classes(marks, truth, resamples=recipe.evaluation.resamples, seed=recipe.seed)


def _temperatures(
    recipe: Recipe, task: Classification, questions: Questions, said: Mapping[str, Said]
) -> tuple[dict[str, tuple[float, int]], list[str]]:
    """Each arm's temperature with the number of validation texts that it was fitted on, and what is to be noted."""
    if not recipe.evaluation.calibrate:
        return {}, []
    truth = _truth(questions.validation, questions.labels, task)
    known = truth.labelled_N & ~_outside(questions.validation, task)
    if not known.any():
        return {}, ["no temperature was fitted: no text of the validation split has a label"]
    fitted = {
        arm: fit_temperature(one.validation[known], truth.true_NC[known], multi_label=task.multi_label)
        for arm, one in said.items()
    }
    notes = [
        f"the temperature of {arm}, {value:.2f}, is the {'lowest' if value < 1 else 'highest'} that is tried: the "
        "validation texts do not bound it"
        for arm, value in fitted.items()
        if not LOWEST * 1.01 < value < HIGHEST / 1.01
    ]
    return {arm: (value, int(known.sum())) for arm, value in fitted.items()}, notes


def _find_scope(
    recipe: Recipe, task: Classification, questions: Questions, said: Mapping[str, tuple[Said, float]]
) -> tuple[list[Measurement], list[str]]:
    """What is measured of texts out of scope, and what is to be noted; `said` has each arm's temperature."""
    test, validation = (
        {arm: _confidences(getattr(one, split), texts, task, temperature) for arm, (one, temperature) in said.items()}
        for split, texts in (("test", questions.test), ("validation", questions.validation))
    )
    asked = recipe.evaluation.precision
    try:
        thresholds = {arm: choose_threshold(one, asked) for arm, one in validation.items()}
        found = measure_scope(test, thresholds, resamples=recipe.evaluation.resamples, seed=recipe.seed)
    except DataError as error:
        return [], [f"texts out of scope were not measured: {error}"]
    return found, [_missed(arm, one, asked) for arm, one in thresholds.items() if not one.reached]


def _missed(arm: str, threshold: Threshold, asked: float) -> str:
    return (
        f"out of scope: {arm} reaches a precision of {asked:g} at no threshold on the validation split; the threshold "
        f"of its best, {threshold.precision:.2f}, was taken"
    )


def _confidences(
    logits_NC: Scores, texts: Sequence[LabelledText], task: Classification, temperature: float
) -> Confidences:
    confidence_N = score_confidence(logits_NC, temperature, multi_label=task.multi_label)
    outside = _outside(texts, task)
    labelled = np.array([text.label is not None for text in texts], dtype=np.bool_)
    return Confidences(confidence_N[labelled & ~outside], confidence_N[outside])


def _truth(texts: Sequence[LabelledText], labels: Sequence[str], task: TextTask) -> Truth:
    """One answer a text; a text without a label, or out of scope, counts as unlabelled."""
    places = {name: place for place, name in enumerate(labels)}
    true_NC = np.zeros((len(texts), len(labels)), dtype=np.bool_)
    labelled_N = np.zeros(len(texts), dtype=np.bool_)
    for number, text in enumerate(texts):
        known = [places[name] for name in text.labels if name in places]
        labelled_N[number] = text.label is not None and len(known) == len(text.labels)
        true_NC[number, known] = labelled_N[number]
    several = isinstance(task, Classification) and task.multi_label
    return Truth(labels, true_NC, labelled_N, np.arange(len(texts)), [text.slice for text in texts], several)


def _word_truth(texts: Sequence[LabelledText], labels: Sequence[str]) -> Truth:
    """An answer a word, in text order."""
    places = {name: place for place, name in enumerate(labels)}
    words = [len(text.text) if isinstance(text.text, tuple) else 1 for text in texts]
    names = [name for text, count in zip(texts, words, strict=True) for name in (text.label or ("",) * count)]
    class_N = np.array([places.get(name, -1) for name in names], dtype=np.int64)
    text_N = np.repeat(np.arange(len(texts)), words)
    true_NC = class_N[:, None] == np.arange(len(labels))
    return Truth(labels, true_NC, class_N >= 0, text_N, [text.slice for text in texts])


def _select(truth: Truth, chosen: NDArray[np.bool_], *, texts_stay: bool = False) -> Truth:
    """The chosen answers; their texts are numbered anew, unless all texts stay."""
    text_N = truth.text_N[chosen] if texts_stay else np.arange(chosen.sum())
    slices = truth.slices if texts_stay else [truth.slices[text] for text in truth.text_N[chosen]]
    return Truth(truth.names, truth.true_NC[chosen], truth.labelled_N[chosen], text_N, slices, truth.multi_label)


def _outside(texts: Sequence[LabelledText], task: Classification) -> NDArray[np.bool_]:
    """Which texts are labelled as out of scope."""
    name = task.out_of_scope
    return np.array([name is not None and name in text.labels for text in texts], dtype=np.bool_)


def _judged(text: LabelledText) -> float | None:
    """How alike the two texts are, where their label is a number."""
    if text.pair is None or not isinstance(text.label, str):
        return None
    try:
        value = float(text.label)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def _tables(marks: Mapping[str, Marks], truth: Truth, found: Sequence[Measurement]) -> dict[str, Any]:
    """calibration.json, classes.json, confusions.json, slices.json."""
    rows = {arm: [asdict(row) for row in tabulate_classes(one, truth)] for arm, one in marks.items()}
    sliced = [one for one in found if one.slice.startswith("slice:")]
    words = dict.fromkeys(one.slice.removeprefix("slice:") for one in sliced)
    confusions = []
    if "student" in marks and not truth.multi_label:
        confusions = [asdict(one) for one in added_confusions(marks["student"], marks["teacher"], truth)]
    return {
        "calibration": {arm: [asdict(row) for row in reliability(one.bins_DM3.sum(0))] for arm, one in marks.items()},
        "classes": {"labels": [row["label"] for row in rows["teacher"]], "arms": rows},
        "confusions": confusions,
        "slices": [
            {"value": word, "measurements": [asdict(one) for one in sliced if one.slice == f"slice:{word}"]}
            for word in words
        ],
    }


def _label_notes(truth: Truth) -> list[str]:
    notes, unlabelled, slices = [], int((~truth.labelled_N).sum()), len({word for word in truth.slices if word})
    what = "texts" if truth.single else "words"
    if unlabelled:
        count = f"{unlabelled} of {len(truth.labelled_N)} {what} of the test split"
        notes.append(f"{count} have no label: they count only where an arm is compared with the teacher")
    if slices > TOLD_SLICES:
        notes.append(f"data.slice has {slices} values in the test split: the {TOLD_SLICES} most frequent are told")
    return notes


def _told(logits_NC: Scores, labels: Sequence[str], task: Classification) -> list[str]:
    """Every answer with its probability."""
    if not task.multi_label:
        chosen, sure = logits_NC.argmax(-1), score_confidence(logits_NC)
        return [f"{labels[place]} ({value:.2f})" for place, value in zip(chosen.tolist(), sure.tolist(), strict=True)]
    return [_told_labels(row_C, labels) for row_C in logits_NC]


def _told_labels(logits_C: Scores, labels: Sequence[str]) -> str:
    probability_C = np.exp(-np.logaddexp(0, -logits_C)).tolist()
    rows = zip(labels, probability_C, logits_C.tolist(), strict=True)
    return ", ".join(f"{label} ({sure:.2f})" for label, sure, logit in rows if logit >= 0) or "none"


def _told_words(logits_NC: Scores, truth: Truth) -> list[str]:
    """The labels of every text's words; a dash for a word that was not read."""
    rows = zip(_read(logits_NC).tolist(), logits_NC.argmax(-1).tolist(), strict=True)
    names = [truth.names[place] if read else "-" for read, place in rows]
    ends = np.cumsum(np.bincount(truth.text_N, minlength=truth.texts)).tolist()
    return [" ".join(names[begin:end]) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def _read(logits_NC: Scores) -> NDArray[np.bool_]:
    """Which words the arm read."""
    return np.atleast_1d(~np.isnan(logits_NC).any(-1))


def _told_nearest(vectors_ND: Scores, texts: Sequence[LabelledText]) -> list[str]:
    """Of the first texts, the one of all others that the arm holds for most alike."""
    lengths_N1 = np.linalg.norm(vectors_ND, axis=-1, keepdims=True)
    unit_ND = vectors_ND / np.where(lengths_N1 > 0, lengths_N1, 1.0)
    cosines = unit_ND[:SHOWN] @ unit_ND.T
    cosines[np.arange(len(cosines)), np.arange(len(cosines))] = -np.inf
    if len(texts) < 2:
        return ["none"] * len(texts)
    return [f"{raw_text(texts[row_N.argmax()])} ({row_N.max():.2f})" for row_N in cosines]
