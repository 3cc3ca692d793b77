"""Layer reduction by sentence-transformers, the peer of bench/intent.py, and the judge of both students.

Follows that library's documented way: keep some layers of the teacher, let the teacher encode all texts once, learn its
vectors by MSELoss with SentenceTransformerTrainer. Runs in a virtual environment of its own
(bench/requirements-peers.txt) and imports nothing of potstill. Refuses: to time the imports, or the reading of texts.

Prints one JSON line: seconds, steps, versions, threads; or, as the judge, Spearman's rho of each student.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import spearmanr
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)

__all__ = ["main"]

PAIRS, ENCODED_AT_ONCE = 20_000, 128
PACKAGES = ("sentence-transformers", "transformers", "torch")


def main() -> None:
    """Train the peer's student, or judge both."""
    arguments = read_arguments()
    with contextlib.redirect_stdout(sys.stderr):
        told = train(arguments) if arguments.train else judge(arguments)
    print(json.dumps(told))


def read_arguments() -> argparse.Namespace:
    """The command line; the folder holds train.json, test.json and potstill's run."""
    parser = argparse.ArgumentParser(description="Cut a sentence encoder with sentence-transformers.")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--train", action="store_true")
    task.add_argument("--judge", action="store_true")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--batch-texts", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    return parser.parse_args()


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Cut, encode, learn, save."""
    texts = json.loads((arguments.folder / "train.json").read_text(encoding="utf-8"))
    began = time.perf_counter()
    teacher = load(arguments.teacher, arguments.length)
    student = cut(load(arguments.teacher, arguments.length), arguments.layers)
    vectors = teacher.encode(texts, batch_size=ENCODED_AT_ONCE, show_progress_bar=False)
    rows = Dataset.from_dict({"sentence": texts, "label": vectors.tolist()})
    trainer = SentenceTransformerTrainer(
        model=student, args=settings(arguments), train_dataset=rows, loss=losses.MSELoss(model=student)
    )
    trainer.train()
    student.save(str(arguments.folder / "peer"))
    return {
        "seconds": time.perf_counter() - began,
        "steps": trainer.state.global_step,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
    }


def settings(arguments: argparse.Namespace) -> Any:
    """Those of the documented script, on a CPU in fp32, without evaluation and checkpoints on the way."""
    return SentenceTransformerTrainingArguments(
        output_dir=str(arguments.folder / "checkpoints"),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_texts,
        learning_rate=arguments.learning_rate,
        warmup_steps=round(0.1 * arguments.steps),
        seed=arguments.seed,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=1000,
        report_to="none",
        disable_tqdm=True,
    )


def load(place: str, length: int) -> Any:
    """A sentence encoder that reads so many tokens at most."""
    model = SentenceTransformer(place)
    model.max_seq_length = length
    return model


def cut(model: Any, layers: list[int]) -> Any:
    """The same encoder with these layers only."""
    bert = model[0].auto_model
    bert.encoder.layer = torch.nn.ModuleList(bert.encoder.layer[number] for number in layers)
    bert.config.num_hidden_layers = len(layers)
    return model


def judge(arguments: argparse.Namespace) -> dict[str, Any]:
    """Spearman's rho between each student's cosines and the teacher's, over the same random pairs of test texts."""
    texts = json.loads((arguments.folder / "test.json").read_text(encoding="utf-8"))
    pairs_P2 = np.random.default_rng(0).integers(len(texts), size=(PAIRS, 2))
    pairs_P2 = pairs_P2[pairs_P2[:, 0] != pairs_P2[:, 1]]  # a text is its own neighbour for everyone

    def cosines(place: str) -> Any:
        vectors_BD = load(place, arguments.length).encode(texts, normalize_embeddings=True, show_progress_bar=False)
        return (vectors_BD[pairs_P2[:, 0]] * vectors_BD[pairs_P2[:, 1]]).sum(-1)

    teacher = cosines(arguments.teacher)
    students = {"ours": arguments.folder / "run" / "train" / "student", "peer": arguments.folder / "peer"}
    return {side: float(spearmanr(cosines(str(place)), teacher).statistic) for side, place in students.items()}


if __name__ == "__main__":
    main()
