"""Which layers matter: removing one by one the layer whose removal moves the model least from its teacher.

Refuses to look at anything but the rows it is given; the hallway gives held-out ones.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
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
    """`count` of `total` layers evenly spaced, ascending, the first and the last among them (for 1, the first).

    With more than `total` some come more than once, as a map of a deep model on a shallow one needs it.
    """
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
    progress: Callable[[int, float | None], None] = lambda _removed, _value: None,
) -> LayerChoice:
    """Remove layers until `count` are left, each time the one whose removal leaves the smallest distance.

    `run()` runs the model's body on the rows of the search and returns its final hidden states; `distance` says how far
    these are from the teacher's. The first round tries every layer, later ones the `shortlist` layers whose removal
    raised the distance least when last tried. Each try starts at the removed layer's own input: what comes before it
    does not change. When `seconds` are over, the rest goes by what is known: the last rise seen, or before the first
    round is through, block influence, 1 - cosine of a block's input and output (Men et al. 2024, arXiv:2403.03853,
    eq. 1). `progress` hears of every removal: how many so far, and the distance or None.
    """
    _, blocks = find_blocks(model)
    kept = list(range(len(blocks)))
    removed: list[tuple[int, float | None]] = []
    rises: dict[int, float] = {}
    reached, until = 0.0, time.monotonic() + seconds
    while len(kept) > count and time.monotonic() < until:
        inputs, beside = _block_inputs(model, blocks, kept, run)
        candidates = sorted(kept, key=rises.__getitem__)[:shortlist] if rises else kept
        values: dict[int, float] = {}
        for layer in candidates:
            if time.monotonic() < until:
                i = kept.index(layer)
                later = [Given(inputs[i], blocks[layer], beside=beside), *(blocks[other] for other in kept[i + 1 :])]
                values[layer] = _comparable(distance(_run_with(model, later, kept[i:], run)))
        if len(values) < len(candidates):
            break  # judging half a round would favour the layers that were tried first
        rises |= {layer: value - reached for layer, value in values.items()}
        reached, worst = min((value, layer) for layer, value in values.items())
        kept.remove(worst)
        removed.append((worst, reached))
        progress(len(removed), reached)
    if len(kept) > count and not rises:
        rises = _influences(_block_inputs(model, blocks, kept, run)[0])
    for layer in sorted(kept, key=rises.__getitem__)[: max(0, len(kept) - count)] if rises else ():
        kept.remove(layer)
        removed.append((layer, None))
        progress(len(removed), None)
    return LayerChoice(tuple(kept), tuple(removed))


def _block_inputs(
    model: Any, blocks: nn.ModuleList, kept: list[int], run: Callable[[], Tensor]
) -> tuple[list[Tensor], int | None]:
    """The input of every kept block, and the last one's output at the end; how many things that gave beside it."""
    seen: list[Tensor] = []
    last: list[Any] = []
    chosen = [blocks[layer] for layer in kept]
    hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for block in chosen]
    hooks.append(chosen[-1].register_forward_hook(lambda _, __, output: last.append(output)))
    try:
        with replaced_blocks(model, chosen, kept):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    (output,) = last
    if isinstance(output, tuple):
        return [*seen, output[0]], len(output) - 1
    return [*seen, output], None


def _run_with(model: Any, blocks: Sequence[nn.Module], kinds: Sequence[int], run: Callable[[], Tensor]) -> Tensor:
    with replaced_blocks(model, blocks, kinds):
        return run()


def _influences(inputs: list[Tensor]) -> dict[int, float]:
    """1 - cosine of what goes into each block and what comes out, averaged over positions."""
    return {
        layer: 1.0 - nn.functional.cosine_similarity(before.float(), after.float(), dim=-1).mean().item()
        for layer, (before, after) in enumerate(itertools.pairwise(inputs))
    }


def _comparable(distance: float) -> float:
    """NaN is neither more nor less than another number, but a model that gives it is the worst."""
    return math.inf if math.isnan(distance) else distance
