"""How far apart: distances between what a student and its teacher say. Refuses to know where either came from."""

from potstill.losses.blocks import logit_blocks
from potstill.losses.chunked import distillation_loss
from potstill.losses.combine import FeatureLoss, HeadLoss, Objective, Ramp, Schedule
from potstill.losses.compiling import can_compile
from potstill.losses.divergence import (
    DIVERGENCES,
    Divergence,
    adaptive_kl,
    alpha_beta,
    cross_entropy,
    forward_kl,
    jsd,
    normalised_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    symmetric_kl,
    total_variation,
)
from potstill.losses.feature import HiddenLoss, PooledLoss, hidden_cosine, hidden_mse
from potstill.losses.relation import (
    AttentionVectors,
    attention_kl,
    attention_mse,
    gram_mse,
    linear_cka,
    minilm,
    minilm_v2,
    relation_kl,
    rkd_angle,
    rkd_distance,
)
from potstill.losses.scores import head_logits, position_scores
from potstill.losses.sparse import tail_bucket_kl
from potstill.losses.structure import AttentionLoss, SimilarityLoss, VectorsLoss
from potstill.losses.terms import HeadTerm

__all__ = [
    "DIVERGENCES",
    "AttentionLoss",
    "AttentionVectors",
    "Divergence",
    "FeatureLoss",
    "HeadLoss",
    "HeadTerm",
    "HiddenLoss",
    "Objective",
    "PooledLoss",
    "Ramp",
    "Schedule",
    "SimilarityLoss",
    "VectorsLoss",
    "adaptive_kl",
    "alpha_beta",
    "attention_kl",
    "attention_mse",
    "can_compile",
    "cross_entropy",
    "distillation_loss",
    "forward_kl",
    "gram_mse",
    "head_logits",
    "hidden_cosine",
    "hidden_mse",
    "jsd",
    "linear_cka",
    "logit_blocks",
    "minilm",
    "minilm_v2",
    "normalised_jsd",
    "position_scores",
    "relation_kl",
    "reverse_kl",
    "rkd_angle",
    "rkd_distance",
    "skew_forward_kl",
    "skew_reverse_kl",
    "symmetric_kl",
    "tail_bucket_kl",
    "total_variation",
]
