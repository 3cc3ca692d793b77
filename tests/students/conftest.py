"""Tiny random teachers of six layers whose configs say something layer by layer, or nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
    SmolLM3Config,
)

DEPTH = 6
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = ["sliding_attention", "full_attention", "full_attention"] * 2


def config_of(family: str) -> Any:
    match family:
        case "llama":
            return LlamaConfig(**SIZES, tie_word_embeddings=True)
        case "qwen3":
            return Qwen3Config(**SIZES, head_dim=8, use_sliding_window=True, sliding_window=3, layer_types=KINDS)
        case "gemma2":
            return Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=3, layer_types=KINDS)
        case "smollm3":  # some of its layers have no rotary positions
            return SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1, 1, 0, 1])
    small = {
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": DEPTH,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.15,
    }
    return GPT2Config(**small, bos_token_id=1, eos_token_id=2)


def build(family: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32).eval()


@pytest.fixture(params=["llama", "qwen3", "gemma2", "smollm3", "gpt2"])
def teacher(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.fixture
def llama() -> Any:
    return build("llama")


@pytest.fixture
def qwen3() -> Any:
    return build("qwen3")


@pytest.fixture
def ids_BT() -> torch.Tensor:
    return torch.randint(3, 64, (2, 10))
