"""A classifier without attention: the mean of static token embeddings, and a linear layer over it.

The embeddings are distilled from a teacher's encoder by model2vec, then learn with the layer; the folder that comes of
it needs model2vec alone. Refuses losses over layers or attention, of which it has none.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, linear
from transformers import PreTrainedTokenizerFast

from potstill.errors import MissingExtra, ModelError, RecipeError
from potstill.types import Batch, StudentView, Wants

__all__ = [
    "StaticAnswers",
    "StaticClassifier",
    "StaticTokens",
    "check_static_packages",
    "distil_static",
    "load_static",
    "save_static",
    "tokenizer_of_rows",
]


def check_static_packages(*names: str) -> None:
    """Raises MissingExtra for the first of these packages (default: all that a static student needs) that is absent."""
    for name in names or ("model2vec", "skeletoken", "sklearn"):
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(
                f"static: {name} is not installed. Run `pip install 'potstill[static]'`, or remove `static`."
            )


@dataclass(frozen=True, slots=True)
class StaticTokens:
    """Tokens with a vector each, whatever stands around them.

    vectors_VD  float32 [V, D]
    tokenizer   turns a text into ids below V; adds no special tokens, neither pads nor cuts
    unknown     id of the token for what the vocabulary lacks, which counts as nothing; None where there is none
    """

    vectors_VD: Tensor
    tokenizer: Tokenizer
    unknown: int | None


class StaticClassifier(nn.Module):
    """scores(text) = W m + b, where m is the mean of the embeddings of the text's known tokens, 0 where it has none.

    The embeddings start as `tokens.vectors_VD` (copied), W [C, D] and b [C] at zero: at first every class is as likely
    as any other. Joulin et al. (2016), arXiv:1607.01759, section 2, with a vocabulary of subwords.
    """

    def __init__(self, tokens: StaticTokens, classes: int) -> None:
        super().__init__()
        self.vectors_VD = nn.Parameter(tokens.vectors_VD.clone())
        self.weight_CD = nn.Parameter(torch.zeros(classes, tokens.vectors_VD.shape[1]))
        self.bias_C = nn.Parameter(torch.zeros(classes))
        self.unknown = tokens.unknown

    def forward(self, batch: Batch, wants: Wants = Wants()) -> StudentView:  # noqa: B008 - frozen
        """Scores [N, C] of the rows that are spoken of, and the means [B, D] of all rows; one document a row.

        Raises ModelError where more is wanted, or where answers are asked for elsewhere than at position 0.
        """
        if wants.layers or wants.attentions or wants.vectors:
            raise ModelError(
                f"static: {wants} asks for insides, but a static student has neither layers nor attention. Train it "
                "on answers and pooled vectors only; remove its other losses."
            )
        spoken_BT = batch.spoken_BT
        if spoken_BT[:, 1:].any():
            raise ModelError(
                "static: answers are wanted within texts, but a static student has one answer a text. Use "
                "task.kind=classification, or remove `static`."
            )
        known_BT = batch.segments_BT > 0
        if self.unknown is not None:
            known_BT = known_BT & (batch.ids_BT != self.unknown)
        mean_BD = self.mean(batch.ids_BT[known_BT], known_BT.sum(1))
        return StudentView(self.scores(mean_BD[spoken_BT[:, 0]]), None, pooled_BD=mean_BD)

    def mean(self, ids_M: Tensor, lengths_B: Tensor) -> Tensor:
        """Means [B, D] of the embeddings of consecutive runs of `ids_M`, int64 [M]; run b has lengths_B[b] of them."""
        starts_B = lengths_B.cumsum(0) - lengths_B
        return embedding_bag(ids_M, self.vectors_VD, starts_B, mode="mean")

    def scores(self, mean_ND: Tensor) -> Tensor:
        """Scores [N, C] of means."""
        return linear(mean_ND, self.weight_CD, self.bias_C)


@dataclass(frozen=True, slots=True)
class StaticAnswers:
    """A static classifier with all that turns a text into answers.

    tokenizer    as in StaticTokens
    labels       names of the classes, in the order of the scores
    multi_label  whether scores are logits of labels, one by one (sigmoid), instead of one distribution (softmax)
    """

    model: StaticClassifier
    tokenizer: Tokenizer
    labels: tuple[str, ...]
    multi_label: bool = False

    @torch.inference_mode()
    def query(self, texts: Sequence[str]) -> Tensor:
        """Scores of whole texts, however long: float32 [len(texts), C]."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        unknown, device = self.model.unknown, self.model.bias_C.device
        known = [[token for token in encoding.ids if token != unknown] for encoding in encodings]
        ids_M = torch.tensor(list(chain.from_iterable(known)), dtype=torch.long, device=device)
        lengths_B = torch.tensor([len(ids) for ids in known], dtype=torch.long, device=device)
        return self.model.scores(self.model.mean(ids_M, lengths_B))


def distil_static(teacher: Any, tokenizer: Any, *, dimensions: int, device: str = "cpu") -> StaticTokens:
    """A vector [dimensions] for every token of the teacher, by model2vec: `distill_from_model` at its defaults.

    Each token goes through the encoder alone, between the tokens that frame a text; the mean of its last hidden states
    is cut to its principal components, and scaled by a / (a + p), a = 1e-4, where p is the token's share by Zipf's law.
    Tulkens and van Dongen (2024), doi:10.5281/zenodo.17270888; the weights are those of Arora et al. (2017), "A simple
    but tough-to-beat baseline for sentence embeddings", algorithm 1. `teacher` is a transformers model, with or without
    a head, and stays as it is. Raises MissingExtra, RecipeError where it has not so many components, ModelError for a
    tokenizer that is not a fast one.
    """
    check_static_packages()
    from model2vec.distill import distill_from_model

    width = teacher.config.get_text_config().hidden_size
    if dimensions > width:
        raise RecipeError(
            f"static.dimensions={dimensions}: the teacher's states have width {width}. Ask for {width} or less."
        )
    if not tokenizer.is_fast:
        raise ModelError(
            f"static: {type(tokenizer).__name__} is no fast tokenizer, which model2vec needs. Use a teacher that has "
            "one (a tokenizer.json), or remove `static`."
        )
    static = distill_from_model(
        _unnamed(teacher.base_model), tokenizer, device=device, pca_dims=dimensions, quantize_to="float32"
    )
    if static.dim != dimensions:
        raise RecipeError(
            f"static.dimensions={dimensions}: the teacher has {len(static.tokens)} tokens, too few for as many "
            "components. Ask for less."
        )
    return _tokens_of(static)


def _unnamed(body: Any) -> Any:
    """The same weights under the name of a folder: of one that is not, model2vec asks the hub which language it is."""
    body = copy.copy(body)
    body.name_or_path = "."
    return body


def _tokens_of(static: Any) -> StaticTokens:
    """What model2vec reads a text with, its limit of length (512 tokens, by default) lifted."""
    state = json.loads(static.tokenizer.to_str())
    # Else who writes "[PAD]" or "[UNK]" in a text gets the vector of that token. Their ids are the vocabulary's.
    vocabulary = state["model"]["vocab"]
    pieces = {piece for piece, _ in vocabulary} if isinstance(vocabulary, list) else vocabulary
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in pieces]
    tokenizer: Tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return StaticTokens(torch.from_numpy(static.embedding).float(), tokenizer, static.unk_token_id)


def tokenizer_of_rows(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The same tokens from a tokenizer of transformers. It names no padding: any id will do, told by its segment."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def save_static(answers: StaticAnswers, folder: Path) -> None:
    """Write a folder for model2vec: `StaticModelPipeline.from_pretrained` gives labels and their probabilities.

    `StaticModel.from_pretrained` gives the means alone. Both read texts whole. Raises MissingExtra, and ValueError
    where there is not one label a class.
    """
    check_static_packages("model2vec")
    import numpy as np
    from model2vec import StaticModel
    from model2vec.inference import StaticModelPipeline
    from model2vec.inference.mlp import Activation, Layer, MLPHead

    model = answers.model
    if len(answers.labels) != len(model.bias_C):
        raise ValueError(f"{len(answers.labels)} labels for {len(model.bias_C)} classes: give one a class, in order")
    vectors = _array(model.vectors_VD)
    config = {"model_type": "model2vec", "architectures": ["StaticModel"], "hidden_dim": vectors.shape[1]}
    static = StaticModel(vectors, answers.tokenizer, config=config, normalize=False, max_length=None)
    activation = Activation.SIGMOID if answers.multi_label else Activation.SOFTMAX
    head = MLPHead([Layer(_array(model.weight_CD), _array(model.bias_C))], activation, np.asarray(answers.labels))
    StaticModelPipeline(static, head).save_pretrained(str(folder))
    # The library's card names a licence that nobody gave.
    (folder / "README.md").unlink(missing_ok=True)


def _array(parameter: Tensor) -> Any:
    return parameter.detach().cpu().numpy()


def load_static(folder: Path) -> StaticAnswers:
    """What `save_static` wrote, on the CPU. Raises MissingExtra, and ModelError for a folder of anything else."""
    check_static_packages("model2vec")
    from model2vec.inference.mlp import Activation

    pipeline = _load_pipeline(folder)
    static, head = pipeline.model, pipeline.head
    plain = static.weights is None and static.token_mapping is None and not static.normalize
    if not plain or len(head.layers) != 1 or head.classes_ is None:
        raise ModelError(f"static: {folder} holds another kind of model2vec model. Run the stage again that writes it.")
    tokens, labels = _tokens_of(static), tuple(str(label) for label in head.classes_)
    model = StaticClassifier(tokens, len(labels))
    with torch.no_grad():
        model.weight_CD.copy_(torch.from_numpy(head.layers[0].weight))
        model.bias_C.copy_(torch.from_numpy(head.layers[0].bias))
    return StaticAnswers(model, tokens.tokenizer, labels, head.activation == Activation.SIGMOID)


def _load_pipeline(folder: Path) -> Any:
    from model2vec.inference import StaticModelPipeline

    # Looked for first: what is no folder is taken for the name of a model on the hub.
    if not (folder / "head.safetensors").is_file():
        raise ModelError(f"static: {folder} holds no static classifier. Run the stage again that writes it.")
    try:
        return StaticModelPipeline.from_pretrained(folder)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ModelError(f"static: {folder} is damaged ({error}). Run the stage again that writes it.") from error
