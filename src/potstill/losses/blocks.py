"""Rows in chunks whose logits fit a number of bytes, and chunks in tiles that fit the cache.

Refuses to make one block larger than that, unless a single row is.

Suffixes: n rows of one chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from potstill.losses.arithmetic import slices
from potstill.losses.sides import Dense, Opened, Parts, Side, open_logits
from potstill.types import Mixture, States

__all__ = ["blocks", "logit_blocks", "most_rows", "tiles"]

CHUNK_BYTES = {"cpu": 50 << 20, "cuda": 512 << 20}
"""Size of one block of logits. On a CPU small blocks stay near the cores; a GPU wants large products."""

READ_BYTES = {"cpu": 400 << 20, "cuda": 512 << 20}
"""The same where logits are only read: fewer blocks, so that a bfloat16 head is widened less often."""

TILE_ROWS = 4
"""A tile has at least so many rows, where its block has them: a single row would be compiled for once more."""

TILE_BYTES = {"cpu": 3 << 19}
"""Size of the part of a block that the element-wise work takes at once, so that its passes find it in the cache."""


def blocks(first: Dense, *others: Opened) -> Iterator[tuple[slice, Sequence[Parts]]]:
    """(rows, the parts of every side) chunk by chunk; the next chunk overwrites them."""
    sides, chunks = (first, *others), _chunks(_first(first))
    buffers = [side.buffers(most_rows(first)) for side in sides]
    for rows in chunks:
        yield rows, [side.parts(rows, own) for side, own in zip(sides, buffers, strict=True)]


def most_rows(first: Dense) -> int:
    """Rows of the largest chunk."""
    sizes = [int(rows.stop - rows.start) for rows in _chunks(_first(first))]
    return max(sizes)


def tiles(raw_nV: Tensor) -> Iterator[slice]:
    """Slices of a block whose element-wise work stays in the cache; the whole block on a GPU."""
    row_bytes = raw_nV.shape[1] * raw_nV.element_size()
    budget = TILE_BYTES.get(raw_nV.device.type, len(raw_nV) * row_bytes)
    return slices(len(raw_nV), row_bytes, max(budget, TILE_ROWS * row_bytes))


@torch.no_grad()
def logit_blocks(said: States | Mixture) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits [n, V] in float32, or float64 for float64 rows), as many rows at a time as a loss takes.

    Of a mixture, the logarithm of its mean probabilities. The next block may overwrite this one.
    """
    side = cast(Dense, open_logits(said))
    chunks = list(_chunks(_first(side), READ_BYTES))
    buffers = side.buffers(max(int(rows.stop - rows.start) for rows in chunks))
    for rows in chunks:
        yield rows, side.form.logits((side.parts(rows, buffers), side.shared), 1.0)


def _chunks(side: Side, budgets: Mapping[str, int] | None = None) -> Iterator[slice]:
    row_bytes = len(side.weight_VD) * side.arithmetic.wide.itemsize
    budgets = budgets or CHUNK_BYTES
    return slices(len(side.rows_ND), row_bytes, budgets.get(side.rows_ND.device.type, budgets["cpu"]))


def _first(opened: Dense) -> Side:
    """The model whose logits a chunk is measured by; only teachers come with logits that are there already."""
    return cast(Side, opened.sides[0])
