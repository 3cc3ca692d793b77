"""Who learns: layers cut from the teacher, a pretrained small model, or a fresh one. Refuses to train."""

from potstill.students.importance import LayerChoice, choose_greedily, even_layers
from potstill.students.initialise import check_layers, cut_layers, fresh_model, save_student

__all__ = [
    "LayerChoice",
    "check_layers",
    "choose_greedily",
    "cut_layers",
    "even_layers",
    "fresh_model",
    "save_student",
]
