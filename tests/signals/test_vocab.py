"""Vocabularies are the same when every number means the same token, and for no other reason."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.errors import ModelError, VocabularyMismatch
from potstill.signals import shared_vocabulary


@dataclass
class FakeTokenizer:
    numbers: dict[str, int]
    chat_template: str | dict[str, str] | None = None

    def get_vocab(self) -> dict[str, int]:
        return dict(self.numbers)


def numbered(*tokens: str) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=3), unique=True, max_size=20), st.randoms())
def test_equal_vocabularies_share_all_their_tokens_in_whatever_order_they_are_listed(tokens, random):
    pairs = list(numbered(*tokens).items())
    shuffled = random.sample(pairs, len(pairs))
    assert shared_vocabulary(FakeTokenizer(dict(pairs)), FakeTokenizer(dict(shuffled))) == len(tokens)


@settings(deadline=None)
@given(st.integers(1, 12), st.data())
def test_the_first_token_that_differs_is_named(size, data):
    teacher = [f"t{number}" for number in range(size)]
    changed = data.draw(st.sets(st.integers(0, size - 1), min_size=1))
    student = [f"other{number}" if number in changed else token for number, token in enumerate(teacher)]
    first = min(changed)
    with pytest.raises(VocabularyMismatch) as caught:
        shared_vocabulary(FakeTokenizer(numbered(*teacher)), FakeTokenizer(numbered(*student)))
    text = str(caught.value)
    assert f"its tokenizer has 'other{first}' as number {first}, the teacher's has 't{first}'" in text
    assert text.startswith("student.model: ")
    assert "\n" not in text


@pytest.mark.parametrize("swapped", [False, True])
def test_sizes_that_differ_are_refused_naming_the_first_token_that_one_lacks(swapped):
    large, small = FakeTokenizer(numbered("a", "b", "c", "d")), FakeTokenizer(numbered("a", "b"))
    teacher, student = (small, large) if swapped else (large, small)
    expected = "has 'c' as number 2, the teacher's has no token" if swapped else "has no token as number 2, the teacher"
    with pytest.raises(VocabularyMismatch, match=expected) as caught:
        shared_vocabulary(teacher, student)
    assert ("sizes 4 and 2" if swapped else "sizes 2 and 4") in str(caught.value)


def test_two_tokens_that_changed_places_are_refused():
    with pytest.raises(VocabularyMismatch, match="has 'b' as number 0, the teacher's has 'a'"):
        shared_vocabulary(FakeTokenizer(numbered("a", "b")), FakeTokenizer(numbered("b", "a")))


def test_a_number_that_neither_uses_is_no_difference_and_counts_towards_the_size():
    holes = {"a": 0, "b": 2, "c": 5}
    assert shared_vocabulary(FakeTokenizer(holes), FakeTokenizer(dict(holes))) == 6


def test_a_number_that_only_one_uses_is_a_difference():
    with pytest.raises(VocabularyMismatch, match="has no token as number 1, the teacher's has 'x'"):
        shared_vocabulary(FakeTokenizer({"a": 0, "x": 1, "b": 2}), FakeTokenizer({"a": 0, "b": 2}))


def test_chat_templates_that_differ_are_refused_with_a_way_out():
    numbers = numbered("a", "b")
    with pytest.raises(
        VocabularyMismatch, match=r"^student\.model: its chat template differs .*teacher's chat template"
    ):
        shared_vocabulary(FakeTokenizer(numbers, "{{ a }}"), FakeTokenizer(numbers, "{{ b }}"))


@pytest.mark.parametrize("templates", [(None, None), ("{{ a }}", None), (None, "{{ a }}"), ("{{ a }}", "{{ a }}")])
def test_a_template_that_one_side_lacks_is_no_difference(templates):
    teacher, student = (FakeTokenizer(numbered("a", "b"), template) for template in templates)
    assert shared_vocabulary(teacher, student) == 2


def test_a_mismatch_is_a_mistake_of_the_user_s_models():
    assert issubclass(VocabularyMismatch, ModelError)


def test_a_real_tokenizer_agrees_with_its_copy_and_not_with_one_that_learned_a_token(tiny_tokenizer):
    other = copy.deepcopy(tiny_tokenizer)
    assert shared_vocabulary(tiny_tokenizer, other) == len(tiny_tokenizer)
    other.add_tokens(["<tool>"])
    with pytest.raises(VocabularyMismatch, match=f"has '<tool>' as number {len(tiny_tokenizer)}, .* no token"):
        shared_vocabulary(tiny_tokenizer, other)
