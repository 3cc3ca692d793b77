"""Finding, in what a teacher wrote, the part that is the answer. Refuses to choose between several blocks of code."""

from __future__ import annotations

import re

__all__ = ["final_answer", "last_block"]

_FENCE = re.compile(r"^[ ]{0,3}(`{3,}|~{3,})[ \t]*([\w+-]*)[^\n]*$", re.MULTILINE)
_ANNOUNCED = re.compile(r"answer(?:\s+is\b\s*:?|\s*:)", re.IGNORECASE)
_AROUND = " \t\r\n*_`$\"'"


def last_block(text: str, languages: tuple[str, ...]) -> str:
    """The last fenced block in one of these languages; else the only block, if it names no other; else the whole text.

    A fence is closed by one at least as long, of the same kind, or by the end.
    """
    blocks = _blocks(text)
    named = [body for language, body in blocks if language in languages]
    if named:
        return named[-1]
    return blocks[0][1] if len(blocks) == 1 and not blocks[0][0] else text


def final_answer(text: str) -> str:
    r"""What is in the last \boxed{}; else follows the last "answer is" or "answer:" in its line; else the last line.

    Of the last line, what follows its last ": ". Emphasis, quotes, dollar signs and a full stop around it are removed.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip(_AROUND)
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    found = None
    for match in _ANNOUNCED.finditer(text):
        rest = text[match.end() :].lstrip(_AROUND).split("\n", 1)[0]
        found = rest if rest.strip(_AROUND) else found
    answer = lines[-1].rpartition(": ")[2] if found is None else found
    return answer.strip(_AROUND).removesuffix(".").strip(_AROUND)


def _blocks(text: str) -> list[tuple[str, str]]:
    """(language in lower case, body) of every fenced block."""
    blocks: list[tuple[str, str]] = []
    opened: re.Match[str] | None = None
    for match in _FENCE.finditer(text):
        if opened is None:
            opened = match
        elif match[1].startswith(opened[1]) and not match[2]:
            blocks.append((opened[2].lower(), text[opened.end() + 1 : match.start()]))
            opened = None
    if opened is not None:
        blocks.append((opened[2].lower(), text[opened.end() + 1 :]))
    return blocks


def _last_boxed(text: str) -> str | None:
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    for place in range(start + len(r"\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len(r"\boxed{") : place]
    return None
