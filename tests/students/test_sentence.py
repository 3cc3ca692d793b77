"""What sentence-transformers reads: its published layout, and the model still alone as before."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModel

from potstill.errors import ModelError
from potstill.students import save_sentence_encoder, save_student


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_folder_says_how_states_become_a_vector(encoder_of, tiny_tokenizer, tmp_path, family, normalise, pooling):
    model = encoder_of(family, "body")
    save_student(model, tiny_tokenizer, tmp_path)
    for _ in range(2):  # what is there already is written again
        save_sentence_encoder(tmp_path, pooling=pooling, normalise=normalise, length=48)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")][: 3 if normalise else 2]
    assert read(tmp_path / "modules.json") == [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    assert (tmp_path / "2_Normalize").is_dir() == normalise
    assert read(tmp_path / "sentence_bert_config.json") == {"max_seq_length": 48, "do_lower_case": False}
    assert read(tmp_path / "1_Pooling" / "config.json") == {
        "word_embedding_dimension": 32,
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    loaded = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(
        ModelError, match=r"holds no config\.json: needs a saved encoder\. Save the student there first"
    ):
        save_sentence_encoder(tmp_path, pooling="mean", normalise=True, length=16)
    assert list(tmp_path.iterdir()) == []
