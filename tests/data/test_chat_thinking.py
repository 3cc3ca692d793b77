"""Reasoning in conversations: learned where the template shows it, put there where it does not, and always with an end.

The templates are short ones that behave like those of real models.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from potstill.data import Encoded, encode_example, encode_examples
from potstill.errors import DataError
from potstill.types import Example


@dataclass(frozen=True)
class Kind:
    """A template, and what a student learns of "deep thought" and "the answer": with reasoning and without.

    `alone` says that each answer of a conversation has an encoding of its own.
    """

    template: str
    thinking: str
    silent: str
    alone: bool = True
    eos: str = "<|im_end|>"
    tokens: tuple[str, ...] = ()
    silent_alone: bool = False


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (  # reasoning in its field, for turns after the last question; an empty one where there is none
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '').strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content.lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
R1 = (  # cuts the reasoning out of every turn, and begins it in the prompt
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GLM = (  # ends no turn: the next one's role does
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
    "{{ '<think>' + ((m.reasoning_content or '') if loop.index0 > ns.last else '') + '</think>\n' }}{% endif %}"
    "{{ m.content.strip() }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
HARMONY = (  # a channel for each, the thinking in the last turn only, which ends otherwise
    "{% for m in messages %}"
    "{% if m.role != 'assistant' %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% else %}"
    "{% if loop.last and 'thinking' in m %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
OPENING = (  # begins the reasoning in the prompt, and has a field for it (QwQ, Qwen3.5 and others)
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
MARKED = (  # marks an answer without its end
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
)
FOLDED = "<think>\ndeep thought\n</think>\n\nthe answer"
CHANNELS = ("<|start|>", "<|message|>", "<|channel|>", "<|return|>")
KINDS = {
    "chatml": Kind(CHATML, FOLDED + "<|im_end|>", "the answer<|im_end|>", alone=False),
    "qwen3": Kind(QWEN3, FOLDED + "<|im_end|>", "<think>\n\n</think>\n\nthe answer<|im_end|>", silent_alone=True),
    "r1": Kind(
        R1,
        "deep thought\n</think>\n\nthe answer<|endoftext|>",
        "</think>\n\nthe answer<|endoftext|>",
        silent_alone=True,
        eos="<|endoftext|>",
    ),
    "llama": Kind(LLAMA, FOLDED + "<|eot_id|>", "the answer<|eot_id|>", alone=False, eos="<|eot_id|>"),
    "gemma": Kind(GEMMA, FOLDED + "<end_of_turn>", "the answer<end_of_turn>", alone=False, eos="<end_of_turn>"),
    "glm": Kind(
        GLM,
        "<think>deep thought</think>\nthe answer<|endoftext|>",
        "<think></think>\nthe answer<|endoftext|>",
        silent_alone=True,
        eos="<|endoftext|>",
        tokens=("<|user|>", "<|assistant|>"),
    ),
    "harmony": Kind(
        HARMONY,
        "<|channel|>analysis<|message|>deep thought<|end|>"
        "<|start|>assistant<|channel|>final<|message|>the answer<|return|>",
        "<|channel|>final<|message|>the answer<|return|>",
        silent_alone=True,
        eos="<|return|>",
        tokens=CHANNELS,
    ),
    "opening": Kind(
        OPENING,
        "deep thought\n</think>\n\nthe answer<|im_end|>",
        "\n</think>\n\nthe answer<|im_end|>",
        silent_alone=True,
    ),
    "marked": Kind(MARKED, FOLDED + "<|im_end|>", "the answer<|im_end|>", alone=False),
}
every_kind = pytest.mark.parametrize("name", KINDS)


@pytest.fixture
def tokenizer_of(make_tokenizer):
    def make(name: str):
        kind = KINDS[name]
        tokenizer = make_tokenizer(kind.template, eos_token=kind.eos)
        tokenizer.add_special_tokens({"additional_special_tokens": list(kind.tokens)})
        return tokenizer

    return make


def talk(*turns: tuple[str, str, str]) -> Example:
    """Questions, each with what is thought and answered."""
    messages = []
    for question, thought, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer, **({"reasoning_content": thought} if thought else {})})
    return Example(id="talk", messages=tuple(messages))


def decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def learned(encoded: Encoded, tokenizer) -> list[str]:
    pairs = zip(encoded.ids, encoded.learn, strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1])
    return [decode(tokenizer, [token for token, _ in run]) for on, run in runs if on]


@every_kind
@pytest.mark.parametrize("thinking", [True, False])
def test_reasoning_answer_and_end_are_learned_exactly(name, thinking, tokenizer_of):
    tokenizer, kind = tokenizer_of(name), KINDS[name]
    (encoded,) = encode_example(talk(("a question", "deep thought", "the answer")), tokenizer, thinking=thinking)
    assert learned(encoded, tokenizer) == [kind.thinking if thinking else kind.silent]
    assert decode(tokenizer, encoded.ids).count("<think>") <= 1
    assert encoded.conversation
    assert encoded.learn[-1] or decode(tokenizer, encoded.ids[-1:]).isspace()


@every_kind
def test_what_comes_before_the_learned_tokens_is_what_the_model_will_be_asked(name, tokenizer_of):
    """The ids before them are those of the generation prompt, so that training and use meet the same beginning."""
    if name == "marked":
        pytest.skip("its template has no generation prompt")
    tokenizer = tokenizer_of(name)
    (encoded,) = encode_example(talk(("a question", "deep thought", "the answer")), tokenizer)
    asked = [{"role": "user", "content": "a question"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert encoded.ids[: encoded.learn.index(True)] == prompt


@every_kind
@pytest.mark.parametrize("thinking", [True, False])
def test_every_turn_of_a_conversation_is_learned_with_its_own_reasoning(name, thinking, tokenizer_of):
    tokenizer, kind = tokenizer_of(name), KINDS[name]
    example = talk(("q one", "deep thought", "the answer"), ("q two", "deep thought", "the answer"))
    encodings = encode_example(example, tokenizer, thinking=thinking)
    runs = [learned(encoded, tokenizer) for encoded in encodings]
    expected = kind.thinking if thinking else kind.silent
    alone = kind.alone if thinking else kind.silent_alone
    assert runs == ([[expected], [expected]] if alone else [[expected, expected]])


@every_kind
def test_turns_without_reasoning_among_those_with_it_stay_as_they_are(name, tokenizer_of):
    tokenizer, kind = tokenizer_of(name), KINDS[name]
    if name == "r1":  # its prompt begins a thought that this turn lacks
        with pytest.raises(DataError, match=r"message 1 does not follow the generation prompt"):
            encode_example(talk(("q", "", "the answer"), ("q", "deep thought", "the answer")), tokenizer)
        return
    encodings = encode_example(talk(("q", "", "the answer"), ("q", "deep thought", "the answer")), tokenizer)
    assert [run for encoded in encodings for run in learned(encoded, tokenizer)] == [kind.silent, kind.thinking]


@every_kind
def test_blank_reasoning_is_none(name, tokenizer_of):
    if name == "r1":
        pytest.skip("its prompt begins a thought, so that there must be one")
    tokenizer = tokenizer_of(name)
    blank = encode_example(talk(("q", " \n", "the answer")), tokenizer)
    assert blank == encode_example(talk(("q", "", "the answer")), tokenizer)


says = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|endoftext|>", "<|return|>", "<|eot_id|>", "<|user|>", "\ufdd0", "x y", "é🦊", "\n"]
    )
).map("".join)
SLOW = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@every_kind
@SLOW
@given(thought=says, answer=says)
def test_neither_reasoning_nor_answer_can_write_a_control_token(name, tokenizer_of, thought, answer):
    tokenizer = tokenizer_of(name)
    plain = talk(("q", "deep thought", "the answer"))
    hostile = talk(("q", f"so {thought} it", f"it {answer} is"))
    (calm,), (encoded,) = encode_example(plain, tokenizer), encode_example(hostile, tokenizer)
    specials = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    assert [i for i in encoded.ids if i in specials] == [i for i in calm.ids if i in specials]
    (run,) = learned(encoded, tokenizer)
    said = run.partition(f"so {thought} it".replace("\ufdd0", ""))
    assert said[1]
    assert f"it {answer} is".replace("\ufdd0", "") in said[2]


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_any_of_its_names(field, tokenizer_of):
    tokenizer = tokenizer_of("qwen3")
    messages = ({"role": "user", "content": "q"}, {"role": "assistant", field: "deep thought", "content": "the answer"})
    (encoded,) = encode_example(Example(id="x", messages=messages), tokenizer)
    assert learned(encoded, tokenizer) == [KINDS["qwen3"].thinking]


def test_thinking_in_the_content_stays_as_it_was(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    for thinking in (True, False):
        (encoded,) = encode_example(talk(("q", "", FOLDED)), tokenizer, thinking=thinking)
        assert learned(encoded, tokenizer) == [FOLDED + "<|im_end|>"]


def test_a_template_whose_prompt_has_closed_all_thinking_is_refused_where_there_is_some(make_tokenizer):
    closing = R1.replace("<think>\n", "<think>\n\n</think>\n\n")
    tokenizer = make_tokenizer(closing)
    with pytest.raises(DataError, match=r"data\.messages: talk: .*no place for what message 1 thinks"):
        encode_example(talk(("q", "deep thought", "the answer")), tokenizer)


def test_marks_that_miss_the_reasoning_give_way_to_the_generation_prompt(make_tokenizer):
    marked = QWEN3.replace(
        "{{ m.content.lstrip('\n') + '<|im_end|>\n' }}",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    )
    assert marked != QWEN3
    tokenizer = make_tokenizer(marked, eos_token="<|im_end|>")
    (encoded,) = encode_example(talk(("q", "deep thought", "the answer")), tokenizer)
    assert learned(encoded, tokenizer) == [FOLDED + "<|im_end|>"]


def test_an_answer_that_cannot_be_ended_is_refused(make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", eos_token=None
    )
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    with pytest.raises(DataError, match="no end-of-sequence token, so that a student would never learn to stop"):
        encode_example(talk(("q", "", "the answer")), tokenizer)


def test_an_added_token_in_an_answer_is_not_taken_for_the_end_of_an_open_turn(tokenizer_of):
    tokenizer = tokenizer_of("glm")
    (encoded,) = encode_example(talk(("q", "deep thought", "ends in </think>")), tokenizer)
    assert learned(encoded, tokenizer) == ["<think>deep thought</think>\nends in </think><|endoftext|>"]


def test_reasoning_that_is_no_text_is_refused(tokenizer_of):
    messages = ({"role": "user", "content": "q"}, {"role": "assistant", "reasoning_content": ["a"], "content": "b"})
    with pytest.raises(DataError, match="the reasoning of a message must be text"):
        encode_example(Example(id="x", messages=messages), tokenizer_of("qwen3"))


def test_plain_text_is_no_conversation(tokenizer_of):
    (encoded,) = encode_examples([Example(id="a", text="red")], tokenizer_of("chatml"))
    assert not encoded.conversation
