"""A tokenizer's chat template: how it writes a conversation, where it shows reasoning, what it ends a turn with.

Refuses to go by a template's name: what it does is tried on one small conversation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from potstill.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CLOSED",
    "OPENED",
    "QUOTED",
    "REASONING_FIELDS",
    "UNFIT",
    "ChatTemplate",
    "Messages",
    "Span",
    "any_of",
    "fold",
    "open_template",
    "render",
]

QUOTED = "\ufdd0"
"""Put before a control token that a message merely quotes. A Unicode noncharacter, which text must not hold."""

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Under which an assistant's message may hold what it thought; the first is the one that most templates read."""

OPENED, CLOSED = "<think>\n", "\n</think>\n\n"
"""Around reasoning that a template does not know how to write."""

UNFIT = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError)
"""What a template raises for a conversation that it cannot write."""

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_QUESTION, _THOUGHT, _ANSWER = "Qfoxq", "Tharet", "Aowla"

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template with the patterns of the tokens that it writes with.

    special      special tokens: what a message must not be able to write; `special_ids` are their numbers
    added        all added tokens but white space, where no message quotes them: what may end a turn
    marked       whether it marks what the assistant says
    reasoning    where it shows what an assistant thought: in its `field`, if that is folded into the `content`, or
                 `nowhere`, since it cuts thinking out of every turn
    tail         what it writes after an answer that ends the conversation; None where that is not known
    """

    tokenizer: PreTrainedTokenizerBase
    source: str
    special: re.Pattern[str]
    special_ids: frozenset[int]
    added: re.Pattern[str]
    marked: bool
    reasoning: Literal["field", "content", "nowhere"] = "field"
    tail: str | None = None

    @property
    def closes(self) -> bool:
        """Whether it ends a turn with a token, which a model can be asked to write; taken to be so where not known."""
        return self.tail is None or self.added.search(self.tail) is not None


def open_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The tokenizer's chat template, and what it does with reasoning and ends of turns.

    Raises:
        DataError: there is no chat template, or the tokenizer gives no character offsets.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.chat_template:
        raise DataError(
            f"data.messages: there are messages, but the tokenizer {name} has no chat template. "
            "Use a chat model, or give the conversations as plain text (data.text)."
        )
    if not tokenizer.is_fast:
        raise DataError(
            f"data.messages: the tokenizer {name} gives no character offsets, which the learn mask needs. "
            "Use a model that ships tokenizer.json."
        )
    added = [token for token in tokenizer.added_tokens_decoder.values() if not token.content.isspace()]
    special = {*(token.content for token in added if token.special), *tokenizer.all_special_tokens}
    source = tokenizer.get_chat_template()
    untried = ChatTemplate(
        tokenizer,
        source,
        special=re.compile(any_of(special)),
        special_ids=frozenset(tokenizer.convert_tokens_to_ids(sorted(special))),
        added=re.compile(f"(?<!{QUOTED})(?:{any_of({*special, *(token.content for token in added)})})"),
        marked=bool(_GENERATION_TAG.search(source)),
    )
    return _tried(untried)


def any_of(words: Iterable[str]) -> str:
    """A pattern for any of the words, the longest first; without words it matches nothing."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)"


def render(
    messages: Messages, template: ChatTemplate, *, prompt: bool = False, marks: bool = False
) -> tuple[str, list[Span]]:
    """The conversation as the template writes it, and the spans of its `{% generation %}` blocks if `marks`.

    With `prompt`, the beginning of the assistant's next turn is added. Raises one of `UNFIT` where it cannot be
    written.
    """
    rendered, spans = render_jinja_template(
        conversations=[list(messages)],
        chat_template=template.source,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=marks,
        **template.tokenizer.special_tokens_map,
    )
    return rendered[0], spans[0] if marks else []


def fold(thought: str, content: str) -> str:
    """Reasoning and answer as one content: "<think>", the reasoning, "</think>", an empty line, the answer.

    New lines at the ends of both are left out.
    """
    return OPENED + thought.strip("\n") + CLOSED + content.strip("\n")


def _tried(template: ChatTemplate) -> ChatTemplate:
    """The same, with what a small conversation tells of it; one that it cannot write tells nothing."""
    plain = _written({"content": _ANSWER}, template)[0]
    in_field = _written(dict.fromkeys(REASONING_FIELDS, _THOUGHT) | {"content": _ANSWER}, template)[1]
    in_content = _written({"content": fold(_THOUGHT, _ANSWER)}, template)[1]
    shown = [_THOUGHT in said and _ANSWER in said.partition(_THOUGHT)[2] for said in (in_field, in_content)]
    reasoning: Literal["field", "content", "nowhere"] = "field" if shown[0] else "content" if shown[1] else "nowhere"
    return replace(template, reasoning=reasoning, tail=plain.rpartition(_ANSWER)[2] if _ANSWER in plain else None)


def _written(message: Mapping[str, Any], template: ChatTemplate) -> tuple[str, str]:
    """A question and this answer to it as the template writes them; of that, what the assistant is to say."""
    asked = [{"role": "user", "content": _QUESTION}]
    try:
        text, spans = render([*asked, {"role": "assistant", **message}], template, marks=template.marked)
        if template.marked:
            return text, "".join(text[start:stop] for start, stop in spans)
        prompt, _ = render(asked, template, prompt=True)
    except UNFIT:
        return "", ""
    return text, text[len(prompt) :] if text.startswith(prompt) else ""
