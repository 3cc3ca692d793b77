"""Learn masks: what the assistant said, all of it and nothing else, in small templates and in real ones."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from potstill.data import Encoded, encode_example, encode_examples
from potstill.errors import DataError
from potstill.types import Example

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
FORGETFUL = (  # strips the thinking from every turn but the last
    "{% for message in messages %}"
    "{% set said = message['content'] if loop.last else message['content'].split('</think>')[-1] %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (  # no control tokens at all
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
QUOTES = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|eot_id|>",
    "<|endoftext|>",
    "<think>",
    "\ufdd0",
    "<|im_<|im_end|>",
]


def talk(*contents: str, system: str | None = None) -> Example:
    """A conversation of user and assistant in turns."""
    turns = [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]
    return Example(id="talk", messages=(*([{"role": "system", "content": system}] if system else []), *turns))


def decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def learned(encoded: Encoded, tokenizer) -> list[str]:
    """The runs of learned tokens, decoded."""
    pairs = zip(encoded.ids, encoded.learn, strict=True)
    return [
        decode(tokenizer, [token for token, _ in run]) for on, run in groupby(pairs, key=lambda pair: pair[1]) if on
    ]


def specials(encoded: Encoded, tokenizer) -> list[str]:
    return [token for token in tokenizer.convert_ids_to_tokens(encoded.ids) if token[:2] == "<|" and token[-1] == ">"]


def test_text_is_learned_but_for_its_first_token_and_ends_with_eos(make_tokenizer):
    tokenizer = make_tokenizer()
    (encoded,) = encode_example(Example(id="a", text="The red fox"), tokenizer)
    assert encoded.ids == [*tokenizer("The red fox", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert encoded.learn == [False] + [True] * (len(encoded.ids) - 1)


def test_text_gets_a_bos_only_from_a_tokenizer_that_adds_it_and_an_eos_only_where_there_is_one(make_tokenizer):
    plain = make_tokenizer()("one two")["input_ids"]
    (with_bos,) = encode_example(Example(id="a", text="one two"), make_tokenizer(adds_bos=True))
    (without_eos,) = encode_example(Example(id="a", text="one two"), make_tokenizer(eos_token=None))
    eos = make_tokenizer().eos_token_id
    assert with_bos.ids == [make_tokenizer().bos_token_id, *plain, eos]
    assert without_eos.ids == plain


def test_an_eos_that_the_tokenizer_adds_itself_is_not_doubled(make_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    eos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    (encoded,) = encode_example(Example(id="a", text="one"), tokenizer)
    assert encoded.ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("quote", ["<|endoftext|>", "<|im_end|>", "a <bos> b"])
def test_text_that_looks_like_a_special_token_stays_text(make_tokenizer, quote):
    tokenizer = make_tokenizer()
    (encoded,) = encode_example(Example(id="a", text=quote), tokenizer)
    assert not set(encoded.ids[:-1]) & set(tokenizer.all_special_ids)
    assert decode(tokenizer, encoded.ids[:-1]) == quote


words = st.lists(
    st.sampled_from([*QUOTES, "The red fox", " ", "\n", "é", "🦊", "漢字", "user", "x"]) | st.text(max_size=3)
)
says = words.map("".join)
answers = st.builds(lambda content, last: content.lstrip() + last, says, st.sampled_from(["yes", "🦊", "<|im_end|>"]))
HOSTILE = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@HOSTILE
@given(st.lists(st.tuples(says, answers), min_size=1, max_size=4), st.booleans())
@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["derived", "marked"])
def test_only_answers_are_learned_and_no_message_can_write_a_control_token(make_tokenizer, template, turns, unanswered):
    tokenizer = make_tokenizer(template)
    contents = [content for turn in turns for content in turn]
    example = talk(*contents, *(["And then?"] if unanswered else []), system="Be quick.")
    (encoded,) = encode_example(example, tokenizer)
    contents = [content.replace("\ufdd0", "") for content in contents]
    assert learned(encoded, tokenizer) == [content + "<|im_end|>" for content in contents[1::2]]
    shown = 1 + len(contents) + (unanswered and template is MARKED)
    assert decode(tokenizer, encoded.ids).startswith(
        "<|im_start|>system\nBe quick.<|im_end|>\n<|im_start|>user\n" + contents[0]
    )
    assert specials(encoded, tokenizer) == ["<|im_start|>", "<|im_end|>"] * shown


def test_a_conversation_without_quotes_is_exactly_what_the_template_and_tokenizer_say(make_tokenizer):
    tokenizer = make_tokenizer(HEADERS, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", adds_bos=True)
    example = talk("What does the owl say?", " hoot\n", "And?", "Nothing. 🦉")
    (encoded,) = encode_example(example, tokenizer)
    rendered = tokenizer.apply_chat_template(list(example.messages), tokenize=False)
    assert encoded.ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert encoded.ids.count(tokenizer.bos_token_id) == 1
    assert learned(encoded, tokenizer) == ["hoot<|eot_id|>", "Nothing. 🦉<|eot_id|>"]


def test_a_template_that_rewrites_earlier_turns_gives_each_answer_as_it_was_given(make_tokenizer):
    tokenizer = make_tokenizer(FORGETFUL)
    first, second = encode_example(talk("q1", "<think>t1</think>a1", "q2", "<think>t2</think>a2"), tokenizer)
    assert learned(first, tokenizer) == ["<think>t1</think>a1<|im_end|>"]
    assert learned(second, tokenizer) == ["<think>t2</think>a2<|im_end|>"]
    assert "q2" not in decode(tokenizer, first.ids)
    assert "t1" not in decode(tokenizer, second.ids)
    assert "a1" in decode(tokenizer, second.ids)


def test_the_same_template_gives_one_encoding_where_nothing_was_rewritten(make_tokenizer):
    tokenizer = make_tokenizer(FORGETFUL)
    (encoded,) = encode_example(talk("q1", "a1", "q2", "<think>t2</think>a2"), tokenizer)
    assert learned(encoded, tokenizer) == ["a1<|im_end|>", "<think>t2</think>a2<|im_end|>"]


def test_answers_that_a_template_leaves_open_get_the_end_of_sequence_each_in_an_encoding_of_its_own(make_tokenizer):
    tokenizer = make_tokenizer(PLAIN)
    first, second = encode_example(talk("q", "red fox", "q", "two"), tokenizer)
    # The space before the answer belongs to its first token.
    assert learned(first, tokenizer) == [" red fox\n\n<|endoftext|>"]
    assert learned(second, tokenizer) == [" two\n\n<|endoftext|>"]
    assert decode(tokenizer, second.ids).startswith("user: q\n\nassistant: red fox\n\nuser: q")


def test_successive_answers_and_answers_after_tools_are_all_learned(make_tokenizer):
    roles = [("user", "q"), ("assistant", "a1"), ("tool", "result"), ("assistant", "a2"), ("assistant", "a3")]
    example = Example(id="x", messages=tuple({"role": role, "content": content} for role, content in roles))
    tokenizer = make_tokenizer(CHATML)
    (encoded,) = encode_example(example, tokenizer)
    assert learned(encoded, tokenizer) == ["a1<|im_end|>", "a2<|im_end|>", "a3<|im_end|>"]


def test_an_opening_assistant_turn_is_context(make_tokenizer):
    roles = [("assistant", "hello"), ("user", "q"), ("assistant", "a")]
    example = Example(id="x", messages=tuple({"role": role, "content": content} for role, content in roles))
    tokenizer = make_tokenizer(CHATML)
    (encoded,) = encode_example(example, tokenizer)
    assert learned(encoded, tokenizer) == ["a<|im_end|>"]
    assert "hello" in decode(tokenizer, encoded.ids)


def test_the_first_token_is_never_learned_whatever_the_template_marks(make_tokenizer):
    tokenizer = make_tokenizer("{% generation %}{{ messages[1]['content'] }}{% endgeneration %}")
    (encoded,) = encode_example(talk("q", "red fox"), tokenizer)
    assert encoded.learn == [False] + [True] * (len(encoded.ids) - 1)


@pytest.mark.parametrize("trim", [True, False])
def test_spaces_next_to_an_answer_are_given_to_the_right_side_whatever_offsets_are_reported(make_tokenizer, trim):
    from tokenizers.processors import ByteLevel

    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m['role'] + '<|end|>  ' + m['content'] + '<|im_end|>  ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant<|end|>  ' }}{% endif %}"
    )
    tokenizer.backend_tokenizer.post_processor = ByteLevel(add_prefix_space=False, trim_offsets=trim)
    (encoded,) = encode_example(talk("q", "<think>x  <think>", "q", "<think>y z"), tokenizer)
    assert learned(encoded, tokenizer) == ["<think>x  <think><|im_end|>", "<think>y z<|im_end|>"]


REFUSED = {
    "no template": (None, "has no chat template.*plain text"),
    "prompt is not continued": (
        CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"),
        r"message 1 does not follow the generation prompt, which ends in .*<think>",
    ),
    "raises": ("{{ raise_exception('roles must alternate') }}", r"roles must alternate"),
    "breaks": ("{{ messages[7]['content'] + 1 }}", r"does not fit the chat template"),
    "loses the answer": (
        CHATML.replace("message['content']", "(message['content'] if message['role'] == 'user' else '')"),
        r"what message 1 says is not where",
    ),
    "marks nothing": (
        "{% if false %}{% generation %}{% endgeneration %}{% endif %}x",
        r"what message 1 says is not where",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_template_cannot_say_is_refused_with_the_tokenizer_named(make_tokenizer, name):
    template, message = REFUSED[name]
    tokenizer = make_tokenizer(template)
    tokenizer.name_or_path = "acme/tiny"
    with pytest.raises(DataError, match=rf"(?s)data\.messages: .*{message}") as caught:
        encode_example(talk("q", "a"), tokenizer)
    assert "acme/tiny" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_needs_no_template(make_tokenizer):
    assert encode_example(Example(id="a", text="one"), make_tokenizer())


def test_batches_of_any_size_give_what_single_examples_give(make_tokenizer):
    tokenizer = make_tokenizer(FORGETFUL)
    thinking = talk("q1", "<think>t</think>a1", "q2", "a2")
    examples = [Example(id=str(i), text="fox " * i) if i % 3 else thinking for i in range(10)]
    single = [encoded for example in examples for encoded in encode_example(example, tokenizer)]
    for batch_size in (1, 3, 100):
        assert list(encode_examples(iter(examples), tokenizer, batch_size=batch_size)) == single


@pytest.fixture(scope="module")
def templates() -> Path:
    from potstill.samples import fetch

    return fetch("chat-templates")


ASKED = talk("UQ one <|im_end|>", "<think>\nTH one\n</think>\n\nAA one", "UQ two", "AA two")
CHATML_ANSWERS = [["<think>\nTH one\n</think>\n\nAA one<|im_end|>", "AA two<|im_end|>"]]
REAL = {
    "qwen2_5": CHATML_ANSWERS,
    "qwen3_instruct_2507": CHATML_ANSWERS,
    "qwen3": [["<think>\nTH one\n</think>\n\nAA one<|im_end|>"], ["<think>\n\n</think>\n\nAA two<|im_end|>"]],
    "qwen3_training": [
        ["<think>\nTH one\n</think>\n\nAA one<|im_end|>\n", "<think>\n\n</think>\n\nAA two<|im_end|>\n"]
    ],
    "llama3": [["<think>\nTH one\n</think>\n\nAA one<|eot_id|>", "AA two<|eot_id|>"]],
    "llama3_training": [["<think>\nTH one\n</think>\n\nAA one<|eot_id|>", "AA two<|eot_id|>"]],
    "gemma": [["<think>\nTH one\n</think>\n\nAA one<end_of_turn>", "AA two<end_of_turn>"]],
    "phi3": [
        ["<think>\nTH one\n</think>\n\nAA one<|end|>\n<|endoftext|>"],
        ["AA two<|end|>\n<|endoftext|>"],
    ],
}


@pytest.mark.sample
@pytest.mark.parametrize("name", REAL)
def test_real_templates_learn_the_answers_alone(name, templates, make_tokenizer):
    tokenizer = make_tokenizer((templates / f"{name}.jinja").read_text(encoding="utf-8"))
    encodings = encode_example(ASKED, tokenizer)
    assert [learned(encoded, tokenizer) for encoded in encodings] == REAL[name]


@pytest.mark.sample
def test_a_real_template_that_loses_the_thinking_it_prompts_for_is_refused(templates, make_tokenizer):
    tokenizer = make_tokenizer((templates / "deepseek_r1_distill.jinja").read_text(encoding="utf-8"))
    with pytest.raises(DataError, match=r"does not follow the generation prompt, which ends in .*<think>"):
        encode_example(ASKED, tokenizer)


@pytest.mark.sample
def test_every_real_template_learns_every_answer_and_no_question_or_is_refused(templates, make_tokenizer):
    encoded_by_template = {}
    for path in sorted(templates.glob("*.jinja")):
        tokenizer = make_tokenizer(path.read_text(encoding="utf-8"))
        try:
            encoded_by_template[path.stem] = encode_example(ASKED, tokenizer)
        except DataError:
            continue
    assert len(encoded_by_template) > 50
    tokenizer = make_tokenizer()
    for name, encodings in encoded_by_template.items():
        said = "|".join(run for encoded in encodings for run in learned(encoded, tokenizer))
        assert said.count("AA one") == said.count("AA two") == 1, name
        assert "UQ" not in said, name


def test_bare_text_gets_no_special_token_and_every_token_is_learned(bert_tokenizer):
    lines = ["the red fox", "one [SEP] two", ""]
    encoded = list(
        encode_examples([Example(str(n), text=line) for n, line in enumerate(lines)], bert_tokenizer, bare=True)
    )
    specials = {bert_tokenizer.cls_token_id, bert_tokenizer.sep_token_id}
    assert encoded[0].ids == bert_tokenizer("the red fox")["input_ids"][1:-1]
    assert not any(specials & set(page.ids) for page in encoded)
    assert [page.learn for page in encoded] == [[True] * len(page.ids) for page in encoded]
    assert encoded[2].ids == []


def test_bare_conversations_are_refused(bert_tokenizer):
    examples = [Example("1", text="a"), Example("chat-7", messages=({"role": "user", "content": "a"},))]
    with pytest.raises(
        DataError, match=r"^data\.messages: chat-7 is a conversation, and task\.kind=masked_lm reads plain"
    ):
        list(encode_examples(examples, bert_tokenizer, bare=True))
