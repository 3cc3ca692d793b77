"""Who learns: layers cut from the teacher, a pretrained small model, or a fresh one. Refuses to train."""

from potstill.students.distilbert import to_distilbert
from potstill.students.dropout import find_dropout, set_dropout
from potstill.students.importance import LayerChoice, choose_greedily, even_layers
from potstill.students.initialise import check_layers, cut_layers, fresh_model, save_student
from potstill.students.lora import add_adapters, find_targets, has_adapters, merge_adapters
from potstill.students.sentence import save_sentence_encoder
from potstill.students.static import (
    StaticAnswers,
    StaticClassifier,
    StaticTokens,
    check_static_packages,
    distil_static,
    load_static,
    save_static,
    tokenizer_of_rows,
)

__all__ = [
    "LayerChoice",
    "StaticAnswers",
    "StaticClassifier",
    "StaticTokens",
    "add_adapters",
    "check_layers",
    "check_static_packages",
    "choose_greedily",
    "cut_layers",
    "distil_static",
    "even_layers",
    "find_dropout",
    "find_targets",
    "fresh_model",
    "has_adapters",
    "load_static",
    "merge_adapters",
    "save_sentence_encoder",
    "save_static",
    "save_student",
    "set_dropout",
    "to_distilbert",
    "tokenizer_of_rows",
]
