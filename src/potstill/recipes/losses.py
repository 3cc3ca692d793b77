"""What a student may be taught to make small: one frozen model a kind of loss, and numbers that move in training.

A model carries what the hallway needs to build it: what it asks of a teacher, and the settings of its formula. Refuses
settings at which a loss is 0 whatever the student does.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from potstill.recipes.numbers import Count, Fraction, Layer, Positive, Real, Share
from potstill.recipes.part import Part

__all__ = [
    "JSD",
    "AdaptiveKL",
    "AlphaBeta",
    "AttentionKL",
    "AttentionMSE",
    "ConstantRamp",
    "CosineRamp",
    "CrossEntropy",
    "ForwardKL",
    "GramMSE",
    "HiddenCosine",
    "HiddenMSE",
    "LayerTerm",
    "LinearCKA",
    "LinearRamp",
    "LossTerm",
    "MiniLM",
    "MiniLMv2",
    "NormalisedJSD",
    "RKDAngle",
    "RKDDistance",
    "Ramp",
    "RelationTerm",
    "ReverseKL",
    "SimilarityTerm",
    "SkewForwardKL",
    "SkewReverseKL",
    "SoftTerm",
    "SymmetricKL",
    "TotalVariation",
    "VectorCosine",
    "VectorMSE",
    "VectorTerm",
    "VocabularyTerm",
]

NonNegative = Annotated[Real, Field(ge=0.0)]
Need = Literal["logits", "hidden", "attention", "vectors", "pooled"]
"""What of a teacher a term compares with."""

Within = Annotated[Real, Field(ge=0.0, le=1.0)]


class ConstantRamp(Part):
    """The same number in every step."""

    kind: Literal["constant"]
    value: Positive
    """The number."""

    @property
    def ends(self) -> dict[str, float]:
        """Its extremes, by key."""
        return {"value": self.value}


class _Moving(Part):
    start: NonNegative
    """The number in the first step."""
    end: NonNegative
    """The number in the last step."""

    @property
    def ends(self) -> dict[str, float]:
        """Its extremes, by key."""
        return {"start": self.start, "end": self.end}

    @model_validator(mode="after")
    def _is_not_nothing(self) -> _Moving:
        if self.start == self.end == 0.0:
            raise ValueError("start and end are both 0, which switches the term off; remove the term, or raise one")
        return self


class LinearRamp(_Moving):
    """From `start` to `end` in equal steps over the whole training."""

    kind: Literal["linear"]


class CosineRamp(_Moving):
    """From `start` to `end` along half a cosine: slow at both ends of the training, fast in its middle."""

    kind: Literal["cosine"]


Ramp = Annotated[LinearRamp | CosineRamp | ConstantRamp, Field(discriminator="kind")]


class _Term(Part):
    needs: ClassVar[Need | None]
    """What the teacher must offer for this term."""

    kind: str
    weight: Positive | Ramp = 1.0
    """Factor of this term in the sum of losses: a number, or one that moves over the training."""


class VocabularyTerm(_Term):
    """A term over the next-token distributions. The fields of a kind itself are the settings of its formula."""

    @property
    def settings(self) -> dict[str, float]:
        """The settings of the formula, by the names that it has for them."""
        return {name: getattr(self, name) for name in type(self).model_fields if name not in _NO_SETTINGS}


class SoftTerm(VocabularyTerm):
    """A divergence between the softened distributions of teacher and student."""

    needs: ClassVar[Need | None] = "logits"

    temperature: Positive | Ramp = 1.0
    """Distillation temperature, which softens both distributions: a number, or one that moves over the training."""
    times_temperature_squared: bool = True
    """Multiply by T^2, which keeps the gradient's size when terms are mixed (Hinton et al. 2015, section 2.1)."""
    biased: bool = False
    """Let a divergence that has no unbiased form for stored top-k tokens compare these and one class for the rest."""

    @model_validator(mode="after")
    def _is_never_cold(self) -> SoftTerm:
        ends = {} if isinstance(self.temperature, float) else self.temperature.ends
        for key, value in ends.items():
            if value == 0.0:
                raise ValueError(f"temperature.{key}: got {value}, needs a number greater than 0; 1 softens nothing")
        return self


_NO_SETTINGS = set(SoftTerm.model_fields)


class ForwardKL(SoftTerm):
    """KL(teacher || student): cover all that the teacher might say. The one to begin with."""

    kind: Literal["forward_kl"]


class ReverseKL(SoftTerm):
    """KL(student || teacher): say only what the teacher would. For a student too small to cover the rest."""

    kind: Literal["reverse_kl"]


class SymmetricKL(SoftTerm):
    """The mean of forward and reverse KL: between covering the teacher and keeping to it, without a setting."""

    kind: Literal["symmetric_kl"]


class JSD(SoftTerm):
    """Generalised Jensen-Shannon divergence to a mixture: bounded, so that no position can dominate a batch."""

    kind: Literal["jsd"]
    beta: Share = 0.5
    """Share of the teacher in the mixture, as published. At 0 and 1 the divergence is 0: see `normalised_jsd`."""


class NormalisedJSD(SoftTerm):
    """JSD / (beta (1 - beta)): goes from forward KL at beta 0 to reverse KL at beta 1 without a change of scale."""

    kind: Literal["normalised_jsd"]
    beta: Within = 0.5
    """Share of the teacher in the mixture."""


class SkewForwardKL(SoftTerm):
    """KL(teacher || mixture of both): forward KL for a wide capacity gap; what the student lacks costs no fortune."""

    kind: Literal["skew_forward_kl"]
    alpha: Fraction = 0.1
    """Share of the teacher in the mixture; 0 is forward KL."""


class SkewReverseKL(SoftTerm):
    """KL(student || mixture of both): reverse KL for a wide capacity gap; what the teacher lacks costs no fortune."""

    kind: Literal["skew_reverse_kl"]
    alpha: Fraction = 0.1
    """Share of the student in the mixture; 0 is reverse KL."""


class TotalVariation(SoftTerm):
    """Half the absolute difference of the probabilities: bounded, and blind to ratios, which tails inflate."""

    kind: Literal["total_variation"]


class AlphaBeta(SoftTerm):
    """The family that holds forward KL (1, 0) and reverse KL (0, 1): to tune between them when a sweep can be paid."""

    kind: Literal["alpha_beta"]
    alpha: NonNegative
    """Power in the pull q^alpha - p^alpha on a token: the smaller, the more large ratios count."""
    beta: NonNegative
    """Power of q by which that pull is weighted: the larger, the more what the student finds likely counts."""

    @model_validator(mode="after")
    def _has_a_side(self) -> AlphaBeta:
        if self.alpha == self.beta == 0.0:
            raise ValueError("alpha and beta are both 0, where no token counts; raise one (1 and 0 is forward KL)")
        return self


class AdaptiveKL(SoftTerm):
    """Forward and reverse KL, weighed at each position by where the gap is: in the teacher's head or in its tail."""

    kind: Literal["adaptive_kl"]
    mu: Share = 0.5
    """Probability mass of the teacher's likeliest tokens that counts as its head."""


class CrossEntropy(VocabularyTerm):
    """Hard labels: -log q(next token) at temperature 1. Asks no teacher; mix it in where the data is good."""

    needs: ClassVar[Need | None] = None

    kind: Literal["cross_entropy"]
    label_smoothing: Fraction = 0.0
    """Share of the label that is spread over all tokens alike."""


class LayerTerm(_Term):
    """A term over hidden states, layer by layer."""

    needs: ClassVar[Need | None] = "hidden"

    layers: Annotated[dict[Layer, Layer], Field(min_length=1)] | Literal["even", "last"] = "last"
    """{student layer: teacher layer}, 0 being the embeddings' output and i the output of block i. `even` spreads all
    student layers over the teacher's; `last` matches the last ones."""


class HiddenMSE(LayerTerm):
    """Mean squared difference of hidden states. Widths that differ get a learned projection, dropped at the end."""

    kind: Literal["hidden_mse"]


class HiddenCosine(LayerTerm):
    """1 - cosine of hidden states. Widths that differ get a learned projection, dropped at the end."""

    kind: Literal["hidden_cosine"]


class RelationTerm(LayerTerm):
    """A term over how positions of a text relate to each other; texts of one batch, where it says so."""


class _AttentionTerm(RelationTerm):
    needs: ClassVar[Need | None] = "attention"

    heads: Literal["matched", "averaged"] = "matched"
    """Compare head by head, which needs as many heads; or the mean map of all heads."""


class AttentionMSE(_AttentionTerm):
    """Mean squared difference of attention maps."""

    kind: Literal["attention_mse"]


class AttentionKL(_AttentionTerm):
    """KL(teacher || student) of attention maps."""

    kind: Literal["attention_kl"]


class MiniLM(RelationTerm):
    """KL of query-key and of value-value relations, head by head: needs as many heads. Usually of the last layers."""

    needs: ClassVar[Need | None] = "vectors"

    kind: Literal["minilm"]


class MiniLMv2(RelationTerm):
    """KL of query-query, key-key and value-value relations, split anew into heads: widths and heads may differ."""

    needs: ClassVar[Need | None] = "vectors"

    kind: Literal["minilm_v2"]
    relation_heads: Count = 12
    """Heads of the relations; must divide the widths of student and teacher."""


class SimilarityTerm(RelationTerm):
    """A term over how near states lie to each other."""

    over: Literal["positions", "texts"] = "positions"
    """Relations between the positions of a text; or, where the task is over texts, between the texts of a batch, each a
    vector (then `layers` must be left out)."""

    @model_validator(mode="after")
    def _texts_have_no_layers(self) -> SimilarityTerm:
        if self.over == "texts" and self.layers != "last":
            raise ValueError("layers: with `over: texts` the vectors of whole texts are compared; leave layers out")
        return self


class RKDDistance(SimilarityTerm):
    """SmoothL1 of the distances between states, in units of their mean."""

    kind: Literal["rkd_distance"]


class RKDAngle(SimilarityTerm):
    """SmoothL1 of the angles between states, three by three: for some hundred of them at most."""

    kind: Literal["rkd_angle"]


class GramMSE(SimilarityTerm):
    """Mean squared difference of the rows of states' products: similarity-preserving."""

    kind: Literal["gram_mse"]


class LinearCKA(SimilarityTerm):
    """1 - linear CKA of the states. Biased where there are fewer states than dimensions."""

    kind: Literal["linear_cka"]


class VectorTerm(_Term):
    """A term over the vectors of whole texts."""

    needs: ClassVar[Need | None] = "pooled"


class VectorMSE(VectorTerm):
    """Mean squared difference of the vectors. Widths that differ get a learned projection, dropped at the end."""

    kind: Literal["vector_mse"]


class VectorCosine(VectorTerm):
    """1 - cosine of the vectors. Widths that differ get a learned projection, dropped at the end."""

    kind: Literal["vector_cosine"]


LossTerm = Annotated[
    ForwardKL
    | ReverseKL
    | SymmetricKL
    | JSD
    | NormalisedJSD
    | SkewForwardKL
    | SkewReverseKL
    | TotalVariation
    | AlphaBeta
    | AdaptiveKL
    | CrossEntropy
    | HiddenMSE
    | HiddenCosine
    | AttentionMSE
    | AttentionKL
    | MiniLM
    | MiniLMv2
    | RKDDistance
    | RKDAngle
    | GramMSE
    | LinearCKA
    | VectorMSE
    | VectorCosine,
    Field(discriminator="kind"),
]
