"""How far apart: distances between what a student and its teacher say. Refuses to know where either came from."""

from potstill.losses.chunked import HeadTerm, can_compile, distillation_loss, position_scores
from potstill.losses.combine import HeadLoss, Objective
from potstill.losses.divergence import cross_entropy, forward_kl, reverse_kl
from potstill.losses.feature import HiddenLoss, hidden_cosine, hidden_mse

__all__ = [
    "HeadLoss",
    "HeadTerm",
    "HiddenLoss",
    "Objective",
    "can_compile",
    "cross_entropy",
    "distillation_loss",
    "forward_kl",
    "hidden_cosine",
    "hidden_mse",
    "position_scores",
    "reverse_kl",
]
