"""A student's first weights, and the folder that it is handed out in.

Every folder loads with plain `AutoModelForCausalLM.from_pretrained`. Refuses to change the teacher that it cuts from.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM

from potstill.errors import ModelError, RecipeError
from potstill.students.blocks import find_blocks, pick_layers

__all__ = ["check_layers", "cut_layers", "fresh_model", "save_student"]

_DRAWN = (("temperature", 1.0), ("top_p", 1.0), ("min_p", None), ("typical_p", 1.0), ("top_k", 50))
"""What a generation config may say of sampling, with the values that say nothing."""


def check_layers(keep: Sequence[int], depth: int, key: str = "student.keep") -> None:
    """Raises RecipeError naming the first layer that a teacher of `depth` layers does not have."""
    for index, layer in enumerate(keep):
        if not 0 <= layer < depth:
            raise RecipeError(
                f"{key}[{index}]={layer}: the teacher has layers 0..{depth - 1}. Use a layer in that range, or "
                f"`keep: greedy` with `count` to let potstill choose."
            )


def cut_layers(teacher: Any, keep: Sequence[int]) -> Any:
    """A model of the teacher's kind with only the layers `keep` (0-based, ascending), everything else copied.

    Sanh et al. (2019), arXiv:1910.01108, section 3, for any choice of layers. The teacher's dtype is kept. Raises
    RecipeError for a layer that the teacher does not have, ModelError where its layers differ and cannot be moved.
    """
    name, blocks = find_blocks(teacher)
    check_layers(keep, len(blocks))
    config = copy.deepcopy(teacher.config)
    pick_layers(config.get_text_config(), keep)
    new_number = {layer: position for position, layer in enumerate(keep)}
    block_key = re.compile(rf"^{re.escape(name)}\.(\d+)\.")
    state = {}
    for key, value in teacher.state_dict().items():
        match = block_key.match(key)
        if match is None:
            state[key] = value
        elif int(match[1]) in new_number:
            state[f"{name}.{new_number[int(match[1])]}.{key[match.end() :]}"] = value
    student = AutoModelForCausalLM.from_config(config, dtype=teacher.dtype)
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(
            f"student.keep={list(keep)}: the layers of {type(teacher).__name__} are not alike, and its config cannot "
            "say which of them these are. Keep the first ones where they are, or use student.kind=config."
        ) from error
    student.tie_weights()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def fresh_model(teacher_config: Any, sizes: Mapping[str, int | bool], seed: int, device: str = "cpu") -> Any:
    """A model of the teacher's architecture with other sizes and random float32 weights, none on the device "meta".

    Raises ModelError where the architecture has no such size, or the sizes do not go together: that is tried first,
    without weights, so that a model of any size is refused at once.
    """
    config = _resize(teacher_config, sizes)
    try:
        with torch.device("meta"):
            blank = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            _run_blank(blank)
        if device == "meta":
            return blank
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, RuntimeError, StrictDataclassError) as error:
        raise ModelError(
            f"student.config: these sizes do not go together ({' '.join(str(error).split())}). Change one of them."
        ) from error


def _run_blank(model: Any) -> None:
    """Two tokens through a model without weights: some sizes fail only where they meet.

    A mask that is given is not made: making one asks for values, of which there are none.
    """
    mask_B1TT = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    ids_BT, positions_BT = torch.zeros(1, 2, dtype=torch.long), torch.arange(2).unsqueeze(0)
    with torch.no_grad():
        model(input_ids=ids_BT, position_ids=positions_BT, attention_mask=mask_B1TT, use_cache=False)


def _resize(teacher_config: Any, sizes: Mapping[str, int | bool]) -> Any:
    config = copy.deepcopy(teacher_config)
    text = config.get_text_config()
    for size in sizes:
        if not hasattr(text, size):
            raise ModelError(f"student.config.{size}: {type(config).__name__} has no such size. Leave it out.")
    depth = sizes.get("num_hidden_layers", text.num_hidden_layers)
    pick_layers(text, [i % text.num_hidden_layers for i in range(depth)])
    for size, value in sizes.items():
        setattr(text, size, value)
    if "head_dim" not in sizes and ("hidden_size" in sizes or "num_attention_heads" in sizes):
        _fit_heads(text)
    _check_groups(text)
    return config


def save_student(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write weights, config, generation config, tokenizer and chat template; `dtype` rounds the weights on the way."""
    target = model if dtype is None else copy.deepcopy(model).to(dtype)
    sampling = target.generation_config
    if not sampling.do_sample and any(getattr(sampling, name, None) not in (None, default) for name, default in _DRAWN):
        # Some publishers name a temperature and forget do_sample; transformers loads that, and refuses to save it.
        sampling.do_sample = True
    target.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fit_heads(config: Any) -> None:
    """Keep width = heads * head size true, and refuse heads that do not divide the width."""
    if config.hidden_size % config.num_attention_heads:
        raise ModelError(
            f"student.config.num_attention_heads={config.num_attention_heads} does not divide hidden_size="
            f"{config.hidden_size}. Choose a divisor."
        )
    if getattr(config, "head_dim", None):
        config.head_dim = config.hidden_size // config.num_attention_heads


def _check_groups(config: Any) -> None:
    key_value = getattr(config, "num_key_value_heads", None)
    if key_value and config.num_attention_heads % key_value:
        raise ModelError(
            f"student.config.num_key_value_heads={key_value} does not divide num_attention_heads="
            f"{config.num_attention_heads}. Choose a divisor."
        )
