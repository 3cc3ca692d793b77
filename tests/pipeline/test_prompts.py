from __future__ import annotations

import pytest

from potstill.pipeline.prompts import HELD_OUT_CHARACTERS, dump_examples, make_prompts
from potstill.types import Example

LONG = "The red fox counts: one, two, three. " * 6
SHORT = "The owl."
CHAT = [
    {"role": "user", "content": "Say one."},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "Thanks."},
]


@pytest.fixture
def make(tiny_tokenizer):
    def prompts(*documents, count=4, tokens=5, longest=512):
        return make_prompts(documents, tiny_tokenizer, count=count, tokens=tokens, longest=longest)

    return prompts


def test_a_text_is_cut_and_goes_on_as_it_really_did(make, tiny_tokenizer):
    (found,) = make({"text": LONG})
    assert LONG.startswith(found.prompt + found.reference)
    assert len(tiny_tokenizer(found.prompt)["input_ids"]) == 5
    assert len(tiny_tokenizer(found.reference)["input_ids"]) == 5


def test_texts_long_enough_come_first_and_short_ones_are_halved(make):
    found = make({"text": SHORT}, {"text": LONG}, tokens=10)
    assert LONG.startswith(found[0].prompt)
    assert found[1].prompt + found[1].reference == SHORT
    assert found[1].reference


def test_a_chat_is_cut_before_its_last_answer(make):
    (found,) = make({"messages": CHAT})
    assert found.prompt.endswith("And two?<|im_end|>\n<|im_start|>assistant\n")
    assert "one<|im_end|>" in found.prompt
    assert found.reference == "two"


def test_chats_that_are_too_long_or_answer_nothing_are_passed_over(make):
    assert make({"messages": CHAT}, longest=8) == []
    assert make({"messages": [{"role": "assistant", "content": "Hello"}]}) == []


def test_a_template_that_begins_the_text_does_so_once(tiny_tokenizer, tiny_llama):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    begin = ("<|im_start|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    (found,) = make_prompts([{"messages": CHAT}], tokenizer, count=1, tokens=5, longest=512)
    assert tokenizer(found.prompt)["input_ids"][:2].count(tokenizer.bos_token_id) == 1


def test_no_more_prompts_than_asked_for_and_none_that_are_blank(make):
    assert len(make(*[{"text": LONG}] * 9, count=3)) == 3
    assert make({"text": LONG}, count=0) == []
    assert make({"text": " "}, {"text": ""}) == []


def test_documents_are_kept_as_they_are_up_to_a_length():
    text = Example("a", text="x" * (HELD_OUT_CHARACTERS + 5))
    chat = Example("b", messages=tuple(CHAT))
    assert dump_examples([text, chat]) == [{"text": "x" * HELD_OUT_CHARACTERS}, {"messages": CHAT}]
