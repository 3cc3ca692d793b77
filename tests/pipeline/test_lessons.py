"""Held-out lessons come back as they went: every arm's curves are drawn with one ruler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from potstill.pipeline.lessons import open_head, open_lessons, read_lessons, write_head, write_lessons
from potstill.types import IGNORE, Batch, Head, Lesson, Logits, Mixture, Signal, States, Wants

V, D, ROWS = 12, 4, 5
HEADS = {
    "plain": Head(torch.randn(V, D)),
    "bias": Head(torch.randn(V, D), torch.randn(V)),
    "scale": Head(torch.randn(V, D), None, 0.0625),
    "softcap": Head(torch.randn(V, D), torch.randn(V), 2.0, 30.0),
    "half": Head(torch.randn(V, D).bfloat16()),
}


class Rows:
    """As many supervised positions in a row as its number says."""

    def __len__(self) -> int:
        return ROWS

    def batch(self, numbers) -> Batch:
        ids_BT = torch.arange(6).expand(len(numbers), 6).clone()
        targets_BT = torch.where(ids_BT < torch.tensor(list(numbers))[:, None], ids_BT, IGNORE)
        return Batch(ids_BT, targets_BT, torch.ones_like(ids_BT))


class Teacher:
    """Says something else every time."""

    def __init__(self, *heads: Head) -> None:
        self.heads = heads

    def read(self, batch: Batch, wants: Wants) -> Signal:
        assert wants == Wants(final=True)
        count = int(batch.supervised_BT.sum())
        members = tuple(States(torch.randn(count, D).to(head.weight_VD.dtype), head) for head in self.heads)
        return Signal(Mixture(members, torch.rand(count, len(members))) if len(members) > 1 else members[0])


def same(one: Tensor | None, other: Tensor | None) -> None:
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def same_states(one: States, other: States) -> None:
    same(one.rows_ND, other.rows_ND)
    same_heads(one.head, other.head)


def same_heads(one: Head, other: Head) -> None:
    same(one.weight_VD, other.weight_VD)
    same(one.bias_V, other.bias_V)
    assert (one.scale, one.softcap) == (other.scale, other.softcap)


def kept(folder, lessons: list[Lesson], most: int | None, at_once: int) -> list[Lesson]:
    write_lessons(lessons, folder / "lessons")
    return open_lessons(folder / "lessons", Rows(), most, at_once=at_once)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("most", "at_once"), [(3, 3), (4, 3), (99, 2), (None, 99), (1, 1)])
def test_what_a_teacher_said_comes_back_bit_for_bit(tmp_path, head, most, at_once):
    lessons = list(read_lessons(Teacher(HEADS[head]), Rows(), most, at_once=at_once))
    assert sum(len(lesson.batch) for lesson in lessons) == min(ROWS, most or ROWS)
    again = kept(tmp_path, lessons, most, at_once)
    assert len(again) == len(lessons)
    for ours, theirs in zip(again, lessons, strict=True):
        assert ours.batch.key == theirs.batch.key
        same_states(ours.signal.logits, theirs.signal.logits)


def test_several_teachers_come_back_with_their_weights(tmp_path):
    teacher = Teacher(HEADS["bias"], HEADS["half"], HEADS["softcap"])
    lessons = list(read_lessons(teacher, Rows(), 4, at_once=2))
    for ours, theirs in zip(kept(tmp_path, lessons, 4, 2), lessons, strict=True):
        assert isinstance(ours.signal.logits, Mixture)
        same(ours.signal.logits.weights_NM, theirs.signal.logits.weights_NM)
        for one, other in zip(ours.signal.logits.members, theirs.signal.logits.members, strict=True):
            same_states(one, other)


def test_a_head_is_kept_once_and_shared_by_all_lessons(tmp_path):
    lessons = list(read_lessons(Teacher(Head(torch.randn(1000, D))), Rows(), None, at_once=1))
    again = kept(tmp_path, lessons, None, 1)
    assert (tmp_path / "lessons").stat().st_size < 2 * 1000 * D * 4
    assert len({lesson.signal.logits.head.weight_VD.data_ptr() for lesson in again}) == 1


@pytest.mark.parametrize("head", HEADS)
def test_a_head_comes_back_bit_for_bit(tmp_path, head):
    write_head(HEADS[head], tmp_path / "head")
    same_heads(open_head(tmp_path / "head"), HEADS[head])


def test_a_cut_head_is_kept_without_what_was_cut_off(tmp_path):
    write_head(HEADS["bias"].sliced(7), tmp_path / "head")
    same_heads(open_head(tmp_path / "head"), HEADS["bias"].sliced(7))
    assert open_head(tmp_path / "head").vocabulary == 7


@pytest.mark.parametrize("said", [None, Logits(torch.zeros(1, V))])
def test_what_is_no_final_state_is_refused(tmp_path, said):
    with pytest.raises(ValueError, match="gives its final hidden states"):
        write_lessons([Lesson(Rows().batch([1]), Signal(said))], tmp_path / "lessons")
    assert not (tmp_path / "lessons").exists()
