from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from potstill.data import LabelledText, LabelMap, TextRows, bucketed_order
from potstill.errors import DataError
from potstill.types import IGNORE, Role

LABELS = LabelMap(("a", "b", "c"), "oos")
LINES = ["the red fox", "one two three one two three", "owl", "do you like the owl ?"]
CLASSES = ["c", None, "a", "oos"]


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token a byte, spaces among them."""
    from tokenizers import pre_tokenizers
    from transformers import RobertaTokenizer

    letters = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return RobertaTokenizer(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])


def texts_of(lines, labels=None):
    labels = labels or [None] * len(lines)
    return [
        LabelledText(str(n), line, label=label, source="f")
        for n, (line, label) in enumerate(zip(lines, labels, strict=True))
    ]


def rows_of(texts, tokenizer, **options):
    options = {"length": 32, "role": Role.CLASSIFIER, "labels": LABELS, **options}
    return TextRows(texts, tokenizer, **options)


def test_a_batch_holds_one_text_a_row_padded_on_the_right(bert_tokenizer):
    texts = texts_of(LINES, CLASSES)
    rows = rows_of(texts, bert_tokenizer)
    batch = rows.batch([3, 0])
    assert batch.ids_BT.tolist()[0] == bert_tokenizer(LINES[3])["input_ids"]
    assert batch.ids_BT.tolist()[1] == [*bert_tokenizer(LINES[0])["input_ids"], 0, 0, 0]
    assert batch.segments_BT.tolist() == [[1] * 8, [1] * 5 + [0] * 3]
    assert batch.examples == (("3",), ("0",))
    assert batch.sources == (("f",), ("f",))
    assert batch.keys == (texts[3].key, texts[0].key)
    assert batch.types_BT is None
    assert batch.labels_BC is None


def test_answers_about_texts_stand_at_position_0_and_unlabelled_ones_are_taught_all_the_same(bert_tokenizer):
    rows = rows_of(texts_of(LINES, CLASSES), bert_tokenizer)
    batch = rows.batch(range(4))
    assert batch.targets_BT[:, 0].tolist() == [2, IGNORE, 0, IGNORE]
    assert (batch.targets_BT[:, 1:] == IGNORE).all()
    assert batch.taught_BT[:, 0].all()
    assert not batch.taught_BT[:, 1:].any()
    assert rows.labelled.tolist() == [0, 2]
    assert rows.lengths.tolist() == [5, 8, 3, 8]


def test_several_labels_are_ones_and_zeros_and_their_number_is_the_target(bert_tokenizer):
    labels = [("c", "a"), (), None, ("oos",)]
    batch = rows_of(texts_of(LINES, labels), bert_tokenizer, multi_label=True).batch(range(4))
    assert batch.labels_BC.tolist() == [[1, 0, 1], [0, 0, 0], [IGNORE] * 3, [IGNORE] * 3]
    assert batch.targets_BT[:, 0].tolist() == [2, 0, IGNORE, IGNORE]


def test_embeddings_have_answers_and_nothing_to_learn(bert_tokenizer):
    batch = rows_of(texts_of(LINES, ["3.5", None, "1", "2"]), bert_tokenizer, role=Role.ENCODER, labels=None).batch(
        [0, 1]
    )
    assert batch.taught_BT.sum(1).tolist() == [1, 1]
    assert not batch.supervised_BT.any()


def test_a_word_answers_at_its_first_token(bert_tokenizer):
    words = ("the", "playing", "foxs", "\u200b", "owl")
    text = LabelledText("1", words, label=("a", "b", "", "c", "oos"))
    rows = rows_of([text], bert_tokenizer, role=Role.TOKEN_CLASSIFIER)
    batch = rows.batch([0])
    tokens = bert_tokenizer.convert_ids_to_tokens(batch.ids_BT[0].tolist())
    assert tokens == ["[CLS]", "the", "play", "##ing", "fox", "##s", "?", "owl", "[SEP]"]
    assert batch.taught_BT[0].nonzero()[:, 0].tolist() == [1, 2, 4, 6, 7]
    assert batch.targets_BT[0, [1, 2, 4, 6, 7]].tolist() == [0, 1, IGNORE, 2, IGNORE]
    assert rows.words_of(0).tolist() == [0, 1, 2, 3, 4]
    assert rows.lost_words == 0


@given(st.lists(st.sampled_from(["fox", "playing", "\u200b", "", " ", "\ufe0f", "\x07", "\u0301", "?"]), min_size=1))
def test_whatever_the_words_are_every_tokenizer_answers_about_all_of_them(bert_tokenizer, byte_tokenizer, words):
    text = LabelledText("1", tuple(words), label=("a",) * len(words))
    for tokenizer in (bert_tokenizer, byte_tokenizer):
        rows = rows_of([text], tokenizer, length=512, role=Role.TOKEN_CLASSIFIER)
        assert rows.words_of(0).tolist() == list(range(len(words)))
        assert rows.batch([0]).targets_N.tolist() == [0] * len(words)


def test_words_keep_their_spaces_where_these_belong_to_tokens(byte_tokenizer):
    tokenizer = byte_tokenizer
    text = LabelledText("1", ("ab", "c", "d"), label=("a", "b", "c"))
    batch = rows_of([text], tokenizer, role=Role.TOKEN_CLASSIFIER).batch([0])
    assert batch.ids_BT.tolist() == [tokenizer("ab c d")["input_ids"]]
    assert batch.taught_BT[0].nonzero()[:, 0].tolist() == [1, 3, 5]


def test_a_text_without_a_token_is_a_row_of_padding_with_its_answer(bert_tokenizer):
    tokenizer = copy.deepcopy(bert_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    rows = rows_of(texts_of(["\u200b", "the fox"], ["a", "b"]), tokenizer)
    assert rows.lengths.tolist() == [0, 2]
    assert rows.batch([0]).segments_BT.tolist() == [[0]]
    batch = rows.batch([0, 1])
    assert batch.segments_BT.tolist() == [[0, 0], [1, 1]]
    assert batch.targets_BT[:, 0].tolist() == [0, 1]


def test_words_that_are_cut_off_are_counted(bert_tokenizer):
    text = LabelledText("1", ("one", "two", "playing"), label=("a", "b", "c"))
    rows = rows_of([text], bert_tokenizer, role=Role.TOKEN_CLASSIFIER, length=5)
    assert rows.words_of(0).tolist() == [0, 1, 2]
    rows = rows_of([text], bert_tokenizer, role=Role.TOKEN_CLASSIFIER, length=4)
    assert rows.words_of(0).tolist() == [0, 1]
    assert (rows.lost_words, rows.overlong_count) == (1, 1)


def test_a_pair_has_token_types(bert_tokenizer):
    texts = [LabelledText("1", "the fox", pair="the owl counts"), LabelledText("2", "one")]
    batch = rows_of(texts, bert_tokenizer, labels=None).batch([0, 1])
    assert batch.types_BT.tolist() == [[0] * 4 + [1] * 4, [0] * 8]
    assert batch.ids_BT[0].tolist() == bert_tokenizer("the fox", "the owl counts")["input_ids"]


@pytest.mark.parametrize(("overlong", "kept"), [("truncate", [5, 5, 3, 5]), ("drop", [5, 3])])
def test_texts_that_are_too_long_are_cut_or_dropped_and_counted(bert_tokenizer, overlong, kept):
    rows = rows_of(texts_of(LINES, CLASSES), bert_tokenizer, length=5, overlong=overlong)
    assert rows.lengths.tolist() == kept
    assert rows.overlong_count == 2
    assert len(rows) == len(rows.texts) == len(kept)
    assert rows.batch([1]).ids_BT[0, kept[1] - 1] == bert_tokenizer.sep_token_id


def test_texts_that_are_too_long_are_refused_with_their_number_and_the_longest(bert_tokenizer):
    with pytest.raises(
        DataError, match=r"^data\.sequence_length: 2 texts have more than 5 tokens, the longest 8 \(1\)"
    ):
        rows_of(texts_of(LINES), bert_tokenizer, length=5, overlong="refuse")


def test_a_cut_pair_keeps_both_texts(bert_tokenizer):
    text = LabelledText("1", "one two three one two three", pair="owl hare")
    row = rows_of([text], bert_tokenizer, length=8).batch([0])
    tokens = bert_tokenizer.convert_ids_to_tokens(row.ids_BT[0].tolist())
    assert tokens == ["[CLS]", "one", "two", "three", "[SEP]", "owl", "hare", "[SEP]"]


def test_what_looks_like_a_special_token_is_text(bert_tokenizer):
    batch = rows_of(texts_of(["the [SEP] fox [MASK]"]), bert_tokenizer).batch([0])
    special = torch.isin(batch.ids_BT, torch.tensor([0, 2, 3, 4]))
    assert special.sum() == 2


def test_a_noisy_copy_has_the_key_of_its_original(bert_tokenizer):
    text = texts_of(["the fox"])[0]
    copy = replace(text, id="0~1", text="the fxo", origin=text.key)
    assert rows_of([copy], bert_tokenizer).batch([0]).keys == (text.key,)


def test_a_subset_has_the_same_rows(bert_tokenizer):
    rows = rows_of(texts_of(LINES, CLASSES), bert_tokenizer, length=5)
    part = rows.subset(rows.labelled)
    assert [text.id for text in part.texts] == ["0", "2"]
    assert part.lengths.tolist() == [5, 3]
    assert part.overlong_count == 0
    assert part.batch([1]).ids_BT.tolist() == rows.batch([2]).ids_BT.tolist()
    assert len(rows) == 4


def test_there_is_no_other_row(bert_tokenizer):
    rows = rows_of(texts_of(LINES), bert_tokenizer)
    for call in (rows.batch, rows.subset):
        with pytest.raises(IndexError):
            call([4])


def test_a_label_that_is_no_class_is_refused(bert_tokenizer):
    with pytest.raises(DataError, match=r"^task\.labels: there is no class 'z'"):
        rows_of(texts_of(["owl"], ["z"]), bert_tokenizer)


def test_a_row_is_the_same_in_every_batch(bert_tokenizer):
    rows = rows_of(texts_of(LINES, CLASSES), bert_tokenizer)
    alone, together = rows.batch([2]), rows.batch([1, 2])
    assert together.ids_BT[1, :3].tolist() == alone.ids_BT[0].tolist()
    assert together.targets_BT[1, :3].tolist() == alone.targets_BT[0].tolist()


@given(st.lists(st.integers(1, 60), max_size=80), st.integers(1, 7), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_has_every_row_once_and_follows_from_seed_and_epoch(lengths, batch_rows, seed, epoch):
    order = bucketed_order(np.array(lengths), batch_rows=batch_rows, seed=seed)
    rows = order(epoch)
    assert rows.dtype == torch.int64
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    order(epoch + 1)
    assert torch.equal(rows, order(epoch))


def test_rows_of_a_batch_are_of_like_length_and_epochs_differ():
    lengths = np.random.default_rng(0).integers(1, 100, 3210)
    order = bucketed_order(lengths, batch_rows=32, seed=0)
    batches = lengths[order(0)][:3200].reshape(100, 32)
    assert (batches.max(1) - batches.min(1)).mean() < 5
    assert not torch.equal(order(0), order(1))
    # Batches themselves are shuffled: short ones do not come first.
    means = batches.mean(1)
    assert abs(means[:50].mean() - means[50:].mean()) < 20


def test_batches_drawn_at_random_are_those_of_a_plain_shuffle_and_sorted_within():
    lengths = np.random.default_rng(0).integers(1, 100, 3200)
    rows = bucketed_order(lengths, batch_rows=32, seed=0, pooled=1)(0).reshape(100, 32)
    batches = lengths[rows]
    assert (np.diff(batches, axis=1) >= 0).all()
    # Of random batches the means differ by the spread of lengths over the root of the batch, and no more.
    assert batches.mean(1).std() < 2 * lengths.std() / 32**0.5


def test_batches_stay_of_like_length_when_epochs_end_within_one():
    epochs = 3
    lengths = np.random.default_rng(0).integers(1, 100, 3215)
    order = bucketed_order(lengths, batch_rows=32, seed=0)
    rows = np.concatenate([order(epoch).numpy() for epoch in range(epochs)])
    batches = lengths[rows[: len(rows) // 32 * 32]].reshape(-1, 32)
    spread = batches.max(1) - batches.min(1)
    assert (spread > 10).sum() <= epochs  # but for those that two epochs share
