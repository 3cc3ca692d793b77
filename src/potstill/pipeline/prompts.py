"""The held-out beginnings that every arm continues, side by side. Refuses prompts that the student could have seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.types import Example

__all__ = ["HELD_OUT_CHARACTERS", "Prompt", "dump_examples", "make_prompts", "render_prompt"]

HELD_OUT_CHARACTERS = 20_000
"""A longer document is cut: only its beginning is ever shown."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A beginning, and how it really went on."""

    prompt: str
    reference: str


def dump_examples(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Documents as JSON, for `make_prompts` in a later stage."""
    return [
        {"messages": [dict(message) for message in example.messages]}
        if example.messages is not None
        else {"text": (example.text or "")[:HELD_OUT_CHARACTERS]}
        for example in examples
    ]


def make_prompts(
    documents: Sequence[Mapping[str, Any]], tokenizer: Any, *, count: int, tokens: int, longest: int
) -> list[Prompt]:
    """At most `count` prompts: of a text its first `tokens` tokens, of a chat all before the last answer.

    Texts that have as much again to compare with come first; of shorter ones the first half is the prompt. Chats of
    more than `longest` tokens are passed over.
    """
    whole: list[Prompt] = []
    short: list[Prompt] = []
    for document in documents:
        if "messages" in document:
            whole += _chat_prompt(document["messages"], tokenizer, longest)
        else:
            ids = tokenizer(document["text"], verbose=False)["input_ids"]
            (whole if len(ids) >= 2 * tokens else short).extend(_text_prompt(ids, tokenizer, tokens))
    return [*whole, *short][:count]


def render_prompt(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> str:
    """A conversation up to where the assistant answers, as the chat template writes it."""
    text = str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    begin = tokenizer.bos_token_id
    if begin is not None and tokenizer(text, verbose=False)["input_ids"][:2] == [begin, begin]:
        text = text.removeprefix(tokenizer.bos_token)  # the template writes it, and the tokenizer would once more
    return text


def _text_prompt(ids: list[int], tokenizer: Any, tokens: int) -> list[Prompt]:
    cut = min(tokens, len(ids) // 2)
    prompt, reference = (
        str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[:cut], ids[cut : cut + tokens])
    )
    return [Prompt(prompt=prompt, reference=reference)] if prompt.strip() else []


def _chat_prompt(messages: Sequence[Mapping[str, Any]], tokenizer: Any, longest: int) -> list[Prompt]:
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    if last == 0:
        return []  # it answers nothing
    text = render_prompt(messages[:last], tokenizer)
    ids = tokenizer(text, verbose=False)["input_ids"]
    return [Prompt(prompt=text, reference=str(messages[last]["content"]))] if len(ids) <= longest else []
