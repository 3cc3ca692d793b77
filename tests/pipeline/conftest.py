"""Tiny queries with labels, random encoders that read them, and recipes of tasks over them that run in a moment."""

from __future__ import annotations

import gc
import json
import multiprocessing
from collections.abc import Callable, Sequence
from itertools import product
from multiprocessing.context import ForkServerContext
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from potstill.recipes import Recipe, load_recipe

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VERBS = {"count": "counting", "find": "finding", "paint": "painting"}
COLOURS = ("red", "grey", "brown", "green", "gold")
ANIMALS = ("fox", "owl", "hare", "toad", "wren")
NUMBERS = ("one", "two", "three", "four", "five", "six")
WORDS = (*VERBS, *COLOURS, *ANIMALS, *NUMBERS, "the", "and", "please", "##s", "w", "x", "y", "z")


@pytest.fixture(scope="session")
def queries() -> Callable[..., list[dict[str, Any]]]:
    """So many different queries: text, label (of its verb), tags, words with theirs, a second text."""
    every = list(product(VERBS, COLOURS, ANIMALS, NUMBERS))
    Random(0).shuffle(every)

    def some(count: int, first: int = 0) -> list[dict[str, Any]]:
        return [write_query(number, *every[number]) for number in range(first, first + count)]

    return some


def write_query(number: int, verb: str, colour: str, animal: str, amount: str) -> dict[str, Any]:
    tags = {"warm": colour in ("red", "gold"), "bird": animal in ("owl", "wren")}
    return {
        "id": f"q{number}",
        "text": f"{verb} {amount} {colour} {animal}",
        "label": VERBS[verb],
        "tags": [tag for tag, holds in tags.items() if holds],
        "words": [verb, amount, colour, animal],
        "word_labels": ["O", "O", "B-HUE", "B-BEAST"],
        "second": f"please {verb} the {animal}",
        "beast": animal,
    }


@pytest.fixture(scope="session")
def write_rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[dict[str, Any]]], Path]:
    """Writes rows as JSON lines into a file of their own."""

    def write(rows: Sequence[dict[str, Any]]) -> Path:
        file = tmp_path_factory.mktemp("rows") / "queries.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="session")
def query_file(queries: Any, write_rows: Any) -> Path:
    """80 queries."""
    return Path(write_rows(queries(80)))


def word_tokenizer(words: Sequence[str]) -> Any:
    """Word pieces as a BERT has them, numbered in this order."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.WordPiece({word: n for n, word in enumerate((*SPECIALS, *words))}, unk_token="[UNK]"))
    own.normalizer = normalizers.BertNormalizer()
    own.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    own.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = {f"{name[1:-1].lower()}_token": name for name in SPECIALS}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=own, model_input_names=inputs, **named)


def encoder_config(family: str, layers: int, width: int) -> Any:
    from transformers import BertConfig, DistilBertConfig, ModernBertConfig, RobertaConfig

    size = len(SPECIALS) + len(WORDS)
    if family == "distilbert":
        sizes = {"dim": width, "hidden_dim": 2 * width, "n_layers": layers, "n_heads": 4}
        plain = {"max_position_embeddings": 48, "pad_token_id": 0, "initializer_range": 0.2}
        return DistilBertConfig(vocab_size=size, **plain, **sizes)
    sizes = {
        "vocab_size": size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 48,
        "initializer_range": 0.2,  # with the usual 0.02 its answers would be nearly uniform, and tests blind
        "pad_token_id": 0,
    }
    if family == "modernbert":
        own = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3, "local_attention": 8}
        return ModernBertConfig(**sizes, **own)
    return {"bert": BertConfig, "roberta": RobertaConfig}[family](**sizes)


@pytest.fixture(scope="session")
def make_encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes the folder of a random encoder with its tokenizer, once: of this family, with this head and seed.

    `head` is masked, classes, words or body; `backwards` numbers the words the other way round. Do not write into it.
    """
    import transformers  # noqa: F401

    # Stages collect garbage as they end; going through all that was imported would take a third of a tiny run.
    gc.collect()
    gc.freeze()
    made: dict[str, Path] = {}

    def make(
        head: str = "masked",
        *,
        family: str = "bert",
        labels: Sequence[str] = (),
        seed: int = 1,
        layers: int = 3,
        width: int = 32,
        backwards: bool = False,
    ) -> Path:
        name = repr((head, family, tuple(labels), seed, layers, width, backwards))
        if name in made:
            return made[name]
        config = encoder_config(family, layers, width)
        if labels:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: number for number, label in enumerate(labels)}
        made[name] = tmp_path_factory.mktemp("encoders") / family
        save_encoder(config, head, seed, made[name])
        word_tokenizer(WORDS[::-1] if backwards else WORDS).save_pretrained(made[name])
        return made[name]

    return make


def save_encoder(config: Any, head: str, seed: int, folder: Path) -> None:
    from transformers import (
        AutoModel,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    classes = {
        "body": AutoModel,
        "masked": AutoModelForMaskedLM,
        "classes": AutoModelForSequenceClassification,
        "words": AutoModelForTokenClassification,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = classes[head].from_config(config, dtype=torch.float32)
        for name, weight in model.named_parameters():
            if "classifier" in name:  # random answers hardly differ from text to text
                weight.data *= 6.0
        model.save_pretrained(folder)


@pytest.fixture
def write_task(tmp_path: Path, query_file: Path) -> Callable[..., Path]:
    """Writes the recipe of a task into `tmp_path / NAME.yaml`, to run in `tmp_path / NAME`; keys as given."""

    def write(name: str = "task", **keys: Any) -> Path:
        recipe: dict[str, Any] = {
            "name": name,
            "run_dir": str(tmp_path / name),
            "task": {"kind": "classification"},
            "data": {"source": str(query_file), "sequence_length": 16, "splits": {"validation": 0.2, "test": 0.25}},
            "student": {"kind": "layers", "keep": "even", "count": 2},
            "losses": [{"kind": "forward_kl"}],
            "training": brief_training(12),
            "evaluation": {"resamples": 100, "sample_prompts": 2, "speed": False},
        }
        for key, value in keys.items():
            recipe[key] = {**recipe[key], **value} if key in ("data", "training", "evaluation") else value
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(recipe), encoding="utf-8")
        return file

    return write


@pytest.fixture
def task(write_task: Callable[..., Path]) -> Callable[..., Recipe]:
    """Writes such a recipe and loads it."""
    return lambda name="task", *overrides, **keys: load_recipe(write_task(name, **keys), overrides)


def brief_training(steps: int) -> dict[str, Any]:
    return {
        "steps": steps,
        "batch_rows": 8,
        "precision": "fp32",
        "learning_rate": 5e-3,
        "checkpoint": {"every_steps": 4},
    }


@pytest.fixture(scope="session")
def brief() -> Callable[[int], dict[str, Any]]:
    """The `training` of so many steps."""
    return brief_training


@pytest.fixture(scope="session")
def encoder_processes() -> ForkServerContext:
    """Processes forked from a server that has imported all and computed nothing: quick to start, safe to kill."""
    context = multiprocessing.get_context("forkserver")
    ours = [
        f"potstill.pipeline.{name}" for name in ("answerers", "arms", "examine", "run", "still", "telling", "tutor")
    ]
    theirs = ["torch._dynamo", "transformers.models.bert.modeling_bert"]
    context.set_forkserver_preload([*ours, *theirs])
    return context
