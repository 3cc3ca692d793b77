"""The report stage: gathers what the run folder knows into a story, and has it told as a page and a model card.

Refuses to compute: what was not measured is absent.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from potstill.pipeline import build
from potstill.pipeline.chain import load_chain
from potstill.pipeline.disk import read_json
from potstill.pipeline.fidelity import Fidelity, describe_fidelity
from potstill.pipeline.metrics import read_metrics
from potstill.pipeline.places import STUDENT
from potstill.pipeline.run import stage_fingerprints
from potstill.pipeline.rundir import Manifest, RunDir, Stage
from potstill.recipes import Recipe, dump_recipe
from potstill.recipes.losses import ConstantRamp, CosineRamp, LinearRamp, LossTerm, SoftTerm, VocabularyTerm
from potstill.recipes.schema import FreshStudent, LayersStudent, Member, MixtureTeacher
from potstill.report import (
    CurvePoint,
    DataFacts,
    ReliabilityPoint,
    Sample,
    SignalFacts,
    StageCost,
    Story,
    write_card,
    write_report,
)
from potstill.signals import SignalSpec
from potstill.types import Measurement

__all__ = ["name_teacher", "report", "tell"]

ARM_STAGES = {"student": "train", "control": "control"}
VALIDATION_NAMES = {"validation_forward_kl": "kl_to_teacher", "validation_cross_entropy": "nll"}
PROGRESS_KEYS = {"step", "tokens", "seconds", "loss", "gradient_norm", "learning_rate"}
SCHEDULED = ("weight_", "temperature_")
"""How the names of what moves over a training begin: settings, not losses to be drawn as curves."""


UNBIASED = {
    "sampled": "the tokens are drawn so that the gradient is right on average",
    "topk": "a coarser comparison, not a biased one: which of the unlisted tokens are likelier is not taught",
    "topk_renormalised": "",
    "hidden": "the teacher's own words, bit for bit",
    "dense": "the teacher's own words, bit for bit",
}
"""Of what is stored, what keeps a student from learning something else."""


def report(recipe: Recipe, stage: Stage, folder: Path) -> None:
    """Write the page into the stage's folder and the model card into the student's."""
    story = tell(recipe, folder)
    write_report(story, stage.folder)
    write_card(story, folder / "train" / STUDENT)
    stage.finish(page=str(stage.folder / "index.html"))


def tell(recipe: Recipe, folder: Path) -> Story:
    """The story of a run whose evaluation is finished."""
    run = RunDir(folder)
    measurements: Any = read_json(folder / "evaluate" / "measurements.json")
    samples: Any = read_json(folder / "evaluate" / "samples.json")
    calibration = folder / "evaluate" / "calibration.json"  # earlier versions wrote none
    sure: Any = read_json(calibration) if calibration.exists() else {}
    manifests = {name: run.manifest(name) for name in stage_fingerprints(recipe) if name != "report"}
    arms = {arm: name for arm, name in ARM_STAGES.items() if name in manifests}
    return Story(
        title=recipe.report.title or recipe.name,
        description=recipe.description,
        teacher=name_teacher(recipe),
        student=_student_name(recipe, manifests["initialise"].facts),
        student_origin=_origin(recipe, manifests["initialise"].facts),
        objective=" + ".join(_term(term) for term in recipe.losses),
        recipe=dump_recipe(recipe),
        has_control=recipe.control.enabled,
        measurements=tuple(Measurement(**row) for row in measurements),
        curves={arm: tuple(map(_point, read_metrics(folder / name / "metrics.jsonl"))) for arm, name in arms.items()},
        samples=tuple(Sample(row["prompt"], row["reference"], row["completions"]) for row in samples),
        stages=tuple(StageCost(_starts(m), m.wall_s, m.peak_rss_bytes / 1e9) for m in manifests.values()),
        data=_data(recipe, manifests["prepare"].facts, manifests["prepare"].fingerprint),
        versions=manifests["evaluate"].versions,
        machine=_machine(),
        notes=(
            *_teacher_notes(recipe),
            *_notes(manifests["prepare"].facts, manifests["initialise"].facts),
            *(_signal_notes(manifests["capture"].facts) if "capture" in manifests else ()),
        ),
        base_model=_base_model(recipe),
        reliability={arm: tuple(ReliabilityPoint(**point) for point in points) for arm, points in sure.items()},
        signals=_signals(recipe, manifests["capture"].facts) if "capture" in manifests else None,
    )


def name_teacher(recipe: Recipe) -> str:
    """The teacher in words: a model, the student of a run and whose student that is, or models with their weights."""
    for assistant in load_chain(recipe)[:1]:
        return f"assistant {assistant.name}, itself distilled from {name_teacher(assistant)}"
    members = list(build.teachers_of(recipe).values())
    return members[0].model if len(members) == 1 else f"the mean of {' and '.join(map(_name_member, members))}"


def _name_member(member: Member) -> str:
    elsewhere = "".join(f", {weight:g} on {pattern}" for pattern, weight in member.sources.items())
    return f"{member.model} (weight {member.weight:g}{elsewhere})"


def _teacher_notes(recipe: Recipe) -> tuple[str, ...]:
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
    return tuple(notes)


def _base_model(recipe: Recipe) -> str | None:
    """The hub id of the first teacher of all, where it has one."""
    members = build.teachers_of((recipe, *load_chain(recipe))[-1])
    model = next(iter(members.values())).model
    return model if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else None


def _starts(manifest: Manifest) -> str:
    """The stage's name, and what its numbers cover where that is not the whole stage."""
    timed = manifest.timed_attempts
    if timed == manifest.attempts:
        return manifest.stage
    covered = "the last" if timed == 1 else f"{timed} of them"
    return f"{manifest.stage} ({manifest.attempts} starts; wall time of {covered})"


def _student_name(recipe: Recipe, facts: dict[str, Any]) -> str:
    if isinstance(recipe.student, LayersStudent):
        return f"{len(facts['layers'])}-layer student"
    return "freshly made student" if isinstance(recipe.student, FreshStudent) else f"student {recipe.student.model}"


def _origin(recipe: Recipe, facts: dict[str, Any]) -> str:
    first = "first " if isinstance(recipe.teacher, MixtureTeacher) else ""
    if isinstance(recipe.student, LayersStudent):
        rule = recipe.student.keep if isinstance(recipe.student.keep, str) else "listed"
        kept = ", ".join(map(str, facts["layers"]))
        return f"Cut from the {first}teacher: layers {kept} ({rule} choice), with its embeddings, final norm and head."
    if isinstance(recipe.student, FreshStudent):
        return f"The {first}teacher's architecture with other sizes and random weights."
    return f"Pretrained: {recipe.student.model}."


def _term(term: LossTerm) -> str:
    weight = "" if _number(term.weight) == "1" else f"{_number(term.weight)} "
    settings = term.settings if isinstance(term, VocabularyTerm) else {}
    details = [f"{name} = {value:g}" for name, value in settings.items() if value or name != "label_smoothing"]
    if isinstance(term, SoftTerm):
        squared = ", times T^2" if term.times_temperature_squared and _number(term.temperature) != "1" else ""
        details.append(f"T = {_number(term.temperature)}{squared}")
    return f"{weight}{term.kind}" + (f" ({', '.join(details)})" if details else "")


def _number(number: float | LinearRamp | CosineRamp | ConstantRamp) -> str:
    if isinstance(number, float):
        return f"{number:g}"
    if isinstance(number, ConstantRamp):
        return f"{number.value:g}"
    return " to ".join(f"{end:g}" for end in number.ends.values())


def _point(line: dict[str, Any]) -> CurvePoint:
    validation = {VALIDATION_NAMES[key]: value for key, value in line.items() if key in VALIDATION_NAMES}
    known = PROGRESS_KEYS | VALIDATION_NAMES.keys()
    terms = {key: value for key, value in line.items() if key not in known and not key.startswith(SCHEDULED)}
    return CurvePoint(line["step"], line["tokens"], line["seconds"], line["loss"], terms, validation)


def _signals(recipe: Recipe, facts: Mapping[str, Any]) -> SignalFacts:
    """What is to be told of a finished capture."""
    spec = SignalSpec.from_json(facts["spec"])
    seconds, stored = facts["capture_seconds"], max(1, facts["stored_positions"])
    # What was put aside still lies there, and would count as if it were of use.
    size = facts["stride"] if any(facts["quarantined"].values()) else facts["stored_bytes"] / stored
    return SignalFacts(
        kind=_kept(spec),
        store=facts["store"],
        pieces=facts["pieces"],
        positions=facts["positions"],
        bytes=round(facts["positions"] * size),
        bytes_per_token=size,
        captured=facts["captured"],
        found=facts["pieces"] - facts["captured"],
        rule=_rule(spec),
        capture_tokens_per_s=facts["read_tokens"] / seconds if facts["read_tokens"] and seconds else None,
        quarantined=facts["quarantined"]["blocks"] + facts["quarantined"]["shards"],
        biased=bool(bias := _bias(recipe, spec)),
        bias=bias or UNBIASED[spec.kind],
        fidelity=tuple(describe_fidelity(Fidelity(**facts["fidelity"]))) if facts["fidelity"] else (),
    )


def _signal_notes(facts: Mapping[str, Any]) -> tuple[str, ...]:
    if facts["fidelity"] is not None:
        return ()
    return ("how true the stored signals are was not measured: four copies of the student's head would exceed 4 GB",)


def _kept(spec: SignalSpec) -> str:
    match spec.kind:
        case "sampled":
            return f"{spec.k} sampled tokens a position"
        case "topk":
            return f"the {spec.k} likeliest tokens a position, and the probability of all others"
        case "topk_renormalised":
            return f"the {spec.k} likeliest tokens a position, as if there were no others"
        case "hidden":
            return "the teacher's final hidden states"
    return "all logits"


def _rule(spec: SignalSpec) -> str:
    match spec.positions:
        case "random":
            return f"{100 * spec.share:g} % at random"
        case "highest_entropy":
            return f"the {100 * spec.share:g} % of highest entropy"
    return "all"


def _bias(recipe: Recipe, spec: SignalSpec) -> str:
    """Why the student learned from an estimate that is wrong on average; empty where it did not."""
    if spec.kind == "topk_renormalised":
        return "the listed tokens are taught as if there were no others, which makes a student too sure"
    listed = [term.kind for term in recipe.losses if isinstance(term, SoftTerm) and term.kind != "forward_kl"]
    if spec.lists and listed:
        return f"{' and '.join(listed)} compared the listed tokens and one class for all others, as the recipe allows"
    return ""


def _data(recipe: Recipe, facts: dict[str, Any], fingerprint: str) -> DataFacts:
    return DataFacts(
        source=recipe.data.source,
        documents=facts["documents"],
        tokens=facts["tokens"],
        rows=facts["rows"],
        cleaning=facts["cleaning"],
        fingerprint=fingerprint,
    )


def _notes(prepared: dict[str, Any], initial: dict[str, Any]) -> tuple[str, ...]:
    notes = [f"{count} rows {what}" for what, count in prepared["cleaning"].items() if not what.startswith("kept")]
    if prepared.get("reading", {}).get("stopped_at_max_tokens"):
        notes.append(
            f"reading stopped at data.max_tokens, after {prepared['reading']['source_rows']:,} rows of the source"
        )
    untried = sum(1 for _, value in initial.get("removed", []) if value is None)
    if untried:
        notes.append(f"{untried} layers were removed untried: student.search.minutes was too short to judge them")
    return tuple(notes)


def _machine() -> str:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {', '.join(gpus) or 'no GPU'}"
