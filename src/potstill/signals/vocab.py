"""Do teacher and student mean the same by a token number? Matched by token identity, never by size alone.

Refuses tokenizers that differ in a single token, and says which.
"""

from __future__ import annotations

from typing import Any

from potstill.errors import VocabularyMismatch

__all__ = ["shared_vocabulary"]


def shared_vocabulary(teacher_tokenizer: Any, student_tokenizer: Any) -> int:
    """The number of tokens that both know by the same numbers; heads padded beyond it are cut there.

    Raises VocabularyMismatch naming the first token number that differs, or the first that only one of them has.
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
            "student.model: its chat template differs from the teacher's, so that both would see different texts. Use a "
            "student of the teacher's family, or give it the teacher's chat template."
        )
    return size


def _tokens_by_number(tokenizer: Any) -> dict[int, str]:
    return {number: token for token, number in tokenizer.get_vocab().items()}


def _name(token: str | None) -> str:
    return "no token" if token is None else repr(token)
