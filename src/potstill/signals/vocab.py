"""Do two models mean the same by a token number? Matched by token identity, never by size alone.

Refuses tokenizers that differ in a single token, and says which.
"""

from __future__ import annotations

from typing import Any

from potstill.errors import VocabularyMismatch

__all__ = ["shared_vocabulary"]

STUDENT = "student.model"


def shared_vocabulary(teacher_tokenizer: Any, other_tokenizer: Any, key: str = STUDENT) -> int:
    """One more than the highest token number, when both know the same tokens by the same numbers.

    `key` is the recipe's key of the other one: the student, or a teacher that is averaged with the first. Heads padded
    beyond the result are cut there; a number that neither uses may lie below it. Raises VocabularyMismatch naming the
    first number whose token differs or is known to one of them only, or when both have chat templates that differ.
    """
    whose = "the teacher's" if key == STUDENT else "the first teacher's"
    advice = "a student of the teacher's family, or student.kind=layers" if key == STUDENT else "teachers of one family"
    teacher, other = _tokens_by_number(teacher_tokenizer), _tokens_by_number(other_tokenizer)
    size = max((*teacher, *other), default=-1) + 1
    for number in range(size):
        ours, theirs = other.get(number), teacher.get(number)
        if ours != theirs:
            raise VocabularyMismatch(
                f"{key}: its tokenizer has {_name(ours)} as number {number}, {whose} has {_name(theirs)} "
                f"(sizes {len(other)} and {len(teacher)}). Logits can only be compared over one vocabulary: use "
                f"{advice}."
            )
    templates = [getattr(tokenizer, "chat_template", None) for tokenizer in (teacher_tokenizer, other_tokenizer)]
    if all(templates) and templates[0] != templates[1]:
        raise VocabularyMismatch(
            f"{key}: its chat template differs from {whose}, so that both would see different texts. Use "
            f"{advice.partition(',')[0]}, or give it {whose} chat template."
        )
    return size


def _tokens_by_number(tokenizer: Any) -> dict[int, str]:
    return {number: token for token, number in tokenizer.get_vocab().items()}


def _name(token: str | None) -> str:
    return "no token" if token is None else repr(token)
