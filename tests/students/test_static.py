"""A static classifier says the same in training, in evaluation, and in the library that serves it."""

from __future__ import annotations

import copy
import importlib.util
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from potstill.errors import MissingExtra, ModelError, RecipeError
from potstill.students.static import (
    StaticAnswers,
    StaticClassifier,
    StaticTokens,
    check_static_packages,
    distil_static,
    load_static,
    save_static,
    tokenizer_of_rows,
)
from potstill.types import IGNORE, Batch, Wants

WORDS = ["book", "a", "flight", "to", "paris", "what", "is", "my", "balance", "##s", "##ing", "play", ",", "[", "]"]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
LABELS = ("travel", "bank", "music")
TEXTS = [
    "book a flight to paris",
    "What is my BALANCE",
    "playing",
    "",
    "   ",
    "zyx qqq",
    "play zyx",
    "[PAD] book [UNK] [CLS] a [SEP]",
    "flight \U0001f600 \u4f60\u597d, na\u00efve\x00\tbooks",
    "what is my balance " * 700,
    "x" * 5000 + " book",
]


def word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]", max_input_chars_per_word=20)
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def byte_pairs() -> Tokenizer:
    """A vocabulary without an unknown token, whose token 0 is an ordinary one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "bo", "ok"])}, [("b", "o")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def make_tokens(tokenizer: Tokenizer, unknown: int | None, width: int = 8) -> StaticTokens:
    vectors_VD = torch.randn(tokenizer.get_vocab_size(), width, generator=torch.Generator().manual_seed(1))
    return StaticTokens(vectors_VD, tokenizer, unknown)


def make_answers(kind: str = "pieces", multi_label: bool = False) -> StaticAnswers:
    tokens = make_tokens(word_pieces(), 1) if kind == "pieces" else make_tokens(byte_pairs(), None)
    model = StaticClassifier(tokens, len(LABELS))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        model.weight_CD.copy_(torch.randn(model.weight_CD.shape, generator=generator))
        model.bias_C.copy_(torch.randn(model.bias_C.shape, generator=generator))
    return StaticAnswers(model, tokens.tokenizer, LABELS, multi_label)


def rows(ids: list[list[int]], more_padding: int = 0, pad: int = 0) -> Batch:
    length = max(1, *(len(row) for row in ids)) + more_padding
    ids_BT = torch.tensor([row + [pad] * (length - len(row)) for row in ids])
    segments_BT = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    taught_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    taught_BT[:, 0] = True
    return Batch(ids_BT, torch.full_like(ids_BT, IGNORE), segments_BT, taught_BT=taught_BT)


@pytest.fixture(params=["pieces", "bytes"])
def answers(request: pytest.FixtureRequest) -> StaticAnswers:
    return make_answers(request.param)


def test_training_and_evaluation_read_a_text_alike(answers):
    tokenizer = tokenizer_of_rows(answers.tokenizer)
    view = answers.model(rows([tokenizer(text)["input_ids"] for text in TEXTS]))
    assert view.head is None
    assert view.final_ND.dtype == torch.float32
    assert_close(answers.query(TEXTS), view.final_ND)


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=40), kind=st.sampled_from(["pieces", "bytes"]))
def test_a_text_has_the_same_tokens_for_transformers_as_for_the_library(text, kind):
    raw = word_pieces() if kind == "pieces" else byte_pairs()
    expected = raw.encode(text, add_special_tokens=False).ids
    assert tokenizer_of_rows(raw)(text)["input_ids"] == expected
    assert tokenizer_of_rows(raw)(text, truncation=True, max_length=5)["input_ids"] == expected[:5]


def test_a_text_is_the_mean_of_its_known_tokens_in_any_order():
    answers = make_answers()
    (vectors_VD, book, a) = answers.model.vectors_VD, PIECES.index("book"), PIECES.index("a")
    view = answers.model(rows([[book, a, 1], [a, 1, 1, book], [1]]))
    assert_close(view.pooled_BD[0], (vectors_VD[book] + vectors_VD[a]) / 2)
    assert_close(view.pooled_BD[1], view.pooled_BD[0])
    assert torch.equal(view.pooled_BD[2], torch.zeros(8))
    assert_close(view.final_ND[2], answers.model.bias_C)


@pytest.mark.parametrize("pad", [0, 5])
def test_padding_changes_nothing_and_learns_nothing(pad):
    gradients = []
    for more_padding in (0, 7):
        model = make_answers().model
        scores_NC = model(rows([[4, 5, 6], [8]], more_padding, pad)).final_ND
        cross_entropy(scores_NC, torch.tensor([0, 2])).backward()
        gradients.append((scores_NC, [parameter.grad for parameter in model.parameters()]))
    (bare, bare_gradients), (padded, padded_gradients) = gradients
    assert_close(bare, padded)
    assert_close(bare_gradients, padded_gradients)
    touched = bare_gradients[0].abs().sum(1).nonzero().flatten().tolist()
    assert touched == [4, 5, 6, 8]


def test_only_rows_that_are_spoken_of_are_answered():
    model = make_answers().model
    batch = rows([[4, 5], [6], [7]])
    batch.taught_BT[1, 0] = False
    view = model(batch)
    assert_close(view.final_ND, model(rows([[4, 5], [7]])).final_ND)
    assert view.pooled_BD.shape == (3, 8)


def test_before_it_has_learnt_every_class_is_as_likely():
    model = StaticClassifier(make_tokens(word_pieces(), 1), 3)
    assert torch.equal(model(rows([[4, 5], [6]])).final_ND, torch.zeros(2, 3))


def test_making_one_draws_no_random_numbers_and_shares_no_vectors():
    tokens, state = make_tokens(word_pieces(), 1), torch.get_rng_state()
    before = tokens.vectors_VD.clone()
    with torch.no_grad():
        StaticClassifier(tokens, 3).vectors_VD.zero_()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tokens.vectors_VD, before)


def test_it_learns_what_words_decide():
    model = StaticClassifier(make_tokens(word_pieces(), 1), 3)
    batch, classes = rows([[4, 6], [6, 5], [9, 12], [10, 12], [15], [15, 5]]), torch.tensor([0, 0, 1, 1, 2, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(batch).final_ND, classes).backward()
        optimizer.step()
    assert torch.equal(model(batch).final_ND.argmax(-1), classes)


@pytest.mark.parametrize("wants", [Wants(layers=(0,)), Wants(attentions=(1,)), Wants(vectors=(1,))], ids=str)
def test_insides_that_it_has_not_are_refused(wants):
    with pytest.raises(ModelError, match="neither layers nor attention"):
        make_answers().model(rows([[4]]), wants)


def test_an_answer_for_every_word_is_refused():
    batch = rows([[4, 5]])
    batch.taught_BT[0, 1] = True
    with pytest.raises(ModelError, match=r"task\.kind=classification"):
        make_answers().model(batch)


def test_nothing_asked_is_nothing_answered(answers):
    assert answers.query([]).shape == (0, 3)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("kind", ["pieces", "bytes"])
def test_the_library_gives_the_same_probabilities(tmp_path, kind, multi_label):
    inference = pytest.importorskip("model2vec.inference")
    ours = make_answers(kind, multi_label)
    save_static(ours, tmp_path / "static")
    theirs = inference.StaticModelPipeline.from_pretrained(tmp_path / "static")
    scores_NC = ours.query(TEXTS)
    expected = scores_NC.sigmoid() if multi_label else scores_NC.softmax(-1)
    np.testing.assert_allclose(theirs.predict_proba(TEXTS), expected.numpy(), atol=1e-5)
    said = theirs.predict(TEXTS)
    for row, scores_C in zip(said, scores_NC, strict=True):
        if multi_label:
            assert list(row) == [LABELS[i] for i in range(3) if scores_C[i] > 0]
        else:
            assert row == LABELS[int(scores_C.argmax())]


def test_the_library_gives_the_same_vectors(tmp_path, answers):
    model2vec = pytest.importorskip("model2vec")
    save_static(answers, tmp_path)
    tokenizer = tokenizer_of_rows(answers.tokenizer)
    pooled_BD = answers.model(rows([tokenizer(text)["input_ids"] for text in TEXTS])).pooled_BD
    theirs = model2vec.StaticModel.from_pretrained(tmp_path).encode(TEXTS)
    np.testing.assert_allclose(theirs, pooled_BD.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("multi_label", [False, True])
def test_what_was_saved_is_loaded(tmp_path, multi_label):
    pytest.importorskip("model2vec")
    saved = make_answers(multi_label=multi_label)
    save_static(saved, tmp_path)
    loaded = load_static(tmp_path)
    assert (loaded.labels, loaded.multi_label) == (LABELS, multi_label)
    assert loaded.model.unknown == 1
    assert torch.equal(loaded.query(TEXTS), saved.query(TEXTS))
    save_static(loaded, tmp_path / "again")
    for name in ("model.safetensors", "head.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_no_card_claims_a_licence(tmp_path):
    pytest.importorskip("model2vec")
    save_static(make_answers(), tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_one_label_too_few_is_refused(tmp_path):
    pytest.importorskip("model2vec")
    answers = make_answers()
    with pytest.raises(ValueError, match="2 labels for 3 classes"):
        save_static(StaticAnswers(answers.model, answers.tokenizer, LABELS[:2]), tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
    pytest.importorskip("model2vec")
    with pytest.raises(ModelError, match="holds no static classifier"):
        load_static(tmp_path)
    save_static(make_answers(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "normalize": True}))
    with pytest.raises(ModelError, match="another kind"):
        load_static(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="is damaged"):
        load_static(tmp_path)


@pytest.mark.parametrize("absent", ["model2vec", "skeletoken", "sklearn"])
def test_an_absent_package_is_named_with_its_extra(monkeypatch, absent):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else object())
    with pytest.raises(MissingExtra, match=rf"static: {absent} is not installed.*potstill\[static\]"):
        check_static_packages()


@pytest.fixture
def teacher() -> Any:
    config = BertConfig(
        vocab_size=len(PIECES),
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        initializer_range=0.4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return BertForSequenceClassification(config).eval()


@pytest.fixture
def fast() -> Any:
    tokenizer = word_pieces()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@torch.no_grad()
def vector_by_hand(teacher: Any, token: int) -> torch.Tensor:
    return teacher.bert(torch.tensor([[2, token, 3]])).last_hidden_state[0].mean(0)


def test_distilled_vectors_are_those_of_the_published_recipe(teacher, fast):
    pytest.importorskip("skeletoken")
    tokens = distil_static(teacher, fast, dimensions=6)
    vocabulary = tokens.tokenizer.get_vocab()
    assert tokens.unknown == vocabulary["[UNK]"]
    assert tokens.vectors_VD.shape == (len(vocabulary), 6)
    names = sorted(vocabulary, key=lambda name: vocabulary[name])
    states_VD = torch.stack([vector_by_hand(teacher, PIECES.index(name)) for name in names])
    centred_VD = states_VD - states_VD.mean(0)
    _, _, axes_DD = torch.linalg.svd(centred_VD.double(), full_matrices=False)
    share_V = 1 / torch.arange(2, len(names) + 2, dtype=torch.float64)
    weight_V = 1e-4 / (1e-4 + share_V / share_V.sum())
    expected_VD = (centred_VD.double() @ axes_DD[:6].T) * weight_V.unsqueeze(1)
    assert_close(tokens.vectors_VD.abs(), expected_VD.abs().float(), rtol=1e-3, atol=1e-5)


def test_distilling_leaves_the_teacher_as_it_is_and_is_repeatable(teacher, fast):
    pytest.importorskip("skeletoken")
    before, name = copy.deepcopy(teacher.state_dict()), teacher.base_model.name_or_path
    ids = fast("book a")["input_ids"]
    first, again = (distil_static(model, fast, dimensions=4) for model in (teacher, teacher.bert))
    assert torch.equal(first.vectors_VD, again.vectors_VD)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert (teacher.base_model.name_or_path, fast("book a")["input_ids"]) == (name, ids)


def test_distilled_tokens_frame_pad_and_cut_nothing(teacher, fast):
    pytest.importorskip("skeletoken")
    tokenizer = distil_static(teacher, fast, dimensions=4).tokenizer
    texts = ["book a flight", "a " * 900]
    assert [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)] == [3, 900]
    assert tokenizer.encode("book a flight").tokens == ["book", "a", "flight"]


def test_a_text_that_spells_a_special_token_is_ordinary_text(teacher, fast):
    pytest.importorskip("skeletoken")
    tokenizer = distil_static(teacher, fast, dimensions=4).tokenizer
    assert tokenizer.encode("[PAD] a").tokens == ["[", "[UNK]", "]", "a"]
    assert tokenizer.get_vocab()["[PAD]"] == 0


def test_more_dimensions_than_the_teacher_has_are_refused(teacher, fast):
    pytest.importorskip("skeletoken")
    with pytest.raises(RecipeError, match=r"static\.dimensions=13: .*states have width 12"):
        distil_static(teacher, fast, dimensions=13)


def test_more_dimensions_than_there_are_tokens_are_refused(fast):
    pytest.importorskip("skeletoken")
    wide = BertModel(BertConfig(vocab_size=len(PIECES), hidden_size=40, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(RecipeError, match=r"static\.dimensions=30: the teacher has \d+ tokens, too few"):
        distil_static(wide, fast, dimensions=30)


def test_a_slow_tokenizer_is_refused(teacher, fast, monkeypatch):
    pytest.importorskip("skeletoken")
    monkeypatch.setattr(type(fast), "is_fast", False)
    with pytest.raises(ModelError, match="no fast tokenizer"):
        distil_static(teacher, fast, dimensions=4)
