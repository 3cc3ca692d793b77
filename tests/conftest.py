"""What all tests share: seeds, and a tiny tokenizer, model and corpus that are made in a second and need no network."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import settings

# A law is not broken because another process was at work: how long an example takes is no part of it.
settings.register_profile("potstill", deadline=None)
settings.load_profile("potstill")

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

ANIMALS = ("fox", "owl", "hare", "toad", "wren")
COLOURS = {"fox": "red", "owl": "grey", "hare": "brown", "toad": "green", "wren": "gold"}
NUMBERS = ("one", "two", "three", "four", "five", "six")


@pytest.fixture(autouse=True)
def _seeds(request: pytest.FixtureRequest) -> None:
    """Every test draws the same numbers alone, in any order, and in the whole suite."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def write_document(index: int) -> str:
    """A short text whose next word can mostly be known: animals have their colours, and count from one upwards."""
    draw = random.Random(index)
    sentences = []
    for _ in range(draw.randint(1, 5)):
        animal, last = draw.choice(ANIMALS), draw.randint(2, len(NUMBERS))
        sentences.append(f"The {COLOURS[animal]} {animal} counts: {', '.join(NUMBERS[:last])}.")
    return " ".join(sentences)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 300 tokens, a ChatML-like template, `<|im_end|>` as end of sequence and `<|pad|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([write_document(index) for index in range(20)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 512
    return tokenizer


@pytest.fixture(scope="session")
def tiny_llama(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama with tokenizer: 4 layers, width 32, 4 heads over 2, tied, float32.

    Its head has 320 rows for 300 tokens, as many published models have padded heads. Do not write into the folder.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=-(-len(tiny_tokenizer) // 64) * 64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,  # with the usual 0.02 all its predictions would be nearly uniform, and tests blind
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL file of 200 short documents with `id` and `text`."""
    file = tmp_path_factory.mktemp("corpus") / "tiny.jsonl"
    rows = ({"id": f"doc-{index}", "text": write_document(index)} for index in range(200))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def tiny_recipe(tmp_path: Path, write_tiny_recipe: Callable[[Path], Path]) -> Path:
    """File of a recipe on the tiny model and corpus that runs in a second or two, into `tmp_path / "run"`."""
    return write_tiny_recipe(tmp_path)


@pytest.fixture(scope="session")
def write_tiny_recipe(tiny_llama: Path, tiny_corpus: Path) -> Callable[[Path], Path]:
    """What writes `tiny_recipe` into a folder, for runs that several tests share."""
    return lambda folder: write_recipe(folder, tiny_llama, tiny_corpus)


def write_recipe(folder: Path, model: Path, corpus: Path) -> Path:
    recipe = {
        "name": "tiny",
        "run_dir": str(folder / "run"),
        "data": {"source": str(corpus), "sequence_length": 32, "splits": {"validation": 0.1, "test": 0.1}},
        "teacher": {"kind": "local", "model": str(model), "dtype": "fp32"},
        "student": {"kind": "layers", "keep": "even", "count": 2},
        "losses": [{"kind": "forward_kl"}],
        "training": {
            "steps": 20,
            "batch_rows": 4,
            "precision": "fp32",
            "learning_rate": 1e-2,
            "checkpoint": {"every_steps": 4},
        },
        "evaluation": {"max_rows": 8, "resamples": 100, "sample_prompts": 2, "sample_tokens": 4, "speed": False},
    }
    file = folder / "tiny.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    return file
