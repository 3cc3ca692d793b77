"""One tiny random model of every family that reads, masks or finishes its logits in a way of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from potstill.types import IGNORE, Batch

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SIZES, head_dim=8, sliding_window=4),
    "qwen2": lambda: Qwen2Config(**SIZES, use_sliding_window=True, **SLIDING),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8, use_sliding_window=True, **SLIDING),
    "gemma2": lambda: Gemma2Config(
        **SIZES, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0, attn_logit_softcapping=5.0, **SLIDING
    ),
    "cohere": lambda: CohereConfig(**SIZES, logit_scale=0.25),
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=3.0, residual_multiplier=0.5, embedding_multiplier=2.0),
    "phi": lambda: PhiConfig(**SIZES),  # its head has a bias
    "gpt2": lambda: GPT2Config(
        **{key: SIZES[key] for key in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id")},
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
    ),
}


def build(family: str) -> Any:
    """A model of this family with random float32 weights, biases included."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.fixture
def llama() -> Any:
    return build("llama")


@pytest.fixture
def packed() -> Batch:
    """Two rows of 16: documents longer than any sliding window, of one token, and padding that holds real ids."""
    ids_BT = torch.randint(3, VOCABULARY, (2, 16))
    segments_BT = torch.tensor([[1] * 5 + [2] * 7 + [0] * 4, [1] * 3 + [2] + [3] * 12])
    targets_BT = torch.where(torch.rand(2, 16) < 0.6, torch.randint(3, VOCABULARY, (2, 16)), IGNORE)
    targets_BT[segments_BT == 0] = IGNORE
    return Batch(ids_BT, targets_BT, segments_BT)


def documents(batch: Batch) -> list[tuple[int, slice]]:
    """(row, positions) of every segment that is not padding."""
    found = []
    for row, segments_T in enumerate(batch.segments_BT):
        for segment in range(1, int(segments_T.max()) + 1):
            places = (segments_T == segment).nonzero().squeeze(-1).tolist()
            found.append((row, slice(places[0], places[-1] + 1)))
    return found


@pytest.fixture
def alone(packed: Batch) -> list[tuple[tuple[int, slice], Batch]]:
    """Every document of `packed`: where it lies, and a batch of it alone."""
    parts = []
    for row, places in documents(packed):
        ids, targets = packed.ids_BT[row : row + 1, places], packed.targets_BT[row : row + 1, places]
        parts.append(((row, places), Batch(ids, targets, torch.ones_like(ids))))
    return parts
