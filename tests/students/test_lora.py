"""Adapters: they alone learn, the head never has one, and merged the model is the same without them."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from potstill.errors import MissingExtra, RecipeError
from potstill.students import add_adapters, find_targets, has_adapters, merge_adapters, save_student


def logits(model, ids_BT):
    with torch.no_grad():
        return model(input_ids=ids_BT).logits


def stir(model):
    """Give the adapters values, as a training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))


def test_fresh_adapters_change_no_answer_and_alone_have_a_gradient(teacher, ids_BT):
    before, own = logits(teacher, ids_BT), dict(teacher.named_parameters())
    adapted = add_adapters(teacher, rank=4, alpha=8)
    assert adapted is teacher
    assert torch.equal(logits(adapted, ids_BT), before)
    learned = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert learned
    assert all("lora_" in name for name in learned)
    assert all(not parameter.requires_grad for parameter in own.values())


def test_merged_and_saved_the_model_answers_as_with_its_adapters_without_peft(teacher, ids_BT, tokenizer, tmp_path):
    add_adapters(teacher, rank=4, alpha=8)
    stir(teacher)
    with_adapters, before = logits(teacher, ids_BT), copy.deepcopy(teacher.state_dict())
    save_student(teacher, tokenizer, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not (tmp_path / "adapter_config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert not has_adapters(loaded)
    assert_close(logits(loaded, ids_BT), with_adapters, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(with_adapters, logits(merge_adapters_off(teacher), ids_BT), atol=1e-2)


def merge_adapters_off(model):
    """The model as it was before it learned."""
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    return plain


def test_merged_weights_are_w_plus_scaled_b_a(llama):
    add_adapters(llama, rank=4, alpha=8, targets=["q_proj"])
    stir(llama)
    layer = llama.model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    merged = merge_adapters(llama)
    assert_close(merged.model.layers[0].self_attn.q_proj.weight, expected, rtol=1e-6, atol=1e-6)
    assert not has_adapters(merged)
    assert has_adapters(llama)
    assert list(merged.state_dict()) == [
        name.replace(".base_layer", "") for name in llama.state_dict() if "lora_" not in name
    ]


def test_named_targets_are_adapted_and_no_others(qwen3):
    names = find_targets(qwen3, ["q_proj", "mlp.up_proj"])
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "up_proj"}
    assert len(names) == 2 * 6
    add_adapters(qwen3, rank=2, alpha=2, targets=["q_proj", "mlp.up_proj"])
    adapted = {name.partition(".lora_")[0] for name, _ in qwen3.named_parameters() if "lora_" in name}
    assert adapted == set(names)


def test_all_linear_leaves_the_head_and_the_embeddings_alone(teacher):
    names = find_targets(teacher, "all-linear")
    kept = {teacher.get_output_embeddings(), teacher.get_input_embeddings()}
    assert names
    assert not [name for name in names if teacher.get_submodule(name) in kept]


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_the_head_and_the_embeddings_are_refused(llama, target):
    with pytest.raises(
        RecipeError, match=rf"^training\.lora\.targets\[1\]={target}: the output layer and the embeddings .*q_proj"
    ):
        find_targets(llama, ["q_proj", target])


@pytest.mark.parametrize("target", ["query", "proj", "", "norm"])
def test_a_name_that_fits_no_linear_layer_is_refused_with_those_that_would(llama, target):
    with pytest.raises(RecipeError, match=r"targets\[0\]=.*has no linear layer of this name.*down_proj, gate_proj"):
        find_targets(llama, [target])


def test_without_peft_the_extra_is_named(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"^training\.lora: peft .*pip install 'potstill\[lora\]'"):
        find_targets(llama, "all-linear")


def test_equal_seeds_draw_equal_adapters(llama):
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        adapted = add_adapters(copy.deepcopy(llama), rank=4, alpha=8)
        drawn.append({name: value for name, value in adapted.state_dict().items() if "lora_" in name})
    assert all(torch.equal(value, drawn[1][name]) for name, value in drawn[0].items())
