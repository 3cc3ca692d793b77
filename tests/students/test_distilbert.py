"""A BERT in the clothes of a DistilBERT: the same numbers wherever it has a counterpart, and else an error."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForMaskedLM, AutoModelForTokenClassification, AutoTokenizer

from potstill.errors import ModelError
from potstill.students import cut_layers, save_student, to_distilbert
from potstill.students.blocks import find_blocks


@pytest.fixture
def mask_BT(ids_BT):
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 6:] = 0
    return mask_BT


@torch.no_grad()
def answers(model, ids_BT, mask_BT):
    return model.eval()(ids_BT, attention_mask=mask_BT)[0][mask_BT > 0]


@pytest.mark.parametrize(
    ("head", "name"), [("body", ""), ("masked", "ForMaskedLM"), ("words", "ForTokenClassification")]
)
def test_it_says_what_the_bert_says(encoder_of, ids_BT, mask_BT, head, name):
    bert = cut_layers(encoder_of("bert", head), [0, 3, 5])
    student = to_distilbert(bert)
    assert type(student).__name__ == f"DistilBert{name or 'Model'}"
    assert len(find_blocks(student)[1]) == 3
    assert_close(answers(student, ids_BT, mask_BT), answers(bert, ids_BT, mask_BT), rtol=1e-5, atol=1e-5)


def test_every_hidden_state_of_a_classifier_is_the_berts_and_its_head_is_fresh_and_seeded(encoder_of, ids_BT, mask_BT):
    bert = encoder_of("bert", "classes")
    state = torch.get_rng_state()
    student, same, other = (to_distilbert(bert, seed=seed).eval() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        both = [
            model.base_model(ids_BT, attention_mask=mask_BT, output_hidden_states=True).hidden_states
            for model in (student, bert)
        ]
    assert len(both[0]) == 7
    for ours, theirs in zip(*both, strict=True):
        assert_close(ours[mask_BT > 0], theirs[mask_BT > 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(student.classifier.weight, same.classifier.weight)
    assert not torch.equal(student.pre_classifier.weight, other.pre_classifier.weight)
    assert student.config.id2label == {0: "no", 1: "maybe", 2: "yes"}


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_the_embedding_matrix_where_it_was(encoder_of, ids_BT, mask_BT, tied):
    bert = encoder_of("bert", "masked", tie_word_embeddings=tied)
    student = to_distilbert(bert)
    shared = student.vocab_projector.weight is student.distilbert.embeddings.word_embeddings.weight
    assert shared == tied == student.config.tie_word_embeddings
    assert_close(answers(student, ids_BT, mask_BT), answers(bert, ids_BT, mask_BT), rtol=1e-5, atol=1e-5)


def test_the_bert_is_left_alone_and_nothing_is_shared_with_it(encoder_of):
    bert = encoder_of("bert", "masked").to(torch.bfloat16)
    before = {name: value.clone() for name, value in bert.state_dict().items()}
    student = to_distilbert(bert)
    assert student.dtype == torch.bfloat16
    for parameter in student.parameters():
        parameter.data.fill_(7.0)
    assert all(torch.equal(value, before[name]) for name, value in bert.state_dict().items())


def test_dropout_activation_and_labels_go_along(encoder_of):
    changes = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2, "hidden_act": "relu", "pad_token_id": 5}
    bert = encoder_of("bert", "words", **changes)
    bert.config.classifier_dropout, bert.config.problem_type = 0.25, "multi_label_classification"
    config = to_distilbert(bert).config
    assert (config.dropout, config.attention_dropout, config.seq_classif_dropout) == (0.3, 0.2, 0.25)
    assert (config.activation, config.pad_token_id, config.problem_type) == ("relu", 5, "multi_label_classification")
    assert config.label2id == {"no": 0, "maybe": 1, "yes": 2}


def test_a_saved_one_loads_with_transformers_alone(encoder_of, tiny_tokenizer, tmp_path, ids_BT, mask_BT):
    for head, auto in (("masked", AutoModelForMaskedLM), ("words", AutoModelForTokenClassification)):
        bert = cut_layers(encoder_of("bert", head), [1, 4])
        save_student(to_distilbert(bert), tiny_tokenizer, tmp_path / head)
        loaded, notes = auto.from_pretrained(tmp_path / head, output_loading_info=True)
        assert (list(notes["missing_keys"]), list(notes["unexpected_keys"])) == ([], [])
        assert_close(answers(loaded, ids_BT, mask_BT), answers(bert, ids_BT, mask_BT), rtol=1e-5, atol=1e-5)


def test_the_tokenizer_of_a_student_gives_what_the_student_takes(encoder_of, tiny_tokenizer, tmp_path):
    names, bert = ["input_ids", "token_type_ids", "attention_mask"], encoder_of("bert", "masked")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = list(names)
    for model, folder in ((bert, "bert"), (to_distilbert(bert), "distilbert")):
        save_student(model, tokenizer, tmp_path / folder)
    given = {folder: list(AutoTokenizer.from_pretrained(tmp_path / folder)("fox")) for folder in ("bert", "distilbert")}
    assert given == {"bert": names, "distilbert": ["input_ids", "attention_mask"]}
    assert tokenizer.model_input_names == names


@pytest.mark.parametrize("family", ["roberta", "electra", "distilbert"])
def test_other_architectures_are_refused(encoder_of, family):
    with pytest.raises(
        ModelError, match=r"^student\.architecture=distilbert: the teacher is a \w+ForMaskedLM, needs one of"
    ):
        to_distilbert(encoder_of(family, "masked"))


@pytest.mark.parametrize("change", [{"layer_norm_eps": 1e-5}, {"is_decoder": True}])
def test_a_bert_without_a_counterpart_is_refused(encoder_of, change):
    with pytest.raises(ModelError, match=r"^student\.architecture=distilbert: the teacher has layer_norm_eps="):
        to_distilbert(encoder_of("bert", "masked", **change))
