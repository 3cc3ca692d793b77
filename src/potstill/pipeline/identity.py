"""Which work is which: the fingerprints by which a stage knows that what lies there is its own.

Importing this module is cheap. Refuses to open a model or a data file: they count by name, size and time of change.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from potstill.pipeline.chain import before, load_chain, phases_of
from potstill.pipeline.places import identify
from potstill.recipes import Recipe, fingerprint
from potstill.recipes.losses import SoftTerm
from potstill.recipes.schema import (
    Embedding,
    FinetuneTeacher,
    LanguageModel,
    LayersStudent,
    LocalTeacher,
    MixtureTeacher,
    OpenAITeacher,
    PretrainedStudent,
    RecordedTeacher,
    RunTeacher,
    StoredSignals,
)
from potstill.recipes.signals import DenseSignals
from potstill.recipes.verify import FunctionVerifier, SchemaVerifier

__all__ = ["stage_fingerprints"]

ROWS = "rows that know their sources"
"""Which rows prepare writes: another text here makes those of earlier versions stale."""

FREE_TRAINING_KEYS = {"checkpoint", "trackers"}
"""Settings of the training that change how it is watched and kept, not what comes out of it."""

LENGTH_KEYS = {"tokens", "steps", "epochs", "batch_rows", "micro_batch_rows", "validation_rows"}
"""Settings of the training that decide what a store must hold for it."""

FREE_SIGNAL_KEYS = {"store", "batch_tokens"}
"""Settings of the signals that change where they are and how fast they come, not what a student learns of them."""


def stage_fingerprints(recipe: Recipe) -> dict[str, str]:
    """What decides each stage's result: its part of the recipe, its inputs, and the stages before it."""
    tokenizer, teacher = _identify_teacher(recipe)
    training = recipe.training.model_dump(exclude=FREE_TRAINING_KEYS)
    found: dict[str, str] = {}
    if recipe.generate:
        found["generate"] = fingerprint(["generate", *_identify_writing(recipe), teacher])
    written = [found["generate"]] if recipe.generate else []
    found["prepare"] = fingerprint(["prepare", ROWS, *_identify_data(recipe, tokenizer), *written])
    if isinstance(recipe.teacher, FinetuneTeacher):
        settings = recipe.teacher.model_dump(exclude={"dtype": True, "device": True, "training": FREE_TRAINING_KEYS})
        # The model that it begins as, not how it teaches afterwards: it is trained in full precision.
        found["finetune"] = fingerprint(["finetune", found["prepare"], recipe.task, settings, tokenizer])
        teacher = [teacher, found["finetune"]]
    task = [] if isinstance(recipe.task, LanguageModel) else [recipe.task]
    found["initialise"] = fingerprint(["initialise", found["prepare"], _identify_student(recipe), teacher, *task])
    said: list[object] = []
    if isinstance(recipe.signals, StoredSignals):
        length = recipe.training.model_dump(include=LENGTH_KEYS)
        temperatures = [term.temperature for term in recipe.losses if isinstance(term, SoftTerm)]
        said = [recipe.signals.model_dump(exclude=FREE_SIGNAL_KEYS)]
        if isinstance(recipe.signals, DenseSignals) and recipe.signals.features:
            # What lies behind the answers is kept for these comparisons, and for no others.
            said += [term.model_dump(exclude={"weight"}) for term in recipe.losses if not isinstance(term, SoftTerm)]
        found["capture"] = fingerprint(["capture", found["initialise"], length, temperatures, *said])
    found["train"] = fingerprint(["train", found["initialise"], training, recipe.losses, *said])
    if recipe.has_control:
        found["control"] = fingerprint(["control", found["initialise"], training])
    if recipe.static:
        own = recipe.static.model_dump(exclude={"training": FREE_TRAINING_KEYS})
        found["static"] = fingerprint(["static", found["initialise"], own, recipe.losses, *said])
    arms = [found["train"], found.get("control"), *([found["static"]] if recipe.static else [])]
    found["evaluate"] = fingerprint(["evaluate", *arms, recipe.evaluation])
    words = [recipe.name, recipe.description, recipe.report]
    if isinstance(recipe.teacher, OpenAITeacher):
        words.append(recipe.teacher.permission)  # it stands in the model card
    earlier = [stage_fingerprints(phase)["report"] for phase in phases_of(recipe)]  # the page tells of them, too
    found["report"] = fingerprint(["report", found["evaluate"], words, *([earlier] if earlier else [])])
    return found


def _identify_writing(recipe: Recipe) -> list[object]:
    """What decides what a teacher is asked to write, and what is kept of it."""
    asked = recipe.generate
    files = [
        identify(verify.file)
        for verify in [asked and asked.verify]
        if isinstance(verify, FunctionVerifier | SchemaVerifier)
    ]
    if asked and asked.cleaning.decontaminate:
        files += map(identify, asked.cleaning.decontaminate.against)
    if asked and asked.cleaning.semantic:
        files.append(identify(asked.cleaning.semantic.model))
    budget = getattr(recipe.teacher, "budget", None)
    # Where the run goes on with what a budget left, another budget leaves something else.
    files.append(fingerprint([budget]) if budget and budget.partial else "")
    source = recipe.data.source and identify(recipe.data.source)
    return [asked, recipe.data, source, recipe.seed, recipe.has_control, files]


def _identify_data(recipe: Recipe, tokenizer: object) -> list[object]:
    """What decides the rows: tokens of packed ones; of texts, what the task makes of their labels.

    Where the recipe lists no classes, they are those of a ready teacher: another one may have others.
    """
    if not recipe.over_texts:
        task = [] if isinstance(recipe.task, LanguageModel) else [recipe.task.kind]
        return [[recipe.data, identify(recipe.data.source), tokenizer, recipe.seed], *task]
    more = recipe.data.unlabelled and identify(recipe.data.unlabelled)
    listed = getattr(recipe.task, "labels", None) or isinstance(recipe.task, Embedding)
    classes = [] if listed or isinstance(recipe.teacher, FinetuneTeacher | RecordedTeacher) else [tokenizer]
    return [[recipe.data, identify(recipe.data.source), more, recipe.seed], recipe.task, *classes]


def _identify_student(recipe: Recipe) -> list[object]:
    """What decides the student that begins."""
    for phase in before(recipe):
        return ["phase", stage_fingerprints(phase)["train"]]
    own = recipe.student.model if isinstance(recipe.student, PretrainedStudent | LayersStudent) else None
    return [recipe.student, own and identify(own)]


def _identify_teacher(recipe: Recipe) -> tuple[object, object]:
    """What decides the teacher's tokenizer, and what decides the teacher."""
    teacher = recipe.teacher
    base = getattr(recipe.student, "model", None)
    if recipe.generate and isinstance(teacher, LocalTeacher):
        return base and identify(base), [teacher.model_dump(exclude={"device"}), identify(teacher.model)]
    if isinstance(teacher, RunTeacher):
        # Not the folder's files: the report adds the model card to them, and another assistant of the same sizes
        # could hardly be told by them.
        student = stage_fingerprints(load_chain(recipe)[0])["train"]
        return student, [teacher.kind, teacher.dtype, student]
    if isinstance(teacher, MixtureTeacher):
        # As lists, since the order of patterns counts and that of a mapping's keys does not.
        members = [[one.weight, list(one.sources.items()), one.model, identify(one.model)] for one in teacher.members]
        return identify(teacher.members[0].model), [teacher.kind, teacher.dtype, members]
    if isinstance(teacher, OpenAITeacher):
        # Not how hard and at what cost it is asked: the same words come of it. Nor the port of a server.
        host = urlsplit(teacher.base_url).hostname
        own: list[object] = [teacher.kind, teacher.model, teacher.api, teacher.reasoning, host, teacher.tokenizer]
        own.append(teacher.budget.partial)
        # Of how it is asked for classes, all but how many answers may be missing.
        return base and identify(base), [*own, teacher.labelling.model_dump(exclude={"missing"})]
    if isinstance(teacher, RecordedTeacher):
        return None, [teacher, identify(teacher.path)]
    if isinstance(teacher, FinetuneTeacher):
        return identify(teacher.model), [teacher.kind, teacher.dtype, identify(teacher.model)]
    return identify(teacher.model), [teacher.model_dump(exclude={"device"}), identify(teacher.model)]
