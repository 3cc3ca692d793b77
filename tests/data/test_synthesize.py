"""Laws of prompts that a teacher writes: as many as wanted, or a reason; and the same again after a crash."""

from __future__ import annotations

import hashlib
from random import Random

import pytest

from potstill.data.prompts import Prompt
from potstill.data.synthesize import IDLE_ROUNDS, evolve, self_instruct
from potstill.errors import DataError
from potstill.types import Completion, Request

SEEDS = [Prompt(str(number), f"Name the bird number {number}.", group=str(number)) for number in range(12)]


class Crash(Exception):
    pass


class Teacher:
    """Answers by what is asked, keeps what it was asked, and crashes once so much was asked."""

    def __init__(self, answer, crash_after: int | None = None) -> None:
        self.answer, self.crash_after, self.asked, self.ledger = answer, crash_after, [], {}

    def __call__(self, requests):
        answers = []
        for request in requests:
            key = (request.messages[0]["content"], request.sample)
            if key not in self.ledger:
                if self.crash_after is not None and len(self.asked) >= self.crash_after:
                    raise Crash
                self.asked.append(key)
                self.ledger[key] = self.answer(request)
            answers.append(self.ledger[key])
        return answers


def digest(request: Request) -> str:
    return hashlib.blake2b(f"{request.messages} {request.sample}".encode(), digest_size=6).hexdigest()


def lists(request: Request) -> Completion:
    """Four tasks, of which one comes in every answer."""
    tasks = [f"Explain the word {digest(request)}{letter}." for letter in "abc"] + ["Name the bird number 3."]
    return Completion("\n".join(f"{number}. {task}" for number, task in enumerate(tasks, 1)), model="m-1")


def once():
    seen = set()

    def is_new(name: str, text: str) -> bool:
        new = text not in seen
        seen.add(text)
        return new

    return is_new


def grow(ask, **changes):
    keys = {"count": 50, "shown": 8, "written": 4, "is_new": once(), "random": Random(1), "max_tokens": 256} | changes
    return self_instruct(SEEDS, ask, **keys)


def test_as_many_prompts_come_as_were_wanted_none_twice_and_no_seed():
    grown = grow(Teacher(lists))
    texts = [one.text for one in grown.prompts]
    assert len(texts) == len(set(texts)) == 50
    assert not set(texts) & {seed.text for seed in SEEDS}
    assert grown.note == ""
    assert grown.refused["too like another"] > 0
    one = grown.prompts[0]
    assert (one.origin, one.group, one.row, dict(one.provenance)) == (
        "self_instruct", one.id, {"prompt": one.text}, {"written_by": "m-1"})  # fmt: skip


def test_a_request_shows_as_many_as_said_a_quarter_of_them_the_teachers_own():
    teacher = Teacher(lists)
    grow(teacher)
    first, last = teacher.asked[0][0], teacher.asked[-1][0]
    assert "These are 8 tasks" in first
    assert "Explain the word" not in first
    assert "These are 8 tasks" in last
    assert last.count("Explain the word") == 2


@pytest.mark.parametrize("crash_after", [0, 1, 7, 13, 16])
def test_a_run_that_crashed_is_replayed_from_what_was_answered(crash_after):
    whole = Teacher(lists)
    expected = grow(whole)
    teacher = Teacher(lists, crash_after)
    with pytest.raises(Crash):
        grow(teacher)
    teacher.crash_after = None
    assert grow(teacher) == expected
    assert teacher.asked == whole.asked


def refuse(request: Request) -> Completion:
    return Completion("I am sorry, but I cannot write tasks.")


def repeat(request: Request) -> Completion:
    return Completion("1. Name the bird number 3.\n2. Sing.")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(lambda request: None, "no answer"), (refuse, "no list in the answer"), (repeat, "too like another")],
)
def test_a_teacher_that_brings_nothing_new_is_given_up_with_the_reason(answer, reason):
    grown = grow(Teacher(answer))
    assert grown.prompts == ()
    assert grown.requests == IDLE_ROUNDS * 13
    assert grown.note.startswith("0 of 50 prompts were written; not taken: ")
    assert f"{reason}: {grown.requests}" in grown.note


def test_what_was_cut_off_and_what_is_too_much_is_left_out():
    def cut(request: Request) -> Completion:
        return Completion(f"1. Explain {digest(request)}.\n2. Explain the w", finish="length")

    assert all(one.text.endswith(".") for one in grow(Teacher(cut)).prompts)
    grown = grow(Teacher(lists), written=2)
    assert grown.refused["more than was asked for"] > 0


def test_seeds_are_needed_and_must_be_texts():
    keys = {"count": 1, "shown": 1, "written": 1, "is_new": once(), "random": Random(0), "max_tokens": 9}
    talk = Prompt("t", messages=({"role": "user", "content": "Hi."},))
    with pytest.raises(DataError, match="needs rows to begin with"):
        self_instruct([], Teacher(lists), **keys)
    with pytest.raises(DataError, match="row t is a conversation"):
        self_instruct([talk], Teacher(lists), **keys)
    with pytest.raises(DataError, match="row t is a conversation"):
        evolve([talk], Teacher(lists), rounds=1, random=Random(0), max_tokens=9)


def harder(request: Request) -> Completion:
    return Completion(f"<task>Explain the word {digest(request)}.</task>", model="m-2")


def test_every_version_goes_back_to_its_seed_and_the_next_comes_from_the_last():
    teacher = Teacher(harder)
    grown = evolve(SEEDS, teacher, rounds=3, random=Random(2), max_tokens=99)
    assert grown.prompts[: len(SEEDS)] == tuple(SEEDS)
    assert len(grown.prompts) == 4 * len(SEEDS)
    assert len({one.id for one in grown.prompts}) == len(grown.prompts)
    versions = [one for one in grown.prompts if one.group == "5"]
    assert [one.id for one in versions] == ["5", "5~1", "5~2", "5~3"]
    assert [one.provenance["from"] for one in versions[1:]] == ["5", "5~1", "5~2"]
    assert any(versions[1].text in asked for asked, sample in teacher.asked if sample == 1)
    assert {one.provenance["written_by"] for one in versions[1:]} == {"m-2"}
    assert grown.note == ""


def test_a_version_has_no_columns_of_its_seeds_row():
    seed = Prompt("a", "What is 2 + 2?", row={"prompt": "What is 2 + 2?", "answer": "4"}, group="a")
    grown = evolve([seed], Teacher(harder), rounds=1, random=Random(0), max_tokens=99)
    assert set(grown.prompts[1].row) == {"prompt"}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda request: None, "no answer"),
        (refuse, "the teacher refuses"),
        (lambda request: Completion(request.messages[0]["content"] + "<task>"), "it equals the original"),
        (lambda request: Completion("Write another task in its place."), "it holds the words of the request"),
        (lambda request: Completion("Explain", finish="length"), "cut off"),
        (lambda request: Completion(""), "nothing was written"),
    ],
)
def test_a_version_that_is_no_use_is_counted_and_its_original_stays(answer, reason):
    grown = evolve(SEEDS, Teacher(answer), rounds=2, random=Random(0), max_tokens=99)
    assert grown.prompts == tuple(SEEDS)
    assert grown.refused == {reason: 24}
    assert grown.note == f"0 of 24 prompts were written; not taken: {reason}: 24"


def test_versions_that_are_alike_are_kept_once():
    grown = evolve(
        SEEDS, Teacher(lambda request: Completion("Sing a song.")), rounds=1, random=Random(0), max_tokens=99
    )
    assert [one.text for one in grown.prompts[len(SEEDS) :]] == ["Sing a song."]
    assert grown.refused == {"it equals another": 11}


@pytest.mark.parametrize("crash_after", [0, 5, 12, 30])
def test_an_evolution_that_crashed_is_replayed_from_what_was_answered(crash_after):
    whole, teacher = Teacher(harder), Teacher(harder, crash_after)
    expected = evolve(SEEDS, whole, rounds=3, random=Random(2), max_tokens=99)
    with pytest.raises(Crash):
        evolve(SEEDS, teacher, rounds=3, random=Random(2), max_tokens=99)
    teacher.crash_after = None
    assert evolve(SEEDS, teacher, rounds=3, random=Random(2), max_tokens=99) == expected
    assert teacher.asked == whole.asked
