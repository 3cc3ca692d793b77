"""A student has exactly the weights it should have, in a folder that loads anywhere."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Qwen3Config,
    pipeline,
)

from potstill.errors import ModelError, RecipeError
from potstill.students import check_layers, cut_layers, fresh_model, save_student
from potstill.students.blocks import find_blocks, replaced_blocks

KEEPS = [[5], [0, 2, 5], [1, 4]]


@pytest.mark.parametrize("keep", KEEPS, ids=str)
def test_a_cut_model_has_exactly_the_weights_of_its_layers(teacher, keep):
    student = cut_layers(teacher, keep)
    (name, ours), (_, theirs) = find_blocks(student), find_blocks(teacher)
    assert len(ours) == len(keep)
    for block, layer in zip(ours, keep, strict=True):
        expected = theirs[layer].state_dict()
        assert list(block.state_dict()) == list(expected)
        for key, value in block.state_dict().items():
            assert torch.equal(value, expected[key])
    outside = {key: value for key, value in teacher.state_dict().items() if not key.startswith(f"{name}.")}
    for key, value in outside.items():
        assert torch.equal(student.state_dict()[key], value), key
    assert {key for key in student.state_dict() if not key.startswith(f"{name}.")} == set(outside)


@pytest.mark.parametrize("keep", KEEPS, ids=str)
def test_a_cut_model_computes_what_the_teachers_layers_compute(teacher, keep, ids_BT):
    _, blocks = find_blocks(teacher)
    with torch.no_grad():
        with replaced_blocks(teacher, [blocks[layer] for layer in keep], keep):
            expected = teacher(ids_BT, use_cache=False).logits
        assert_close(cut_layers(teacher, keep).eval()(ids_BT, use_cache=False).logits, expected, rtol=1e-5, atol=1e-6)


def test_configs_that_list_layers_are_cut_alike(qwen3):
    kinds = qwen3.config.layer_types
    student = cut_layers(qwen3, [0, 1, 5])
    assert student.config.num_hidden_layers == 3
    assert student.config.layer_types == [kinds[0], kinds[1], kinds[5]]
    assert qwen3.config.num_hidden_layers == 6


def test_cutting_touches_neither_the_teacher_nor_shares_with_it(teacher):
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    config = copy.deepcopy(teacher.config.to_dict())
    student = cut_layers(teacher, [1, 3])
    for parameter in student.parameters():
        parameter.data.fill_(7.0)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert teacher.config.to_dict() == config


def test_a_cut_model_keeps_dtype_tying_and_generation_config(llama):
    llama.to(torch.bfloat16).generation_config.max_new_tokens = 77
    student = cut_layers(llama, [0, 5])
    assert student.dtype == torch.bfloat16
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert student.generation_config.max_new_tokens == 77
    assert student.generation_config is not llama.generation_config


def test_a_layer_out_of_range_is_named():
    check_layers([0, 29], 30)
    with pytest.raises(RecipeError) as caught:
        check_layers([0, 1, 2, 41], 30)
    assert str(caught.value).startswith(
        "student.keep[3]=41: the teacher has layers 0..29. Use a layer in that range, or"
    )
    with pytest.raises(RecipeError, match=r"^student\.keep\[0\]=-1: "):
        check_layers([-1], 30)


def test_cutting_a_layer_out_of_range_is_refused(llama):
    with pytest.raises(RecipeError, match=r"^student\.keep\[1\]=6: the teacher has layers 0\.\.5\."):
        cut_layers(llama, [0, 6])


def test_layers_that_cannot_be_moved_are_refused():
    """DeepSeek's first layer is dense and the others are not; its config can say so of the first one only."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": None}
    head = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}
    experts = {"n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1, "first_k_dense_replace": 1}
    config = DeepseekV2Config(num_hidden_layers=3, **sizes, **heads, **head, **experts)
    teacher = DeepseekV2ForCausalLM(config)
    assert find_blocks(cut_layers(teacher, [0, 2]))[1] is not None
    with pytest.raises(ModelError, match=r"^student\.keep=\[1, 2\]: the layers of DeepseekV2ForCausalLM are not alike"):
        cut_layers(teacher, [1, 2])


def test_a_saved_student_loads_with_transformers_alone(teacher, tiny_tokenizer, tmp_path, ids_BT):
    teacher.generation_config.max_new_tokens = 5
    student = cut_layers(teacher, [0, 3, 4]).eval()
    save_student(student, tiny_tokenizer, tmp_path)
    loaded, notes = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    assert loaded.dtype == torch.float32
    assert loaded.generation_config.max_new_tokens == 5
    with torch.no_grad():
        assert_close(loaded(ids_BT).logits, student(ids_BT).logits, rtol=1e-6, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert tokenizer("The red fox")["input_ids"] == tiny_tokenizer("The red fox")["input_ids"]


def test_weights_are_rounded_on_the_way_only(llama, tiny_tokenizer, tmp_path):
    student = cut_layers(llama, [0, 1])
    save_student(student, tiny_tokenizer, tmp_path, torch.bfloat16)
    assert student.dtype == torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, student.state_dict()[name].bfloat16())


@pytest.mark.parametrize("taste", [{"temperature": 0.6, "top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}, {}])
def test_a_publisher_who_forgot_do_sample_is_no_obstacle(llama, tiny_tokenizer, tmp_path, taste):
    for name, value in taste.items():
        setattr(llama.generation_config, name, value)
    save_student(cut_layers(llama, [0]), tiny_tokenizer, tmp_path)
    sampling = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert {name: getattr(sampling, name) for name in taste} == taste
    assert bool(sampling.do_sample) == bool(taste)
    assert not llama.generation_config.do_sample, "the teacher's own is left alone"


def parameters(model):
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def test_a_fresh_model_has_the_sizes_asked_for(llama):
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    student = fresh_model(llama.config, sizes | {"num_key_value_heads": 1, "tie_word_embeddings": False}, seed=5)
    block = find_blocks(student)[1][0]
    assert len(find_blocks(student)[1]) == 2
    assert block.mlp.down_proj.weight.shape == (16, 24)
    assert block.self_attn.k_proj.weight.shape == (8, 16)
    assert student.lm_head.weight is not student.model.embed_tokens.weight
    assert student.lm_head.weight.shape == (64, 16)
    assert student.dtype == torch.float32


def test_a_fresh_model_without_sizes_is_the_teachers_shape(teacher):
    assert parameters(fresh_model(teacher.config, {}, 0)) == parameters(teacher)


@pytest.mark.parametrize("depth", [2, 6, 9])
def test_lists_by_layer_fit_a_fresh_models_depth(qwen3, depth):
    student = fresh_model(qwen3.config, {"num_hidden_layers": depth}, 0)
    assert student.config.layer_types == (qwen3.config.layer_types * 2)[:depth]
    assert qwen3.config.num_hidden_layers == 6


def test_equal_seeds_give_equal_weights_and_no_seed_is_spent(llama):
    state = torch.get_rng_state()
    first, same, other = (fresh_model(llama.config, {"num_hidden_layers": 1}, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_a_head_size_of_its_own_follows_the_width(qwen3):
    student = fresh_model(qwen3.config, {"hidden_size": 64}, 0)
    assert student.config.head_dim == 16
    wide = Qwen3Config(**{**qwen3.config.to_dict(), "head_dim": 16})
    assert fresh_model(wide, {"num_hidden_layers": 1}, 0).config.head_dim == 16, "nothing asked to change it"


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"hidden_size": 30}, "student.config.num_attention_heads=4 does not divide hidden_size=30. Choose a divisor."),
        ({"num_attention_heads": 3}, "student.config.num_attention_heads=3 does not divide hidden_size=32."),
        ({"num_attention_heads": 1}, "student.config.num_key_value_heads=2 does not divide num_attention_heads=1."),
        ({"num_key_value_heads": 3}, "student.config.num_key_value_heads=3 does not divide num_attention_heads=4."),
        ({"hidden_size": 36}, "student.config: these sizes do not go together ("),
    ],
)
def test_impossible_sizes_are_refused(llama, sizes, text):
    with pytest.raises(ModelError) as caught:
        fresh_model(llama.config, sizes, 0)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("teacher", ["gpt2"], indirect=True)
def test_a_size_that_the_architecture_has_not_is_refused(teacher):
    with pytest.raises(ModelError, match=r"^student\.config\.num_key_value_heads: GPT2Config has no such size"):
        fresh_model(teacher.config, {"num_key_value_heads": 2}, 0)


# ------------------------------------------------------------------------------------------------------------- encoders


@pytest.mark.parametrize("keep", [[0], [0, 2, 5]], ids=str)
def test_a_cut_encoder_is_of_its_class_and_computes_what_the_teachers_layers_compute(encoder, keep, ids_BT):
    _, blocks = find_blocks(encoder)
    with torch.no_grad():
        with replaced_blocks(encoder, [blocks[layer] for layer in keep], keep):
            expected = encoder(ids_BT)[0]
        student = cut_layers(encoder, keep).eval()
        assert_close(student(ids_BT)[0], expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(encoder(ids_BT)[0], expected)
    assert type(student) is type(encoder)
    assert student.config.id2label == encoder.config.id2label
    assert student.config.num_hidden_layers == len(find_blocks(student)[1]) == len(keep)
    name = find_blocks(encoder)[0]
    outside = {key: value for key, value in encoder.state_dict().items() if not key.startswith(f"{name}.")}
    assert all(torch.equal(student.state_dict()[key], value) for key, value in outside.items())


@pytest.mark.parametrize("pooler", [True, False])
def test_a_body_keeps_its_pooler_or_the_lack_of_it(encoder_of, pooler, ids_BT):
    body = encoder_of("bert", "body")
    if not pooler:
        body = type(body)(body.config, add_pooling_layer=False).eval()
    student = cut_layers(body, [1, 4]).eval()
    assert (student.pooler is not None) == pooler
    assert set(student.state_dict()) <= set(body.state_dict())
    assert student(ids_BT).last_hidden_state.shape == (2, 10, 32)


def test_a_first_block_that_is_unlike_the_others_cannot_be_left_out(encoder_of):
    with pytest.raises(ModelError, match=r"^student\.keep=\[1, 2\]: the layers of ModernBert\w+ are not alike"):
        cut_layers(encoder_of("modernbert"), [1, 2])


def test_a_saved_encoder_loads_with_transformers_alone_and_answers_alike(
    encoder, auto, tiny_tokenizer, tmp_path, ids_BT
):
    student = cut_layers(encoder, [0, 3]).eval()
    save_student(student, tiny_tokenizer, tmp_path)
    (kind,) = [one for one in auto.values() if one._model_mapping[type(student.config)] is type(student)]
    loaded, notes = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    assert loaded.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    with torch.no_grad():
        assert_close(loaded.eval()(ids_BT)[0], student(ids_BT)[0], rtol=1e-6, atol=1e-6)
    assert not (tmp_path / "generation_config.json").exists()


def test_a_pipeline_of_transformers_answers_as_the_student_does(encoder_of, tiny_tokenizer, tmp_path):
    student = cut_layers(encoder_of("bert", vocab_size=len(tiny_tokenizer)), [0, 3]).eval()
    save_student(student, tiny_tokenizer, tmp_path, torch.bfloat16)
    save_student(student, tiny_tokenizer, tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path), tokenizer=str(tmp_path), top_k=None, device="cpu")
    said = {one["label"]: one["score"] for one in classify(["The red fox"])[0]}
    with torch.no_grad():
        scores_C = student(**tiny_tokenizer("The red fox", return_tensors="pt")).logits[0].softmax(-1)
    assert said == pytest.approx(dict(zip(("no", "maybe", "yes"), scores_C.tolist(), strict=True)), abs=1e-6)


def test_a_fresh_encoder_has_the_sizes_the_class_and_the_labels(encoder, ids_BT):
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    student = fresh_model(encoder.config, sizes, 0, kind=type(encoder))
    assert type(student) is type(encoder)
    assert len(find_blocks(student)[1]) == 2
    assert student.config.num_attention_heads == 2
    assert student.config.id2label == encoder.config.id2label
    assert student(ids_BT)[0].shape == encoder(ids_BT)[0].shape
    blank = fresh_model(encoder.config, sizes, 0, "meta", kind=type(encoder))
    assert parameters(blank) == parameters(student)
    again = fresh_model(encoder.config, sizes, 0, kind=type(encoder))
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


def test_an_auto_class_chooses_by_the_config_and_a_bare_body_gets_no_pooler(encoder_of, auto):
    config = encoder_of("bert").config
    assert {head: type(fresh_model(config, {}, 0, kind=kind)).__name__ for head, kind in auto.items()} == {
        "body": "BertModel",
        "masked": "BertForMaskedLM",
        "classes": "BertForSequenceClassification",
        "words": "BertForTokenClassification",
    }
    assert fresh_model(config, {}, 0, kind=auto["body"]).pooler is None


def test_sizes_of_an_encoder_that_do_not_go_together_and_kinds_that_it_lacks_are_refused(encoder_of, auto, llama):
    config = encoder_of("bert").config
    with pytest.raises(ModelError, match=r"num_attention_heads=4 does not divide hidden_size=30"):
        fresh_model(config, {"hidden_size": 30}, 0, kind=auto["masked"])
    with pytest.raises(ModelError, match=r"^student\.config\.num_key_value_heads: BertConfig has no such size"):
        fresh_model(config, {"num_key_value_heads": 2}, 0, kind=auto["masked"])
    with pytest.raises(ModelError, match=r"^student\.kind=config: LlamaConfig has no AutoModelForMaskedLM, which the"):
        fresh_model(llama.config, {}, 0, kind=auto["masked"])
