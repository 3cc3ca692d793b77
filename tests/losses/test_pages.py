"""Memory from huge pages is memory like any other."""

from __future__ import annotations

import gc
import mmap

import pytest
import torch

from potstill.losses.pages import empty

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(0, 7), (1, 1), (33, 129), (3000, 1500)])
def test_a_block_has_the_size_and_type_that_were_asked_for_and_keeps_what_is_written(size, dtype):
    block = empty(size, dtype, CPU)
    assert (tuple(block.shape), block.dtype, block.is_contiguous()) == (size, dtype, True)
    block.fill_(3)
    gc.collect()
    assert bool((block == 3).all())


def test_two_blocks_share_nothing_and_a_slice_outlives_its_block():
    first, second = (empty((3000, 1500), torch.float32, CPU) for _ in range(2))
    first.fill_(1)
    second.fill_(2)
    part = first[10:12]
    del first, second
    gc.collect()
    assert bool((part == 1).all())


def test_where_there_are_no_huge_pages_a_block_is_a_block(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert empty((3000, 1500), torch.float32, CPU).fill_(2).sum() == 9e6


def test_a_kernel_that_refuses_them_gives_small_ones(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1, raising=False)
    assert empty((3000, 1500), torch.float32, CPU).fill_(2).sum() == 9e6
