"""Whether an answer is well written, by rules that can be counted; and which of two is better, by a judge's word.

Refuses to judge what an answer says: whether it is right is asked elsewhere, and a refusal is an answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Literal

import numpy as np

from potstill.data.similar import hash_grams, hash_words
from potstill.errors import DataError

__all__ = [
    "JUDGE_TEMPLATE",
    "WRITING_SYSTEMS",
    "Flaw",
    "Preference",
    "Rules",
    "judge_text",
    "order_swapped",
    "read_preference",
    "repetition_of",
    "win_share",
    "writing_systems",
]

Preference = Literal["first", "second"]

_GRAM = 4
_LINES_IN_A_LOOP = 10
_LARGEST_MIXTURE = 0.1
# A rule of dashes or a long number is shorter.
_LETTER_LOOP = re.compile(r"(\S)\1{99}")
_CODE_BLOCK = re.compile(r"^[ \t]{0,3}(?:```|~~~)", re.M)
_PARAGRAPH_END = re.compile(r"\n[^\S\n]*+\n")
# A Greek letter that stands alone is a quantity in any language.
_QUANTITY = re.compile(r"(?<!\w)[\u0370-\u03ff](?!\w)")

_SYSTEM_OF_NAME = {"cjk": "han", "ideographic": "han"}
_MADE_OF = {"japanese": {"han", "hiragana", "katakana"}, "korean": {"hangul"}}
WRITING_SYSTEMS = (
    *(
        "arabic",
        "armenian",
        "bengali",
        "cyrillic",
        "devanagari",
        "ethiopic",
        "georgian",
        "greek",
        "gujarati",
        "gurmukhi",
    ),
    *("han", "hangul", "hebrew", "japanese", "kannada", "khmer", "korean", "lao", "latin", "malayalam", "mongolian"),
    *("myanmar", "oriya", "sinhala", "tamil", "telugu", "thai", "tibetan"),
)
"""Names for `Rules.language`. Japanese is han, hiragana and katakana together; korean is hangul."""

JUDGE_TEMPLATE = """Two answers were given to the same request. Which of them is more helpful and more correct?

[Request]
{prompt}

[First answer]
{first}

[Second answer]
{second}

Judge what they say, neither their order nor their length. Reply with one word: FIRST, SECOND, or TIE."""


class Flaw(StrEnum):
    """Why an answer was dropped."""

    EMPTY = "the answer is empty"
    SHORT = "the answer has too few words"
    LONG = "the answer has too many words"
    LANGUAGE = "more than a tenth of the letters are of another writing system"
    LOOP = "one line or one character is written over and over"
    REPETITION = "the answer repeats itself"
    CODE = "the reasoning holds a code block"
    PARAGRAPH = "a paragraph of the reasoning is too long"


@dataclass(frozen=True, slots=True)
class Rules:
    """What a well-written answer is. In scripts without spaces a letter counts as a word.

    min_words            of the answer without its reasoning
    max_words            of both together; None for any number
    language             one of WRITING_SYSTEMS that nine tenths of the letters must be of; None for any
    repetition           largest share of 4-grams of words that stood there before, in the answer and in the reasoning
    code_in_reasoning    whether the reasoning may hold code blocks
    max_paragraph_words  of the reasoning; None for any number
    """

    min_words: int = 1
    max_words: int | None = None
    language: str | None = None
    repetition: float = 0.3
    code_in_reasoning: bool = True
    max_paragraph_words: int | None = None

    def __post_init__(self) -> None:
        """Raises DataError for a writing system that nobody knows."""
        if self.language is not None and self.language not in WRITING_SYSTEMS:
            raise DataError(
                f"generate.cleaning.quality.language={self.language} is no writing system. Use one of "
                f"{', '.join(WRITING_SYSTEMS)}; or null for any."
            )


def judge_text(content: str, reasoning: str, rules: Rules) -> Flaw | None:
    """The first rule that an answer, or the reasoning before it, breaks; None for a good one."""
    if not content.strip():
        return Flaw.EMPTY
    return next((flaw for flaw, broken in _findings(content, reasoning, rules) if broken), None)


def _findings(content: str, reasoning: str, rules: Rules) -> Iterator[tuple[Flaw, bool]]:
    """Each rule and whether it is broken, one after the other: the first that is ends the work."""
    words, thoughts = len(hash_words(content)), len(hash_words(reasoning))
    yield Flaw.SHORT, words < rules.min_words
    yield Flaw.LONG, rules.max_words is not None and words + thoughts > rules.max_words
    yield Flaw.LANGUAGE, rules.language is not None and _is_mixed(f"{reasoning}\n{content}", rules.language)
    yield Flaw.LOOP, _is_loop(content) or _is_loop(reasoning)
    yield Flaw.REPETITION, max(repetition_of(content), repetition_of(reasoning)) > rules.repetition
    yield Flaw.CODE, not rules.code_in_reasoning and bool(_CODE_BLOCK.search(reasoning))
    longest = rules.max_paragraph_words
    yield Flaw.PARAGRAPH, longest is not None and _longest_paragraph(reasoning) > longest


def repetition_of(text: str) -> float:
    """Share of the 4-grams of words that stood in the text before: 1 - distinct / all, in [0, 1); 0 without any.

    As rep-n of Welleck et al. (2019), arXiv:1908.04319, section 6.
    """
    grams = hash_grams(hash_words(text, signs=True), _GRAM)
    return 1.0 - len(np.unique(grams)) / len(grams) if len(grams) else 0.0


def writing_systems(text: str) -> Counter[str]:
    """How many letters of `text` are of which writing system, by its name in Unicode in lower case; han for CJK.

    Greek letters that stand alone are not counted: they name quantities in any language.
    """
    found: Counter[str] = Counter()
    for letter, count in Counter(_QUANTITY.sub("", text)).items():
        if letter.isalpha():
            found[_system_of(letter)] += count
    return found


@lru_cache(maxsize=1 << 14)
def _system_of(letter: str) -> str:
    plain = unicodedata.normalize("NFKC", letter)[0]
    name = re.split(r"[ -]", unicodedata.name(plain, "unknown"))[0].lower()
    return _SYSTEM_OF_NAME.get(name, name)


def _is_mixed(text: str, language: str) -> bool:
    found = writing_systems(text)
    own = sum(found[system] for system in _MADE_OF.get(language, {language}))
    return found.total() - own > _LARGEST_MIXTURE * found.total()


def _is_loop(text: str) -> bool:
    """Whether ten lines in a row are one, or a hundred characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    in_a_row = 1
    for line, before in zip(lines[1:], lines, strict=False):
        in_a_row = in_a_row + 1 if line == before else 1
        if in_a_row == _LINES_IN_A_LOOP:
            return True
    return bool(_LETTER_LOOP.search(text))


def _longest_paragraph(text: str) -> int:
    """Words of the longest part between blank lines."""
    return max(len(hash_words(part)) for part in _PARAGRAPH_END.split(text))


def order_swapped(prompt: str, first: str, second: str, template: str = JUDGE_TEMPLATE) -> tuple[str, str]:
    """What a judge is asked about two answers to a prompt: once in this order, once in the other.

    Judges prefer the place of an answer, too: Zheng et al. (2023), arXiv:2306.05685, section 3.4.

    Raises:
        DataError: the template lacks one of {prompt}, {first}, {second}.
    """
    absent = [name for name in ("prompt", "first", "second") if f"{{{name}}}" not in template]
    if absent:
        raise DataError(
            f"generate.cleaning.judge.template lacks {', '.join(f'{{{name}}}' for name in absent)}. "
            "Write it where it belongs."
        )
    once = {"prompt": prompt, "first": first, "second": second}
    return _fill(template, once), _fill(template, {**once, "first": second, "second": first})


def _fill(template: str, parts: Mapping[str, str]) -> str:
    """In one pass, so that braces in what is filled in stay as they are."""
    return re.sub(r"\{(prompt|first|second)\}", lambda name: parts[name[1]], template)


def read_preference(answer: str) -> Preference | None:
    """Which answer a judge prefers; None for a tie, and for a verdict that is not clear.

    The verdict stands in the last line that says anything: it ends in FIRST or SECOND (maybe with "answer" after it),
    and neither names the other nor denies; or it is one of A, B, 1, 2, maybe after a word such as "Verdict:". Letters
    may be of either case.
    """
    lines = [line for line in answer.splitlines() if re.search(r"[^\W_]", line)]
    words = re.findall(r"[^\W_]+", lines[-1].lower()) if lines else []
    while len(words) > 1 and words[-1] in {"answer", "one"}:
        words.pop()
    sides = _SIDES if len(words) == 1 or (len(words) == 2 and words[0] not in _SIDES) else _NAMES
    named = {sides[word] for word in words if word in sides}
    if not words or words[-1] not in sides or len(named) > 1 or _DENIALS & set(words):
        return None
    return sides[words[-1]]


_NAMES: dict[str, Preference] = {"first": "first", "second": "second"}
_SIDES: dict[str, Preference] = {**_NAMES, "1": "first", "2": "second", "a": "first", "b": "second"}
_DENIALS = {"not", "neither", "nor", "never", "worse", "than", "t"}


def win_share(comparisons: Sequence[tuple[Preference | None, Preference | None]]) -> float:
    """Share of comparisons that an answer wins, in [0, 1]: it stood first in the first order, second in the other.

    A comparison counts as won or lost only if both orders agree, else as half: Zheng et al. (2023), arXiv:2306.05685,
    section 3.4. Raises ValueError without any: an answer that was compared with none has no share.
    """
    if not comparisons:
        raise ValueError("win_share got no comparisons: needs at least one. Keep an answer that has no rivals.")
    worth = [1.0 if pair == _WON else 0.0 if pair == _LOST else 0.5 for pair in comparisons]
    return sum(worth) / len(worth)


_WON, _LOST = ("first", "second"), ("second", "first")
