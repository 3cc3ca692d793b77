"""Low-rank adapters: small matrices learn beside weights that stay, until both become one.

Refuses to adapt the output layer or embeddings: losses read the head's own weight, and a tied one would change twice.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from potstill.errors import MissingExtra, RecipeError

__all__ = ["add_adapters", "find_targets", "has_adapters", "merge_adapters"]


def find_targets(model: Any, targets: str | Sequence[str], key: str = "training.lora") -> list[str]:
    """Names of the layers that get an adapter: all linear ones of the model's body, or those that `targets` names.

    `targets` is all-linear, or a list of the ends of names, such as q_proj. Models without weights will do. Raises
    RecipeError where a name fits no linear layer of the body, or there is none; MissingExtra where peft is absent.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingExtra(f"{key}: peft is not installed. Run `pip install 'potstill[lora]'`, or remove `lora`.")
    body = set(model.base_model.modules()) - {model.get_output_embeddings()}
    linear = [
        name for name, part in model.named_modules() if part in body and isinstance(part, nn.Linear | Conv1D) and name
    ]
    if not linear:
        raise RecipeError(f"{key}: {type(model).__name__} has no linear layers to adapt. Remove `lora`.")
    if isinstance(targets, str):
        return linear
    for index, target in enumerate(targets):
        if not any(_ends(name, target) for name in linear):
            raise RecipeError(_unknown(f"{key}.targets[{index}]={target}", model, target, linear=linear))
    return [name for name in linear if any(_ends(name, target) for target in targets)]


def add_adapters(
    model: Any,
    *,
    rank: int,
    alpha: int,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    key: str = "training.lora",
) -> Any:
    """The same model, changed: y = W x + (alpha / rank) B A x in the layers of `find_targets`; only A and B learn.

    Hu et al. (2021), arXiv:2106.09685, eq. 3. A is drawn from torch's random numbers, B is zero, so that the model
    answers as before. `dropout` befalls x on its way into A. Raises as `find_targets`.
    """
    names = find_targets(model, targets, key)
    from peft import LoraConfig, inject_adapter_in_model

    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in names)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, fan_in_fan_out=transposed
    )  # fmt: skip
    model.requires_grad_(False)
    return inject_adapter_in_model(config, model)


def has_adapters(model: nn.Module) -> bool:
    """Whether any layer of the model carries an adapter."""
    return any(hasattr(part, "base_layer") for part in model.modules())


def merge_adapters(model: Any) -> Any:
    """A copy of the model with its adapters in its weights, W + (alpha / rank) B A, and none left beside them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = copy.deepcopy(model)
    for name, part in list(merged.named_modules()):
        if isinstance(part, BaseTunerLayer):
            part.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(merged.get_submodule(parent), child, part.get_base_layer())
    vars(merged).pop("peft_config", None)
    return merged


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _unknown(got: str, model: Any, target: str, *, linear: Sequence[str]) -> str:
    """What is wrong with a target that fits no linear layer of the body."""
    known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    kept = [model.get_output_embeddings(), model.get_input_embeddings()]
    if any(part in kept and _ends(name, target) for name, part in model.named_modules() if part is not None):
        return f"{got}: the output layer and the embeddings stay as they are. Name some of: {known}."
    return f"{got}: {type(model).__name__} has no linear layer of this name. Name some of: {known}."
