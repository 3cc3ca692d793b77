"""Slips of the pen: copies of a text with words lost or swapped and letters lost, doubled or swapped.

Refuses to make a text empty, and to know of labels that belong to single words: their places would move.
"""

from __future__ import annotations

from random import Random

__all__ = ["add_slips"]

_SLIPS = ("leave out", "swap words", "lose a letter", "double a letter", "swap letters")


def add_slips(text: str, *, share: float, random: Random) -> str:
    """The text, its words one space apart, with a slip at each word with probability `share`, at one word at least.

    Each kind of slip is as likely as the others: the word is left out, or swapped with the next; one of its letters is
    lost, doubled, or swapped with the next. What a slip cannot do without leaving nothing, such as losing the only
    letter, it leaves undone. A text of white space is given back as it is.
    """
    words = text.split()
    if not words:
        return text
    befallen = [place for place in range(len(words)) if random.random() < share] or [random.randrange(len(words))]
    # From the end, so that a word that is left out moves none of those still to come.
    for place in reversed(befallen):
        slip = random.choice(_SLIPS)
        if slip == "leave out":
            words[place : place + 1] = [] if len(words) > 1 else words
        elif slip == "swap words":
            words[place : place + 2] = reversed(words[place : place + 2])
        else:
            words[place] = _misspell(words[place], slip, random)
    return " ".join(words)


def _misspell(word: str, slip: str, random: Random) -> str:
    place = random.randrange(len(word))
    before, letter, after = word[:place], word[place], word[place + 1 :]
    if slip == "double a letter":
        return before + letter + letter + after
    if slip == "lose a letter":
        return before + after or word
    return before + after[:1] + letter + after[1:]
