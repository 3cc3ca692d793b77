from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from potstill.data import MaskRule, mask_tokens
from potstill.types import IGNORE, Batch

CLS, SEP, PAD, MASK, UNKNOWN = range(5)
VOCABULARY = 50
RULE = MaskRule(0.15, 0.8, 0.1, MASK, VOCABULARY, (CLS, SEP, PAD, MASK, UNKNOWN))


def framed(rows, length, seed=0):
    """Rows of [CLS] tokens [SEP], then padding; some tokens are unknown."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(UNKNOWN, VOCABULARY, (rows, length), generator=generator)
    ids[:, 0], ids[:, -3], ids[:, -2:] = CLS, SEP, PAD
    targets = ids.clone()
    targets[:, 0] = targets[:, -3:] = IGNORE
    segments = torch.ones_like(ids)
    segments[:, -2:] = 0
    return Batch(ids, targets, segments)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_15_percent_are_chosen_of_which_80_are_masked_10_random_and_10_kept():
    batch = framed(400, 500)
    masked = mask_tokens(batch, RULE, seeded(1))
    maskable = batch.supervised_BT & (batch.ids_BT != UNKNOWN)
    chosen = masked.supervised_BT
    assert chosen.sum() / maskable.sum() == pytest.approx(0.15, abs=0.004)
    ids, before = masked.ids_BT[chosen], batch.ids_BT[chosen]
    assert (ids == MASK).float().mean() == pytest.approx(0.8, abs=0.01)
    assert ((ids != MASK) & (ids != before)).float().mean() == pytest.approx(0.1 * 44 / 45, abs=0.008)
    drawn = ids[(ids != MASK) & (ids != before)]
    assert set(drawn.tolist()) == set(range(UNKNOWN + 1, VOCABULARY))


@given(st.integers(1, 4), st.integers(4, 30), st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1))
def test_only_maskable_tokens_change_and_targets_are_what_stood_there(rows, length, seed, share, by_mask):
    batch = framed(rows, length, seed)
    masked = mask_tokens(batch, replace(RULE, masked=share, by_mask=by_mask, by_random=1 - by_mask), seeded(seed))
    maskable = batch.supervised_BT & (batch.ids_BT != UNKNOWN)
    assert not (masked.supervised_BT & ~maskable).any()
    assert torch.equal(masked.ids_BT[~masked.supervised_BT], batch.ids_BT[~masked.supervised_BT])
    assert torch.equal(masked.targets_N, batch.ids_BT[masked.supervised_BT])
    assert bool(masked.supervised_BT.any()) == bool(maskable.any())
    assert torch.equal(masked.taught_BT, batch.segments_BT > 0)


def test_padding_changes_nothing():
    batch = framed(3, 20)
    wide = Batch(
        *(
            torch.nn.functional.pad(part, (0, 7), value=value)
            for part, value in ((batch.ids_BT, PAD), (batch.targets_BT, IGNORE), (batch.segments_BT, 0))
        )
    )
    narrow, padded = mask_tokens(batch, RULE, seeded(5)), mask_tokens(wide, RULE, seeded(5))
    assert torch.equal(padded.ids_BT[:, :20], narrow.ids_BT)
    assert torch.equal(padded.targets_BT[:, :20], narrow.targets_BT)


def test_masks_follow_from_the_generator_and_are_drawn_anew():
    batch, generator = framed(4, 40), seeded(2)
    first, second = mask_tokens(batch, RULE, generator), mask_tokens(batch, RULE, generator)
    assert torch.equal(first.ids_BT, mask_tokens(batch, RULE, seeded(2)).ids_BT)
    assert not torch.equal(first.targets_BT, second.targets_BT)


def test_a_batch_has_a_target_even_where_chance_chose_none():
    masked = mask_tokens(framed(2, 12), replace(RULE, masked=0.0), seeded(0))
    assert masked.supervised_BT.sum() == 1
    empty = framed(1, 4)
    empty.targets_BT[:] = IGNORE
    assert not mask_tokens(empty, RULE, seeded(0)).supervised_BT.any()


def test_the_batch_itself_is_left_alone():
    batch = framed(2, 12)
    before = batch.ids_BT.clone(), batch.targets_BT.clone()
    mask_tokens(batch, replace(RULE, masked=1.0), seeded(0))
    assert torch.equal(batch.ids_BT, before[0])
    assert torch.equal(batch.targets_BT, before[1])


@given(st.sets(st.integers(0, 60), max_size=30), st.integers(0, 99))
def test_random_tokens_are_any_but_special_ones_and_of_the_vocabulary(special, seed):
    batch = framed(2, 200)
    ordinary = [token for token in range(40) if token not in special]
    rule = MaskRule(1.0, 0.0, 1.0, MASK, 40, tuple(special))
    masked = mask_tokens(batch, rule, seeded(seed))
    found = masked.ids_BT[masked.supervised_BT]
    # The n-th ordinary token for the n-th number drawn: a list of all of them says the same.
    count = len(found)
    generator = seeded(seed)
    torch.rand(count, generator=generator), torch.rand(count, generator=generator)
    assert (
        found.tolist() == torch.tensor(ordinary)[torch.randint(len(ordinary), (count,), generator=generator)].tolist()
    )


def test_a_draw_costs_nothing_a_token_of_the_vocabulary():
    batch = framed(2, 12)
    with torch.profiler.profile(profile_memory=True) as profile:
        mask_tokens(batch, replace(RULE, vocabulary=10**6), seeded(0))
    assert max(event.cpu_memory_usage for event in profile.key_averages()) < 10**5
