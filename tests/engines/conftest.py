"""One tiny random model of every family that reads, masks or finishes its logits in a way of its own; and batches."""

from __future__ import annotations

from collections.abc import Callable
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
    CohereConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from potstill.types import IGNORE, Batch, Role

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


def build_causal(family: str) -> Any:
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
    return build_causal(request.param)


@pytest.fixture
def llama() -> Any:
    return build_causal("llama")


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


BERT_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}

ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertConfig(**BERT_SIZES),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=40, pad_token_id=0
    ),
    "debertav2": lambda: DebertaV2Config(
        **BERT_SIZES, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"]
    ),
    "roberta": lambda: RobertaConfig(**{**BERT_SIZES, "pad_token_id": 1}),
    "electra": lambda: ElectraConfig(**BERT_SIZES, embedding_size=16),
    "modernbert": lambda: ModernBertConfig(
        **BERT_SIZES, local_attention=4, global_attn_every_n_layers=2, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2,
    ),
}  # fmt: skip


CLASSES = {
    Role.CAUSAL: AutoModelForCausalLM,
    Role.MASKED: AutoModelForMaskedLM,
    Role.CLASSIFIER: AutoModelForSequenceClassification,
    Role.TOKEN_CLASSIFIER: AutoModelForTokenClassification,
    Role.ENCODER: AutoModel,
}


def build_for(family: str, role: Role, *, eager: bool = False, seed: int = 1, **changes: Any) -> Any:
    """A random float32 model of this family for this role; norms and biases are not the usual ones and zeros."""
    config = (ENCODERS | FAMILIES)[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    attention = {"attn_implementation": "eager"} if eager else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLASSES[role].from_config(config, dtype=torch.float32, **attention)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """`build_for`: what makes a model of a family for a role."""
    return build_for


@pytest.fixture(params=sorted(set(ENCODERS) - {"debertav2"}))
def encoder(request: pytest.FixtureRequest) -> str:
    """The name of a family of encoders that attends as most do."""
    return str(request.param)


@pytest.fixture
def texts() -> Batch:
    """Three texts of 9, 5 and 1 tokens, padded with tokens that mean something; all but the second are labelled."""
    ids_BT = torch.randint(3, VOCABULARY, (3, 9))
    segments_BT = (torch.arange(9) < torch.tensor([[9], [5], [1]])).long()
    targets_BT = torch.full((3, 9), IGNORE)
    targets_BT[:, 0] = torch.tensor([1, IGNORE, 0])
    taught_BT = torch.zeros(3, 9, dtype=torch.bool)
    taught_BT[:, 0] = True
    names = (("a",), ("b",), ("c",))
    return Batch(ids_BT, targets_BT, segments_BT, names, names, taught_BT, keys=(b"a" * 16, b"b" * 16, b"c" * 16))
