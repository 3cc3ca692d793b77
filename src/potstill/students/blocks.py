"""A transformer's stack of blocks: find it, and run the model with other blocks in its place for a while.

Refuses models whose stack is not one list of `num_hidden_layers` modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from potstill.errors import ModelError

__all__ = ["Given", "find_blocks", "pick_layers", "replaced_blocks"]


def find_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """The name (from the model's root) and the list of its transformer blocks. Raises ModelError without one."""
    depth = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise ModelError(
        f"student.kind=layers: {type(model).__name__} has no single list of {depth} blocks to cut from. "
        "Use student.kind=model or student.kind=config."
    )


class Given(nn.Module):
    """A block that says what was computed before, whatever it is asked; else it looks like the block it stands for."""

    def __init__(self, hidden_BTD: Tensor, like: nn.Module, *, beside: int | None = None) -> None:
        """`beside`: how many things come after the hidden states in a block's tuple; None where it gives no tuple."""
        super().__init__()
        self.hidden_BTD, self.beside = hidden_BTD, beside
        object.__setattr__(self, "_like", like)

    def __getattr__(self, name: str) -> Any:
        """Attributes that models read from their blocks, such as `attention_type`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_like"), name)

    def forward(self, *_: Any, **__: Any) -> Tensor | tuple[Tensor | None, ...]:
        """The given hidden states, in the form in which the block itself gives them."""
        return self.hidden_BTD if self.beside is None else (self.hidden_BTD, *[None] * self.beside)


@contextmanager
def replaced_blocks(model: Any, blocks: Sequence[nn.Module], kinds: Sequence[int]) -> Iterator[None]:
    """Run `model` with these blocks instead of its own. `kinds[i]` is the original layer whose type block i has.

    Whatever the config lists layer by layer is cut alike, since models read it by position. All is put back at the end.
    """
    name, original = find_blocks(model)
    parent = model.get_submodule(name.rpartition(".")[0])
    attribute = name.rpartition(".")[2]
    config = model.config.get_text_config()
    names = ("num_hidden_layers", *_lists_by_layer(config))
    before = {key: getattr(config, key) for key in names}
    setattr(parent, attribute, nn.ModuleList(blocks))
    try:
        pick_layers(config, kinds)
        yield
    finally:
        setattr(parent, attribute, original)
        for key, value in before.items():
            setattr(config, key, value)


def pick_layers(config: Any, kinds: Sequence[int]) -> None:
    """Give a text config `len(kinds)` layers, layer i with all that it listed for layer `kinds[i]`.

    Such lists say which layers slide (`layer_types`), have no rotary positions (`no_rope_layers`), and so on.
    """
    for key in _lists_by_layer(config):
        values = getattr(config, key)
        setattr(config, key, [values[kind] for kind in kinds])
    config.num_hidden_layers = len(kinds)


def _lists_by_layer(config: Any) -> list[str]:
    """Names of the config's lists that have one entry for each layer."""
    return [
        key
        for key, value in vars(config).items()
        if "layer" in key and isinstance(value, list) and len(value) == config.num_hidden_layers
    ]
