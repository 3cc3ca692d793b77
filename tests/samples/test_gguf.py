from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from potstill.errors import ModelError
from potstill.samples import convert_gguf, fetch

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleave_heads(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF stores query and key rows in the order that rotates neighbouring pairs."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(file: Path, model: Any, tokenizer: Any, *, split: str = "gpt-2") -> None:
    """What llama.cpp's converter would write for a tied Llama, unquantized."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("A Name Of Its Own")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    write_tokenizer(writer, tokenizer, config.vocab_size, split)
    for name, tensor in gguf_tensors(model):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, vocabulary: int, split: str) -> None:
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_ids)
    padding = [f"[PAD{number}]" for number in range(len(tokens), vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens + padding)
    writer.add_token_types([3 if number in special else 1 for number in range(len(tokens))] + [5] * len(padding))
    writer.add_token_merges([" ".join(pair) for pair in stored["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def gguf_tensors(model: Any) -> list[tuple[str, np.ndarray]]:
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tensors = [
        ("token_embd.weight", state["model.embed_tokens.weight"]),
        ("output_norm.weight", state["model.norm.weight"]),
    ]
    heads = {"self_attn.q_proj": model.config.num_attention_heads, "self_attn.k_proj": model.config.num_key_value_heads}
    for layer in range(model.config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            weight = interleave_heads(weight, heads[ours]) if ours in heads else weight
            tensors.append((f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(weight)))
    return tensors


@pytest.fixture
def llama(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.fixture
def converted(llama, tiny_tokenizer, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", llama, tiny_tokenizer)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    return tmp_path / "out"


def test_weights_are_the_originals_rounded_to_bf16_once(llama, converted):
    model = AutoModelForCausalLM.from_pretrained(converted, dtype="auto")
    assert model.dtype == torch.bfloat16
    for name, weight in llama.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.to(torch.bfloat16)), name


def test_embeddings_stay_tied(converted):
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_nothing_of_the_gguf_file_is_left_in_the_config(llama, converted):
    config = json.loads((converted / "config.json").read_text())
    assert not [key for key in config if "quant" in key or "name" in key]
    assert config["rms_norm_eps"] == llama.config.rms_norm_eps == 1e-6
    generation = json.loads((converted / "generation_config.json").read_text())
    assert set(generation) == {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}


def test_the_tokenizer_comes_along(tiny_tokenizer, converted):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    text = "<|im_start|>user\nThe red fox counts: one, two.<|im_end|>"
    assert tokenizer(text).input_ids == tiny_tokenizer(text).input_ids
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert tokenizer.model_max_length == 512
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")


def test_smollms_rule_splits_digits_off_white_space(llama, tiny_tokenizer, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", llama, tiny_tokenizer, split="smollm")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    split = AutoTokenizer.from_pretrained(tmp_path / "out").backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in split.pre_tokenize_str("a  20")] == ["a", "ĠĠ", "2", "0"]


def test_an_unknown_splitting_rule_is_not_passed_over_in_silence(llama, tiny_tokenizer, tmp_path, caplog):
    write_gguf(tmp_path / "tiny.gguf", llama, tiny_tokenizer, split="unheard-of")
    with caplog.at_level(logging.WARNING, logger="potstill"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert "unheard-of" in caplog.text


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_cut_file_is_named_and_writes_nothing(llama, tiny_tokenizer, tmp_path, share):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, llama, tiny_tokenizer)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ModelError, match=r"tiny\.gguf cannot be read as a GGUF model: ") as caught:
        convert_gguf(file, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_files_are_refused(tmp_path):
    (tmp_path / "notes.gguf").write_text("not a model")
    with pytest.raises(ModelError, match="cannot be read as a GGUF model"):
        convert_gguf(tmp_path / "notes.gguf", tmp_path / "out")
    with pytest.raises(ModelError, match="does not exist"):
        convert_gguf(tmp_path / "absent.gguf", tmp_path / "out")


@pytest.mark.sample
def test_the_real_model_predicts_news_as_well_as_it_should():
    folder = fetch("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    lines = fetch("news-articles").read_text(encoding="utf-8").splitlines()[::375]
    rows = [tokenizer(json.loads(line)["text"]).input_ids[:256] for line in lines]
    batch = torch.tensor([row for row in rows if len(row) == 256])
    with torch.inference_mode():
        perplexity = math.exp(model(batch, labels=batch).loss.item())
    assert 20 < perplexity < 40
    assert tokenizer.tokenize("x\n\n20") == ["x", "ĊĊ", "2", "0"]
