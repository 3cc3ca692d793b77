"""From a recipe's losses to what a training minimises. The only place that branches on kinds of losses.

Refuses a loss that the teacher cannot serve, and one that the task has no answers for, before any weight is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.engines import LocalEngine
from potstill.errors import RecipeError
from potstill.losses import (
    AttentionLoss,
    FeatureLoss,
    HeadLoss,
    HeadTerm,
    HiddenLoss,
    Objective,
    PooledLoss,
    Ramp,
    Schedule,
    SimilarityLoss,
    VectorsLoss,
)
from potstill.recipes import Recipe
from potstill.recipes.losses import (
    AttentionKL,
    AttentionMSE,
    ConstantRamp,
    CosineRamp,
    CrossEntropy,
    HiddenCosine,
    HiddenMSE,
    LayerTerm,
    LinearRamp,
    LossTerm,
    MiniLM,
    MiniLMv2,
    SimilarityTerm,
    SoftTerm,
    VectorTerm,
    VocabularyTerm,
)
from potstill.recipes.schema import Classification, Embedding, LanguageModel, OpenAITeacher, RecordedTeacher
from potstill.students import even_layers
from potstill.types import Offer, Wants

__all__ = ["Answers", "build_examiner", "build_objective", "check_losses", "fixed", "need_of", "terms_of", "wants_of"]


@dataclass(frozen=True, slots=True)
class Answers:
    """What the losses must know of the answers.

    vocabulary  tokens or classes to choose from; components of a vector
    causal      whether positions see only what came before
    everywhere  whether the teacher speaks at exactly the supervised positions
    binary      whether a text bears any number of labels
    vectors     whether an answer is a vector
    taught      whether a teacher says anything of them: one that writes does not
    """

    vocabulary: int
    causal: bool = True
    everywhere: bool = True
    binary: bool = False
    vectors: bool = False
    taught: bool = True

    @staticmethod
    def of(recipe: Recipe, vocabulary: int) -> Answers:
        """Those of this recipe's task."""
        task = recipe.task
        return Answers(
            vocabulary,
            causal=isinstance(task, LanguageModel),
            everywhere=isinstance(task, LanguageModel) and recipe.signals.everywhere,
            binary=isinstance(task, Classification) and task.multi_label,
            vectors=isinstance(task, Embedding),
            taught=recipe.generate is None,
        )


def check_losses(recipe: Recipe) -> None:
    """Raises RecipeError where a loss needs what the teacher or the task cannot offer."""
    offers = _offers(recipe)
    teacher = f"teacher.kind={recipe.teacher.kind}" if recipe.generate is None else "a teacher that writes"
    for index, term in enumerate(recipe.losses):
        key = f"losses[{index}]"
        if isinstance(recipe.task, Embedding) and isinstance(term, VocabularyTerm):
            raise RecipeError(
                f"{key}.kind={term.kind} compares probabilities, but task.kind=embedding has vectors. Use vector_mse, "
                "vector_cosine, rkd_distance, or another loss over states."
            )
        need = need_of(term)
        if need and need not in offers:
            raise RecipeError(
                f"{key}.kind={term.kind} needs {need.name}, but {teacher} offers "
                f"{', '.join(sorted(offer.name for offer in offers)) or Offer.TEXT.name}. Remove this loss, or use "
                "another teacher."
            )
        over_texts = isinstance(term, VectorTerm) or (isinstance(term, SimilarityTerm) and term.over == "texts")
        if over_texts and not recipe.over_texts:
            raise RecipeError(
                f"{key}.kind={term.kind} compares the vectors of whole texts, but task.kind={recipe.task.kind} is over "
                "tokens. Remove this loss, or use a task over texts."
            )


def terms_of(recipe: Recipe, arm: str) -> list[LossTerm]:
    """What this arm minimises: the control arm hard labels alone, every other one the recipe's losses."""
    return [CrossEntropy(kind="cross_entropy")] if arm == "control" else list(recipe.losses)


def build_objective(terms: Sequence[LossTerm], answers: Answers, student: Any, teacher: Any) -> Objective:
    """The objective of these terms. `student` and `teacher` are model configs, for depths and widths.

    Where the teacher speaks at exactly the supervised positions, all terms over the vocabulary share a pass. `teacher`
    may be None where no term looks behind its answers. Raises RecipeError where a layer map names a layer that a model
    does not have.
    """
    head = [_head_term(term) for term in terms if isinstance(term, VocabularyTerm)]
    passes = [head]
    if not answers.everywhere:
        passes = [[one for one in head if one.needs_teacher is soft] for soft in (True, False)]
    losses: list[HeadLoss | FeatureLoss] = [
        HeadLoss(own, answers.vocabulary, binary=answers.binary) for own in passes if own
    ]
    for index, term in enumerate(terms):
        if not isinstance(term, VocabularyTerm):
            losses.append(_layer_loss(term, (student, teacher), f"losses[{index}]", causal=answers.causal))
    return Objective(losses, {term.kind: schedule for term in terms if (schedule := _schedule_of(term))})


def build_examiner(answers: Answers, student: Any, teacher: Any) -> Objective:
    """The questions of validation, alike for every arm: forward KL to the teacher and cross-entropy, both at T = 1.

    Of vectors: their cosine or, where widths differ and no untrained projection may judge, how their distances differ.
    """
    if answers.vectors:
        widths = _widths(student, teacher)
        same = widths[0] == widths[1]
        return Objective(
            [PooledLoss("vector_cosine", widths) if same else SimilarityLoss("rkd_distance", {}, over="texts")]
        )
    passes = [["forward_kl", "cross_entropy"]] if answers.everywhere else [["forward_kl"], ["cross_entropy"]]
    if not answers.taught:
        passes = [["cross_entropy"]]
    return Objective([HeadLoss([*map(HeadTerm, own)], answers.vocabulary, binary=answers.binary) for own in passes])


def wants_of(objective: Objective) -> Wants:
    """What to read from the teacher for this objective."""
    return objective.wants()[1]


def fixed(number: float | LinearRamp | CosineRamp | ConstantRamp) -> float:
    """The number itself; 1 where it moves, since the schedule brings the rest."""
    if isinstance(number, ConstantRamp):
        return number.value
    return number if isinstance(number, float) else 1.0


def _offers(recipe: Recipe) -> frozenset[Offer]:
    """What the teacher offers for this task."""
    if isinstance(recipe.teacher, RecordedTeacher):
        return frozenset({Offer.LOGITS})
    insides = {Offer.HIDDEN, Offer.ATTENTION, Offer.VECTORS}
    if recipe.generate:
        return frozenset()
    if isinstance(recipe.teacher, OpenAITeacher):
        return frozenset({Offer.LOGITS})
    if isinstance(recipe.task, LanguageModel):
        return LocalEngine.offers | insides
    if isinstance(recipe.task, Embedding):
        return frozenset({*insides, Offer.POOLED})
    return frozenset({*insides, Offer.LOGITS, *({Offer.POOLED} if recipe.over_texts else ())})


def need_of(term: LossTerm) -> Offer | None:
    """What a teacher must offer for this term."""
    if isinstance(term, SimilarityTerm) and term.over == "texts":
        return Offer.POOLED
    return Offer(term.needs) if term.needs else None


def _head_term(term: VocabularyTerm) -> HeadTerm:
    weight = fixed(term.weight)
    if not isinstance(term, SoftTerm):
        return HeadTerm(term.kind, weight, settings=term.settings)
    squared = term.times_temperature_squared
    return HeadTerm(term.kind, weight, fixed(term.temperature), squared, term.settings, term.biased)


def _layer_loss(term: LossTerm, models: tuple[Any, Any], key: str, *, causal: bool) -> FeatureLoss:
    """A loss over what lies behind the answers; `models` are the configs of student and teacher."""
    weight = fixed(term.weight)
    if isinstance(term, VectorTerm):
        return PooledLoss(term.kind, _widths(*models), weight)
    if isinstance(term, SimilarityTerm) and term.over == "texts":
        return SimilarityLoss(term.kind, {}, over="texts", weight=weight)
    if not isinstance(term, LayerTerm):
        raise ValueError(f"{term.kind} is no loss over layers")
    depths = models[0].get_text_config().num_hidden_layers, models[1].get_text_config().num_hidden_layers
    first = 0 if isinstance(term, HiddenMSE | HiddenCosine | SimilarityTerm) else 1
    layers = _layer_map(term, depths, f"{key}.layers", first=first)
    match term:
        case HiddenMSE() | HiddenCosine():
            return HiddenLoss(term.kind, layers, _widths(*models), weight)
        case AttentionMSE() | AttentionKL():
            if term.heads == "matched":
                _check_same_heads(term, models, key, f"{key}.heads=averaged")
            return AttentionLoss(term.kind, layers, heads=term.heads, causal=causal, weight=weight)
        case MiniLM():
            _check_same_heads(term, models, key, "minilm_v2")
            return VectorsLoss(term.kind, layers, causal=causal, weight=weight)
        case MiniLMv2(relation_heads=heads):
            _check_relation_heads(heads, models, f"{key}.relation_heads")
            return VectorsLoss(term.kind, layers, causal=causal, weight=weight, relation_heads=heads)
        case SimilarityTerm():
            return SimilarityLoss(term.kind, layers, over="positions", weight=weight)
    raise ValueError(f"{term.kind} is no loss over layers")


def _check_same_heads(term: LossTerm, models: tuple[Any, Any], key: str, instead: str) -> None:
    student, teacher = (config.get_text_config().num_attention_heads for config in models)
    if student != teacher:
        raise RecipeError(
            f"{key}.kind={term.kind} compares head by head, but the student has {student} heads and the teacher "
            f"{teacher}. Use {instead}, or a student with as many heads."
        )


def _check_relation_heads(heads: int, models: tuple[Any, Any], key: str) -> None:
    student, teacher = (_vector_widths(config.get_text_config()) for config in models)
    shared = math.gcd(*student, *teacher)
    if shared % heads:
        raise RecipeError(
            f"{key}: {heads} does not divide the widths of queries and keys, {student[0]} and {student[1]} in the "
            f"student, {teacher[0]} and {teacher[1]} in the teacher. Use a divisor of {shared}."
        )


def _vector_widths(config: Any) -> tuple[int, int]:
    """All heads together: of the queries, and of keys or values, of which there may be fewer."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * width, (getattr(config, "num_key_value_heads", None) or heads) * width


def _widths(student: Any, teacher: Any) -> tuple[int, int]:
    return student.get_text_config().hidden_size, teacher.get_text_config().hidden_size


def _schedule_of(term: LossTerm) -> Schedule | None:
    """What moves in this term, None if nothing does."""
    numbers = (term.weight, term.temperature if isinstance(term, SoftTerm) else 1.0)
    ramps = [Ramp(n.start, n.end, n.kind) if isinstance(n, LinearRamp | CosineRamp) else None for n in numbers]
    return Schedule(*ramps) if any(ramps) else None


def _layer_map(term: LayerTerm, depths: tuple[int, int], key: str, *, first: int) -> Mapping[int, int]:
    """{student layer: teacher layer}; 0 is the embeddings' output. `depths` are the student's and the teacher's.

    `first` is 1 for what only blocks have.
    """
    if term.layers == "last":
        return {depths[0]: depths[1]}
    if term.layers == "even":
        # A student deeper than its teacher has blocks that lie nearest to the embeddings' output.
        matched = [max(first, layer) for layer in even_layers(depths[1] + 1, depths[0] + 1)]
        return dict(zip(range(1, depths[0] + 1), matched[1:], strict=True))
    for pair in term.layers.items():
        for role, depth, layer in zip(("student", "teacher"), depths, pair, strict=True):
            if not first <= layer <= depth:
                what = "0 is the embeddings' output" if first == 0 else "the embeddings have no attention"
                raise RecipeError(
                    f"{key}: {{{pair[0]}: {pair[1]}}}, but the {role} has layers {first}..{depth} ({what}). "
                    "Use a layer in that range."
                )
    return term.layers
