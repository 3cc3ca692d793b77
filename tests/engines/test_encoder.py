"""Padding changes no answer, packed is alone, and what is gathered is what the model itself says there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from potstill.engines import EncoderEngine, TrainableEncoder, pool_states, read_encoder, score_layer
from potstill.engines.encoder import masked_head
from potstill.errors import ModelError
from potstill.types import IGNORE, Batch, Offer, Role, Wants

ROLES = [Role.MASKED, Role.CLASSIFIER, Role.TOKEN_CLASSIFIER, Role.ENCODER]


class Words:
    """As much of a tokenizer as an engine asks for: 90 tokens."""

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(90)}


def logits_of(view):
    return view.final_ND @ view.head.weight_VD.T + (0.0 if view.head.bias_V is None else view.head.bias_V)


def answers(view, role):
    return view.pooled_BD if role is Role.ENCODER else view.final_ND


def spoken_everywhere(batch: Batch, role: Role) -> Batch:
    """Words and masks are spoken of at all positions, texts at their first."""
    return replace(batch, taught_BT=batch.segments_BT > 0) if role in (Role.MASKED, Role.TOKEN_CLASSIFIER) else batch


def one_by_one(batch: Batch) -> list[Batch]:
    """Every document alone, without padding, its answers at the positions where the batch has them."""
    found = []
    for row, segments_T in enumerate(batch.segments_BT):
        for segment in range(1, int(segments_T.max()) + 1):
            part = segments_T == segment
            cut = replace(batch.rows(row, row + 1), segments_BT=torch.ones(1, int(part.sum()), dtype=torch.int64))
            cells = {name: getattr(cut, name)[:, part] for name in ("ids_BT", "targets_BT")}
            taught_BT = None if cut.taught_BT is None else cut.taught_BT[:, part]
            found.append(replace(cut, **cells, taught_BT=taught_BT))
    return found


@pytest.mark.parametrize("role", ROLES)
@torch.no_grad()
def test_padding_changes_no_answer(build, encoder, role, texts):
    model, batch = build(encoder, role), spoken_everywhere(texts, role)
    view = read_encoder(model, batch, role, pooling="mean")
    alone = [answers(read_encoder(model, part, role, pooling="mean"), role) for part in one_by_one(batch)]
    assert_close(answers(view, role), torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert float(answers(view, role).std()) > 0.02


@pytest.mark.parametrize("role", ROLES)
@torch.no_grad()
def test_the_tokens_within_padding_play_no_part(build, encoder, role, texts):
    model, batch = build(encoder, role), spoken_everywhere(texts, role)
    other = replace(batch, ids_BT=torch.where(batch.segments_BT > 0, batch.ids_BT, 1 + batch.ids_BT.flip(1) % 90))
    before, after = (answers(read_encoder(model, one, role), role) for one in (batch, other))
    assert_close(before, after, rtol=0, atol=1e-6)


@pytest.mark.parametrize("eager", [False, True])
@torch.no_grad()
def test_packed_is_alone(build, encoder, packed, eager):
    """ModernBERT's sliding windows of 2 to either side included: the texts are longer."""
    model, batch = build(encoder, Role.MASKED, eager=eager), replace(packed, taught_BT=packed.segments_BT > 0)
    wants = Wants(layers=(1, 3))
    view = read_encoder(model, batch, Role.MASKED, wants)
    alone = [read_encoder(model, part, Role.MASKED, wants) for part in one_by_one(batch)]
    assert_close(view.final_ND, torch.cat([one.final_ND for one in alone]), rtol=1e-4, atol=1e-5)
    for layer in wants.layers:
        together = view.hidden[layer][batch.segments_BT > 0]
        assert_close(together, torch.cat([one.hidden[layer][0] for one in alone]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_masks_never_let_documents_see_each_other(build, encoder, packed):
    model = build(encoder, Role.MASKED, eager=True)
    view = read_encoder(model, packed, Role.MASKED, Wants(attentions=(1, 2, 3)))
    apart_BTT = packed.segments_BT[:, :, None] != packed.segments_BT[:, None, :]
    for maps_BHTT in view.attentions.values():
        assert float((maps_BHTT * apart_BTT[:, None]).max()) == 0.0
        assert_close(maps_BHTT.sum(-1), torch.ones(2, 4, 16))


@torch.no_grad()
def test_a_head_on_the_gathered_states_is_the_models_logits_there(build, encoder, texts):
    model, batch = build(encoder, Role.MASKED), spoken_everywhere(texts, Role.MASKED)
    expected_BTV = model(input_ids=batch.ids_BT, attention_mask=batch.segments_BT).logits
    view = read_encoder(model, batch, Role.MASKED)
    assert_close(logits_of(view), expected_BTV[batch.segments_BT > 0], rtol=1e-4, atol=1e-5)
    assert_close(model(input_ids=batch.ids_BT, attention_mask=batch.segments_BT).logits, expected_BTV, rtol=0, atol=0)


@torch.no_grad()
def test_scores_of_classes_are_the_models_own_of_the_rows_that_speak(build, encoder, texts):
    model = build(encoder, Role.CLASSIFIER, num_labels=4)
    ids_BT = texts.ids_BT.masked_fill(texts.segments_BT == 0, model.config.pad_token_id)
    expected_BC = model(input_ids=ids_BT, attention_mask=texts.segments_BT).logits
    assert_close(read_encoder(model, texts, Role.CLASSIFIER).final_ND, expected_BC)
    labelled = replace(texts, taught_BT=None)
    assert_close(read_encoder(model, labelled, Role.CLASSIFIER).final_ND, expected_BC[[0, 2]])


@torch.no_grad()
def test_words_are_answered_where_they_begin(build, texts):
    model = build("bert", Role.TOKEN_CLASSIFIER, num_labels=5)
    firsts = torch.zeros_like(texts.segments_BT)
    firsts[0, [1, 4]], firsts[1, 2] = 1, 1
    batch = replace(texts, targets_BT=torch.where(firsts == 1, 3, IGNORE), taught_BT=None)
    expected_BTC = model(input_ids=batch.ids_BT, attention_mask=batch.segments_BT).logits
    expected_NC = torch.stack([expected_BTC[0, 1], expected_BTC[0, 4], expected_BTC[1, 2]])
    assert_close(read_encoder(model, batch, Role.TOKEN_CLASSIFIER).final_ND, expected_NC)


@torch.no_grad()
def test_vectors_of_texts_are_what_their_names_say(build, texts):
    model = build("bert", Role.ENCODER)
    states_BTD = model(input_ids=texts.ids_BT, attention_mask=texts.segments_BT).last_hidden_state
    means_BD = torch.stack([states_BTD[0].mean(0), states_BTD[1, :5].mean(0), states_BTD[2, 0]])
    for pooling, expected_BD in (("cls", states_BTD[:, 0]), ("mean", means_BD)):
        raw = read_encoder(model, texts, Role.ENCODER, pooling=pooling, normalise=False)
        assert_close(raw.pooled_BD, expected_BD, rtol=1e-4, atol=1e-6)
        unit = read_encoder(model, texts, Role.ENCODER, pooling=pooling)
        assert_close(unit.pooled_BD, expected_BD / expected_BD.norm(dim=-1, keepdim=True), rtol=1e-4, atol=1e-6)
        assert (unit.final_ND.shape, unit.head) == ((3, 0), None)


def test_a_mean_is_taken_in_float32_and_of_nothing_is_zero():
    states_BTD = torch.full((2, 300, 1), 1.0078125, dtype=torch.bfloat16)
    pooled_BD = pool_states(states_BTD, torch.tensor([[True] * 300, [False] * 300]), "mean")
    assert pooled_BD.tolist() == [[1.0078125], [0.0]]


@torch.no_grad()
def test_a_classifiers_vector_is_the_first_tokens_final_state(build, encoder, texts):
    model = build(encoder, Role.CLASSIFIER)
    view = read_encoder(model, texts, Role.CLASSIFIER, Wants(pooled=True, layers=(3,)))
    assert_close(view.pooled_BD, view.hidden[3][:, 0])
    assert read_encoder(model, texts, Role.CLASSIFIER).pooled_BD is None


def test_who_has_no_vector_says_so(build, packed):
    with pytest.raises(ModelError, match="BertForMaskedLM has no vector for a text in the role masked_lm"):
        read_encoder(build("bert", Role.MASKED), packed, Role.MASKED, Wants(pooled=True))


@torch.no_grad()
def test_the_second_of_two_texts_is_told_apart_where_the_architecture_can(build, texts):
    paired = replace(texts, types_BT=(torch.arange(9) > 3).long().expand(3, -1))
    for family, differs in (("bert", True), ("distilbert", False)):
        model = build(family, Role.CLASSIFIER)
        one, two = (read_encoder(model, batch, Role.CLASSIFIER).final_ND for batch in (texts, paired))
        assert torch.equal(one, two) != differs


def test_several_documents_a_row_have_no_single_answer(build, packed):
    for role in (Role.CLASSIFIER, Role.ENCODER):
        with pytest.raises(ValueError, match="a row of the batch holds several documents"):
            read_encoder(build("bert", role), packed, role)


def test_packed_rows_need_position_ids(build, packed, monkeypatch):
    model = build("bert", Role.MASKED)
    own = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, attention_mask=None: own(input_ids, attention_mask))
    with pytest.raises(ModelError, match="BertForMaskedLM takes no position_ids"):
        read_encoder(model, packed, Role.MASKED)


@pytest.mark.parametrize("role", ROLES)
def test_gradients_reach_the_body_and_the_head(build, encoder, role, texts):
    model = build(encoder, role)
    view = TrainableEncoder(model, role, "fp32")(spoken_everywhere(texts, role))
    answer = logits_of(view) if role is Role.MASKED else answers(view, role)
    (answer * torch.randn_like(answer)).sum().backward()
    embeddings = model.get_input_embeddings().weight.grad
    assert float(embeddings.norm()) > 0.0
    if role in (Role.CLASSIFIER, Role.TOKEN_CLASSIFIER):
        assert float(score_layer(model).weight.grad.norm()) > 0.0


def test_bf16_keeps_master_weights_and_scores_in_float32(build, encoder, texts):
    model = build(encoder, Role.CLASSIFIER, num_labels=4)
    view = TrainableEncoder(model, Role.CLASSIFIER, "bf16")(texts)
    exact_NC = TrainableEncoder(model, Role.CLASSIFIER, "fp32")(texts).final_ND
    assert view.final_ND.dtype == torch.float32
    assert not torch.equal(view.final_ND, view.final_ND.bfloat16().float()), "rounded on the way"
    assert float(((view.final_ND - exact_NC).norm() / exact_NC.norm()).detach()) < 0.05
    view.final_ND.square().sum().backward()
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}


def test_bf16_gives_bf16_states_to_the_head(build, packed):
    assert TrainableEncoder(build("bert", Role.MASKED), Role.MASKED, "bf16")(packed).final_ND.dtype == torch.bfloat16


def test_an_engine_speaks_where_it_is_to_and_learns_nothing(build, texts):
    model = build("bert", Role.MASKED).train()
    taught = replace(texts, targets_BT=torch.full_like(texts.ids_BT, 5), taught_BT=texts.segments_BT > 0)
    signal = EncoderEngine(model, Words(), Role.MASKED).read(taught, Wants(final=True, layers=(1,)))
    assert len(signal.logits.rows_ND) == 15
    assert signal.logits.head.vocabulary == 90
    assert not model.training
    assert not signal.hidden[1].requires_grad
    view = TrainableEncoder(model, Role.MASKED, "fp32")(taught)
    assert len(view.final_ND) == 27
    assert_close(view.final_ND[taught.taught_N].detach(), signal.logits.rows_ND)


@pytest.mark.parametrize("role", ROLES)
def test_an_engine_offers_what_it_gives(build, role, texts):
    engine = EncoderEngine(build("bert", role, eager=True), Words(), role)
    pooled = Offer.POOLED in engine.offers
    wants = Wants(final=True, layers=(1,), attentions=(1,), vectors=(1,), pooled=pooled)
    signal = engine.read(texts, wants)
    assert (signal.logits is not None) == (Offer.LOGITS in engine.offers)
    assert (signal.pooled_BD is not None) == pooled
    assert {Offer.HIDDEN, Offer.ATTENTION, Offer.VECTORS} < engine.offers
    assert Offer.TEXT not in engine.offers
    assert len(signal.hidden) == len(signal.attentions) == len(signal.vectors) == 1


def test_the_size_of_an_answer(build):
    sizes = {Role.MASKED: 90, Role.CLASSIFIER: 4, Role.TOKEN_CLASSIFIER: 4, Role.ENCODER: 32}
    for role, size in sizes.items():
        assert EncoderEngine(build("bert", role, num_labels=4), Words(), role).vocabulary == size


def test_tokens_are_counted_once_and_not_at_every_batch(build, packed, monkeypatch):
    engine = EncoderEngine(build("bert", Role.MASKED), Words(), Role.MASKED)
    monkeypatch.setattr(Words, "get_vocab", lambda _: pytest.fail("listed again"))
    assert engine.read(packed, Wants(final=True)).logits.head.vocabulary == engine.vocabulary


def test_a_batch_without_answers_gives_none(build, texts):
    silent = replace(texts, targets_BT=torch.full_like(texts.targets_BT, IGNORE), taught_BT=None)
    for role, width in ((Role.MASKED, 32), (Role.CLASSIFIER, 2), (Role.TOKEN_CLASSIFIER, 2)):
        assert read_encoder(build("bert", role), silent, role).final_ND.shape == (0, width)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_a_decoder_classifies_by_its_last_token(build, family, texts):
    model = build(family, Role.CLASSIFIER, pad_token_id=0)
    view = read_encoder(model, texts, Role.CLASSIFIER)
    alone = [read_encoder(model, part, Role.CLASSIFIER).final_ND for part in one_by_one(texts)]
    assert_close(view.final_ND, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_model_of_another_role_is_refused(build, texts):
    with pytest.raises(ModelError, match="BertModel has no linear layer for its 2 classes"):
        read_encoder(build("bert", Role.ENCODER), texts, Role.CLASSIFIER)
    model = build("debertav2", Role.MASKED, legacy=False)
    with pytest.raises(ModelError, match="DebertaV2ForMaskedLM has no linear output layer over its 96 tokens"):
        masked_head(model)
    with pytest.raises(ModelError, match="DebertaV2ForMaskedLM has no linear output layer"):
        read_encoder(model, texts, Role.MASKED)


def test_an_error_while_reading_leaves_the_model_as_it_was(build, texts):
    for role in (Role.MASKED, Role.CLASSIFIER):
        model = build("bert", role)
        layer = model.get_output_embeddings() if role is Role.MASKED else score_layer(model)
        with pytest.raises(IndexError):
            read_encoder(model, replace(texts, ids_BT=texts.ids_BT + 1000), role)
        assert "forward" not in vars(layer)
