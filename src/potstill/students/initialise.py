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
from transformers import AutoModelForCausalLM

from potstill.errors import ModelError, RecipeError
from potstill.students.blocks import find_blocks

__all__ = ["check_layers", "cut_layers", "fresh_model", "save_student"]


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

    Sanh et al. (2019), arXiv:1910.01108, section 3, for any choice of layers. The teacher's dtype is kept.
    """
    name, blocks = find_blocks(teacher)
    check_layers(keep, len(blocks))
    config = copy.deepcopy(teacher.config)
    text = config.get_text_config()
    text.num_hidden_layers = len(keep)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[layer] for layer in keep]
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
    student.load_state_dict(state)
    student.tie_weights()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def fresh_model(teacher_config: Any, sizes: Mapping[str, int | bool], seed: int) -> Any:
    """A model of the teacher's architecture with other sizes and random float32 weights.

    Raises ModelError where the architecture has no such size, or the sizes do not go together.
    """
    config = copy.deepcopy(teacher_config)
    text = config.get_text_config()
    for size, value in sizes.items():
        if not hasattr(text, size):
            raise ModelError(
                f"student.config.{size}: {type(config).__name__} has no such size. Leave it out, or choose another teacher."
            )
        setattr(text, size, value)
    if "hidden_size" in sizes or "num_attention_heads" in sizes:
        _fit_heads(text)
    if "num_hidden_layers" in sizes and getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[i % len(text.layer_types)] for i in range(text.num_hidden_layers)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (ValueError, RuntimeError) as error:
            raise ModelError(
                f"student.config: these sizes do not go together ({error}). Change one of them."
            ) from error


def save_student(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write weights, config, generation config, tokenizer and chat template; `dtype` rounds the weights on the way."""
    target = model if dtype is None else copy.deepcopy(model).to(dtype)
    target.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fit_heads(config: Any) -> None:
    """Keep width = heads * head size true, and refuse heads that do not divide the width."""
    if config.hidden_size % config.num_attention_heads:
        raise ModelError(
            f"student.config.num_attention_heads={config.num_attention_heads} does not divide hidden_size="
            f"{config.hidden_size}. Choose a divisor."
        )
    key_value = getattr(config, "num_key_value_heads", None)
    if key_value and config.num_attention_heads % key_value:
        raise ModelError(
            f"student.config.num_key_value_heads={key_value} does not divide num_attention_heads="
            f"{config.num_attention_heads}. Choose a divisor."
        )
    if getattr(config, "head_dim", None):
        config.head_dim = config.hidden_size // config.num_attention_heads
