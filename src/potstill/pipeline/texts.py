"""The stage prepare of tasks over texts: which texts there are, in which split, of which classes, labelled or not.

Texts are kept as they are; every model tokenises them itself. Refuses splits that are empty or without labels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from pydantic import JsonValue

from potstill.data import (
    Cleaning,
    LabelledText,
    LabelMap,
    Split,
    TextColumns,
    add_slips,
    count_labels,
    fit_labels,
    load_texts,
    normal_form,
    partition_texts,
    read_texts,
    write_texts,
)
from potstill.errors import DataError, RecipeError, RunError
from potstill.pipeline.disk import read_json, write_json_atomic, writing
from potstill.pipeline.places import resolve_data
from potstill.pipeline.rundir import Stage
from potstill.pipeline.survey import SPLITS
from potstill.recipes import Recipe
from potstill.recipes.schema import FinetuneTeacher
from potstill.recipes.tasks import Classification, Embedding, TextTask, TokenClassification
from potstill.types import Role

__all__ = ["TextSurvey", "open_labels", "open_texts", "prepare_texts", "survey_texts"]

LABELS = "labels.json"

HARD = "cross_entropy"
"""The kind of loss that learns from labels."""

Texts = tuple[LabelledText, ...]


@dataclass(frozen=True, slots=True)
class TextSurvey:
    """What was found: the texts of each split as a training and an evaluation will have them.

    labels    the classes; None where the task has none
    cleaning  what was read, dropped and mended
    changed   how many texts were removed, lost their label or were added, by what was done
    """

    texts: Mapping[Split, Texts]
    labels: LabelMap | None
    cleaning: Cleaning
    changed: Counter[str]


def prepare_texts(recipe: Recipe, stage: Stage, *, labels: Sequence[str] | None = None) -> None:
    """Write {train,validation,test}.jsonl and labels.json, and count what stands there.

    `labels` are the classes of a ready teacher, for a recipe that lists none. Raises as `survey_texts`.
    """
    survey = survey_texts(recipe, labels=labels)
    with writing(stage.folder):
        for split, texts in survey.texts.items():
            write_texts(stage.folder / f"{split}.jsonl", texts)
    known = survey.labels
    content = None if known is None else {"names": list(known.names), "out_of_scope": known.out_of_scope}
    write_json_atomic(stage.folder / LABELS, content)
    stage.finish(
        documents={split: len(texts) for split, texts in survey.texts.items()},
        labels=[] if known is None else list(known.names),
        labelled={split: _labelled(texts) for split, texts in survey.texts.items()},
        per_class={} if known is None else dict(count_labels(survey.texts["train"])),
        cleaning=_describe(survey),
        reading={
            "source_rows": survey.cleaning.rows,
            "documents_used": sum(map(len, survey.texts.values())),
            "stopped_at_max_tokens": False,
        },
    )


def survey_texts(recipe: Recipe, *, labels: Sequence[str] | None = None) -> TextSurvey:
    """All that `prepare_texts` would write, without writing it.

    Out-of-scope texts keep their label where they are held out, and are unlabelled in training. With
    `data.labels_per_class` the labels of so many training texts a class are kept, chosen by content and seed.

    Raises:
        DataError: there is nothing to read or to use; a split is empty, or lacks labels that something needs; labels
            that do not fit (see `fit_labels`).
        RecipeError: what `data` asks for does not go with the task.
    """
    task = recipe.task
    if not isinstance(task, TextTask):
        raise ValueError(f"task.kind={task.kind} is not over texts; survey_data reads its documents")
    _check_settings(recipe)
    rows, cleaning = _read(recipe)
    shares = recipe.data.splits
    found = partition_texts(rows, seed=recipe.seed, validation=shares.validation, test=shares.test)
    changed = Counter({f"removed: {why}": count for why, count in found.removed.items()})
    _check_splits(found.texts)
    known = None
    if not isinstance(task, Embedding):
        outside = task.out_of_scope if isinstance(task, Classification) else None
        given = task.labels if isinstance(task, Classification | TokenClassification) else None
        known = fit_labels(found.texts, given or labels, out_of_scope=outside)
        _check_labelled(recipe, found.texts, known)
    train = _hide_out_of_scope(found.texts["train"], known, changed)
    train = _keep_labels(train, recipe.data.labels_per_class, recipe.seed, changed)
    held_out = [*found.texts["validation"], *found.texts["test"]]
    train = (*train, *_noisy(recipe, train, held_out, changed))
    texts = {**found.texts, "train": train}
    if isinstance(task, Embedding):
        texts |= {split: _apart(texts[split], found.texts["test"], changed) for split in ("train", "validation")}
    return TextSurvey(texts, known, cleaning, changed)


def _apart(texts: Texts, test: Texts, changed: Counter[str]) -> Texts:
    """Both texts of every pair on their own, as they get their vectors, without those that stand in a test pair."""
    tested = {part for text in test for part in normal_form(text)}
    found: list[LabelledText] = []
    for text in texts:
        second = [] if text.pair is None else [replace(text, id=f"{text.id}/2", text=text.pair, pair=None)]
        for one in (replace(text, pair=None), *second):
            if text.pair is not None and normal_form(one)[0] in tested:
                changed["removed: text of a pair stands in a test pair"] += 1
            else:
                found.append(one)
    return tuple(found)


def open_texts(prepared: Path, split: str) -> list[LabelledText]:
    """The texts of a split of a prepare folder. Raises DataError where it is not whole."""
    return read_texts(prepared / f"{split}.jsonl")


def open_labels(prepared: Path) -> LabelMap | None:
    """The classes of a prepare folder; None where its task has none. Raises RunError where it is not whole."""
    match read_json(prepared / LABELS):
        case None:
            return None
        case {"names": list(names), "out_of_scope": str() | None as outside}:
            return LabelMap(tuple(map(str, names)), outside)
    raise RunError(f"{prepared / LABELS} is damaged. Delete it and run again.")


def _check_settings(recipe: Recipe) -> None:
    """Refuse what only goes with one label for a whole text."""
    task, data = recipe.task, recipe.data
    if data.labels_per_class is not None and (not isinstance(task, Classification) or task.multi_label):
        raise RecipeError(
            "data.labels_per_class: needs task.kind: classification with one label a text (multi_label: false). "
            "Leave it out."
        )
    if data.noise is not None and not isinstance(task, Classification):
        raise RecipeError(
            f"data.noise: goes with task.kind: classification, and the task is {task.kind}. Leave it out."
        )


def _read(recipe: Recipe) -> tuple[list[LabelledText], Cleaning]:
    """All usable texts, those of `data.unlabelled` last and for training only."""
    data, task = recipe.data, recipe.task
    columns = TextColumns(data.text, data.text_pair, data.label, data.split_by, data.slice)
    role, several = Role(task.kind), isinstance(task, Classification) and task.multi_label
    rows, cleaning = load_texts(
        resolve_data(data.source),
        columns=columns,
        role=role,
        multi_label=several,
        config=data.config,
        format=data.format,
        max_documents=data.max_documents,
    )
    texts = list(rows)
    if data.unlabelled is None:
        return texts, cleaning
    bare = replace(columns, label=None, split_by=None, slice=None)
    more, read = load_texts(resolve_data(data.unlabelled), columns=bare, role=role, format=data.format)
    taken = {text.id for text in texts}
    for text in more:
        name = f"{text.source}:{text.id}" if text.id in taken else text.id
        texts.append(replace(text, id=name, split="train"))
    whole = Cleaning(cleaning.kept + read.kept, cleaning.dropped + read.dropped, cleaning.mended + read.mended)
    return texts, whole


def _check_splits(texts: Mapping[Split, Texts]) -> None:
    empty = next((split for split in SPLITS if not texts[split]), None)
    if empty is None:
        return
    key = "data.splits" if empty == "train" else f"data.splits.{empty}"
    advice = "Lower data.splits.validation and data.splits.test" if empty == "train" else "Raise it"
    raise DataError(
        f"{key}: of {sum(map(len, texts.values()))} texts none is in the {empty} split. {advice}, give more texts, or "
        "texts that the source itself puts there."
    )


def _check_labelled(recipe: Recipe, texts: Mapping[Split, Texts], known: LabelMap) -> None:
    """Refuse test texts without labels, and training texts without any where something learns from them."""
    counts = {split: sum(name in known.names for text in rows for name in text.labels) for split, rows in texts.items()}
    several = isinstance(recipe.task, Classification) and recipe.task.multi_label
    if not counts["test"] and not (several and _labelled(texts["test"])):
        raise DataError(
            f"data.label: none of the {len(texts['test'])} test texts has a label, so that nothing can be measured. "
            "Label some, or check data.label."
        )
    hard = [f"losses[{place}].kind=cross_entropy" for place, term in enumerate(recipe.losses) if term.kind == HARD]
    hard += ["teacher.kind=finetune"] if isinstance(recipe.teacher, FinetuneTeacher) else []
    hard += ["control.enabled"] if recipe.has_control else []
    if hard and not _labelled(texts["train"]):
        raise DataError(
            f"data.label: none of the {len(texts['train'])} training texts has a label, and {hard[0]} learns from "
            "labels. Label some, check data.label, or switch that off."
        )


def _hide_out_of_scope(texts: Texts, known: LabelMap | None, changed: Counter[str]) -> Texts:
    if known is None or known.out_of_scope is None:
        return texts
    outside = [text for text in texts if known.out_of_scope in text.labels]
    changed["unlabelled: out of scope in train"] += len(outside)
    hidden = {text.id for text in outside}
    return tuple(replace(text, label=None) if text.id in hidden else text for text in texts)


def _keep_labels(texts: Texts, per_class: int | None, seed: int, changed: Counter[str]) -> Texts:
    """The same texts with the labels of `per_class` of each class: those with the lowest hashes of content and seed."""
    if per_class is None:
        return texts
    left: Counter[str] = Counter()
    kept: set[bytes] = set()
    for text in sorted((text for text in texts if text.labels), key=lambda text: _lot(text, seed)):
        if left[text.labels[0]] < per_class:
            left[text.labels[0]] += 1
            kept.add(text.key)
    changed["unlabelled: beyond data.labels_per_class"] += sum(bool(text.labels) for text in texts) - len(kept)
    return tuple(text if text.key in kept else replace(text, label=None) for text in texts)


def _lot(text: LabelledText, seed: int) -> bytes:
    return hashlib.blake2b(text.key, digest_size=16, key=seed.to_bytes(8, "big")).digest()


def _noisy(
    recipe: Recipe, texts: Texts, held_out: Iterable[LabelledText], changed: Counter[str]
) -> Iterator[LabelledText]:
    """Copies with slips in them, but for those that have become a text that is held out."""
    noise = recipe.data.noise
    if noise is None:
        return
    held = {normal_form(text) for text in held_out}
    for text in texts:
        for number in range(1, noise.copies + 1):
            random = Random(f"{recipe.seed}:{text.key.hex()}:{number}")
            slipped = [
                None if part is None else add_slips(part, share=noise.share, random=random)
                for part in (text.text if isinstance(text.text, str) else " ".join(text.text), text.pair)
            ]
            copy = replace(text, id=f"{text.id}~{number}", text=slipped[0] or "", pair=slipped[1], origin=text.key)
            stands = normal_form(copy) in held
            changed["dropped: noisy copy equals a held-out text" if stands else "added: noisy copy"] += 1
            if not stands:
                yield copy


def _labelled(texts: Texts) -> int:
    return sum(text.label is not None for text in texts)


def _describe(survey: TextSurvey) -> dict[str, JsonValue]:
    cleaning = survey.cleaning
    counts = {"kept": cleaning.kept, "dropped": cleaning.dropped, "mended": cleaning.mended}
    read = {f"{what}: {why}": count for what, counter in counts.items() for why, count in counter.items()}
    return {**read, **{what: count for what, count in survey.changed.items() if count}}
