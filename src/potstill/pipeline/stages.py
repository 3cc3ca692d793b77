"""The stages of a distillation, each from folders to a folder. What a stage needs besides the recipe lies in the run.

Refuses to hold anything between stages: a stage that starts after a crash finds all it needs on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from potstill.data import Cleaning, PackedRows, clean_examples, encode_examples, load_examples, split_of, write_rows
from potstill.engines import LocalEngine, TrainableCausal, load_model, load_tokenizer, pick_device
from potstill.engines.local import load_config
from potstill.errors import DataError, RecipeError
from potstill.pipeline import build
from potstill.pipeline.disk import check_disk, read_json, write_json_atomic
from potstill.pipeline.layers import choose_layers
from potstill.pipeline.metrics import MetricsLog, start_trackers
from potstill.pipeline.progress import metered
from potstill.pipeline.rundir import Stage
from potstill.recipes import Recipe
from potstill.recipes.schema import CrossEntropy, FreshStudent, LayersStudent, LossTerm
from potstill.signals import shared_vocabulary
from potstill.students import cut_layers, fresh_model, save_student
from potstill.training import Callbacks, CheckpointStore, RowSource, Training, train
from potstill.types import Batch, Example, Lesson

__all__ = ["Arm", "initialise", "prepare", "train_arm"]

Arm = Literal["student", "control"]
SPLITS = ("train", "validation", "test")
STUDENT = "student"
"""Folder name of a model within a stage."""


def prepare(recipe: Recipe, stage: Stage) -> None:
    """Turn the user's rows into packed token rows, split by document, and keep some held-out beginnings to continue."""
    model = build.resolve_model(recipe.teacher.model, "teacher.model")
    tokenizer, config = load_tokenizer(model, "teacher.model"), load_config(model, "teacher.model").get_text_config()
    _check_length(recipe, config)
    examples = {split: _examples(recipe, split) for split in SPLITS}
    facts: dict[str, Any] = {"documents": {}, "tokens": {}, "rows": {}}
    cleaning = examples["train"][1]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    for split in SPLITS:
        with metered(f"prepare {split}", 1, "split"):
            encoded = encode_examples(examples[split][0], tokenizer)
            try:
                stats = write_rows(
                    encoded,
                    stage.folder / split,
                    sequence_length=recipe.data.sequence_length,
                    pad_id=pad,
                    seed=recipe.seed,
                )
            except DataError as error:
                raise DataError(f"data.splits: the {split} split is empty or teaches nothing ({error})") from error
        facts["documents"][split], facts["tokens"][split], facts["rows"][split] = (
            stats.documents,
            stats.tokens,
            stats.rows,
        )
    prompts = _prompts(recipe, tokenizer)
    write_json_atomic(stage.folder / "prompts.json", prompts)
    facts["cleaning"] = {
        **{f"kept: {k}": v for k, v in cleaning.kept.items()},
        **{f"dropped: {k}": v for k, v in cleaning.dropped.items()},
        **{f"mended: {k}": v for k, v in cleaning.mended.items()},
    }
    stage.finish(**facts)


def initialise(recipe: Recipe, stage: Stage, prepared: Path) -> None:
    """Make the student's first weights: the same for the student, the control arm and the untrained arm."""
    teacher = build.build_teacher(recipe)
    facts: dict[str, Any] = {}
    student: Any
    tokenizer = teacher.tokenizer
    if isinstance(recipe.student, LayersStudent):
        choice = choose_layers(recipe, recipe.student, teacher, PackedRows(prepared / "validation"))
        student = cut_layers(teacher.model, choice.keep)
        facts |= {"layers": list(choice.keep), "removed": [list(step) for step in choice.removed]}
    elif isinstance(recipe.student, FreshStudent):
        sizes = recipe.student.config.model_dump(exclude_none=True)
        student = fresh_model(teacher.model.config, sizes, recipe.seed)
    else:
        model = build.resolve_model(recipe.student.model, "student.model")
        tokenizer = load_tokenizer(model, "student.model")
        student = load_model(model, "fp32", torch.device("cpu"), "student.model")
    facts["vocabulary"] = shared_vocabulary(teacher.tokenizer, tokenizer)
    facts["parameters"] = sum(p.numel() for p in student.parameters())
    facts["teacher_parameters"] = sum(p.numel() for p in teacher.model.parameters())
    check_disk(stage.folder, 2 * 4 * facts["parameters"], "the initial student")
    save_student(student, tokenizer, stage.folder / STUDENT)
    stage.finish(**facts)


def train_arm(
    recipe: Recipe, stage: Stage, folders: tuple[Path, Path], arm: Arm, stopping: Callable[[], bool] = lambda: False
) -> None:
    """Train the student, or the control arm: same initial weights, same batches, hard labels alone.

    `folders` are those of prepare and initialise. Raises Interrupted when `stopping()` turns true, after saving.
    """
    prepared, initial = folders
    set_seed(recipe.seed)
    rows = PackedRows(prepared / "train")
    plan = build.build_plan(recipe, rows)
    device = pick_device(recipe.training.device, "training.device")
    accelerator = Accelerator(cpu=device.type == "cpu")
    student = load_model(str(initial / STUDENT), "fp32", accelerator.device, "student")
    check_disk(stage.folder, _checkpoint_bytes(recipe, student), "training checkpoints")
    teacher = build.build_teacher(recipe)
    vocabulary = shared_vocabulary(teacher.tokenizer, load_tokenizer(str(initial / STUDENT), "student"))
    terms: list[LossTerm] = list(recipe.losses) if arm == "student" else [CrossEntropy(kind="cross_entropy")]
    configs = student.config.get_text_config(), teacher.model.config.get_text_config()
    objective = build.build_objective(terms, vocabulary, *configs).to(accelerator.device)
    examiner = build.build_examiner(vocabulary)
    validation = list(read_lessons(teacher, PackedRows(prepared / "validation"), recipe.training.validation_rows, 4))
    if not objective.needs:
        teacher = None  # a teacher that is not asked must not sit in training memory
    source = RowSource(
        rows,
        seed=recipe.seed,
        batch_rows=recipe.training.batch_rows,
        rows_at_once=recipe.training.rows_at_once,
        teacher=teacher,
        wants=build.wants_of(objective),
        rank=(accelerator.process_index, accelerator.num_processes),
    )
    if recipe.training.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    if recipe.training.compile:
        student.base_model.compile()
    training = Training(
        TrainableCausal(student.train(), recipe.training.precision),
        objective,
        source,
        accelerator,
        validation,
        examiner,
    )
    store = CheckpointStore(stage.folder / "checkpoints", recipe.training.checkpoint.keep)
    trackers = start_trackers(list(recipe.training.trackers), f"{recipe.name}-{arm}", stage.folder)
    log = MetricsLog(stage.folder / "metrics.jsonl", trackers)
    tokens_a_step = recipe.training.batch_rows * recipe.data.sequence_length
    with metered(f"train {arm}", plan.steps * tokens_a_step, "tokens") as meter:

        def rewind(step: int) -> None:
            log.rewind(step)
            meter.skip(step * tokens_a_step)

        def after_step(line: dict[str, Any]) -> None:
            log.log(line)
            meter.advance(tokens_a_step, f"loss {line['loss']:.3f}")

        train(training, plan, store, Callbacks(after_step, stopping, rewind))
    tokenizer = load_tokenizer(str(initial / STUDENT), "student")
    dtype = torch.bfloat16 if recipe.training.precision == "bf16" else None
    save_student(student, tokenizer, stage.folder / STUDENT, dtype)
    store.clear()
    stage.finish(steps=plan.steps, tokens=training.positions, seconds=training.seconds)


def read_lessons(teacher: LocalEngine, rows: PackedRows, most: int | None, at_once: int) -> Iterator[Lesson]:
    """The first rows with what the teacher says about them: final states and head."""
    from potstill.types import Wants

    count = len(rows) if most is None else min(most, len(rows))
    for start in range(0, count, at_once):
        batch = rows.batch(range(start, min(start + at_once, count)))
        yield Lesson(batch, teacher.read(batch, Wants(final=True)))


def _examples(recipe: Recipe, split: str) -> tuple[Iterator[Example], Cleaning]:
    """The clean examples of one split, and the counts of cleaning all rows, complete when these are read."""
    data = recipe.data
    rows = load_examples(
        build.resolve_data(data.source),
        split=data.split,
        format=data.format,
        text=data.text,
        messages=data.messages,
        max_documents=data.max_documents,
    )
    clean, cleaning = clean_examples(rows)
    shares = {"validation": data.splits.validation, "test": data.splits.test}
    return (example for example in clean if split_of(example, seed=recipe.seed, **shares) == split), cleaning


def _prompts(recipe: Recipe, tokenizer: Any) -> list[dict[str, str]]:
    """Beginnings of held-out documents and how they go on; of chats, all up to the last answer."""
    prompts: list[dict[str, str]] = []
    for example in _examples(recipe, "test")[0]:
        if len(prompts) == recipe.evaluation.sample_prompts:
            break
        if example.messages is not None:
            messages = [dict(message) for message in example.messages]
            last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
            text = tokenizer.apply_chat_template(messages[:last], tokenize=False, add_generation_prompt=True)
            prompts.append({"prompt": str(text), "reference": str(messages[last]["content"])})
            continue
        ids = tokenizer(example.text)["input_ids"]
        length = recipe.evaluation.sample_tokens
        if len(ids) >= 2 * length:
            parts = ids[:length], ids[length : 2 * length]
            prompt, reference = (tokenizer.decode(part, skip_special_tokens=True) for part in parts)
            prompts.append({"prompt": prompt, "reference": reference})
    return prompts


def _check_length(recipe: Recipe, config: Any) -> None:
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if longest and recipe.data.sequence_length > longest:
        raise RecipeError(
            f"data.sequence_length: {recipe.data.sequence_length} exceeds the teacher's {longest} positions. "
            f"Use at most {longest}."
        )


def _checkpoint_bytes(recipe: Recipe, student: Any) -> int:
    """Weights and two moments in float32, for every checkpoint kept and the one being written, and the result."""
    parameters = sum(p.numel() for p in student.parameters())
    return parameters * 4 * (3 * (recipe.training.checkpoint.keep + 1) + 1)
