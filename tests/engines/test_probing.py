"""Good models pass and are left as they were; a model of which a law does not hold is refused."""

from __future__ import annotations

import pytest
import torch

from potstill.engines import probe_encoder
from potstill.errors import ModelError
from potstill.types import Role


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("role", [Role.MASKED, Role.CLASSIFIER, Role.TOKEN_CLASSIFIER, Role.ENCODER])
def test_a_good_model_passes_and_is_left_as_it_was(build, encoder, role, dtype):
    model = build(encoder, role).to(dtype).train()
    before, state = {name: p.clone() for name, p in model.named_parameters()}, torch.get_rng_state()
    probe_encoder(model, role, "student.model", pooling="mean")
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


@pytest.mark.parametrize("role", [Role.CLASSIFIER, Role.TOKEN_CLASSIFIER, Role.ENCODER])
def test_deberta_reads_texts_but_no_packed_rows(build, role):
    probe_encoder(build("debertav2", role), role, "teacher.model")
    with pytest.raises(ModelError, match=r"^teacher\.model: DebertaV2ForMaskedLM cannot be read as masked_lm"):
        probe_encoder(build("debertav2", Role.MASKED, legacy=True), Role.MASKED, "teacher.model")


def test_a_model_that_ignores_its_mask_is_refused(build):
    model = build("bert", Role.CLASSIFIER)
    model.bert.register_forward_pre_hook(
        lambda _, args, options: (args, {**options, "attention_mask": None}), with_kwargs=True
    )
    with pytest.raises(ModelError, match=r"^t: BertForSequenceClassification cannot .*padding behind a text changes"):
        probe_encoder(model, Role.CLASSIFIER, "t")


def test_a_model_whose_logits_are_not_its_head_is_refused(build):
    model = build("bert", Role.MASKED)
    model.cls.register_forward_hook(lambda _, __, logits: logits * 1.5 if logits.shape[-1] == 96 else logits)
    with pytest.raises(ModelError, match="its logits are not its output layer applied to the states before it"):
        probe_encoder(model, Role.MASKED, "t")


def test_a_model_that_ignores_restarting_positions_is_refused(build):
    model = build("bert", Role.MASKED)
    model.bert.register_forward_pre_hook(
        lambda _, args, options: (args, {**options, "position_ids": None}), with_kwargs=True
    )
    with pytest.raises(ModelError, match="texts that share a packed row see each other"):
        probe_encoder(model, Role.MASKED, "t")


def test_nan_is_no_agreement(build):
    model = build("bert", Role.CLASSIFIER)
    model.classifier.bias.data[0] = float("nan")
    with pytest.raises(ModelError, match="relative difference nan"):
        probe_encoder(model, Role.CLASSIFIER, "t")


def test_a_model_with_four_tokens_can_be_probed(build):
    probe_encoder(build("bert", Role.MASKED, vocab_size=4), Role.MASKED, "t")
