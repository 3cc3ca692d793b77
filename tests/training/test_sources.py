"""Every row once an epoch, in an order that only the seed and the epoch decide, continued exactly."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from potstill.errors import DataError, RecipeError
from potstill.training import RowSource, first_rows
from potstill.types import Batch, Wants


class Numbered:
    """Rows that say their own number."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def batch(self, row_numbers):
        ids_BT = torch.tensor([[row] for row in row_numbers])
        return Batch(ids_BT, ids_BT, torch.ones_like(ids_BT))


def source(count=10, **settings):
    return RowSource(Numbered(count), **{"seed": 0, "batch_rows": 4, "rows_at_once": 2} | settings)


def numbers(batches):
    return [int(row) for batch in batches for row in batch.ids_BT[:, 0]]


def drawn(origin, steps):
    return [row for _ in range(steps) for row in numbers(origin.draw())]


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_every_row_comes_once_an_epoch(count, batch_rows, seed):
    rows = drawn(source(count, batch_rows=batch_rows, seed=seed), -(-3 * count // batch_rows))
    for epoch in range(3):
        assert sorted(rows[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(st.integers(1, 30), st.integers(0, 99))
def test_the_order_is_the_same_whatever_a_step_holds(count, seed):
    orders = []
    for batch_rows, rows_at_once in ((1, 1), (3, 2), (2 * count, count)):
        steps = -(-2 * count // batch_rows)
        origin = source(count, seed=seed, batch_rows=batch_rows, rows_at_once=rows_at_once)
        orders.append(drawn(origin, steps)[: 2 * count])
    assert orders[0] == orders[1] == orders[2]


def test_seeds_and_epochs_have_orders_of_their_own():
    first, second = drawn(source(50, batch_rows=50), 2), drawn(source(50, batch_rows=50, seed=1), 2)
    assert first[:50] != first[50:]
    assert first != second
    state = torch.get_rng_state()
    source().draw()
    assert torch.equal(torch.get_rng_state(), state)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 5), st.integers(1, 5))
def test_ranks_share_a_steps_rows_exactly(count, batch_rows, ranks, rows_at_once):
    batch_rows = max(batch_rows, ranks)
    settings = {"batch_rows": batch_rows, "rows_at_once": rows_at_once}
    alone = source(count, **settings)
    together = [source(count, rank=(rank, ranks), **settings) for rank in range(ranks)]
    for _ in range(3):
        whole, shares = numbers(alone.draw()), [numbers(origin.draw()) for origin in together]
        assert sorted(row for share in shares for row in share) == sorted(whole)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert min(map(len, shares)) > 0


def test_micro_batches_hold_rows_at_once():
    assert [len(batch) for batch in source(batch_rows=7, rows_at_once=3).draw()] == [3, 3, 1]


def test_a_step_may_hold_more_rows_than_there_are():
    assert sorted(drawn(source(3, batch_rows=7), 1)[:6]) == [0, 0, 1, 1, 2, 2]


@given(st.integers(0, 9), st.integers(1, 13))
def test_continuing_is_as_if_nothing_had_happened(steps, batch_rows):
    whole = source(batch_rows=batch_rows)
    drawn(whole, steps)
    state, expected = whole.state_dict(), drawn(whole, 5)
    other = source(batch_rows=batch_rows)
    drawn(other, 2)
    other.load_state_dict(state)
    assert drawn(other, 5) == expected


@pytest.mark.parametrize("other", [{"count": 11}, {"seed": 1}])
def test_another_order_or_data_set_is_not_continued(other):
    (name,) = (set(other) - {"count"}) or {"rows"}
    with pytest.raises(DataError, match=rf"^training\.checkpoint: it was saved with {name}="):
        source(**other).load_state_dict(source().state_dict())


def test_a_process_without_a_row_is_refused():
    with pytest.raises(RecipeError, match=r"^training\.batch_rows: 2 rows leave some of 3 processes without"):
        source(batch_rows=2, rank=(0, 3))


def test_lessons_carry_what_the_teacher_says_when_asked_for_them(kit):
    teacher = kit.teacher()
    origin = RowSource(
        kit.rows(), seed=0, batch_rows=4, rows_at_once=2, teacher=teacher, wants=Wants(final=True, layers=(1,))
    )
    batches = origin.draw()
    assert teacher.asked == 0
    lesson = origin.lesson(batches[1])
    assert teacher.asked == 1
    assert lesson.batch is batches[1]
    assert lesson.signal.logits.rows_ND.shape == (int(batches[1].supervised_BT.sum()), 24)
    assert list(lesson.signal.hidden) == [1]


def test_without_a_teacher_signals_are_empty(kit):
    origin = RowSource(kit.rows(), seed=0, batch_rows=2, rows_at_once=2)
    signal = origin.lesson(origin.draw()[0]).signal
    assert (signal.logits, dict(signal.hidden)) == (None, {})


@given(st.integers(1, 30), st.integers(0, 60), st.integers(0, 2**32 - 1), st.integers(1, 7))
def test_the_first_rows_are_those_that_are_drawn_first(count, most, seed, batch_rows):
    found = list(first_rows(count, seed, most))
    steps = -(-most // batch_rows)
    assert found == sorted(set(drawn(source(count, seed=seed, batch_rows=batch_rows), steps)[:most]))


def remember(batch, drawn):
    """Write down how many rows were drawn before; and a part that the rows did not have."""
    return replace(
        batch, targets_BT=batch.ids_BT + 1000 * drawn, taught_BT=batch.ids_BT % 2 == 0, keys=(b"%d" % drawn,)
    )


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 5))
def test_what_is_done_to_a_row_follows_from_its_place_whatever_the_ranks_and_micro_batches(count, rows, ranks, at_once):
    rows = max(rows, ranks)
    alone = source(count, batch_rows=rows, rows_at_once=1)
    together = [
        source(count, batch_rows=rows, rows_at_once=at_once, rank=(rank, ranks), prepare=remember)
        for rank in range(ranks)
    ]
    for step in range(3):
        expected = {step * rows + i: row for i, row in enumerate(numbers(alone.draw()))}
        found = {}
        for origin in together:
            for batch in origin.draw():
                for row, key in zip(batch.targets_BT[:, 0].tolist(), batch.keys, strict=True):
                    found[int(key)] = row - 1000 * int(key)
        assert found == expected


def test_who_prepares_is_asked_once_a_row_and_lessons_keep_what_was_prepared():
    asked = []
    origin = source(prepare=lambda batch, drawn: asked.append((len(batch), drawn)) or remember(batch, drawn))
    batches = origin.draw()
    assert asked == [(1, 0), (1, 1), (1, 2), (1, 3)]
    assert [len(batch) for batch in batches] == [2, 2]
    for batch in batches:
        assert torch.equal(batch.taught_BT, batch.ids_BT % 2 == 0)
        assert origin.lesson(batch).batch is batch


def test_preparing_keeps_every_part_of_a_batch():
    class Full(Numbered):
        def batch(self, row_numbers):
            rows = list(row_numbers)
            ids_BT = torch.tensor(rows)[:, None].expand(len(rows), 3)
            names, keys = tuple((f"{row}", "b") for row in rows), tuple(bytes([row]) for row in rows)
            flags_BT = ids_BT % 2 == 0
            return Batch(ids_BT, ids_BT, torch.ones_like(ids_BT), names, names, flags_BT, ids_BT, ids_BT[:, :2], keys)

    whole, apart = (
        RowSource(Full(9), seed=4, batch_rows=6, rows_at_once=4, prepare=prepare)
        for prepare in (None, lambda batch, _: batch)
    )
    for one, other in zip(whole.draw(), apart.draw(), strict=True):
        for field in fields(Batch):
            left, right = getattr(one, field.name), getattr(other, field.name)
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def test_an_order_of_ones_own_is_asked_once_an_epoch():
    asked = []

    def backwards(epoch):
        asked.append(epoch)
        return torch.arange(9, -1, -1)

    origin = source(10, batch_rows=4, order=backwards)
    assert drawn(origin, 5) == list(range(9, -1, -1)) * 2
    assert asked == [0, 1]
    assert list(first_rows(10, 0, 3, order=backwards)) == [7, 8, 9]
    assert first_rows(10, 0, 10, order=backwards) == range(10)
