"""Tiny random teachers of six layers whose configs say something layer by layer, or nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    MPNetConfig,
    Qwen3Config,
    RobertaConfig,
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


ENCODER: dict[str, Any] = {
    name: SIZES[name]
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "initializer_range",
        "pad_token_id",
    )
}
LABELS = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}
AUTO = {
    "body": AutoModel,
    "masked": AutoModelForMaskedLM,
    "classes": AutoModelForSequenceClassification,
    "words": AutoModelForTokenClassification,
}


def encoder_config(family: str) -> Any:
    match family:
        case "bert":
            return BertConfig(**ENCODER, **LABELS)
        case "roberta":
            return RobertaConfig(**ENCODER, **LABELS)
        case "electra":
            return ElectraConfig(**ENCODER, **LABELS, embedding_size=16)
        case "mpnet":  # its blocks give a tuple
            return MPNetConfig(**ENCODER, **LABELS)
        case "deberta":  # and so do its
            relative = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
            return DebertaV2Config(**ENCODER, **LABELS, **relative)
        case "modernbert":  # its first block is unlike the others
            special = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
            return ModernBertConfig(**ENCODER, **LABELS, **special, local_attention=4)
    sizes = {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": DEPTH, "n_heads": 4, "pad_token_id": 0}
    return DistilBertConfig(**sizes, **LABELS, max_position_embeddings=64, initializer_range=0.15)


def build_encoder(family: str, head: str = "classes", **changes: Any) -> Any:
    """A tiny encoder whose layer norms and biases are random too, so that none of them may be forgotten."""
    config = encoder_config(family)
    config.update(changes)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AUTO[head].from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model


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


FAMILIES = ["bert", "distilbert", "roberta", "electra", "mpnet", "deberta", "modernbert"]


@pytest.fixture(
    params=[*((family, "classes") for family in FAMILIES), *(("bert", head) for head in AUTO if head != "classes")]
)
def encoder(request: pytest.FixtureRequest) -> Any:
    """Classifiers of every family, and a BERT of every kind."""
    return build_encoder(*request.param)


@pytest.fixture
def encoder_of() -> Any:
    return build_encoder


@pytest.fixture
def auto() -> dict[str, Any]:
    return AUTO
