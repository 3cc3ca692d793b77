"""Loading refuses in one line; generating in batches is generating one by one."""

from __future__ import annotations

import copy
import json
import shutil
import socket

import pytest
import torch
from huggingface_hub import constants
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config

from potstill.engines import LocalEngine, find_folder, load_model, load_tokenizer, pick_device
from potstill.engines.local import _hub_answers, load_config
from potstill.errors import ModelError
from potstill.types import Batch, Sampling, Wants

CPU = torch.device("cpu")
PROMPTS = [("The red fox counts: one, two. " * (1 + i % 3))[: 5 + 3 * i] for i in range(18)]


@pytest.fixture(autouse=True)
def _nothing_known_of_the_hub():
    """A process asks once; every test here is one of its own."""
    _hub_answers.cache_clear()
    yield
    _hub_answers.cache_clear()


@pytest.fixture
def engine(tiny_llama):
    return LocalEngine(load_model(str(tiny_llama), "fp32", CPU, "teacher.model"), load_tokenizer(str(tiny_llama), "t"))


def talkative(family: str):
    """A model that does not repeat its last word as tied random models do, with its positions learned or rotary."""
    if family == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        return GPT2LMHeadModel(GPT2Config(vocab_size=320, eos_token_id=2, tie_word_embeddings=False, **shape))
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=320, eos_token_id=2, initializer_range=0.3, **shape))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prompts_in_batches_are_completed_as_one_by_one(tiny_tokenizer, family):
    model = talkative(family)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    engine, sampling = LocalEngine(model, tiny_tokenizer), Sampling(max_new_tokens=6)
    together = engine.generate(PROMPTS, sampling)
    assert together == [engine.generate([prompt], sampling)[0] for prompt in PROMPTS]
    assert len(set(together)) > 8


def test_no_prompts_give_no_completions(engine):
    assert engine.generate([], Sampling()) == []


def test_an_empty_prompt_starts_at_the_begin_token(engine):
    sampling = Sampling(max_new_tokens=6)
    empty, beside = engine.generate([""], sampling), PROMPTS[3]
    assert empty == engine.generate([engine.tokenizer.bos_token], sampling)
    assert engine.generate(["", ""], sampling) == empty * 2
    assert engine.generate(["", beside], sampling) == [*empty, *engine.generate([beside], sampling)]


def test_an_empty_prompt_without_any_begin_token_is_refused(engine):
    tokenizer = engine.tokenizer
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ModelError, match="an empty prompt needs a begin token"):
        engine.generate([""], Sampling())


def test_a_publishers_taste_does_not_count_and_is_kept(engine):
    plain = engine.generate(PROMPTS[:4], Sampling(max_new_tokens=12))
    taste = engine.model.generation_config
    taste.repetition_penalty, taste.no_repeat_ngram_size, taste.do_sample, taste.temperature = 9.0, 1, True, 5.0
    assert engine.generate(PROMPTS[:4], Sampling(max_new_tokens=12)) == plain
    assert engine.model.generation_config is taste


@pytest.mark.parametrize("least", [0, 3, 5])
def test_no_completion_ends_before_the_smallest_number_of_new_tokens(engine, least):
    """Of a model that would end at once; every new token is one pass."""
    passes = []

    def end(head, inputs, logits_BTV):
        passes.append(head)
        return logits_BTV.index_fill(-1, torch.tensor([engine.tokenizer.eos_token_id]), 1e4)

    engine.model.lm_head.register_forward_hook(end)
    engine.generate(PROMPTS[:3], Sampling(max_new_tokens=5, min_new_tokens=least))
    assert len(passes) == min(5, least + 1)


def test_sampling_draws_from_the_whole_vocabulary(engine):
    words = engine.generate(["The"] * 320, Sampling(max_new_tokens=1, temperature=50.0))
    assert len(set(words)) > 60, "50 tokens are what transformers draws from unless it is told otherwise"


def test_sampling_depends_on_the_seed_alone(engine):
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(engine.generate(PROMPTS[:3], Sampling(max_new_tokens=8, temperature=1.5)))
    assert draws[0] == draws[1] != draws[2]


def test_a_prompt_beyond_the_models_positions_keeps_its_end(tiny_tokenizer):
    sizes = {"vocab_size": 320, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}
    engine = LocalEngine(GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=2, bos_token_id=1)), tiny_tokenizer)
    sampling = Sampling(max_new_tokens=8)
    prompt = "The red fox counts: one, two, three, four. " * 9
    kept = tiny_tokenizer.decode(tiny_tokenizer(prompt)["input_ids"][-16:])
    assert tiny_tokenizer(kept)["input_ids"] == tiny_tokenizer(prompt)["input_ids"][-16:]
    assert engine.generate([prompt], sampling) == engine.generate([kept], sampling)


def test_an_engine_cuts_the_padding_of_its_head(engine):
    ids_BT = torch.tensor([[5, 6, 7]])
    head = engine.read(Batch(ids_BT, ids_BT, torch.ones_like(ids_BT)), Wants(final=True)).logits.head
    assert (head.vocabulary, engine.model.lm_head.weight.shape[0]) == (300, 320)


def test_devices():
    assert pick_device("cpu", "training.device") == CPU
    assert pick_device("auto", "training.device").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for absent in ("cuda:77", "nonsense", "meta", ""):
        with pytest.raises(
            ModelError, match=rf"^training\.device: {absent} is not available here .*Use auto or cpu\.$"
        ):
            pick_device(absent, "training.device")


def copied(tiny_llama, tmp_path, **changes):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def refusal(folder) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), "fp32", CPU, "teacher.model")
    message = str(caught.value)
    assert message.startswith(f"teacher.model: {folder} ")
    assert "\n" not in message
    assert "Give a " in message
    return message


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_weights_file_cut_short_is_refused(tiny_llama, tmp_path, share):
    file = copied(tiny_llama, tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    assert "cannot be loaded" in refusal(file.parent)


def test_a_folder_without_weights_or_config_is_refused(tiny_llama, tmp_path):
    folder = copied(tiny_llama, tmp_path)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_size": 64}, "cannot be loaded"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"num_attention_heads": 5}, "attention heads"),
        ({"model_type": "no-such-model"}, "no-such-model"),
        ({"num_hidden_layers": 5, "layer_types": None}, "lacks weights of LlamaForCausalLM (9; model.layers.4."),
        ({"tie_word_embeddings": False}, "lacks weights of LlamaForCausalLM (1; lm_head.weight"),
    ],
)
def test_a_config_that_is_not_the_weights_is_refused_and_nothing_made_up(tiny_llama, tmp_path, changes, word):
    assert word in refusal(copied(tiny_llama, tmp_path, **changes))


def test_broken_json_is_refused(tiny_llama, tmp_path):
    folder = copied(tiny_llama, tmp_path)
    (folder / "config.json").write_text("{broken")
    assert "JSON" in refusal(folder)
    (folder / "tokenizer.json").write_text("{broken")
    with pytest.raises(ModelError, match=r"^student: .* cannot be loaded"):
        load_tokenizer(str(folder), "student")


def test_what_is_no_causal_language_model_is_refused(tmp_path):
    T5Config(vocab_size=32, d_model=16, d_ff=16, num_layers=1, num_heads=2).save_pretrained(tmp_path / "t5")
    assert "AutoModelForCausalLM" in refusal(tmp_path / "t5")


def test_paths_that_are_not_there_are_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("potstill.engines.local._hub_answers", lambda: pytest.fail("asked the hub"))
    (tmp_path / "file").write_text("x")
    assert "there is a file where a folder is needed" in refusal(tmp_path / "file")
    for absent in (str(tmp_path / "absent"), "./absent", "../absent", "~/absent", "a/b/c"):
        assert "there is nothing where a folder is needed" in refusal(absent)


@pytest.fixture
def no_network(monkeypatch):
    """Every look-up of a name fails, as without a network; gives the list of names looked up."""
    asked = []

    def fail(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return asked


@pytest.mark.parametrize("load", [load_config, load_tokenizer, lambda m, k: load_model(m, "fp32", CPU, k)])
def test_without_a_network_a_hub_id_is_refused_after_one_try(no_network, load, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"^teacher\.model: nobody/nothing .*the Hugging Face hub cannot be reached"):
        load("nobody/nothing", "teacher.model")
    assert len(no_network) <= 1


@pytest.fixture
def cached(tiny_llama, tmp_path, monkeypatch):
    """The tiny model as the hub's cache holds it; gives the folder of its files."""
    commit = "0" * 40
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_llama, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return repository / "snapshots" / commit


def test_without_a_network_the_cache_is_enough_and_the_hub_is_asked_once(no_network, cached):
    assert load_model("someone/tiny", "fp32", CPU, "teacher.model").config.num_hidden_layers == 4
    assert len(load_tokenizer("someone/tiny", "teacher.model")) == 300
    assert len(no_network) == 1


def test_a_model_is_found_where_it_lies_without_asking_the_hub(no_network, cached, tiny_llama):
    assert find_folder("someone/tiny") == cached
    assert find_folder(str(tiny_llama)) == tiny_llama
    assert [find_folder(absent) for absent in ("someone/else", "no/such/folder", str(cached / "absent"))] == [None] * 3
    assert no_network == []


def test_dtypes_are_what_is_asked(tiny_llama):
    assert load_model(str(tiny_llama), "bf16", CPU, "teacher.model").dtype == torch.bfloat16
    assert load_model(str(tiny_llama), "fp32", CPU, "teacher.model").dtype == torch.float32


def test_a_model_that_fails_the_probe_is_not_loaded(tiny_llama, monkeypatch):
    def refuse(model, key):
        raise ModelError(f"{key}: {type(model).__name__} refused")

    monkeypatch.setattr("potstill.engines.local.probe", refuse)
    with pytest.raises(ModelError, match=r"^student\.model: LlamaForCausalLM refused"):
        load_model(str(tiny_llama), "fp32", CPU, "student.model")


def test_attention_maps_are_had_of_a_model_that_was_loaded_for_them(tiny_llama):
    ids_BT = torch.tensor([[5, 6, 7]])
    batch = Batch(ids_BT, ids_BT, torch.ones_like(ids_BT))
    tokenizer, wants = load_tokenizer(str(tiny_llama), "t"), Wants(attentions=(4,))
    eager = LocalEngine(load_model(str(tiny_llama), "fp32", CPU, "teacher.model", eager=True), tokenizer)
    assert eager.read(batch, wants).attentions[4].shape == (1, 4, 3, 3)
    plain = LocalEngine(load_model(str(tiny_llama), "fp32", CPU, "teacher.model"), tokenizer)
    with pytest.raises(ModelError, match="returned no attention maps"):
        plain.read(batch, wants)


def small(tokenizer, positions=24, **more):
    """A model with few positions, which it has learned one by one: beyond them it fails."""
    sizes = {"vocab_size": 320, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": positions}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=2, bos_token_id=1, tie_word_embeddings=False, **more))
    return LocalEngine(model, tokenizer)


def saying(engine, token):
    """The same engine, whose next token is always this one."""

    def say(head, inputs, logits_BTV):
        return logits_BTV.index_fill(-1, torch.tensor([token]), 1e4)

    engine.model.get_output_embeddings().register_forward_hook(say)
    return engine


@pytest.mark.parametrize("wanted", [8, 23, 24, 1000])
def test_an_answer_is_to_the_whole_prompt_and_in_the_room_that_is_left(tiny_tokenizer, wanted):
    engine = small(tiny_tokenizer)
    read = []
    engine.model.transformer.wte.register_forward_hook(lambda _, inputs, __: read.append(inputs[0]))
    prompt = tiny_tokenizer.decode(tiny_tokenizer("The red fox counts: one, two, three. " * 9)["input_ids"][-18:])
    count = len(tiny_tokenizer(prompt)["input_ids"])
    (answer,) = engine.answer([prompt], Sampling(max_new_tokens=wanted, min_new_tokens=wanted))
    assert read[0].tolist() == [tiny_tokenizer(prompt)["input_ids"]]
    assert len(read) == min(wanted, 24 - count) > 0
    assert answer.finish == "length"


def test_a_prompt_that_leaves_no_room_has_no_answer_and_its_neighbours_have_theirs(tiny_tokenizer):
    engine, sampling = small(tiny_tokenizer), Sampling(max_new_tokens=24)
    prompts = ["The fox", "The red fox counts: one, two, three, four. " * 9, "One", "The red fox"]
    answers = engine.answer(prompts, sampling)
    assert (answers[1].text, answers[1].finish) == ("", "no room")
    assert answers == [engine.answer([prompt], sampling)[0] for prompt in prompts]


@pytest.mark.parametrize("room", [5, 31, 32, 100, 511, 32_700])
def test_of_little_room_no_more_than_a_sixteenth_is_left_unused(tiny_tokenizer, room):
    engine = small(tiny_tokenizer)
    engine.model.config.n_positions = room + 7
    assert room * 15 / 16 < engine._room(7, room + 1) <= room
    assert engine._room(7, room) == room


def test_an_answer_tells_whether_it_ended_by_itself(tiny_tokenizer):
    sampling = Sampling(max_new_tokens=5)
    assert {one.finish for one in saying(small(tiny_tokenizer), 2).answer(["a", "b"], sampling)} == {"stop"}
    assert {one.finish for one in saying(small(tiny_tokenizer), 77).answer(["a", "b"], sampling)} == {"length"}


def test_what_the_template_ends_a_turn_with_ends_an_answer_of_a_base_model(tiny_tokenizer):
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end != 299
    engine = small(tiny_tokenizer)
    engine.model.generation_config.eos_token_id = 299
    (answer,) = saying(engine, end).answer(["The"], Sampling(max_new_tokens=5))
    assert (answer.text, answer.finish) == ("", "stop")
    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    engine.tokenizer = plain
    assert engine.answer(["The"], Sampling(max_new_tokens=5))[0].finish == "length"


def test_what_pads_an_answer_that_has_ended_is_no_part_of_it(tiny_tokenizer):
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = bare.pad_token = bare.eos_token = None
    engine = small(bare)
    prompts = ["The red fox", "One"]
    alone = [engine.generate([prompt], Sampling(max_new_tokens=6)) for prompt in prompts]
    engine.model.generation_config.eos_token_id = bare(alone[0][0])["input_ids"][1]
    assert [[text] for text in engine.generate(prompts, Sampling(max_new_tokens=6))] == [
        engine.generate([prompt], Sampling(max_new_tokens=6)) for prompt in prompts
    ]
