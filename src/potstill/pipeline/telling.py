"""The report stage: gathers what the run folder knows into a story, and has it told as a page and a model card.

Refuses to compute: what was not measured is absent.
"""

from __future__ import annotations

import os
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from potstill.pipeline import build
from potstill.pipeline.chain import load_chain, phases_of
from potstill.pipeline.disk import read_json
from potstill.pipeline.fidelity import Fidelity, describe_fidelity
from potstill.pipeline.licence import check_terms, tell_terms
from potstill.pipeline.metrics import read_metrics
from potstill.pipeline.places import STUDENT
from potstill.pipeline.remarks import describe_term, remarks_on
from potstill.pipeline.run import stage_fingerprints
from potstill.pipeline.rundir import Manifest, RunDir, Stage
from potstill.recipes import Recipe, dump_recipe
from potstill.recipes.losses import SoftTerm
from potstill.recipes.schema import (
    FinetuneTeacher,
    FreshStudent,
    LayersStudent,
    Member,
    MixtureTeacher,
    OpenAITeacher,
    RecordedTeacher,
    TextTask,
)
from potstill.recipes.tasks import Classification, Embedding
from potstill.report import (
    ClassFacts,
    ClassRow,
    Confusion,
    CurvePoint,
    DataFacts,
    GenerationFacts,
    PhaseFacts,
    ReliabilityPoint,
    Sample,
    SignalFacts,
    SliceRow,
    StageCost,
    Story,
    TaskFacts,
    TeacherTraining,
    name_task,
    write_card,
    write_report,
)
from potstill.signals import SignalSpec
from potstill.types import Measurement

__all__ = ["name_teacher", "report", "tell"]

ARM_STAGES = {"student": "train", "control": "control", "static": "static"}
VALIDATION_NAMES = {"validation_forward_kl": "kl_to_teacher", "validation_cross_entropy": "nll"}
PROGRESS_KEYS = {"step", "tokens", "seconds", "loss", "gradient_norm", "learning_rate"}
VALIDATION = "validation_"
PHASES = "phases"
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
    terms = tell_terms(check_terms(recipe))
    write_card(story, folder / "train" / STUDENT, terms=terms)
    if recipe.static:
        write_card(story, folder / "static" / STUDENT, "static", terms=terms)
    stage.finish(page=str(stage.folder / "index.html"))


def tell(recipe: Recipe, folder: Path) -> Story:
    """The story of a run whose evaluation is finished."""
    run, evaluated = RunDir(folder), folder / "evaluate"
    manifests = {name: run.manifest(name) for name in stage_fingerprints(recipe) if name != "report"}
    facts = {name: manifest.facts for name, manifest in manifests.items()}
    arms = {arm: name for arm, name in ARM_STAGES.items() if name in manifests}
    sure = _read(evaluated / "calibration.json", {})
    return Story(
        title=recipe.report.title or recipe.name,
        description=recipe.description,
        teacher=name_teacher(recipe),
        student=_student_name(recipe, _first_facts(recipe, folder, facts)),
        student_origin=_origin(recipe, _first_facts(recipe, folder, facts)),
        objective=" + ".join(map(describe_term, recipe.losses)),
        recipe=dump_recipe(recipe),
        has_control=recipe.has_control,
        measurements=tuple(Measurement(**row) for row in _read(evaluated / "measurements.json", [])),
        curves={arm: tuple(map(_point, read_metrics(folder / name / "metrics.jsonl"))) for arm, name in arms.items()},
        samples=tuple(Sample(**row) for row in _read(evaluated / "samples.json", [])),
        stages=tuple(StageCost(_starts(m), m.wall_s, m.peak_rss_bytes / 1e9) for m in manifests.values()),
        data=_data(recipe, manifests["prepare"].facts, manifests["prepare"].fingerprint),
        versions=manifests["evaluate"].versions,
        machine=_machine(),
        notes=remarks_on(recipe, facts),
        base_model=_base_model(recipe),
        reliability={arm: tuple(ReliabilityPoint(**point) for point in points) for arm, points in sure.items()},
        signals=_signals(recipe, manifests["capture"].facts) if "capture" in manifests else None,
        task=_task(recipe, manifests["prepare"].facts),
        classes=_classes(_read(evaluated / "classes.json", None)),
        confusions=tuple(Confusion(**row) for row in _read(evaluated / "confusions.json", [])),
        slices=_slices(_read(evaluated / "slices.json", [])),
        phases=tuple(_phase(phase, folder) for phase in phases_of(recipe)),
        teacher_training=_teacher_training(recipe, facts.get("finetune", {})),
        generation=_generation(facts["generate"]) if "generate" in facts else None,
    )


def _read(path: Path, absent: Any) -> Any:
    """What the evaluation wrote; earlier versions, and other tasks, do not write every file."""
    return read_json(path) if path.exists() else absent


def _kind(recipe: Recipe) -> str:
    if recipe.generate is None:
        return recipe.task.kind
    return "unverified" if recipe.generate.verify is None else "written"


def _task(recipe: Recipe, prepared: Mapping[str, Any]) -> TaskFacts:
    task, price = recipe.task, recipe.evaluation.price
    scope = task.out_of_scope if isinstance(task, Classification) else None
    return TaskFacts(
        _kind(recipe),
        tuple(prepared.get("labels", ())),
        multi_label=isinstance(task, Classification) and task.multi_label,
        pooling=task.pooling if isinstance(task, Classification | Embedding) else "",
        normalise=isinstance(task, Embedding) and task.normalise,
        out_of_scope=scope,
        precision=recipe.evaluation.precision if scope is not None else None,
        price=_name_price(recipe) if price else "",
        length=recipe.data.sequence_length if isinstance(task, TextTask) else None,
    )


def _name_price(recipe: Recipe) -> str:
    price = recipe.evaluation.price
    if price is None:
        return ""
    words = f"{price.machine_usd_per_hour:g} USD an hour for a machine such as this one, kept busy"
    charged = price.teacher_usd_per_1000
    return words if charged is None else f"{words}; the teacher's API charges {charged:g} USD for 1,000 queries"


def _classes(read: Mapping[str, Any] | None) -> ClassFacts | None:
    if not read:
        return None
    arms = {arm: tuple(ClassRow(**row) for row in rows) for arm, rows in read["arms"].items()}
    return ClassFacts(tuple(read["labels"]), arms)


def _slices(read: Sequence[Mapping[str, Any]]) -> tuple[SliceRow, ...]:
    """Accuracy by kind of text."""
    found = [(row["value"], [Measurement(**one) for one in row["measurements"]]) for row in read]
    return tuple(SliceRow(value, tuple(one for one in rows if one.name == "accuracy")) for value, rows in found)


def _phase(recipe: Recipe, folder: Path) -> PhaseFacts:
    """An earlier phase, as its own run folder tells it."""
    name = recipe.folder.name
    own = folder / PHASES / name
    facts = _task(recipe, RunDir(own).manifest("prepare").facts)
    return PhaseFacts(
        name=name,
        task=name_task(facts),
        teacher=name_teacher(recipe),
        objective=" + ".join(map(describe_term, recipe.losses)),
        folder=f"{PHASES}/{name}",
        measurements=tuple(Measurement(**row) for row in _read(own / "evaluate" / "measurements.json", [])),
        facts=facts,
    )


def _teacher_training(recipe: Recipe, facts: Mapping[str, Any]) -> TeacherTraining | None:
    if not isinstance(recipe.teacher, FinetuneTeacher):
        return None
    spec = recipe.teacher
    learns = "body" if spec.learns == "all" and spec.training.freeze_embeddings else spec.learns
    return TeacherTraining(spec.model, learns, facts.get("steps"), facts.get("seconds"))


def _generation(facts: Mapping[str, Any]) -> GenerationFacts:
    tally, size = facts["tally"], facts["effective"]
    unusable = Counter(tally["quarantined"]) + Counter(tally["given_up"])
    return GenerationFacts(
        prompts=facts["prompts"],
        kept=facts["kept"],
        prompts_dropped=facts["prompts_dropped"],
        dropped=facts["dropped"],
        masked=facts["masked"],
        effective=(size["clusters"], size["prompts"]),
        verdicts=facts["verdicts"] if any(facts["verdicts"].values()) else {},
        difficulty=tuple(facts["difficulty"]),
        pass_at={int(k): share for k, share in facts.get("pass_at", {}).items()},
        unsolved=facts["unsolved"],
        leaks=facts["leaks"],
        reasoning=facts["reasoning"],
        served=tally["served"],
        asked=tally["asked"],
        found_before=tally["answered_before"],
        retried=tally["retried"],
        unusable={**unusable, **({"not asked: the budget was used up": tally["left"]} if tally["left"] else {})},
        tokens=tally["tokens"],
        usd=tally["usd"],
    )


def _first_facts(recipe: Recipe, folder: Path, facts: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """How the student was made at the very first: by the first phase, where there are phases."""
    for phase in phases_of(recipe)[:1]:
        return RunDir(folder / PHASES / phase.folder.name).manifest("initialise").facts
    return facts["initialise"]


def name_teacher(recipe: Recipe) -> str:
    """The teacher in words: a model, the student of a run and whose student that is, or models with their weights."""
    for assistant in load_chain(recipe)[:1]:
        return f"assistant {assistant.name}, itself distilled from {name_teacher(assistant)}"
    if isinstance(recipe.teacher, RecordedTeacher):
        return f"answers recorded in {recipe.teacher.path}"
    if isinstance(recipe.teacher, FinetuneTeacher):
        return f"{recipe.teacher.model}, fine-tuned here"
    if isinstance(recipe.teacher, OpenAITeacher):
        return f"{recipe.teacher.model}, asked at {urlsplit(recipe.teacher.base_url).hostname}"
    members = list(build.teachers_of(recipe).values())
    return members[0].model if len(members) == 1 else f"the mean of {' and '.join(map(_name_member, members))}"


def _name_member(member: Member) -> str:
    elsewhere = "".join(f", {weight:g} on {pattern}" for pattern, weight in member.sources.items())
    return f"{member.model} (weight {member.weight:g}{elsewhere})"


def _base_model(recipe: Recipe) -> str | None:
    """The hub id of the first teacher of all, where it has one."""
    members = list(build.teachers_of((recipe, *load_chain(recipe))[-1]).values())
    hub = members and re.fullmatch(r"[\w.-]+/[\w.-]+", members[0].model)
    return members[0].model if hub else None


def _starts(manifest: Manifest) -> str:
    """The stage's name, and what its numbers cover where that is not the whole stage."""
    timed = manifest.timed_attempts
    if timed == manifest.attempts:
        return manifest.stage
    covered = "the last" if timed == 1 else f"{timed} of them"
    return f"{manifest.stage} ({manifest.attempts} starts; wall time of {covered})"


def _student_name(recipe: Recipe, facts: Mapping[str, Any]) -> str:
    if isinstance(recipe.student, LayersStudent):
        return f"{len(facts['layers'])}-layer student"
    return "freshly made student" if isinstance(recipe.student, FreshStudent) else f"student {recipe.student.model}"


def _origin(recipe: Recipe, facts: Mapping[str, Any]) -> str:
    first = "first " if isinstance(recipe.teacher, MixtureTeacher) else ""
    after = " Trained by low-rank adapters, which are merged into it." if recipe.training.lora else ""
    after += f" Trained before in phases: {', '.join(one.name for one in recipe.phases)}." if recipe.phases else ""
    if isinstance(recipe.student, LayersStudent):
        rule = recipe.student.keep if isinstance(recipe.student.keep, str) else "listed"
        kept = ", ".join(map(str, facts["layers"]))
        rest = "embeddings, final norm and head" if recipe.task.kind == "language_model" else "embeddings and head"
        turned = ", turned into a DistilBERT" if recipe.student.architecture == "distilbert" else ""
        whole = recipe.student.model or f"the {first}teacher"
        return f"Cut from {whole}: layers {kept} ({rule} choice), with its {rest}{turned}.{after}"
    if isinstance(recipe.student, FreshStudent):
        return f"The {first}teacher's architecture with other sizes and random weights.{after}"
    return f"Pretrained: {recipe.student.model}.{after}"


def _point(line: dict[str, Any]) -> CurvePoint:
    validation = {
        VALIDATION_NAMES.get(key, key.removeprefix(VALIDATION)): value
        for key, value in line.items()
        if key.startswith(VALIDATION)
    }
    settings = (VALIDATION, *SCHEDULED)
    terms = {k: value for k, value in line.items() if k not in PROGRESS_KEYS and not k.startswith(settings)}
    return CurvePoint(line["step"], line["tokens"], line["seconds"], line["loss"], terms, validation)


def _signals(recipe: Recipe, facts: Mapping[str, Any]) -> SignalFacts:
    """What is to be told of a finished capture."""
    spec = SignalSpec.from_json(facts["spec"])
    seconds, stored = facts["capture_seconds"], max(1, facts["stored_positions"])
    # What was put aside still lies there, and would count as if it were of use.
    size = facts["stride"] if any(facts["quarantined"].values()) else facts["stored_bytes"] / stored
    return SignalFacts(
        kind=_kept_of_texts(recipe) if recipe.over_texts else _kept(spec),
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


def _kept_of_texts(recipe: Recipe) -> str:
    return "the vector of every text" if isinstance(recipe.task, Embedding) else "the scores of all classes"


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
        tokens=facts.get("tokens", {}),
        rows=facts.get("rows", {}),
        cleaning=facts["cleaning"],
        fingerprint=fingerprint,
        labelled=facts.get("labelled", {}) if facts.get("labels") else {},
    )


def _machine() -> str:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {', '.join(gpus) or 'no GPU'}"
