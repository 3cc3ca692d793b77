"""What is removed from what a teacher wrote. Refuses to remove anything uncounted."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from potstill.recipes.numbers import Count, Share, Whole
from potstill.recipes.part import Part

__all__ = ["Cleaning", "Decontaminate", "Judge", "Quality", "Semantic"]

WritingSystem = Literal[
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
    "han",
    "hangul",
    "hebrew",
    "japanese",
    "kannada",
    "khmer",
    "korean",
    "lao",
    "latin",
    "malayalam",
    "mongolian",
    "myanmar",
    "oriya",
    "sinhala",
    "tamil",
    "telugu",
    "thai",
    "tibetan",
]


class Decontaminate(Part):
    """Remove prompts and answers that share text with what the student is tested on."""

    against: list[str] = Field([])
    """More sources, besides the run's own held-out prompts: files, hub ids (their test split), `sample:NAME`."""
    columns: list[str] = Field(["question", "prompt", "problem", "text"])
    """Columns of these sources that are compared, those that are there."""
    ngram: Annotated[Whole, Field(ge=4, le=50)] = 13
    """Words in a row that count as shared text (Brown et al., 2020, arXiv:2005.14165, app. C)."""
    similarity: Share = 0.7
    """Or, as wholes, this Jaccard similarity of their sets of word 3-shingles. A test of 8 words or more, but fewer
    than `ngram`, must not stand within a text either."""


class Semantic(Part):
    """Prompts whose static embeddings point the same way mean the same."""

    model: str
    """A model2vec model: a hub id or a folder."""
    cosine: Share = 0.9
    """From which two prompts mean the same."""


class Quality(Part):
    """Remove what is badly written."""

    min_words: Whole = 1
    """Of an answer without its reasoning."""
    max_words: Count | None = None
    """Of an answer with its reasoning."""
    language: WritingSystem | None = None
    """The writing system it should be in (latin, cyrillic, han, ...); with more than a tenth of its letters in others
    an answer is mixed."""
    repetition: Share = 0.3
    """Largest share of 4-grams of words that are repeats, in the answer and in its reasoning."""
    code_in_reasoning: bool = True
    """Whether reasoning may hold code blocks. DeepSeek-R1 (arXiv:2501.12948) removed such chains."""
    max_paragraph_words: Count | None = None
    """Longest paragraph of the reasoning. DeepSeek-R1 removed chains with long ones."""


class Judge(Part):
    """The teacher scores answers against each other; both orders are asked."""

    template: str | None = None
    """What it is asked; null for a question about helpfulness and correctness. {prompt}, {first}, {second}."""
    least: Share = 0.5
    """Least share of comparisons with the prompt's other answers that a kept answer wins."""


class Cleaning(Part):
    """In this order."""

    near_duplicates: Share | None = 0.8
    """Jaccard similarity of word shingles from which two prompts, or two answers to one prompt, are the same; null: 1,
    which only equal ones reach."""
    semantic: Semantic | None = None
    """Remove prompts that mean the same (extra `semantic`); null for no such check."""
    decontaminate: Decontaminate | None = Decontaminate()
    """null to leave tests unprotected."""
    pii: Literal["keep", "mask", "drop"] = "keep"
    """E-mail addresses, telephone and card numbers, IP addresses, keys: left, replaced by a name of their kind, or the
    row is dropped."""
    pii_engine: Literal["patterns", "presidio"] = "patterns"
    """Regular expressions, or presidio (extra `presidio`), which finds names, too."""
    quality: Quality = Quality()
    """What is badly written."""
    judge: Judge | None = None
    """The teacher as a judge; null for none."""
