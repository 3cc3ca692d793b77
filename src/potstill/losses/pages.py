"""Large blocks of memory that is written at once: on Linux from huge pages, where the system offers them.

A block of logits is 50 MB that the system has to find, clear and map, 4 KB at a time: a sixth of the time of a whole
loss. Refuses to hold memory back for the next call: a block goes when its tensor goes.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["empty"]

LEAST_BYTES = 8 << 20
"""Below, torch's own memory is as fast."""


def empty(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty: a tensor whose contents mean nothing yet."""
    count = math.prod(size) * dtype.itemsize
    if device.type != "cpu" or count < LEAST_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=dtype, device=device)
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(size)
