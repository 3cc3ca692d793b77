"""Which layers matter: removing one by one the layer whose removal moves the model least from its teacher.

Refuses to look at anything but the rows it is given; the hallway gives held-out ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from potstill.students.blocks import Given, find_blocks, replaced_blocks

__all__ = ["LayerChoice", "choose_greedily", "even_layers"]


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The layers that stay, ascending, and how the choice went: (layer removed, distance after it) in order.

    The distance is None for layers that went untried because the time was up.
    """

    keep: tuple[int, ...]
    removed: tuple[tuple[int, float | None], ...]


def even_layers(total: int, count: int) -> tuple[int, ...]:
    """`count` of `total` layers evenly spaced, the first and the last among them (for 1, the first)."""
    if count == 1:
        return (0,)
    return tuple(round(i * (total - 1) / (count - 1)) for i in range(count))


@torch.inference_mode()
def choose_greedily(
    model: Any,
    run: Callable[[], Tensor],
    distance: Callable[[Tensor], float],
    count: int,
    *,
    shortlist: int,
    seconds: float,
    progress: Callable[[int, float | None], None] = lambda removed, value: None,
) -> LayerChoice:
    """Remove layers until `count` are left, each time the one whose removal leaves the smallest distance.

    `run()` runs the model's body on the rows of the search and returns its final hidden states; `distance` says how far
    these are from the teacher's. The first round tries every layer, later ones the `shortlist` layers whose removal
    raised the distance least when last tried. Each try starts at the removed layer's own input: what comes before it
    does not change. When `seconds` are over, the rest goes by what is known: the last rise seen, or before the first
    round is through, block influence, 1 - cosine of a block's input and output (Men et al. 2024, arXiv:2403.03853, eq. 1).
    """
    _, blocks = find_blocks(model)
    kept, removed = list(range(len(blocks))), []
    rises: dict[int, float] = {}
    reached, until = 0.0, time.monotonic() + seconds
    while len(kept) > count:
        inputs = _block_inputs(model, blocks, kept, run)
        known = sorted(range(len(kept)), key=lambda i: rises[kept[i]]) if rises else None
        values: dict[int, float] = {}
        for i in known[:shortlist] if known else range(len(kept)):
            if time.monotonic() < until:
                values[i] = distance(_run_without(model, blocks, kept, (i, inputs[i]), run))
        if time.monotonic() < until:
            rises |= {kept[i]: value - reached for i, value in values.items()}
            reached, i = min((value, i) for i, value in values.items())
        else:
            i = known[0] if known else _by_influence(inputs)[0]
        removed.append((kept.pop(i), values.get(i)))
        progress(len(removed), values.get(i))
    return LayerChoice(tuple(kept), tuple(removed))


def _block_inputs(model: Any, blocks: nn.ModuleList, kept: list[int], run: Callable[[], Tensor]) -> list[Tensor]:
    """The input of every kept block, and the last one's output at the end."""
    seen: list[Tensor] = []
    chosen = [blocks[layer] for layer in kept]
    hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for block in chosen]
    hooks.append(chosen[-1].register_forward_hook(lambda _, __, output: seen.append(_first(output))))
    try:
        with replaced_blocks(model, chosen, kept):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _run_without(
    model: Any, blocks: nn.ModuleList, kept: list[int], skipped: tuple[int, Tensor], run: Callable[[], Tensor]
) -> Tensor:
    """Final hidden states without the block at position i of `kept`, starting from what that block was given."""
    i, input_BTD = skipped
    later = [blocks[layer] for layer in kept[i + 1 :]]
    with replaced_blocks(model, [Given(input_BTD, blocks[kept[i]]), *later], kept[i:]):
        return run()


def _by_influence(inputs: list[Tensor]) -> list[int]:
    """Positions of blocks, those first that turn their input least."""
    cosines = [
        nn.functional.cosine_similarity(before.float(), after.float(), dim=-1).mean().item()
        for before, after in zip(inputs, inputs[1:], strict=False)
    ]
    return sorted(range(len(cosines)), key=lambda i: -cosines[i])


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
