"""What a report must say beside its numbers: counted warnings, and how recipe parts are called in a sentence.

Refuses to warn of what did not happen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from potstill.pipeline.chain import load_chain, phases_of
from potstill.recipes import Recipe
from potstill.recipes.losses import (
    ConstantRamp,
    CosineRamp,
    LayerTerm,
    LinearRamp,
    LossTerm,
    RelationTerm,
    SoftTerm,
    VocabularyTerm,
)
from potstill.recipes.schema import FinetuneTeacher, MixtureTeacher, RecordedTeacher, StoredSignals, TextTask
from potstill.recipes.tasks import Classification, MaskedLM

__all__ = ["describe_term", "remarks_on"]

Facts = Mapping[str, Mapping[str, Any]]
"""What each stage that was done says of itself."""

LAYER_SETTINGS = ("heads", "relation_heads", "over")
"""Settings of terms over layers that belong into a sentence."""


def describe_term(term: LossTerm) -> str:
    """A loss with its weight, settings and layers, for example `0.1 hidden_cosine (layers: last)`."""
    weight = "" if _number(term.weight) == "1" else f"{_number(term.weight)} "
    settings = term.settings if isinstance(term, VocabularyTerm) else {}
    details = [f"{name} = {value:g}" for name, value in settings.items() if value or name != "label_smoothing"]
    if isinstance(term, SoftTerm):
        squared = ", times T^2" if term.times_temperature_squared and _number(term.temperature) != "1" else ""
        details.append(f"T = {_number(term.temperature)}{squared}")
    if isinstance(term, LayerTerm):
        details += _layers(term)
    return f"{weight}{term.kind}" + (f" ({', '.join(details)})" if details else "")


def _layers(term: LayerTerm) -> list[str]:
    """Which layers of the student are held against which of the teacher's, and how."""
    if getattr(term, "over", None) == "texts":
        return ["over texts"]
    pairs = (
        term.layers if isinstance(term.layers, str) else " ".join(f"{own}:{its}" for own, its in term.layers.items())
    )
    found = [f"layers {pairs}"]
    if isinstance(term, RelationTerm):
        found += [
            f"{name.replace('_', ' ')} {value}" for name in LAYER_SETTINGS if (value := getattr(term, name, None))
        ]
    return found


def _number(number: float | LinearRamp | CosineRamp | ConstantRamp) -> str:
    if isinstance(number, float):
        return f"{number:g}"
    if isinstance(number, ConstantRamp):
        return f"{number.value:g}"
    return " to ".join(f"{end:g}" for end in number.ends.values())


def remarks_on(recipe: Recipe, facts: Facts) -> tuple[str, ...]:
    """All that must stand beside the numbers of this run, in the order of its stages."""
    return (
        *_on_writing(facts.get("generate", {})),
        *_on_phases(recipe),
        *_on_teacher(recipe, facts),
        *_on_data(recipe, facts["prepare"]),
        *(_on_texts(recipe, facts) if recipe.over_texts else ()),
        *_on_student(facts["initialise"]),
        *_on_signals(recipe, facts),
        *map(str, facts.get("capture", {}).get("notes", ())),
        *map(str, facts.get("evaluate", {}).get("notes", ())),
    )


def _on_writing(generated: Mapping[str, Any]) -> tuple[str, ...]:
    """What must be known of a teacher's answers."""
    tally = generated.get("tally", {})
    return (*map(str, generated.get("notes", ())), *map(str, tally.get("remarks", ())))


def _on_phases(recipe: Recipe) -> tuple[str, ...]:
    """What an earlier phase may have read of what is held out here."""
    if not recipe.over_texts:
        return ()
    return tuple(
        f"the phase {phase.name} read {recipe.data.source} as documents, of which others are held out than of texts: "
        "it may have read, without their labels, texts that are tested here"
        for phase in phases_of(recipe)
        if phase.data.source == recipe.data.source and not phase.over_texts
    )


def _on_teacher(recipe: Recipe, facts: Facts) -> tuple[str, ...]:
    notes = [
        f"what the student kept is measured against the assistant {assistant.name}, not against the assistant's teacher"
        for assistant in load_chain(recipe)[:1]
    ]
    notes += [
        f"the assistant {assistant.name} was trained on other data ({assistant.data.source}): whether that holds "
        "documents which are held out here was not checked"
        for assistant in load_chain(recipe)
        if assistant.data.source != recipe.data.source
    ]
    if isinstance(recipe.teacher, MixtureTeacher) and any(member.sources for member in recipe.teacher.members):
        notes.append("the teacher's samples are written with its members' plain weights: a prompt has no source")
    if isinstance(recipe.teacher, RecordedTeacher):
        notes.append("the teacher's answers were recorded elsewhere: its size and speed are not known here")
    return (*notes, *_on_finetuning(recipe, facts.get("finetune", {})))


def _on_finetuning(recipe: Recipe, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """How the teacher came to know the task."""
    if not isinstance(recipe.teacher, FinetuneTeacher):
        return ()
    length = f" in {facts['steps']:,} steps" if "steps" in facts else ""
    notes = []
    if recipe.teacher.learns == "all" and facts.get("new_head") and isinstance(recipe.task, MaskedLM):
        notes.append(
            f"{recipe.teacher.model} has no head for this task: one was fitted first{length}, on hard labels, and all "
            "other weights with it; the teacher is only as good as that training"
        )
    if recipe.teacher.learns == "head":
        notes.append(
            f"{recipe.teacher.model} has no head for this task: one was fitted first{length}, on hard labels, its body "
            "left as it was; the teacher is only as good as that head"
        )
    if "found" in facts:
        notes.append(f"the fine-tuned teacher was found in {facts['found']}, where another run had trained it alike")
    return tuple(notes)


def _on_data(recipe: Recipe, prepared: Mapping[str, Any]) -> tuple[str, ...]:
    unit = "texts" if recipe.over_texts else "rows"
    notes = [f"{count:,} {unit} {what}" for what, count in prepared["cleaning"].items() if not what.startswith("kept")]
    if prepared.get("reading", {}).get("stopped_at_max_tokens"):
        notes.append(
            f"reading stopped at data.max_tokens, after {prepared['reading']['source_rows']:,} rows of the source"
        )
    return tuple(notes)


def _on_texts(recipe: Recipe, facts: Facts) -> tuple[str, ...]:
    """What became of long texts, of those without a label, and of those that belong to no class."""
    task, prepared = recipe.task, facts["prepare"]
    notes = list(_on_length(recipe, facts)) if isinstance(task, TextTask) else []
    notes += [
        f"{stage}: {one['lost_words']:,} words were cut off: nothing was learned of them"
        for stage, one in facts.items()
        if one.get("lost_words")
    ]
    labelled, texts = prepared.get("labelled", {}).get("train", 0), prepared["documents"].get("train", 0)
    if labelled < texts and prepared.get("labels"):
        notes.append(
            f"{texts - labelled:,} of {texts:,} training texts have no label: the teacher's answers taught on all of "
            "them, hard labels on the others alone"
        )
    if isinstance(task, Classification) and task.out_of_scope is not None:
        notes.append(
            f"texts labelled {task.out_of_scope} are no class, and count as unlabelled in training: they are found by "
            "low confidence, with a threshold chosen on the validation split"
        )
    return tuple(notes)


def _on_length(recipe: Recipe, facts: Facts) -> tuple[str, ...]:
    """How many texts were longer than a model reads, where that was counted, and what became of them."""
    task, length = recipe.task, recipe.data.sequence_length
    if not isinstance(task, TextTask) or task.overlong == "refuse":
        return ()
    done = "cut" if task.overlong == "truncate" else "left out"
    counted = {stage: one["overlong"] for stage, one in facts.items() if "overlong" in one}
    if not counted:
        return (f"texts of more than {length:,} tokens are {done}; how many were was not counted",)
    return tuple(
        f"{stage}: {count:,} texts of more than {length:,} tokens were {done}"
        for stage, count in counted.items()
        if count
    )


def _on_student(initial: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    untried = sum(1 for _, value in initial.get("removed", []) if value is None)
    if untried:
        notes.append(f"{untried} layers were removed untried: student.search.minutes was too short to judge them")
    if initial.get("head") == "fresh":
        notes.append("the student began with a new head of random weights: what it began as had none for this task")
    return tuple(notes)


def _on_signals(recipe: Recipe, facts: Facts) -> tuple[str, ...]:
    """Of stored signals, why nobody knows how true they are; scores and vectors of texts are stored as they are."""
    stored = isinstance(recipe.signals, StoredSignals) and "capture" in facts
    if not stored or recipe.over_texts or facts["capture"]["fidelity"] is not None:
        return ()
    return ("how true the stored signals are was not measured: four copies of the student's head would exceed 4 GB",)
