"""Blocks are found, replaced for a while, and put back whatever happens."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from potstill.errors import ModelError
from potstill.students.blocks import Given, find_blocks, pick_layers, replaced_blocks


def test_blocks_are_the_decoders_stack(teacher):
    name, blocks = find_blocks(teacher)
    assert name.rpartition(".")[2] in ("layers", "h")
    assert len(blocks) == 6
    assert teacher.get_submodule(name) is blocks


def test_a_model_without_one_stack_is_refused(llama):
    llama.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match=r"^student\.kind=layers: LlamaForCausalLM has no single list of 7 blocks"):
        find_blocks(llama)


def shape_of(model):
    return list(model.state_dict()), copy.deepcopy(model.config.to_dict())


def test_everything_is_put_back(teacher, ids_BT):
    shape, (_, blocks) = shape_of(teacher), find_blocks(teacher)
    with torch.no_grad():
        before = teacher(ids_BT).logits
        with replaced_blocks(teacher, [blocks[4], blocks[1]], [4, 1]):
            inside = teacher(ids_BT, use_cache=False).logits
        assert_close(teacher(ids_BT).logits, before, rtol=0, atol=0)
    assert not torch.allclose(inside, before)
    assert shape_of(teacher) == shape
    assert find_blocks(teacher)[1] is blocks


def test_everything_is_put_back_after_an_exception(teacher):
    shape, (_, blocks) = shape_of(teacher), find_blocks(teacher)
    with pytest.raises(ZeroDivisionError), replaced_blocks(teacher, blocks[:2], [0, 1]):
        raise ZeroDivisionError
    assert shape_of(teacher) == shape
    assert find_blocks(teacher)[1] is blocks


@pytest.mark.parametrize("teacher", ["qwen3", "smollm3"], indirect=True)
def test_everything_is_put_back_when_a_kind_is_not_there(teacher):
    shape, (_, blocks) = shape_of(teacher), find_blocks(teacher)
    with pytest.raises(IndexError), replaced_blocks(teacher, blocks[:2], [0, 99]):
        pytest.fail("there is no layer 99")
    assert shape_of(teacher) == shape
    assert find_blocks(teacher)[1] is blocks


def test_lists_by_layer_are_cut_alike(qwen3):
    kinds = list(qwen3.config.layer_types)
    with replaced_blocks(qwen3, find_blocks(qwen3)[1][3:5], [3, 4]):
        assert qwen3.config.num_hidden_layers == 2
        assert qwen3.config.layer_types == [kinds[3], kinds[4]]
    assert qwen3.config.layer_types == kinds


def test_picking_layers_leaves_other_lists_alone(qwen3):
    qwen3.config.eos_token_id = [1, 2, 3, 4, 5, 6]
    pick_layers(qwen3.config, [5, 0])
    assert qwen3.config.eos_token_id == [1, 2, 3, 4, 5, 6]


def test_a_given_block_says_what_it_was_given_and_looks_like_the_block_it_stands_for(teacher):
    block, hidden_BTD = find_blocks(teacher)[1][2], torch.randn(1, 2, 32)
    block.remark = "seen"
    given = Given(hidden_BTD, block)
    assert given(torch.zeros(1), attention_mask=None) is hidden_BTD
    assert given.remark == "seen"
    assert list(given.parameters()) == []
    with pytest.raises(AttributeError):
        _ = given.never_there


def test_a_given_block_takes_the_place_of_all_before_it(teacher, ids_BT):
    _, blocks = find_blocks(teacher)
    seen: list[torch.Tensor] = []
    hook = blocks[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        whole = teacher(ids_BT, use_cache=False).logits
        hook.remove()
        later = [Given(seen[0], blocks[1]), *blocks[2:]]
        with replaced_blocks(teacher, later, range(1, 6)):
            assert_close(teacher(ids_BT, use_cache=False).logits, whole, rtol=0, atol=0)
    assert isinstance(blocks, nn.ModuleList)


def test_blocks_of_encoders_are_found_under_a_head_and_bare(encoder_of):
    places = {
        "bert": ("bert.encoder.layer", "encoder.layer"),
        "distilbert": ("distilbert.transformer.layer", "transformer.layer"),
        "roberta": ("roberta.encoder.layer", "encoder.layer"),
        "electra": ("electra.encoder.layer", "encoder.layer"),
        "modernbert": ("model.layers", "layers"),
    }
    for family, expected in places.items():
        models = [encoder_of(family, head) for head in ("masked", "body")]
        assert tuple(find_blocks(model)[0] for model in models) == expected
        assert all(len(find_blocks(model)[1]) == 6 for model in models)


def test_a_given_block_of_an_encoder_takes_the_place_of_all_before_it(encoder, ids_BT):
    _, blocks = find_blocks(encoder)
    seen: list[torch.Tensor] = []
    forms: list[object] = []
    hooks = [
        blocks[2].register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        blocks[1].register_forward_hook(lambda _, __, output: forms.append(output)),
    ]
    with torch.no_grad():
        whole = encoder(ids_BT)[0]
        for hook in hooks:
            hook.remove()
        beside = len(forms[0]) - 1 if isinstance(forms[0], tuple) else None
        with replaced_blocks(encoder, [Given(seen[0], blocks[1], beside=beside), *blocks[2:]], range(1, 6)):
            assert_close(encoder(ids_BT)[0], whole, rtol=0, atol=0)
