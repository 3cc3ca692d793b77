"""What these tests share: an eye on every tensor that torch makes, and the global settings that must not move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Counts the operations that run inside it, and remembers the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        self.operations[func.overloadpacket.__name__] += 1
        return made


@pytest.fixture
def watch() -> Watch:
    return Watch()


def read_settings() -> tuple[Any, ...]:
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.fp32_precision,
        torch.backends.mkldnn.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
    )


@pytest.fixture
def precision_settings() -> Iterator[Callable[[], tuple[Any, ...]]]:
    """Reads torch's global settings of precision; whatever the test does to them is undone."""
    matmul = torch.backends.mkldnn.matmul
    before = (torch.get_float32_matmul_precision(), torch.backends.fp32_precision, matmul.fp32_precision)
    cuda = torch.backends.cuda.matmul.fp32_precision
    yield read_settings
    torch.set_float32_matmul_precision(before[0])
    torch.backends.fp32_precision, matmul.fp32_precision = before[1:]
    torch.backends.cuda.matmul.fp32_precision = cuda
