"""A student's first weights, and the folder that it is handed out in.

Every folder loads with plain transformers, through the auto class of its kind. Refuses to change the teacher that it
cuts from.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM

from potstill.errors import ModelError, RecipeError
from potstill.students.blocks import find_blocks, pick_layers
from potstill.students.lora import has_adapters, merge_adapters

__all__ = ["check_layers", "cut_layers", "fresh_model", "save_student"]

_DRAWN = (("temperature", 1.0), ("top_p", 1.0), ("min_p", None), ("typical_p", 1.0), ("top_k", 50))
"""What a generation config may say of sampling, with the values that say nothing."""


def check_layers(keep: Sequence[int], depth: int, key: str = "student.keep", whose: str = "the teacher") -> None:
    """Raises RecipeError naming the first layer that `whose` model, which has `depth` of them, does not have."""
    for index, layer in enumerate(keep):
        if not 0 <= layer < depth:
            raise RecipeError(
                f"{key}[{index}]={layer}: {whose} has layers 0..{depth - 1}. Use a layer in that range, or "
                f"`keep: greedy` with `count` to let potstill choose."
            )


def cut_layers(teacher: Any, keep: Sequence[int]) -> Any:
    """A model of the teacher's class with only the layers `keep` (0-based, ascending), everything else copied.

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
    without = {"add_pooling_layer": False} if getattr(teacher, "pooler", teacher) is None else {}
    student = type(teacher)._from_config(config, dtype=teacher.dtype, **without)
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(
            f"student.keep={list(keep)}: the layers of {type(teacher).__name__} are not alike, and its config cannot "
            "say which of them these are. Keep the first ones where they are, or use student.kind=config."
        ) from error
    student.tie_weights()
    if hasattr(teacher, "generation_config"):  # encoders have none
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def fresh_model(
    teacher_config: Any,
    sizes: Mapping[str, int | bool],
    seed: int,
    device: str = "cpu",
    *,
    kind: Any = AutoModelForCausalLM,
) -> Any:
    """A model of the teacher's architecture with other sizes and random float32 weights, none on the device "meta".

    `kind` is one of transformers' auto classes, or the class of a model; a bare body (AutoModel) gets no pooler. Raises
    ModelError where the architecture has no such kind or size, or the sizes do not go together: that is tried first,
    without weights, so that a model of any size is refused at once.
    """
    config = _resize(teacher_config, sizes)
    made = _class_of(kind, config)
    try:
        with torch.device("meta"):
            blank = _make(made, config)
            _run_blank(blank)
        if device == "meta":
            return blank
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _make(made, config)
    except (ValueError, RuntimeError, StrictDataclassError) as error:
        raise ModelError(
            f"student.config: these sizes do not go together ({' '.join(str(error).split())}). Change one of them."
        ) from error


def _class_of(kind: Any, config: Any) -> Any:
    """The class of a model, where `kind` is an auto class the one that it has for the config."""
    mapping = getattr(kind, "_model_mapping", None)
    if mapping is None:
        return kind
    if type(config) not in mapping:
        raise ModelError(
            f"student.kind=config: {type(config).__name__} has no {kind.__name__}, which the task needs. Use "
            "student.kind=model, or a teacher of another architecture."
        )
    return mapping[type(config)]


def _make(made: Any, config: Any) -> Any:
    bare = "add_pooling_layer" in inspect.signature(made).parameters
    return made._from_config(config, dtype=torch.float32, **({"add_pooling_layer": False} if bare else {}))


def _run_blank(model: Any) -> None:
    """Two tokens through a model without weights: some sizes fail only where they meet.

    A mask that is given is not made: making one asks for values, of which there are none. Every architecture takes one
    row of keys for all queries.
    """
    mask_B11T = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    given = {"position_ids": torch.arange(2).unsqueeze(0), "attention_mask": mask_B11T, "use_cache": False}
    taken = inspect.signature(model.forward).parameters
    with torch.no_grad():
        model(
            input_ids=torch.zeros(1, 2, dtype=torch.long),
            **{name: value for name, value in given.items() if name in taken},
        )


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
    """Write weights, config, generation config, tokenizer and chat template; `dtype` rounds the weights on the way.

    Adapters are merged first, so that the folder needs none. An encoder has no generation config; the tokenizer of one
    without token types, as of a DistilBERT that was a BERT, gives none. Neither `model` nor `tokenizer` is changed.
    """
    whole = merge_adapters(model) if has_adapters(model) else model
    target = whole if dtype is None else copy.deepcopy(whole).to(dtype)
    sampling = getattr(target, "generation_config", None)
    drawn = [name for name, default in _DRAWN if getattr(sampling, name, None) not in (None, default)]
    if sampling and drawn and not sampling.do_sample:
        # Some publishers name a temperature and forget do_sample; transformers loads that, and refuses to save it.
        sampling.do_sample = True
    target.save_pretrained(folder)
    _fitted(tokenizer, model).save_pretrained(folder)


def _fitted(tokenizer: Any, model: Any) -> Any:
    """The tokenizer, without the token types that an encoder does not take, and older transformers refuse."""
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    if model.can_generate() or "token_type_ids" in inspect.signature(model.forward).parameters:
        return tokenizer
    fitted = copy.deepcopy(tokenizer)
    fitted.model_input_names = fitted.init_kwargs["model_input_names"] = names
    return fitted


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
