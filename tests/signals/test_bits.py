"""What is written in few bits is read back, in a number of bytes that depends on nothing but sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from potstill.errors import StoreError
from potstill.signals.bits import EliasFano, Estimate, Listing, pack_bits, pack_codes, unpack_bits, unpack_codes


@st.composite
def id_rows(draw):
    """(vocabulary, ids): some rows of distinct ascending ids, the extremes among them."""
    vocabulary = draw(st.one_of(st.integers(1, 40), st.integers(41, 1 << 24)))
    count = draw(st.integers(1, min(vocabulary, 70)))
    number = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = [np.arange(count), np.arange(vocabulary - count, vocabulary)]
    rows += [np.sort(number.choice(vocabulary, count, replace=False)) for _ in range(draw(st.integers(0, 3)))]
    return vocabulary, np.stack(rows)


@settings(deadline=None)
@given(id_rows())
def test_elias_fano_gives_any_ascending_ids_back_in_its_stride(case):
    vocabulary, ids = case
    form = EliasFano(vocabulary, ids.shape[1])
    packed = form.pack(ids)
    assert packed.shape == (len(ids), form.stride)
    assert np.array_equal(form.unpack(packed), ids)
    assert form.unpack(packed[:0]).shape == (0, ids.shape[1])
    least = (math.lgamma(vocabulary + 1) - math.lgamma(ids.shape[1] + 1)) / math.log(2)
    least -= math.lgamma(vocabulary - ids.shape[1] + 1) / math.log(2)
    assert 8 * form.stride <= least + 2 * ids.shape[1] + 16


def test_sizes_at_the_vocabulary_of_small_models():
    assert [EliasFano(49_152, k).stride for k in (16, 64)] == [27, 92]
    assert [Estimate(49_152, k).stride for k in (16, 64)] == [37, 120]
    assert [Listing(49_152, k, tails=1).stride for k in (16, 64)] == [41, 142]


@settings(deadline=None)
@given(id_rows(), st.data())
def test_bytes_with_another_number_of_ids_are_refused(case, data):
    vocabulary, ids = case
    form = EliasFano(vocabulary, ids.shape[1])
    packed = form.pack(ids)
    row, bit = data.draw(st.integers(0, len(ids) - 1)), data.draw(st.integers(0, form.unary_bits - 1))
    packed[row, form.low_bytes + bit // 8] ^= 1 << bit % 8
    with pytest.raises(StoreError, match=f"does not hold {ids.shape[1]} token numbers"):
        form.unpack(packed)


def test_an_id_too_many_in_one_row_does_not_make_up_for_one_too_few_in_another():
    form = EliasFano(64, 2)
    packed = form.pack(np.array([[0, 1], [2, 3]]))
    packed[0, form.low_bytes], packed[1, form.low_bytes] = 0b1, 0b111
    with pytest.raises(StoreError, match="does not hold 2"):
        form.unpack(packed)


@settings(deadline=None)
@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20)))
def test_flags_are_read_back(flags):
    assert np.array_equal(unpack_bits(pack_bits(flags), flags.shape[1]), flags)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 24), st.integers(0, 9)), min_size=1, max_size=8), st.integers(0, 2**32))
def test_codes_whose_width_differs_by_row_are_read_back(rows, seed):
    widths, counts = map(np.array, zip(*rows, strict=True))
    number = np.random.default_rng(seed)
    codes = number.integers(0, (1 << widths)[:, None], (len(rows), 9))
    bits = int((widths * counts).max()) + 3
    packed = pack_codes(codes, widths, bits)
    assert packed.shape == (len(rows), -(-bits // 8))
    for row, (width, count) in enumerate(rows):
        starts = row * packed.shape[1] * 8 + np.arange(count) * width
        assert np.array_equal(unpack_codes(packed, starts, np.full(count, width)), codes[row, :count])


def test_bytes_of_a_larger_array_are_read_as_well_as_their_own():
    whole = np.random.default_rng(0).integers(0, 256, (5, 9), dtype=np.uint8)
    whole.flags.writeable = False
    part = whole[:, 3:7]
    starts = np.arange(5)[:, None] * 32 + np.arange(4) * 8
    assert np.array_equal(unpack_codes(part, starts, np.array(8)), part)


@pytest.mark.parametrize("k", [2, 3, 16, 64, 256, 257, 1000])
def test_mass_is_one_and_the_largest_head_positive_with_as_many_heads_as_can_be(k):
    """All heads equal: the narrowest codes, and the least for the largest head to hide rounding in."""
    heads = np.full((200, k), 1 / k)
    heads[:, 0] = 0.0  # one is drawn
    uniforms = np.random.default_rng(k).random((200, 2))
    form = Estimate(2 * k, k)
    packed = form.pack([np.tile(np.arange(k), (200, 1)), heads, np.full(200, 1 / k), uniforms])
    p = form.probabilities(packed)
    assert np.abs(p.sum(-1) - 1).max() < 1e-12
    assert (p >= 0).all()
    assert (p.max(-1) > 0.5 / k).all()
    assert abs(p.mean(0) - 1 / k).max() < 0.2 / k
