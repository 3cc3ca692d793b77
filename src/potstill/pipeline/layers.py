"""Choosing the layers that a student keeps, with the teacher itself as judge. Refuses rows that training sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill.data import PackedRows
from potstill.engines import LocalEngine, read_causal
from potstill.errors import RecipeError
from potstill.losses.chunked import head_logits
from potstill.pipeline.progress import metered
from potstill.recipes import Recipe
from potstill.recipes.schema import LayersStudent
from potstill.students import LayerChoice, check_layers, choose_greedily, even_layers
from potstill.types import Head

__all__ = ["choose_layers"]

JUDGED_POSITIONS = 512
"""Positions on which candidates are compared, spread over the rows: enough to rank them, and the head is the cost."""


def choose_layers(recipe: Recipe, spec: LayersStudent, teacher: LocalEngine, rows: PackedRows) -> LayerChoice:
    """The layers to keep: those listed, evenly spaced ones, or the result of the greedy search on held-out rows."""
    depth = teacher.model.config.get_text_config().num_hidden_layers
    if not isinstance(spec.keep, str):
        check_layers(spec.keep, depth)
        return LayerChoice(tuple(spec.keep), ())
    count = spec.count or depth
    if count > depth:
        raise RecipeError(f"student.count: {count} exceeds the teacher's {depth} layers. Use at most {depth}.")
    if spec.keep == "even":
        return LayerChoice(even_layers(depth, count), ())
    return _search(recipe, spec, teacher, rows, count)


@torch.inference_mode()
def _search(recipe: Recipe, spec: LayersStudent, teacher: LocalEngine, rows: PackedRows, count: int) -> LayerChoice:
    batch = rows.batch(range(min(spec.search.rows, len(rows)))).to(teacher.model.device)
    judged = batch.supervised_BT.flatten().nonzero().squeeze(-1)
    judged = judged[:: max(1, len(judged) // JUDGED_POSITIONS)]

    def run() -> Tensor:
        return read_causal(teacher.model, batch)[0].flatten(0, 1)

    distance = _Distance(run()[judged], _head(teacher))
    depth = teacher.model.config.get_text_config().num_hidden_layers
    with metered("initialise: layers", depth - count, "layers") as meter:
        return choose_greedily(
            teacher.model,
            run,
            lambda final_MD: distance(final_MD[judged]),
            count,
            shortlist=spec.search.shortlist,
            seconds=60 * spec.search.minutes,
            progress=lambda _, value: meter.advance(1, "" if value is None else f"KL {value:.2f}"),
        )


class _Distance:
    """Mean KL(teacher || candidate) over some positions; the teacher's side is computed once."""

    def __init__(self, final_ND: Tensor, head: Head) -> None:
        self._head = head
        self._log_p_NV = head_logits(final_ND, head).log_softmax(-1)

    def __call__(self, final_ND: Tensor) -> float:
        log_q_NV = head_logits(final_ND, self._head).log_softmax(-1)
        return float(torch.nn.functional.kl_div(log_q_NV, self._log_p_NV, log_target=True, reduction="sum")) / len(log_q_NV)


def _head(teacher: LocalEngine) -> Any:
    from potstill.engines.causal import head_of

    return head_of(teacher.model).sliced(min(len(teacher.tokenizer), teacher.model.get_output_embeddings().weight.shape[0]))
