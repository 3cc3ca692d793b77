"""From examples to token ids with a learn mask: plain text whole, conversations only where the assistant speaks.

Refuses to guess a mask: a chat template whose own generation prompt does not begin the assistant's turn is an error,
and one that rewrites earlier turns (strips their thinking) yields one encoding per turn, as it stood when it was said.
Refuses to teach an answer without its end: a student that never learns to stop does not.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from potstill.data.chat_template import (
    CLOSED,
    OPENED,
    QUOTED,
    REASONING_FIELDS,
    UNFIT,
    ChatTemplate,
    Messages,
    Span,
    fold,
    open_template,
    render,
)
from potstill.errors import DataError
from potstill.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoded", "encode_example", "encode_examples"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a document, and for each whether it is to be predicted: never the first, which has no context.

    `conversation` says that it is one: cut into pieces it would teach answers without beginning or end.
    """

    id: str
    ids: list[int]
    learn: list[bool]
    source: str = ""
    conversation: bool = False


@dataclass(frozen=True, slots=True)
class _Page:
    """A rendered conversation with the character spans to learn; `QUOTED` still stands in the text."""

    text: str
    spans: tuple[Span, ...]


def encode_example(example: Example, tokenizer: PreTrainedTokenizerBase, *, thinking: bool = True) -> list[Encoded]:
    """The encodings of one example: one, or one per assistant turn where the template rewrites earlier turns.

    See `encode_examples` for what is encoded how, and for what it raises.
    """
    return list(encode_examples([example], tokenizer, thinking=thinking))


def encode_examples(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 256,
    bare: bool = False,
    thinking: bool = True,
) -> Iterator[Encoded]:
    """Encode examples in order, `batch_size` at a time.

    Text gets what the tokenizer itself adds (such as a beginning-of-sequence token) and, at its end, the
    end-of-sequence token where there is one, so that the student learns to stop; every token but the first is learned.

    A conversation is rendered with the chat template, and what the assistant said is learned up to and with the end of
    its turn: by the template's `{% generation %}` marks where it has them, else from the generation prompt to the end
    of the turn. Without marks, turns after the last answer are left out, and an assistant turn that opens a
    conversation answers nothing and is context. Where a template ends a turn with no token, the end-of-sequence token
    is put there, and each answer gets an encoding of its own.

    What an assistant's message holds in `reasoning_content` is learned before its answer, with the tags that the
    student must write, as the template has it. Where the template does not know the field, the content becomes
    "<think>", the reasoning, "</think>", an empty line and the answer; where it cuts that out of every turn, so much
    of this follows its generation prompt as the prompt has not written. Without `thinking` reasoning is left out, and
    a prompt that opens it is answered by closing it.

    With `bare`, for masked language models, text gets nothing, since whoever packs it frames every piece; all of its
    tokens are learned, and conversations are refused.

    Text that only looks like a special token is encoded as text, in documents and in messages.

    Raises:
        DataError: there are messages and the tokenizer has no chat template or no character offsets; the template
            refuses a conversation, loses its reasoning, or closes all thinking in its prompt; its assistant turns
            cannot be told apart; or there is nothing to end them with. With `bare`: there are messages.
    """
    pending = iter(examples)
    chat: ChatTemplate | None = None
    while batch := list(islice(pending, batch_size)):
        if chat is None and any(example.messages is not None for example in batch):
            if bare:
                raise _refused_chat(next(example.id for example in batch if example.messages is not None))
            chat = open_template(tokenizer)
        words = [example.text for example in batch if example.text is not None]
        texts = iter(_encode_bare(words, tokenizer) if bare else _encode_texts(words, tokenizer))
        for example in batch:
            if example.messages is None:
                ids = next(texts)
                yield Encoded(example.id, ids, [bare or position > 0 for position in range(len(ids))], example.source)
            elif chat is not None:
                pages = _encode_chat(example.id, example.messages, chat, thinking=thinking)
                yield from (replace(page, source=example.source) for page in pages)


def _encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(texts, split_special_tokens=True, return_attention_mask=False, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    return [ids if eos is None or ids[-1:] == [eos] else [*ids, eos] for ids in encoded]


def _encode_bare(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    found: list[list[int]] = tokenizer(texts, verbose=False, **options)["input_ids"]
    return found


def _refused_chat(name: str) -> DataError:
    return DataError(
        f"data.messages: {name} is a conversation, and task.kind=masked_lm reads plain text. "
        "Give its words in the column data.text, or leave it out."
    )


def _encode_chat(name: str, messages: Messages, chat: ChatTemplate, *, thinking: bool) -> Iterator[Encoded]:
    try:
        spoken = [_quote(_read_message(message, thinking), chat.special) for message in messages]
        pages = _marked_pages(spoken, chat) if chat.marked else []
        pages = pages or _derived_pages(spoken, chat, silent=not thinking)
    except UNFIT as error:
        raise DataError(
            f"data.messages: {name}: the conversation does not fit the chat template of "
            f"{chat.tokenizer.name_or_path} ({error}). Mend or remove it, or use another model's template."
        ) from None
    for page in pages:
        yield _encode_page(name, page, chat)


def _read_message(message: Mapping[str, Any], thinking: bool) -> Mapping[str, Any]:
    """The message with what an assistant thought under the first of `REASONING_FIELDS`, if anything and if wanted."""
    if message["role"] != "assistant":
        return message
    said = {key: value for key, value in message.items() if key not in REASONING_FIELDS}
    thoughts = [message[key] for key in REASONING_FIELDS if message.get(key) is not None]
    if not all(isinstance(thought, str) for thought in thoughts):
        raise ValueError("the reasoning of a message must be text")
    thought = next((thought for thought in thoughts if thought.strip()), "")
    return {**said, REASONING_FIELDS[0]: thought} if thought and thinking else said


def _thought(message: Mapping[str, Any]) -> str:
    return str(message.get(REASONING_FIELDS[0], ""))


def _shape(message: Mapping[str, Any], chat: ChatTemplate) -> Mapping[str, Any]:
    """The message with its reasoning where the template shows it."""
    thought = _thought(message)
    if not thought:
        return message
    said = {key: value for key, value in message.items() if key != REASONING_FIELDS[0]}
    if chat.reasoning == "field":
        return {**said, **dict.fromkeys(REASONING_FIELDS, thought)}
    return {**said, "content": fold(thought, said["content"])} if chat.reasoning == "content" else said


def _quote(value: Any, special: re.Pattern[str]) -> Any:
    """Mark every special token that stands in a message's strings, the role (a bare word) excepted."""
    if isinstance(value, str):
        return special.sub(lambda found: QUOTED + found[0], value.replace(QUOTED, ""))
    if isinstance(value, list | tuple):
        return [_quote(part, special) for part in value]
    if isinstance(value, Mapping):
        return {key: part if key == "role" else _quote(part, special) for key, part in value.items()}
    return value


def _marked_pages(messages: Messages, chat: ChatTemplate) -> list[_Page]:
    """The page that the template marks; none where its marks miss reasoning, or answers have no end within it."""
    text, spans = render([_shape(message, chat) for message in messages], chat, marks=True)
    said = "".join(text[start:stop] for start, stop in spans)
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    at = 0
    for turn in turns:
        if not _thought(messages[turn]):
            _check_said(turn, messages[turn], said)
        elif (at := _find_said(messages[turn], said, at)) < 0:
            return []
    if not chat.closes:
        return _ended_page(text, spans, chat) if len(turns) == 1 else []
    spans = [_with_end(text, span, chat) for span in spans]
    closed = all(_end_of_turn(text[:stop], start, chat) is not None for start, stop in spans[-1:])
    return [_Page(text, tuple(spans))] if closed else []


def _with_end(text: str, span: Span, chat: ChatTemplate) -> Span:
    """A marked span, with the token that ends the turn where the marks leave it out."""
    start, stop = span
    follows = re.compile(rf"\s*{chat.added.pattern}").match(text, stop)
    return (start, follows.end()) if follows and _end_of_turn(text[:stop], start, chat) is None else span


def _ended_page(text: str, spans: Sequence[Span], chat: ChatTemplate) -> list[_Page]:
    """The page up to the end of the last marked span, which the end-of-sequence token follows."""
    if not spans:
        return []
    *others, (start, stop) = spans
    ended = text[:stop] + _ending(chat)
    return [_Page(ended, (*others, (start, len(ended))))]


def _derived_pages(messages: Messages, chat: ChatTemplate, *, silent: bool) -> list[_Page]:
    """Pages in which every answer stands as it was given: right after the prompt that the template then wrote.

    An answer joins a later page when that page begins with the whole conversation up to and with the answer. It does
    not where the template rewrites earlier turns; then it gets a page of its own.
    """
    pages: list[_Page] = []
    for turn in range(len(messages) - 1, 0, -1):
        if messages[turn]["role"] != "assistant":
            continue
        prompt, text = _answered(messages, turn, chat, silent=silent)
        _check_said(turn, messages[turn], text[len(prompt) :])
        end = _end_of_turn(text, len(prompt), chat) if chat.closes else None
        if end is None:
            text += _ending(chat)
            end = len(text)
        home = next((index for index, page in enumerate(pages) if page.text.startswith(text)), None)
        if home is None:
            pages.append(_Page(text, ((len(prompt), end),)))
        else:
            pages[home] = _Page(pages[home].text, ((len(prompt), end), *pages[home].spans))
    return pages[::-1]


def _answered(messages: Messages, turn: int, chat: ChatTemplate, *, silent: bool) -> tuple[str, str]:
    """The prompt for this turn, and the conversation up to and with its answer, which begins with the prompt."""
    shaped = [_shape(message, chat) for message in messages[: turn + 1]]
    prompt, _ = render(shaped[:-1], chat, prompt=True)
    text, _ = render(shaped, chat)
    opened = prompt.rstrip().endswith(OPENED.strip())
    thought = _thought(messages[turn])
    if thought and chat.reasoning == "nowhere":
        body = ("" if opened else OPENED) + thought.strip("\n") + CLOSED
    elif silent and opened and not text.startswith(prompt):
        body = CLOSED.lstrip()
    elif text.startswith(prompt):
        return prompt, text
    else:
        raise ValueError(
            f"message {turn} does not follow the generation prompt, which ends in "
            f"{prompt.replace(QUOTED, '')[-40:]!r}; a template with {{% generation %}} marks is needed"
        )
    if chat.tail is None or messages[turn].get("tool_calls") or prompt.rstrip().endswith(CLOSED.strip()):
        raise ValueError(f"the template has no place for what message {turn} thinks before it answers")
    return prompt, prompt + body + messages[turn]["content"].strip("\n") + chat.tail


def _check_said(turn: int, message: Mapping[str, Any], said: str) -> None:
    # The last word: templates may trim a turn or strip the thinking before its answer, but must not lose the answer, as
    # those do that expect content in parts.
    words = message["content"].split()
    if (words and words[-1] not in said) or (_thought(message) and _find_said(message, said) < 0):
        raise ValueError(f"what message {turn} says is not where the template puts an assistant's answer")


def _find_said(message: Mapping[str, Any], said: str, at: int = 0) -> int:
    """Where, from `at` on, the message's reasoning and after it its answer have been said; -1 where they are not."""
    thought, answer = _thought(message).strip(), message["content"].strip()
    start = said.find(thought, at)
    found = said.find(answer, start + len(thought)) if start >= 0 else -1
    return found + len(answer) if found >= 0 else -1


def _ending(chat: ChatTemplate) -> str:
    """What ends a turn that the template leaves open."""
    if not chat.tokenizer.eos_token:
        raise ValueError(
            "the template ends an answer with no token, and the tokenizer has no end-of-sequence token, so that a "
            "student would never learn to stop"
        )
    return str(chat.tokenizer.eos_token)


def _end_of_turn(text: str, start: int, chat: ChatTemplate) -> int | None:
    """Where the turn from `start` to the end of `text` ends: its last added token; None where more than space follows.

    A model that has written its end-of-turn token is not asked for what comes after it.
    """
    last = start
    for found in chat.added.finditer(text, start):
        last = found.end()
    return last if last > start and not text[last:].strip() else None


def _encode_page(name: str, page: _Page, chat: ChatTemplate) -> Encoded:
    marks = [found.start() for found in re.finditer(QUOTED, page.text)]
    quoted = {mark - before for before, mark in enumerate(marks)}
    text = page.text.replace(QUOTED, "")
    said = bytearray(len(text))  # one byte a character: 1 where the assistant speaks
    for start, stop in page.spans:
        first, last = start - bisect_left(marks, start), stop - bisect_left(marks, stop)
        said[first:last] = b"\1" * (last - first)
    encoding = chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = []
    learn: list[bool] = []
    for token, (start, stop) in zip(encoding["input_ids"], _widths(encoding["offset_mapping"]), strict=True):
        parts = [token]
        if token in chat.special_ids and not quoted.isdisjoint(range(start, stop)):
            parts = chat.tokenizer(text[start:stop], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids += parts
        learn += [len(ids) > len(parts) and 1 in said[start:stop]] * len(parts)
    return Encoded(name, ids, learn, conversation=True)


def _widths(offsets: Sequence[Span]) -> Iterator[Span]:
    """Character spans of the tokens, where a token without width gets what lies between it and the token before.

    Byte-level tokenizers that trim offsets report a token of spaces as empty and at its end.
    """
    before = 0
    for start, stop in offsets:
        yield (start if start < stop else min(before, start), stop)
        before = stop
