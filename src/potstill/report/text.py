"""Words that strangers wrote (documents, completions, paths), made safe to show as HTML, Markdown or YAML.

Refuses: dropping anything. A character that cannot be shown is replaced by one that says so.
"""

from __future__ import annotations

import html
import json
import re

__all__ = ["cell", "fenced", "plotly_label", "scalar", "visible"]

_UNSEEN = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    # Bidirectional overrides would reorder what stands beside the text.
    **dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),
    **dict.fromkeys(range(0xD800, 0xE000), 0xFFFD),
}
# An underscore within a word and a bracket without an address mean nothing to Markdown, and read better bare.
_MARKS = re.compile(r"([\\`*<>|#~&]|(?<!\w)_|_(?!\w)|\](?=[(\[:]))")


def visible(text: str) -> str:
    """The text with control characters as their pictures and with lone surrogates and bidi overrides as U+FFFD."""
    return text.replace("\r\n", "\n").translate(_UNSEEN)


def cell(text: str) -> str:
    """The text on one line, with every mark of Markdown and HTML escaped: it can stand in a table."""
    return _MARKS.sub(r"\\\1", " ".join(visible(text).split()))


def fenced(text: str, language: str = "text") -> str:
    """The text as a Markdown code block, behind a fence longer than any in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{visible(text)}\n{fence}"


def plotly_label(text: str) -> str:
    """The text as a label that plotly, which reads a little HTML and %{...}, shows as it is."""
    return html.escape(visible(text)).replace("%{", "%\u200b{")


def scalar(text: str) -> str:
    """The text as a YAML scalar in double quotes, ASCII only."""
    return json.dumps(visible(text))
