"""Choosing the layers that a student keeps, with the model that they are cut from as judge.

Refuses rows that training sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill.data import PackedRows
from potstill.engines import TeacherEngine, models_of, read_causal
from potstill.errors import RecipeError
from potstill.losses import HeadTerm, distillation_loss
from potstill.pipeline.progress import metered
from potstill.recipes.schema import LayersStudent
from potstill.students import LayerChoice, check_layers, choose_greedily, even_layers
from potstill.types import Mixture, States, TeacherLogits, Wants

__all__ = ["choose_layers", "count_layers"]

JUDGED_POSITIONS = 512
"""Positions on which candidates are compared, spread over the rows: enough to rank them, and the head is the cost."""


def count_layers(spec: LayersStudent, depth: int) -> int:
    """How many of the model's `depth` layers stay. Raises RecipeError where the recipe asks for others or more."""
    whose = "the teacher" if spec.model is None else spec.model
    if not isinstance(spec.keep, str):
        check_layers(spec.keep, depth, whose=whose)
        return len(spec.keep)
    count = spec.count or depth
    if count > depth:
        raise RecipeError(f"student.count: {count} exceeds {whose}'s {depth} layers. Use at most {depth}.")
    return count


def choose_layers(spec: LayersStudent, teacher: TeacherEngine, rows: PackedRows | None) -> LayerChoice:
    """The layers to keep: those listed, evenly spaced ones, or the result of the greedy search on held-out `rows`."""
    depth = models_of(teacher)[0].config.get_text_config().num_hidden_layers
    count = count_layers(spec, depth)
    if spec.keep == "greedy" and rows is not None:
        return _search(spec, teacher, rows, count)
    return LayerChoice(even_layers(depth, count) if spec.keep == "even" else tuple(map(int, spec.keep)), ())


@torch.inference_mode()
def _search(spec: LayersStudent, teacher: Any, rows: PackedRows, count: int) -> LayerChoice:
    batch = rows.batch(range(min(spec.search.rows, len(rows)))).to(teacher.model.device)
    supervised_M = batch.supervised_BT.flatten().nonzero().squeeze(-1)
    stride = max(1, len(supervised_M) // JUDGED_POSITIONS)
    judge = _thin(teacher.read(batch, Wants(final=True)).logits, stride)
    head = (judge if isinstance(judge, States) else judge.members[0]).head  # its blocks are those that are cut
    judged_M = supervised_M[::stride]

    def run() -> Tensor:
        return read_causal(teacher.model, batch)[0].flatten(0, 1)

    def distance(final_MD: Tensor) -> float:
        loss = distillation_loss(States(final_MD[judged_M], head), None, [HeadTerm("forward_kl")], teacher=judge)
        return float(loss.total) / loss.count

    depth = teacher.model.config.get_text_config().num_hidden_layers
    with metered("initialise: layers", depth - count, "layers") as meter:
        return choose_greedily(
            teacher.model,
            run,
            distance,
            count,
            shortlist=spec.search.shortlist,
            seconds=60 * spec.search.minutes,
            progress=lambda _, value: meter.advance(1, "" if value is None else f"KL {value:.2f}"),
        )


def _thin(said: TeacherLogits | None, stride: int) -> States | Mixture:
    """Every stride-th row of what the teacher said."""
    if not isinstance(said, States | Mixture):
        raise ValueError("the greedy search needs the teacher's final hidden states and head")
    return said.at(slice(None, None, stride))
