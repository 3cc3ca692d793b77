from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    MPNetConfig,
    MPNetModel,
    OPTConfig,
    OPTModel,
    Qwen3Config,
    Qwen3Model,
)

from potstill.students import add_adapters, find_dropout, set_dropout

BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.5,
    "attention_probs_dropout_prob": 0.5,
}
LLAMA = {**BERT, "num_key_value_heads": 1, "head_dim": 8, "attention_dropout": 0.5}
SMALL = {"vocab_size": 40, "dropout": 0.5, "attention_dropout": 0.5}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**BERT)),
    "electra": lambda: ElectraModel(ElectraConfig(**BERT, embedding_size=16)),
    "mpnet": lambda: MPNetModel(MPNetConfig(**BERT)),
    "deberta": lambda: DebertaV2Model(DebertaV2Config(**BERT)),
    "distilbert": lambda: DistilBertModel(DistilBertConfig(**SMALL, dim=16, n_layers=2, n_heads=2, hidden_dim=24)),
    "llama": lambda: LlamaModel(LlamaConfig(**LLAMA)),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**LLAMA)),
    "gpt2": lambda: GPT2Model(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    ),
    "opt": lambda: OPTModel(
        OPTConfig(
            **SMALL, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24
        )
    ),
}
IDS = torch.tensor([[5, 9, 11, 7], [3, 4, 8, 6]])


def states(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_dropped_at_zero_and_much_at_a_half(name, attention):
    model = MODELS[name]()
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{name} has its own attention only")
    model.set_attn_implementation(attention)
    before = model.config.to_dict()
    undisturbed = states(model.eval())
    assert not torch.allclose(states(model.train()), undisturbed), "this test needs a model that drops something"
    set_dropout(model, 0.0)
    torch.testing.assert_close(states(model), undisturbed)
    set_dropout(model, 0.5)
    assert not torch.allclose(states(model), undisturbed)
    torch.testing.assert_close(states(model.eval()), undisturbed)
    assert model.config.to_dict() == before


def test_adapters_keep_their_own():
    model = MODELS["llama"]()
    set_dropout(model, 0.0)
    add_adapters(model, rank=2, alpha=4, dropout=0.25)
    assert {part.p for part in model.modules() if isinstance(part, nn.Dropout)} == {0.25}


def test_a_share_of_0_is_a_place_too_however_a_config_writes_it():
    config = LlamaConfig(**{**LLAMA, "attention_dropout": 0})
    assert len(find_dropout(LlamaModel(config))) == config.num_hidden_layers


def test_a_model_without_dropout_has_no_places():
    assert find_dropout(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == []
