"""What a model must be to play in a recipe: its class, its labels, how it pools; and the parts that it then plays.

Refuses a task of which the labels are not known yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from potstill.data import LabelledText, LabelMap, Overlong, TextRows
from potstill.engines import (
    EncoderEngine,
    LocalEngine,
    TrainableCausal,
    TrainableEncoder,
    load_encoder,
    load_model,
)
from potstill.pipeline.texts import open_labels, open_texts
from potstill.recipes import Recipe
from potstill.recipes.schema import Classification, Embedding, TextTask
from potstill.recipes.tasks import Pooling
from potstill.types import Role

__all__ = ["Cast", "cast_of"]


@dataclass(frozen=True, slots=True)
class Cast:
    """The task as models must know it.

    labels        names of the classes, in order; empty where there are none
    multi_label   whether a text bears any number of them
    in_order      whether a classifier that does not name its classes has them in this order, as the recipe says
    out_of_scope  a label that is no class
    length        tokens of a text at most; what is longer is treated as `overlong` says
    """

    role: Role
    labels: tuple[str, ...] = ()
    in_order: bool = False
    multi_label: bool = False
    pooling: Pooling = "cls"
    normalise: bool = False
    out_of_scope: str | None = None
    length: int = 512
    overlong: Overlong = "truncate"
    seed: int = 0

    @property
    def causal(self) -> bool:
        """Whether models are language models that read from left to right."""
        return self.role is Role.CAUSAL

    def load(
        self,
        model: str,
        dtype: str,
        device: torch.device,
        key: str,
        *,
        fresh_head: bool = False,
        eager: bool = False,
    ) -> Any:
        """A model for this role from a folder or hub id, with all its weights; `fresh_head` draws a head it lacks.

        `eager` is for attention maps. Raises ModelError naming the recipe key.
        """
        if self.causal:
            return load_model(model, dtype, device, key, eager=eager)
        return load_encoder(
            model,
            self.role,
            dtype,
            device,
            key=key,
            labels=self.labels or None,
            in_order=self.in_order,
            multi_label=self.multi_label,
            pooling=self.pooling,
            normalise=self.normalise,
            fresh_head=fresh_head,
            eager=eager,
            seed=self.seed,
        )

    def engine(self, model: Any, tokenizer: Any) -> LocalEngine | EncoderEngine:
        """The model as one that is asked."""
        if self.causal:
            return LocalEngine(model, tokenizer)
        return EncoderEngine(model, tokenizer, self.role, pooling=self.pooling, normalise=self.normalise)

    def trainable(self, model: nn.Module, precision: str) -> TrainableCausal | TrainableEncoder:
        """The model as one that learns."""
        if self.causal:
            return TrainableCausal(model, precision)
        return TrainableEncoder(model, self.role, precision, pooling=self.pooling, normalise=self.normalise)

    def rows(self, prepared: Path, split: str, tokenizer: Any) -> TextRows:
        """The texts of a split as this tokenizer has them; what is out of scope counts as unlabelled."""
        return self.tokenise(open_texts(prepared, split), tokenizer)

    def tokenise(self, texts: Sequence[LabelledText], tokenizer: Any) -> TextRows:
        """Labelled texts as rows of tokens."""
        return TextRows(
            texts,
            tokenizer,
            length=self.length,
            role=self.role,
            labels=LabelMap(self.labels, self.out_of_scope) if self.labels else None,
            multi_label=self.multi_label,
            overlong=self.overlong,
        )


def cast_of(recipe: Recipe, prepared: Path | None = None) -> Cast:
    """What the task of this recipe asks of a model; with `prepared`, the labels that were found there."""
    task = recipe.task
    labels = open_labels(prepared) if prepared and isinstance(task, TextTask) else None
    return Cast(
        Role(task.kind),
        labels.names if labels else (),
        in_order=bool(getattr(task, "labels", None)),
        multi_label=isinstance(task, Classification) and task.multi_label,
        pooling=task.pooling if isinstance(task, Classification | Embedding) else "cls",
        normalise=isinstance(task, Embedding) and task.normalise,
        out_of_scope=task.out_of_scope if isinstance(task, Classification) else None,
        length=recipe.data.sequence_length,
        overlong=task.overlong if isinstance(task, TextTask) else "truncate",
        seed=recipe.seed,
    )
