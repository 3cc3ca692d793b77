"""From examples to token ids with a learn mask: plain text whole, conversations only where the assistant speaks.

Refuses to guess a mask: a chat template whose own generation prompt does not begin the assistant's turn is an error,
and one that rewrites earlier turns (strips their thinking) yields one encoding per turn, as it stood when it was said.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from potstill.errors import DataError
from potstill.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoded", "encode_example", "encode_examples"]

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_QUOTED = "\ufdd0"
"""Put before a control token that a message merely quotes. A Unicode noncharacter, which text must not hold."""

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a document, and for each whether it is to be predicted: never the first, which has no context."""

    id: str
    ids: list[int]
    learn: list[bool]
    source: str = ""


@dataclass(frozen=True, slots=True)
class _Page:
    """A rendered conversation with the character spans to learn; `_QUOTED` still stands in the text."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class _Chat:
    """A tokenizer's chat template, and the patterns of the tokens that it writes with."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    special: re.Pattern[str]
    """Special tokens: what a message must not be able to write."""
    special_ids: frozenset[int]
    added: re.Pattern[str]
    """All added tokens but white space, where no message quotes them: what may end a turn."""


def encode_example(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """The encodings of one example: one, or one per assistant turn where the template rewrites earlier turns.

    See `encode_examples` for what is encoded how, and for what it raises.
    """
    return list(encode_examples([example], tokenizer))


def encode_examples(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 256, bare: bool = False
) -> Iterator[Encoded]:
    """Encode examples in order, `batch_size` at a time.

    Text gets what the tokenizer itself adds (such as a beginning-of-sequence token) and, at its end, the
    end-of-sequence token where there is one, so that the student learns to stop; every token but the first is learned.

    A conversation is rendered with the chat template, and what the assistant said is learned up to and with the end of
    its turn: by the template's `{% generation %}` marks where it has them, else from the generation prompt to the end
    of the turn. Without marks, turns after the last answer are left out, and an assistant turn that opens a
    conversation answers nothing and is context.

    With `bare`, for masked language models, text gets nothing, since whoever packs it frames every piece; all of its
    tokens are learned, and conversations are refused.

    Text that only looks like a special token is encoded as text, in documents and in messages.

    Raises:
        DataError: there are messages and the tokenizer has no chat template or no character offsets; the template
            refuses a conversation; or its assistant turns cannot be told apart. With `bare`: there are messages.
    """
    pending = iter(examples)
    chat: _Chat | None = None
    while batch := list(islice(pending, batch_size)):
        if chat is None and any(example.messages is not None for example in batch):
            if bare:
                raise _refused_chat(next(example.id for example in batch if example.messages is not None))
            chat = _open_chat(tokenizer)
        words = [example.text for example in batch if example.text is not None]
        texts = iter(_encode_bare(words, tokenizer) if bare else _encode_texts(words, tokenizer))
        for example in batch:
            if example.messages is None:
                ids = next(texts)
                yield Encoded(example.id, ids, [bare or position > 0 for position in range(len(ids))], example.source)
            elif chat is not None:
                pages = _encode_chat(example.id, example.messages, chat)
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


def _open_chat(tokenizer: PreTrainedTokenizerBase) -> _Chat:
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
    return _Chat(
        tokenizer,
        tokenizer.get_chat_template(),
        special=re.compile(_any_of(special)),
        special_ids=frozenset(tokenizer.convert_tokens_to_ids(sorted(special))),
        added=re.compile(f"(?<!{_QUOTED})(?:{_any_of({*special, *(token.content for token in added)})})"),
    )


def _any_of(words: Iterable[str]) -> str:
    """A pattern for any of the words, the longest first; without words it matches nothing."""
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)"


def _encode_chat(name: str, messages: Messages, chat: _Chat) -> Iterator[Encoded]:
    quoted = [_quote(message, chat.special) for message in messages]
    try:
        pages = _marked_pages(quoted, chat) if _GENERATION_TAG.search(chat.template) else _derived_pages(quoted, chat)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise DataError(
            f"data.messages: {name}: the conversation does not fit the chat template of "
            f"{chat.tokenizer.name_or_path} ({error}). Mend or remove it, or use another model's template."
        ) from None
    for page in pages:
        yield _encode_page(name, page, chat)


def _quote(value: Any, special: re.Pattern[str]) -> Any:
    """Mark every special token that stands in a message's strings, the role (a bare word) excepted."""
    if isinstance(value, str):
        return special.sub(lambda found: _QUOTED + found[0], value.replace(_QUOTED, ""))
    if isinstance(value, list | tuple):
        return [_quote(part, special) for part in value]
    if isinstance(value, Mapping):
        return {key: part if key == "role" else _quote(part, special) for key, part in value.items()}
    return value


def _render(messages: Messages, chat: _Chat, *, prompt: bool = False, marks: bool = False) -> tuple[str, list[Span]]:
    """The conversation as the template writes it, and the spans of its `{% generation %}` blocks if `marks`."""
    rendered, spans = render_jinja_template(
        conversations=[list(messages)],
        chat_template=chat.template,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=marks,
        **chat.tokenizer.special_tokens_map,
    )
    return rendered[0], spans[0] if marks else []


def _marked_pages(messages: Messages, chat: _Chat) -> list[_Page]:
    text, spans = _render(messages, chat, marks=True)
    said = "".join(text[start:stop] for start, stop in spans)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            _check_said(turn, message, said)
    return [_Page(text, tuple(spans))]


def _derived_pages(messages: Messages, chat: _Chat) -> list[_Page]:
    """Pages in which every answer stands as it was given: right after the prompt that the template then wrote.

    An answer joins a later page when that page begins with the whole conversation up to and with the answer. It does
    not where the template rewrites earlier turns; then it gets a page of its own.
    """
    pages: list[_Page] = []
    for turn in range(len(messages) - 1, 0, -1):
        if messages[turn]["role"] != "assistant":
            continue
        prompt, _ = _render(messages[:turn], chat, prompt=True)
        text, _ = _render(messages[: turn + 1], chat)
        if not text.startswith(prompt):
            raise ValueError(
                f"message {turn} does not follow the generation prompt, which ends in "
                f"{prompt.replace(_QUOTED, '')[-40:]!r}; a template with {{% generation %}} marks is needed"
            )
        _check_said(turn, messages[turn], text[len(prompt) :])
        span = (len(prompt), _end_of_turn(text, len(prompt), chat))
        home = next((index for index, page in enumerate(pages) if page.text.startswith(text)), None)
        if home is None:
            pages.append(_Page(text, (span,)))
        else:
            pages[home] = _Page(pages[home].text, (span, *pages[home].spans))
    return pages[::-1]


def _check_said(turn: int, message: Mapping[str, Any], said: str) -> None:
    # The last word: templates may trim a turn or strip the thinking before its answer, but must not lose the answer, as
    # those do that expect content in parts.
    words = message["content"].split()
    if words and words[-1] not in said:
        raise ValueError(f"what message {turn} says is not where the template puts an assistant's answer")


def _end_of_turn(text: str, start: int, chat: _Chat) -> int:
    """Where the turn from `start` to the end of `text` ends, without the white space that follows its last added token.

    A model that has written its end-of-turn token is not asked for what comes after it.
    """
    last = start
    for found in chat.added.finditer(text, start):
        last = found.end()
    return last if last > start and not text[last:].strip() else len(text)


def _encode_page(name: str, page: _Page, chat: _Chat) -> Encoded:
    marks = [found.start() for found in re.finditer(_QUOTED, page.text)]
    quoted = {mark - before for before, mark in enumerate(marks)}
    text = page.text.replace(_QUOTED, "")
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
    return Encoded(name, ids, learn)


def _widths(offsets: Sequence[Span]) -> Iterator[Span]:
    """Character spans of the tokens, where a token without width gets what lies between it and the token before.

    Byte-level tokenizers that trim offsets report a token of spaces as empty and at its end.
    """
    before = 0
    for start, stop in offsets:
        yield (start if start < stop else min(before, start), stop)
        before = stop
