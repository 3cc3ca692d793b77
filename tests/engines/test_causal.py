"""Packed reading is reading one by one; head and states are the model's logits; what cannot be proved is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from potstill.engines import CausalReader, TrainableCausal, read_causal
from potstill.engines.causal import head_of, probe
from potstill.errors import ModelError
from potstill.types import Batch, Wants


def dense_logits(hidden_BTD, head):
    """The formula of `Head`, written out."""
    logits_BTV = hidden_BTD.float() @ head.weight_VD.float().T
    if head.bias_V is not None:
        logits_BTV = logits_BTV + head.bias_V.float()
    logits_BTV = logits_BTV * head.scale
    return logits_BTV if head.softcap is None else head.softcap * torch.tanh(logits_BTV / head.softcap)


@torch.no_grad()
def test_a_packed_document_is_read_as_if_it_were_alone(model, packed, alone):
    depth = model.config.num_hidden_layers
    layers = (0, 1, depth)
    final_BTD, insides = read_causal(model, packed, Wants(layers=layers))
    hidden = insides.hidden
    assert set(hidden) == set(layers)
    for (row, places), batch in alone:
        alone_BTD, alone_insides = read_causal(model, batch, Wants(layers=layers))
        alone_hidden = alone_insides.hidden
        assert_close(final_BTD[row, places], alone_BTD[0], rtol=1e-4, atol=2e-5)
        for layer in layers:
            assert_close(hidden[layer][row, places], alone_hidden[layer][0], rtol=1e-4, atol=2e-5)


def gradients(model, losses):
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_packed_document_gives_the_gradients_that_it_gives_alone(model, packed, alone):
    factors_BTD = torch.randn(*packed.ids_BT.shape, 32)
    attended_BT1 = (packed.segments_BT > 0).unsqueeze(-1)
    together = gradients(model, [(read_causal(model, packed)[0] * factors_BTD * attended_BT1).sum()])
    one_by_one = gradients(
        model, [(read_causal(model, batch)[0] * factors_BTD[row, places]).sum() for (row, places), batch in alone]
    )
    assert set(together) == set(one_by_one)
    for name, gradient in together.items():
        scale = float(one_by_one[name].abs().max())
        assert_close(
            gradient, one_by_one[name], rtol=1e-3, atol=1e-5 * max(1.0, scale), msg=lambda m, n=name: f"{n} {m}"
        )


@torch.no_grad()
def test_the_content_of_other_documents_and_of_padding_changes_nothing(model, packed):
    other_ids = packed.ids_BT.clone()
    other_ids[0, :5], other_ids[0, 12:] = 7, 8
    before = read_causal(model, packed)[0][0, 5:12]
    after = read_causal(model, Batch(other_ids, packed.targets_BT, packed.segments_BT))[0][0, 5:12]
    assert_close(before, after, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_head_on_final_states_is_the_models_logits(model, packed):
    final_BTD, _ = read_causal(model, packed)
    logits_BTV = model(input_ids=packed.ids_BT, position_ids=packed.positions_BT, use_cache=False).logits
    assert float(logits_BTV.std()) > 0.05
    assert_close(dense_logits(final_BTD, head_of(model)), logits_BTV, rtol=1e-4, atol=1e-5)


def test_a_model_without_an_output_layer_is_refused(llama):
    llama.set_output_embeddings(nn.Identity())
    with pytest.raises(ModelError, match="no linear output layer"):
        head_of(llama)


def test_an_output_layer_with_an_adapter_is_refused(llama):
    class Adapted(nn.Module):
        def __init__(self, base_layer: nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.weight = base_layer, base_layer.weight

    llama.set_output_embeddings(Adapted(llama.get_output_embeddings()))
    with pytest.raises(ModelError, match=r"carries an adapter.*merge_and_unload.*leave the output layer out"):
        head_of(llama)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_good_model_passes_the_probe_and_is_left_as_it_was(model, dtype):
    model.to(dtype).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    probe(model, "teacher.model")
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


@pytest.mark.parametrize("factor", [1.5, 1.01, float("nan")])
def test_a_model_whose_logits_are_not_its_head_is_refused(llama, factor):
    llama.lm_head.register_forward_hook(lambda _, __, logits: logits * factor)
    with pytest.raises(ModelError, match=r"^teacher\.model: the logits of LlamaForCausalLM are not its output layer"):
        probe(llama, "teacher.model")


def test_a_bf16_model_whose_logits_are_not_its_head_is_refused(llama):
    llama.to(torch.bfloat16).lm_head.register_forward_hook(lambda _, __, logits: logits * 1.5)
    with pytest.raises(ModelError, match="are not its output layer"):
        probe(llama, "teacher.model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_ignores_restarting_positions_is_refused(llama, dtype):
    def forget_positions(_, args, kwargs):
        ids_BT = kwargs["input_ids"]
        return args, {**kwargs, "position_ids": torch.arange(ids_BT.shape[1]).expand_as(ids_BT)}

    llama.to(dtype).model.register_forward_pre_hook(forget_positions, with_kwargs=True)
    with pytest.raises(ModelError, match=r"^student\.model: LlamaForCausalLM lets documents .* see each other"):
        probe(llama, "student.model")


def test_a_vocabulary_of_four_can_be_probed():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    probe(LlamaForCausalLM(LlamaConfig(vocab_size=4, **sizes)), "teacher.model")


def test_a_reader_gathers_supervised_rows_in_batch_order_and_slices_a_padded_head(model, packed):
    with torch.no_grad():
        final_BTD, insides = read_causal(model, packed, Wants(layers=(2,)))
    signal = CausalReader(model, 90).read(packed, Wants(final=True, layers=(2,)))
    expected_ND = torch.stack([final_BTD[b, t] for b in range(2) for t in range(16) if packed.supervised_BT[b, t]])
    assert_close(signal.logits.rows_ND, expected_ND)
    assert signal.logits.head.vocabulary == 90
    assert_close(signal.logits.head.weight_VD, head_of(model).weight_VD[:90])
    assert signal.logits.head.bias_V is None or len(signal.logits.head.bias_V) == 90
    assert_close(signal.hidden[2], insides.hidden[2])


def test_a_reader_learns_nothing(llama, packed):
    reader = CausalReader(llama.train(), 96)
    signal = reader.read(packed, Wants(final=True, layers=(0,)))
    assert not any(parameter.requires_grad for parameter in llama.parameters())
    assert not llama.training
    assert not signal.logits.rows_ND.requires_grad
    assert not signal.hidden[0].requires_grad


def test_a_reader_gives_only_what_is_wanted(llama, packed):
    signal = CausalReader(llama, 96).read(packed, Wants(layers=(1,)))
    assert signal.logits is None
    assert list(signal.hidden) == [1]


def test_the_student_answers_wherever_anybody_speaks_and_the_teacher_where_it_is_to(llama, packed):
    taught_BT = torch.zeros_like(packed.supervised_BT)
    taught_BT[0, :6] = True
    taught = replace(packed, taught_BT=taught_BT)
    with torch.no_grad():
        final_BTD = read_causal(llama, packed)[0]
    view = TrainableCausal(llama, "fp32")(taught)
    signal = CausalReader(llama, 96).read(taught, Wants(final=True))
    assert_close(view.final_ND.detach(), final_BTD[packed.supervised_BT | taught_BT])
    assert_close(signal.logits.rows_ND, final_BTD[0, :6])
    assert_close(view.final_ND.detach()[taught.taught_N], signal.logits.rows_ND)


def test_a_causal_model_has_no_vector_for_a_text(llama, packed):
    with pytest.raises(ModelError, match="has no vector for a text"):
        read_causal(llama, packed, Wants(pooled=True))


def test_a_batch_without_targets_gives_no_rows(llama, packed):
    silent = Batch(packed.ids_BT, torch.full_like(packed.targets_BT, -100), packed.segments_BT)
    assert CausalReader(llama, 96).read(silent, Wants(final=True)).logits.rows_ND.shape == (0, 32)


def test_a_trainable_model_shows_what_a_reader_reads(model, packed):
    view = TrainableCausal(model, "fp32")(packed, Wants(layers=(1,)))
    assert view.final_ND.requires_grad
    signal = CausalReader(model, model.get_output_embeddings().weight.shape[0]).read(packed, Wants(True, (1,)))
    assert_close(view.final_ND.detach(), signal.logits.rows_ND, rtol=0, atol=0)
    assert_close(view.hidden[1].detach(), signal.hidden[1], rtol=0, atol=0)
    assert torch.equal(view.head.weight_VD, signal.logits.head.weight_VD)


def test_bf16_keeps_master_weights_and_gives_bf16_states(model, packed):
    view = TrainableCausal(model, "bf16")(packed)
    assert view.final_ND.dtype == torch.bfloat16
    view.final_ND.float().square().sum().backward()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}
    exact_ND = TrainableCausal(model, "fp32")(packed).final_ND
    assert float(((view.final_ND.float() - exact_ND).norm() / exact_ND.norm()).detach()) < 0.05
