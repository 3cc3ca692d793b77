"""Several teachers as one: the mean of their probabilities, weighted by where a document comes from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from potstill.engines import LocalEngine, MixtureEngine, models_of, shares_of
from potstill.errors import RecipeError
from potstill.losses import HeadTerm, distillation_loss
from potstill.types import IGNORE, Batch, Mixture, Sampling, States, Wants

VOCABULARY = 300
SAY = {"code.jsonl": [3.0, 1.0], "talk.jsonl": [0.0, 2.0], "": [1.0, 1.0]}


def tiny(tokenizer: Any, *, rows: int, width: int, seed: int) -> LocalEngine:
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LocalEngine(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), tokenizer)


@pytest.fixture(scope="module")
def engines(tiny_tokenizer) -> list[LocalEngine]:
    """Two models of one tokenizer, of other widths, the heads of which are padded differently."""
    return [tiny(tiny_tokenizer, rows=320, width=32, seed=1), tiny(tiny_tokenizer, rows=304, width=16, seed=2)]


@pytest.fixture
def mixture(engines) -> MixtureEngine:
    return MixtureEngine(engines, SAY[""], lambda source: SAY[source])


@pytest.fixture
def batch() -> Batch:
    """Two rows of documents from both sources, the second with padding."""
    ids_BT = torch.randint(3, VOCABULARY, (2, 12))
    segments_BT = torch.tensor([[1] * 4 + [2] * 5 + [3] * 3, [1] * 7 + [0] * 5])
    targets_BT = torch.where(segments_BT > 0, torch.randint(3, VOCABULARY, (2, 12)), IGNORE)
    targets_BT[0, 2] = targets_BT[1, 0] = IGNORE
    sources = (("code.jsonl", "talk.jsonl", "code.jsonl"), ("talk.jsonl",))
    return Batch(ids_BT, targets_BT, segments_BT, (("a", "b", "c"), ("d",)), sources)


def probabilities(engine: LocalEngine, batch: Batch) -> Tensor:
    """What one model says at every position, by its own forward pass. float64 [B, T, V]."""
    with torch.inference_mode():
        output = engine.model(input_ids=batch.ids_BT, position_ids=batch.positions_BT, use_cache=False)
    return output.logits[..., :VOCABULARY].double().softmax(-1)


def expected(engines: list[LocalEngine], batch: Batch) -> Tensor:
    """The weighted means at the supervised positions, position by position. float64 [N, V]."""
    said = [probabilities(engine, batch) for engine in engines]
    rows = []
    for row, position in batch.supervised_BT.nonzero().tolist():
        weights = SAY[batch.sources[row][int(batch.segments_BT[row, position]) - 1]]
        parts = [weight * one[row, position] for weight, one in zip(weights, said, strict=True)]
        rows.append(sum(parts) / sum(weights))
    return torch.stack(rows)


def spelled_out(mixture: Mixture) -> Tensor:
    mean_NV = torch.zeros(1, dtype=torch.float64)
    for member, weights_N in zip(mixture.members, mixture.weights_NM.double().T, strict=True):
        logits_NV = member.rows_ND.double() @ member.head.weight_VD.double().T
        mean_NV = mean_NV + weights_N[:, None] * logits_NV.softmax(-1)
    return mean_NV


def test_every_position_gets_the_mean_that_its_documents_source_asks_for(mixture, engines, batch):
    said = mixture.read(batch, Wants(final=True)).logits
    assert said.sliced(VOCABULARY).members[0].head.vocabulary == VOCABULARY
    torch.testing.assert_close(spelled_out(said.sliced(VOCABULARY)), expected(engines, batch), rtol=1e-4, atol=1e-6)


def test_the_members_speak_where_the_teacher_is_to_and_not_where_is_supervised(mixture, engines, batch):
    taught_BT = torch.zeros_like(batch.supervised_BT)
    taught_BT[0, 2:7], taught_BT[1, 0] = True, True
    said = mixture.read(replace(batch, taught_BT=taught_BT), Wants(final=True)).logits
    there = replace(batch, targets_BT=torch.where(taught_BT, 3, IGNORE))
    torch.testing.assert_close(spelled_out(said.sliced(VOCABULARY)), expected(engines, there), rtol=1e-4, atol=1e-6)


def test_a_loss_pulls_the_student_to_the_mean_of_each_source(mixture, engines, batch):
    """At equality the loss is zero: a student that says the mean has nothing to learn; one that says a member has."""
    said = mixture.read(batch, Wants(final=True)).logits
    log_mean_NV = expected(engines, batch).log().float()
    head = type(said.members[0].head)(torch.eye(VOCABULARY))
    equal = distillation_loss(States(log_mean_NV, head), None, [HeadTerm("forward_kl")], teacher=said)
    assert float(equal.total) / equal.count == pytest.approx(0.0, abs=1e-5)
    alone_NV = probabilities(engines[0], batch)[batch.supervised_BT].log().float()
    first = distillation_loss(States(alone_NV, head), None, [HeadTerm("forward_kl")], teacher=said)
    assert float(first.total) / first.count > 0.05


def test_who_has_no_say_changes_nothing(engines, batch):
    for weights, member in (([1.0, 0.0], 0), ([0.0, 1.0], 1)):
        lone = MixtureEngine(engines, weights, lambda _, weights=weights: weights)
        said = spelled_out(lone.read(batch, Wants(final=True)).logits.sliced(VOCABULARY))
        alone_NV = probabilities(engines[member], batch)[batch.supervised_BT]
        torch.testing.assert_close(said, alone_NV, rtol=1e-4, atol=1e-6)


def test_hidden_states_are_the_first_members(mixture, engines, batch):
    wants = Wants(layers=(0, 2), vectors=(1,))
    ours, its = mixture.read(batch, replace(wants, final=True)), engines[0].read(batch, wants)
    assert torch.equal(ours.vectors[1].keys_BGTE, its.vectors[1].keys_BGTE)
    assert mixture.read(batch, wants).logits is None
    assert all(torch.equal(ours.hidden[layer], its.hidden[layer]) for layer in (0, 2))
    assert models_of(mixture) == (engines[0].model, engines[1].model)


def greedy(engines: list[LocalEngine], weights: list[float], prompt: str, length: int) -> str:
    """Token by token from the mean of the probabilities, without caches."""
    tokenizer = engines[0].tokenizer
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = list(prompt_ids)
    for _ in range(length):
        whole = torch.tensor([ids])
        lone = Batch(whole, torch.full_like(whole, IGNORE), torch.ones_like(whole))
        mean_V = sum(
            weight * probabilities(engine, lone)[0, -1] for weight, engine in zip(weights, engines, strict=True)
        )
        ids.append(int(mean_V.argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=True))


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.2, 0.8], [1.0, 0.0]])
def test_writing_takes_the_most_probable_token_of_the_mean(engines, weights):
    prompts = ["The red fox counts: one,", "The", "The grey owl counts: one, two, three"]  # padded to one length
    mixture = MixtureEngine(engines, weights, lambda _: weights)
    expected_texts = [greedy(engines, weights, prompt, 10) for prompt in prompts]
    assert mixture.generate(prompts, Sampling(max_new_tokens=10)) == expected_texts
    assert mixture.generate(prompts[1:], Sampling(max_new_tokens=10)) == expected_texts[1:]


def test_writing_leaves_the_members_as_they_were(mixture, engines):
    prompts, sampling = ["The red fox"], Sampling(max_new_tokens=6)
    before = [engine.generate(prompts, sampling) for engine in engines]
    mixture.generate(prompts, sampling)
    assert [engine.generate(prompts, sampling) for engine in engines] == before


def test_samples_follow_the_mean(engines):
    """The first token of 4000 draws: no padded row, and frequencies within five standard errors of the mean."""
    mixture = MixtureEngine(engines, [0.3, 0.7], lambda _: [0.3, 0.7])
    prompt = engines[0].tokenizer("The red fox")["input_ids"]
    ids = torch.tensor([prompt])
    lone = Batch(ids, torch.full_like(ids, IGNORE), torch.ones_like(ids))
    mean_V = 0.3 * probabilities(engines[0], lone)[0, -1] + 0.7 * probabilities(engines[1], lone)[0, -1]
    draws = 4000
    texts = mixture.generate(["The red fox"] * draws, Sampling(max_new_tokens=1, temperature=1.0, min_new_tokens=0))
    tokenizer = engines[0].tokenizer
    likely = mean_V.topk(5)
    for probability, token in zip(likely.values.tolist(), likely.indices.tolist(), strict=True):
        text = tokenizer.decode([token], skip_special_tokens=True)
        same = [i for i in range(VOCABULARY) if tokenizer.decode([i], skip_special_tokens=True) == text]
        share = float(mean_V[same].sum())
        error = 5 * (share * (1 - share) / draws) ** 0.5
        assert texts.count(text) / draws == pytest.approx(share, abs=error), (text, probability)


def test_a_source_on_which_nobody_has_a_say_is_named(engines, batch):
    silent = MixtureEngine(engines, [1.0, 1.0], lambda source: [0.0, 0.0] if source == "talk.jsonl" else [1.0, 1.0])
    with pytest.raises(RecipeError, match=r"^teacher\.members: every weight is 0 for the source 'talk\.jsonl'\. Raise"):
        silent.read(batch, Wants(final=True))


def test_shares_sum_to_one():
    assert shares_of([1.0, 3.0], "x") == [0.25, 0.75]
    assert shares_of([1e6, 0.0], "x") == [1.0, 0.0]


def test_a_batch_that_does_not_know_its_sources_is_refused(mixture, batch):
    with pytest.raises(ValueError, match=r"needs Batch\.sources"):
        mixture.read(Batch(batch.ids_BT, batch.targets_BT, batch.segments_BT), Wants(final=True))
