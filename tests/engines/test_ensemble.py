"""Several classifiers are a mean of probabilities, also where their tokenizers differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from potstill.engines import EncoderEngine, EnsembleEngine, models_of, score_layer
from potstill.errors import ModelError, RecipeError
from potstill.types import Role, Wants

FINAL = Wants(final=True)


@pytest.fixture
def members(build):
    """Three classifiers of three classes."""
    families = (("bert", 1), ("roberta", 2), ("bert", 3))
    models = [build(family, Role.CLASSIFIER, seed=seed, num_labels=3) for family, seed in families]
    return [EncoderEngine(model, None, Role.CLASSIFIER) for model in models]


def test_probabilities_are_averaged_by_weight(members, texts):
    said = [member.read(texts, FINAL).logits.logits_NV.double().softmax(-1) for member in members]
    found = EnsembleEngine(members, [1.0, 2.0, 5.0]).read(texts, FINAL).logits.logits_NV
    assert_close(found.double().exp(), (said[0] + 2 * said[1] + 5 * said[2]) / 8, rtol=1e-4, atol=1e-6)
    assert float((said[0] - said[1]).abs().max()) > 0.1


def test_of_several_labels_each_is_averaged_alone(members, texts):
    said = [member.read(texts, FINAL).logits.logits_NV.double().sigmoid() for member in members]
    found = EnsembleEngine(members, [1.0, 2.0, 5.0], multi_label=True).read(texts, FINAL).logits.logits_NV
    assert_close(found.double().sigmoid(), (said[0] + 2 * said[1] + 5 * said[2]) / 8, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_certain_stay_finite(members, texts, multi_label):
    for member, sign in zip(members, (1.0, 1.0, -1.0), strict=True):
        score_layer(member.model).bias.data = sign * torch.tensor([200.0, -200.0, 0.0])
    found = EnsembleEngine(members, [1.0, 1.0, 2.0], multi_label=multi_label).read(texts, FINAL).logits.logits_NV
    assert found.isfinite().all()


@pytest.mark.parametrize("multi_label", [False, True])
def test_one_with_all_the_say_is_that_one(members, texts, multi_label):
    alone = members[1].read(texts, FINAL).logits.logits_NV
    found = EnsembleEngine(members, [0.0, 3.0, 0.0], multi_label=multi_label).read(texts, FINAL).logits.logits_NV
    normed = alone if multi_label else alone.log_softmax(-1)
    assert_close(found, normed, rtol=1e-4, atol=1e-5)


def test_members_with_other_tokenizers_read_their_own_batches(members, texts):
    longer = replace(
        texts,
        ids_BT=torch.cat((texts.ids_BT, texts.ids_BT), 1),
        targets_BT=torch.cat((texts.targets_BT, torch.full_like(texts.targets_BT, -100)), 1),
        segments_BT=torch.ones(3, 18, dtype=torch.int64),
        taught_BT=torch.cat((texts.taught_BT, torch.zeros_like(texts.taught_BT)), 1),
    )
    ensemble = EnsembleEngine(members[:2], [1.0, 1.0])
    found = ensemble.read_many([texts, longer], Wants(final=True, layers=(1,)))
    said = [member.read(one, FINAL).logits.logits_NV for member, one in zip(members, (texts, longer), strict=False)]
    mean_NC = (said[0].softmax(-1) + said[1].softmax(-1)) / 2
    assert_close(found.logits.logits_NV.exp(), mean_NC, rtol=1e-4, atol=1e-6)
    assert found.hidden[1].shape == (3, 9, 32), "what lies behind the answers is the first member's"
    with pytest.raises(ValueError, match="got 1 batches for 2 members"):
        ensemble.read_many([texts], FINAL)
    with pytest.raises(ValueError, match=r"the members gave \[3, 2\] answers"):
        ensemble.read_many([texts, longer.rows(0, 2)], FINAL)


def test_what_is_not_asked_is_not_said(members, texts):
    signal = EnsembleEngine(members, [1.0, 1.0, 1.0]).read(texts, Wants(pooled=True))
    assert signal.logits is None
    assert signal.pooled_BD.shape == (3, 32)


def test_members_are_classifiers_of_the_same_classes_in_one_order(build, members):
    names = {0: "LABEL_1", 1: "LABEL_0", 2: "LABEL_2"}
    other = EncoderEngine(build("bert", Role.CLASSIFIER, id2label=names), None, Role.CLASSIFIER)
    with pytest.raises(ModelError, match=r"^teacher\.members\[1\]\.model: its classes .*\(LABEL_1 is the first"):
        EnsembleEngine([members[0], other], [1.0, 1.0])
    with pytest.raises(ModelError, match="made for classification, token_classification"):
        EnsembleEngine(
            [members[0], EncoderEngine(build("bert", Role.TOKEN_CLASSIFIER), None, Role.TOKEN_CLASSIFIER)], [1.0, 1.0]
        )
    with pytest.raises(RecipeError, match="every weight is 0"):
        EnsembleEngine(members, [0.0, 0.0, 0.0])


def test_its_models_are_the_members(members):
    ensemble = EnsembleEngine(members, [1.0, 1.0, 1.0])
    assert models_of(ensemble) == tuple(member.model for member in members)
    assert ensemble.vocabulary == 3
