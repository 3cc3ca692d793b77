"""The evaluate stage: all arms, one at a time, on the same held-out rows and prompts.

Refuses to keep two arms in memory at once: the teacher's final states are read first and kept instead.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
import torch

from potstill.data import PackedRows
from potstill.engines import LocalEngine, pick_device
from potstill.evaluation import DocumentScores, compare_arms, measure_speed, score_arm
from potstill.evaluation.speed import folder_bytes
from potstill.losses import position_scores
from potstill.pipeline import build
from potstill.pipeline.disk import write_json_atomic
from potstill.pipeline.progress import metered
from potstill.pipeline.rundir import Stage, peak_memory_bytes, reset_peak_memory
from potstill.pipeline.stages import read_lessons
from potstill.recipes import Recipe
from potstill.types import Lesson, Measurement, Sampling

__all__ = ["evaluate"]


def evaluate(recipe: Recipe, stage: Stage, prepared: Path, arms: Mapping[str, Path]) -> None:
    """Score, time and sample every arm. `arms` are model folders: teacher first, then untrained, control, student."""
    rows = PackedRows(prepared / "test")
    prompts = json.loads((prepared / "prompts.json").read_text(encoding="utf-8"))
    lessons: list[Lesson] = []
    scores: dict[str, DocumentScores] = {}
    found: list[Measurement] = []
    completions: dict[str, list[str]] = {}
    settings = recipe.evaluation
    count = min(len(rows), settings.max_rows or len(rows))
    with metered("evaluate", len(arms) * count, "rows") as meter:
        for arm, folder in arms.items():
            reset_peak_memory()
            engine = _engine(recipe, arm, folder)
            lessons = lessons or list(read_lessons(engine, rows, count, settings.batch_rows))
            scores[arm] = score_arm(engine, lessons, position_scores)
            meter.advance(count, arm)
            texts = [prompt["prompt"] for prompt in prompts]
            completions[arm] = engine.generate(texts, Sampling(max_new_tokens=settings.sample_tokens))
            found += _sizes(arm, engine, folder)
            if settings.speed and texts:
                found += _speed(arm, engine, lessons[0], texts)
            found.append(Measurement(arm, "peak_memory_bytes", "test", peak_memory_bytes(), None, None, 1, "bytes"))
            del engine
            gc.collect()
    found = compare_arms(scores, settings.resamples, recipe.seed) + found
    write_json_atomic(stage.folder / "measurements.json", [asdict(m) for m in found if math.isfinite(m.value)])
    write_json_atomic(
        stage.folder / "samples.json",
        [p | {"completions": {arm: completions[arm][i] for arm in arms}} for i, p in enumerate(prompts)],
    )
    stage.finish(rows=count, documents=len(scores["teacher"].documents), positions=float(scores["teacher"].counts_D.sum()))


def _engine(recipe: Recipe, arm: str, folder: Path) -> LocalEngine:
    if arm == "teacher":
        return build.build_teacher(recipe)
    device = pick_device(recipe.teacher.device, "teacher.device")
    return build.build_engine(str(folder), recipe.training.precision, device, arm)


def _sizes(arm: str, engine: LocalEngine, folder: Path) -> list[Measurement]:
    parameters = sum(p.numel() for p in engine.model.parameters())
    rows = [Measurement(arm, "parameters", "test", parameters, None, None, 1, "")]
    if folder.is_dir():
        rows.append(Measurement(arm, "folder_bytes", "test", folder_bytes(folder), None, None, 1, "bytes"))
    return rows


@torch.inference_mode()
def _speed(arm: str, engine: LocalEngine, lesson: Lesson, prompts: list[str]) -> list[Measurement]:
    speed = measure_speed(engine, lesson.batch, prompts, count=lambda text: len(engine.tokenizer(text)["input_ids"]))
    return speed.measurements(arm)
