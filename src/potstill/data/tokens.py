"""Texts as rows of tokens, one text a row, for tasks that answer about whole texts or about their words.

Every model has its own tokenizer, and so its own rows of the same texts; `Batch.keys` names the texts for all of them.
Refuses to cut a text, or to lose a word, without counting it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.labels import LabelMap
from potstill.data.texts import LabelledText
from potstill.errors import DataError
from potstill.types import IGNORE, Batch, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["POOLED_BATCHES", "Overlong", "TextRows", "bucketed_order"]

Overlong = Literal["truncate", "drop", "refuse"]
Int64s = NDArray[np.int64]

_TOKENISED_AT_ONCE = 1024
_BLANK = "?"
"""What stands for a word of which a tokenizer makes nothing."""
POOLED_BATCHES = 50
"""Batches whose rows are sorted by length together: many enough that they are of like length, few enough to mix."""


@dataclass(frozen=True, slots=True)
class _Row:
    """The tokens of a text, and its answers.

    key      by which its answers are known: its own, or that of the text that it is a noisy copy of
    ids      int64 [T]
    types    int64 [T]; None where there is no second text
    places   int64: positions of the answers, 0 for that about a whole text
    words    int64: the numbers of the words that these are about, 0, 1, ...; those of the others were cut off
    targets  int64: the classes there, or IGNORE
    labels   int64 [C], of several labels, or IGNORE; None where a text has one
    cut      whether tokens were cut off
    """

    text: LabelledText
    key: bytes
    ids: Int64s
    types: Int64s | None
    places: Int64s
    words: Int64s
    targets: Int64s
    labels: Int64s | None = None
    cut: bool = False


@dataclass(frozen=True, slots=True)
class _Reading:
    """How texts are read: with which tokenizer, for which answers."""

    tokenizer: PreTrainedTokenizerBase
    role: Role
    labels: LabelMap | None
    multi_label: bool


class TextRows:
    """Labelled texts as the tokens of one tokenizer; any of them may be asked for as a batch."""

    def __init__(
        self,
        texts: Sequence[LabelledText],
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int,
        role: Role,
        labels: LabelMap | None = None,
        multi_label: bool = False,
        overlong: Overlong = "truncate",
    ) -> None:
        """Tokenise all texts, which may have `length` tokens at most, special ones included.

        A longer one is cut, dropped or refused, as `overlong` says; of a pair the longer part is cut. What only looks
        like a special token is text. A word of which the tokenizer makes nothing is read as "?", so that every word has
        its answer. Without `labels` nothing is labelled.

        Raises:
            DataError: a text is longer and `overlong` is "refuse"; a label is none of `labels`; there are words, and
                the tokenizer cannot tell which token is of which.
        """
        reading = _Reading(tokenizer, role, labels, multi_label)
        rows = list(_read(texts, reading, None))
        over = [number for number, row in enumerate(rows) if len(row.ids) > length]
        if over and overlong == "refuse":
            raise _too_long([rows[number] for number in over], length)
        if over and overlong == "truncate":
            cut = _read([rows[number].text for number in over], reading, length)
            for number, row in zip(over, cut, strict=True):
                rows[number] = replace(row, cut=True)
        self._dropped = len(over) if overlong == "drop" else 0
        self._pad = next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), 0)
        self._hold([row for row in rows if len(row.ids) <= length])

    def _hold(self, rows: list[_Row]) -> None:
        self._rows = rows
        self._lengths = _int64s([len(row.ids) for row in rows])
        self._labelled = np.flatnonzero([bool((row.targets != IGNORE).any()) for row in rows])

    @property
    def texts(self) -> tuple[LabelledText, ...]:
        """The texts of the rows, in their order."""
        return tuple(row.text for row in self._rows)

    @property
    def lengths(self) -> Int64s:
        """Tokens of each row, special ones included. int64 [rows]."""
        return self._lengths

    @property
    def labelled(self) -> Int64s:
        """Numbers of the rows in which something is to be learned. int64, ascending."""
        return self._labelled

    @property
    def overlong_count(self) -> int:
        """Texts that were longer, and so were cut or dropped."""
        return self._dropped + sum(row.cut for row in self._rows)

    @property
    def lost_words(self) -> int:
        """Words about which nothing is asked, since they were cut off."""
        return sum(len(row.text.text) - len(row.words) for row in self._rows if isinstance(row.text.text, tuple))

    def __len__(self) -> int:
        return len(self._rows)

    def words_of(self, number: int) -> Int64s:
        """Of the row's answers, in their order, the numbers of the words that they are about. int64."""
        return self._rows[number].words

    def subset(self, numbers: Sequence[int] | Int64s) -> TextRows:
        """These rows only, in this order. Raises IndexError where there is no such row."""
        part = copy(self)
        part._hold([self._rows[number] for number in _checked(numbers, len(self))])
        part._dropped = 0
        return part

    def batch(self, numbers: Sequence[int] | Int64s) -> Batch:
        """These rows, in this order, padded on the right to the longest of them.

        The teacher speaks wherever there is an answer, labelled or not. A noisy copy has the key of its original.
        Raises IndexError where there is no such row.
        """
        rows = [self._rows[number] for number in _checked(numbers, len(self))]
        shape = (len(rows), max((len(row.ids) for row in rows), default=0) or 1)
        ids, segments = np.full(shape, self._pad, np.int64), np.zeros(shape, np.int64)
        types, taught = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
        targets = np.full(shape, IGNORE, np.int64)
        for line, row in enumerate(rows):
            stop = len(row.ids)
            ids[line, :stop], segments[line, :stop] = row.ids, 1
            types[line, :stop] = 0 if row.types is None else row.types
            taught[line, row.places], targets[line, row.places] = True, row.targets
        labels = [row.labels for row in rows if row.labels is not None]
        return Batch(
            ids_BT=torch.from_numpy(ids),
            targets_BT=torch.from_numpy(targets),
            segments_BT=torch.from_numpy(segments),
            examples=tuple((row.text.id,) for row in rows),
            sources=tuple((row.text.source,) for row in rows),
            taught_BT=torch.from_numpy(taught),
            types_BT=torch.from_numpy(types) if any(row.types is not None for row in rows) else None,
            labels_BC=torch.from_numpy(np.stack(labels)) if labels else None,
            keys=tuple(row.key for row in rows),
        )


def bucketed_order(
    lengths: Int64s, *, batch_rows: int, seed: int, pooled: int = POOLED_BATCHES
) -> Callable[[int], Tensor]:
    """For every epoch an order of the rows in which those of one batch are of like length. int64 [rows].

    Rows are shuffled, sorted by length within pools of `pooled` batches, and the batches shuffled; with 1, batches are
    drawn at random and only sorted, so that the parts of a batch that accumulate are of like length. Those that fill no
    batch come first and last, so many first as the batch lacks that the epoch before has begun: `batch_rows` successive
    rows of the whole training, from its first on, are a batch. Every row stands there once, and the order is a function
    of lengths, seed and epoch only.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    pool = pooled * batch_rows

    def order(epoch: int) -> Tensor:
        random = np.random.default_rng([seed, epoch])
        shuffled = random.permutation(len(sizes))
        first = min(-epoch * len(sizes) % batch_rows, len(sizes))
        stop = first + (len(sizes) - first) // batch_rows * batch_rows
        pools = [shuffled[start : min(start + pool, stop)] for start in range(first, stop, pool)]
        near = [rows[np.argsort(sizes[rows], kind="stable")] for rows in pools]
        batches = np.concatenate([*near, shuffled[:0]]).reshape(-1, batch_rows)
        mixed = batches[random.permutation(len(batches))].reshape(-1)
        return torch.from_numpy(np.concatenate([shuffled[:first], mixed, shuffled[stop:]]))

    return order


def _checked(numbers: Sequence[int] | Int64s, count: int) -> list[int]:
    return [range(count)[int(number)] for number in numbers]


def _read(texts: Sequence[LabelledText], reading: _Reading, length: int | None) -> Iterator[_Row]:
    """The rows of the texts in order, cut at `length` tokens where it is given."""
    for paired, alike in groupby(texts, key=lambda text: text.pair is not None):
        while some := list(islice(alike, _TOKENISED_AT_ONCE)):
            encoded = _tokenise(some, reading, length, paired=paired)
            for number, text in enumerate(some):
                types = encoded["token_type_ids"][number] if paired and "token_type_ids" in encoded else None
                places, words = _places(encoded, number, text)
                targets, labels = _answers(text, words, reading)
                ids = _int64s(encoded["input_ids"][number])
                second = None if types is None else _int64s(types)
                yield _Row(text, text.origin or text.key, ids, second, places, words, targets, labels)


def _tokenise(texts: Sequence[LabelledText], reading: _Reading, length: int | None, *, paired: bool) -> Any:
    in_words = reading.role is Role.TOKEN_CLASSIFIER
    if in_words and not reading.tokenizer.is_fast:
        raise DataError(
            f"data.text: the tokenizer {reading.tokenizer.name_or_path} cannot tell which token is of which word. "
            "Use a model that ships tokenizer.json."
        )
    return reading.tokenizer(
        _spelled([text.text for text in texts], reading.tokenizer) if in_words else [text.text for text in texts],
        text_pair=[text.pair for text in texts] if paired else None,
        is_split_into_words=in_words,
        split_special_tokens=True,
        truncation="longest_first" if length is not None else False,
        max_length=length,
        return_attention_mask=False,
        verbose=False,
    )


def _spelled(texts: Sequence[str | Sequence[str]], tokenizer: Any) -> list[list[str]]:
    """Words as the tokenizer is to read them, so that every one has a token.

    Of white space, or of an invisible character, one tokenizer makes a token and another does not: answers are known by
    their number in a text, and all after that word would be taken for those to its neighbours.
    """
    distinct = list(dict.fromkeys(chain.from_iterable(texts)))
    ids = tokenizer(distinct, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    spelling = {word: word if found else _BLANK for word, found in zip(distinct, ids, strict=True)}
    # Where spaces belong to tokens, a word without its space would be another word to the model.
    space = " " if getattr(tokenizer, "add_prefix_space", None) is False else ""
    return [[space * (place > 0) + spelling[word] for place, word in enumerate(words)] for words in texts]


def _places(encoded: Any, number: int, text: LabelledText) -> tuple[Int64s, Int64s]:
    """Where the answers of a text stand, and which words they are about."""
    if isinstance(text.text, str):
        return _int64s([0]), _int64s([])
    first: dict[int, int] = {}
    for position, word in enumerate(encoded.word_ids(number)):
        if word is not None:
            first.setdefault(word, position)
    return _int64s(list(first.values())), _int64s(list(first))


def _answers(text: LabelledText, words: Int64s, reading: _Reading) -> tuple[Int64s, Int64s | None]:
    """The targets at the places of a text, and its several labels."""
    labels = reading.labels
    several = np.full(len(labels or ()), IGNORE, np.int64) if reading.multi_label else None
    if isinstance(text.text, tuple):
        names = [text.label[word] if text.label and labels else "" for word in words]
        return _int64s([labels.target(name) if name and labels else IGNORE for name in names]), None
    if text.label is None or labels is None:
        return _int64s([IGNORE]), several
    if several is None:
        return _int64s([labels.target(text.labels[0])]), None
    known = [found for name in text.labels if (found := labels.target(name)) != IGNORE]
    if len(known) < len(text.labels):  # out of scope
        return _int64s([IGNORE]), several
    several[:] = 0
    several[known] = 1
    return _int64s([len(known)]), several


def _int64s(numbers: Sequence[int]) -> Int64s:
    return np.array(numbers, dtype=np.int64)


def _too_long(rows: Sequence[_Row], length: int) -> DataError:
    longest = max(rows, key=lambda row: len(row.ids))
    return DataError(
        f"data.sequence_length: {len(rows)} texts have more than {length} tokens, the longest {len(longest.ids)} "
        f"({longest.text.id}). Raise it as far as the model allows, or set task.overlong to truncate or drop."
    )
