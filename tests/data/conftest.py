"""A tokenizer that is trained in a moment and knows the control tokens of several chat formats."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTROLS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<｜User｜>", "<｜Assistant｜>"),
]
SENTENCES = ["The red fox counts one, two, three.", "What does the owl say to the hare? user assistant system model"]

MakeTokenizer = Callable[..., "PreTrainedTokenizerFast"]


@pytest.fixture(scope="session")
def backend() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=CONTROLS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer(backend: Tokenizer) -> MakeTokenizer:
    """Make a tokenizer with this template; `adds_bos` lets it put its BOS before text by itself."""
    from transformers import PreTrainedTokenizerFast

    def make(template: str | None = None, *, adds_bos: bool = False, **special: Any) -> PreTrainedTokenizerFast:
        own = copy.deepcopy(backend)
        special = {"bos_token": "<bos>", "eos_token": "<|endoftext|>", **special}
        if adds_bos:
            bos = special["bos_token"]
            own.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, own.token_to_id(bos))]
            )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, **special)
        tokenizer.chat_template = template
        return tokenizer

    return make


WORDS = [
    *("the", "red", "fox", "owl", "hare", "counts", "one", "two", "three"),
    *("do", "you", "like", "?", "play", "ing", "##ing", "##s"),
]


@pytest.fixture(scope="session")
def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Word pieces as a BERT has them: [CLS] text [SEP], or [CLS] text [SEP] pair [SEP] with token types."""
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*specials, *WORDS])}
    own = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    own.normalizer = normalizers.BertNormalizer()
    own.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    own.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    named = {f"{name[1:-1].lower()}_token": name for name in specials}
    return PreTrainedTokenizerFast(
        tokenizer_object=own, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **named
    )
