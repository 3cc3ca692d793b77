"""How long one step of TRL's GKDTrainer takes, and how much memory: the peer that bench/step.py compares with.

Runs in a virtual environment of its own (bench/requirements-peers.txt) and imports nothing of potstill. Refuses: to
time anything but whole training steps; loading, warm-up steps, logging and checkpoints are left out.

Prints one JSON line: tokens_per_s (of the median step), step_s (every timed step), peak_bytes (resident memory of the
process, loading included), versions, threads.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

__all__ = ["main"]

BATCH_ROWS = 8


class StepTimer(TrainerCallback):  # type: ignore[misc]
    """Wall time of every optimiser step, from after the batch is drawn until the weights are updated."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self.start)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Stack rows of equal length; every position but the first is a target, as in the other program.

    In TRL's favour: its own collator renders chat templates and tokenizes within the training loop.
    """
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def configure(folder: str, steps: int) -> GKDConfig:
    """GKDTrainer's settings for offline forward KL on CPU; where there is a choice, the one that makes it faster."""
    return GKDConfig(
        output_dir=folder,
        # The comparison: forward KL to the teacher on the given tokens, nothing generated.
        lmbda=0.0,
        beta=0.0,
        seq_kd=False,
        max_steps=steps,
        per_device_train_batch_size=BATCH_ROWS,
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        # How its users train on CPU.
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
        # TRL's default is to recompute activations in the backward pass; without that a step is faster.
        gradient_checkpointing=False,
        # No work that is not the step.
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def train(arguments: argparse.Namespace, folder: str) -> list[float]:
    """Seconds of every step, warm-up included."""
    rows = np.load(arguments.rows_file)
    if rows.ndim != 2 or rows.dtype != np.int64 or len(rows) < BATCH_ROWS:
        raise SystemExit(f"--rows-file: got {rows.dtype} {rows.shape}, needs int64 [R, T] with R >= {BATCH_ROWS}")
    # Both models keep the dtype of their folders (bf16), which is what from_pretrained and TRL do by default. The other
    # program keeps fp32 master weights of the student; TRL is spared that work and memory.
    teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=torch.bfloat16)
    student = AutoModelForCausalLM.from_pretrained(arguments.student, dtype=torch.bfloat16)
    timer = StepTimer()
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=configure(folder, arguments.warmup + arguments.steps),
        data_collator=collate,
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        processing_class=AutoTokenizer.from_pretrained(arguments.teacher),
        callbacks=[timer],
    )
    trainer.train()
    return timer.seconds


def peak_bytes() -> int:
    """Largest resident size this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time the training step of TRL's GKDTrainer.")
    parser.add_argument("--teacher", type=Path, required=True, help="model folder")
    parser.add_argument("--student", type=Path, required=True, help="model folder with the same vocabulary")
    parser.add_argument("--rows-file", type=Path, required=True, help=".npy, int64 [R, T] token ids")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    return parser.parse_args()


def main() -> None:
    """Train, and print one JSON line."""
    arguments = read_arguments()
    # transformers prints its summary to stdout, where only the result belongs.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        seconds = train(arguments, folder)[arguments.warmup :]
    tokens = BATCH_ROWS * np.load(arguments.rows_file, mmap_mode="r").shape[1]
    result = {
        "tokens_per_s": tokens / statistics.median(seconds),
        "step_s": seconds,
        "peak_bytes": peak_bytes(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("trl", "transformers", "accelerate", "torch")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
