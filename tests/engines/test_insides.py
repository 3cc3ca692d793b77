"""What lies behind the answers is what the model multiplies: vectors make the maps, and maps are probabilities."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from potstill.engines import needs_eager, read_causal, read_encoder, reading_insides
from potstill.errors import ModelError
from potstill.types import Batch, Role, Wants

ALL = Wants(layers=(0, 3), attentions=(1, 2, 3), vectors=(1, 2, 3))


@pytest.fixture
def whole() -> Batch:
    """Two rows of one text each, without padding."""
    ids_BT = torch.randint(3, 96, (2, 9))
    return Batch(ids_BT, ids_BT, torch.ones_like(ids_BT))


def masked_maps(vectors, mask_BTT):
    """softmax(Q K^T / sqrt E) over the keys that the mask allows, each group of keys for its queries."""
    groups = vectors.queries_BHTE.shape[1] // vectors.keys_BGTE.shape[1]
    keys_BHTE = vectors.keys_BGTE.repeat_interleave(groups, dim=1)
    scores_BHTT = vectors.queries_BHTE @ keys_BHTE.transpose(-1, -2) / vectors.queries_BHTE.shape[-1] ** 0.5
    return scores_BHTT.masked_fill(~mask_BTT[:, None], -torch.inf).softmax(-1)


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra"])
@torch.no_grad()
def test_vectors_make_the_attention_maps_of_encoders(build, texts, family):
    view = read_encoder(build(family, Role.CLASSIFIER, eager=True), texts, Role.CLASSIFIER, ALL)
    attended_BT = texts.segments_BT > 0
    for block in (1, 2, 3):
        maps_BHTT = masked_maps(view.vectors[block], attended_BT[:, None, :].expand(-1, 9, -1))
        assert_close(view.attentions[block], maps_BHTT, rtol=1e-4, atol=1e-6)
        assert_close(view.attentions[block].sum(-1), torch.ones(3, 4, 9))
        assert view.attentions[block].dtype == torch.float32
    assert float(view.attentions[1].amax(-1).mean()) > 0.2, "maps that are nearly uniform would hide an error"


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "qwen3"])
@torch.no_grad()
def test_vectors_make_the_attention_maps_of_decoders_after_the_rotary_embedding(build, packed, family):
    _, insides = read_causal(build(family, Role.CAUSAL, eager=True), packed, Wants(attentions=(2,), vectors=(2,)))
    same_BTT = packed.segments_BT[:, :, None] == packed.segments_BT[:, None, :]
    mask_BTT = same_BTT & torch.ones(16, 16, dtype=torch.bool).tril()
    if family == "mistral":
        mask_BTT &= ~torch.ones(16, 16, dtype=torch.bool).tril(-4)
    assert_close(insides.attentions[2], masked_maps(insides.vectors[2], mask_BTT), rtol=1e-4, atol=1e-6)
    groups = 4 if family == "gpt2" else 2
    assert insides.vectors[2].queries_BHTE.shape == (2, 4, 16, 8)
    assert insides.vectors[2].keys_BGTE.shape == insides.vectors[2].values_BGTE.shape == (2, groups, 16, 8)


@torch.no_grad()
def test_maps_are_those_that_transformers_returns(build, encoder, whole):
    model = build(encoder, Role.MASKED, eager=True)
    with reading_insides(model, ALL) as insides:
        output = model(input_ids=whole.ids_BT, output_attentions=True, output_hidden_states=True)
    for block in (1, 2, 3):
        assert_close(insides.attentions[block], output.attentions[block - 1], rtol=0, atol=0)
    for layer in (0, 3):
        assert_close(insides.hidden[layer], output.hidden_states[layer], rtol=0, atol=0)


@torch.no_grad()
def test_queries_and_keys_are_bert_s_projections(build, whole):
    model = build("bert", Role.ENCODER)
    view = read_encoder(model, whole, Role.ENCODER, Wants(layers=(1,), vectors=(2,)))
    attention = model.encoder.layer[1].attention.self
    for found, layer in (
        (view.vectors[2].queries_BHTE, attention.query),
        (view.vectors[2].keys_BGTE, attention.key),
        (view.vectors[2].values_BGTE, attention.value),
    ):
        assert_close(found.transpose(1, 2).flatten(2), layer(view.hidden[1]))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_projections_of_the_block_and_no_later_one(build, whole, checkpointing):
    model = build("bert", Role.ENCODER, eager=True).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    view = read_encoder(model, whole, Role.ENCODER, Wants(vectors=(2,), attentions=(2,)))
    loss = view.attentions[2].square().sum() + view.vectors[2].values_BGTE.square().sum()
    loss.backward()
    reached = [layer.attention.self.query.weight.grad is not None for layer in model.encoder.layer]
    assert reached == [True, True, False]


def test_maps_of_a_model_in_training_are_probabilities_though_it_drops_some(build, whole):
    model = build("bert", Role.ENCODER, eager=True, attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    view = read_encoder(model.train(), whole, Role.ENCODER, Wants(attentions=(1,)))
    still = read_encoder(model.eval(), whole, Role.ENCODER, Wants(attentions=(1,)))
    assert_close(view.attentions[1], still.attentions[1])
    assert not torch.allclose(view.pooled_BD, still.pooled_BD, atol=1e-3), "the dropout itself was lost"


def test_maps_need_eager_attention_and_the_error_says_so(build, whole):
    assert needs_eager(Wants(attentions=(1,)))
    assert not needs_eager(Wants(layers=(1,), vectors=(1,)))
    model = build("bert", Role.ENCODER)
    with pytest.raises(ModelError, match=r"BertModel returned no attention maps \(attn_implementation='sdpa'\)"):
        read_encoder(model, whole, Role.ENCODER, Wants(attentions=(1,)))
    assert set(read_encoder(model, whole, Role.ENCODER, Wants(vectors=(1,))).vectors) == {1}


def test_an_architecture_with_attention_of_its_own_is_named(build, whole):
    model = build("debertav2", Role.ENCODER)
    with pytest.raises(ModelError, match="DebertaV2Model computes attention in a way of its own"):
        read_encoder(model, whole, Role.ENCODER, Wants(vectors=(1,)))
    assert set(read_encoder(model, whole, Role.ENCODER, Wants(layers=(0, 3))).hidden) == {0, 3}


@pytest.mark.parametrize(
    ("wants", "message"),
    [
        (Wants(layers=(4,)), r"hidden state 4 was asked of BertModel, which has 0\.\.3"),
        (Wants(layers=(-1,)), r"hidden state -1 .* 0\.\.3"),
        (Wants(attentions=(0,)), r"attention map 0 .* 1\.\.3"),
        (Wants(vectors=(1, 4)), r"queries, keys and values 4 .* 1\.\.3"),
    ],
)
def test_a_number_that_the_model_lacks_is_refused_with_the_range(build, whole, wants, message):
    with pytest.raises(ModelError, match=message):
        read_encoder(build("bert", Role.ENCODER), whole, Role.ENCODER, wants)


def test_other_models_are_not_watched_and_nothing_stays_behind(build, whole):
    model, other = build("bert", Role.ENCODER), build("bert", Role.ENCODER, seed=2)
    before = ALL_ATTENTION_FUNCTIONS.get_interface
    with torch.no_grad(), reading_insides(model, Wants(layers=(1,), vectors=(1,))) as insides:
        other(input_ids=whole.ids_BT)
        assert insides.vectors == {}
        model(input_ids=whole.ids_BT)
        kept = insides.vectors[1].queries_BHTE.clone()
        other(input_ids=whole.ids_BT)
        assert_close(insides.vectors[1].queries_BHTE, kept, rtol=0, atol=0)
    assert ALL_ATTENTION_FUNCTIONS.get_interface == before
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules() if part is model)


def test_an_error_within_is_the_one_that_is_seen(build):
    with pytest.raises(RuntimeError, match="stumbled"), reading_insides(build("bert", Role.ENCODER), ALL):
        raise RuntimeError("stumbled")
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_a_model_whose_blocks_cannot_be_found_is_refused(build, whole):
    model = build("bert", Role.ENCODER)
    model.encoder.layer = nn.Sequential(*model.encoder.layer)
    with pytest.raises(ModelError, match="its stack of blocks was not found"):
        read_encoder(model, whole, Role.ENCODER, Wants(vectors=(1,)))
