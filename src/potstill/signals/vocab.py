"""Do teacher and student mean the same by a token number? Matched by token identity, never by size alone.

Refuses tokenizers that differ in a single token, and says which.
"""

from __future__ import annotations

from typing import Any

from potstill.errors import VocabularyMismatch

__all__ = ["shared_vocabulary"]


def shared_vocabulary(teacher_tokenizer: Any, student_tokenizer: Any) -> int:
    """One more than the highest token number, when both know the same tokens by the same numbers.

    Heads padded beyond it are cut there; a number that neither uses may lie below it. Raises VocabularyMismatch naming
    the first number whose token differs or is known to one of them only, or when both have chat templates that differ.
    """
    teacher, student = _tokens_by_number(teacher_tokenizer), _tokens_by_number(student_tokenizer)
    size = max((*teacher, *student), default=-1) + 1
    for number in range(size):
        ours, theirs = student.get(number), teacher.get(number)
        if ours != theirs:
            raise VocabularyMismatch(
                f"student.model: its tokenizer has {_name(ours)} as number {number}, the teacher's has {_name(theirs)} "
                f"(sizes {len(student)} and {len(teacher)}). Logits can only be compared over one vocabulary: use a "
                "student of the teacher's family, or student.kind=layers."
            )
    templates = [getattr(tokenizer, "chat_template", None) for tokenizer in (teacher_tokenizer, student_tokenizer)]
    if all(templates) and templates[0] != templates[1]:
        raise VocabularyMismatch(
            "student.model: its chat template differs from the teacher's, so that both would see different texts. Use "
            "a student of the teacher's family, or give it the teacher's chat template."
        )
    return size


def _tokens_by_number(tokenizer: Any) -> dict[int, str]:
    return {number: token for token, number in tokenizer.get_vocab().items()}


def _name(token: str | None) -> str:
    return "no token" if token is None else repr(token)
