"""The bare forward of a teacher over the batches of a capture: what a capture cannot be faster than.

The whole model as its user would call it: body, and head in the model's dtype at the supervised positions, no more.
Logits go into memory that is there already: fresh pages would be charged to the forward, and make captures look good.
Refuses batches of its own making: texts, lengths and padding are the capture's.

Suffixes: B texts, T positions, D width, N supervised positions, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from _stand import Stand, transcript_of

from potstill.pipeline.recall import stamp_for
from potstill.pipeline.transcribe import _batch_of, _batches, texts_to_read
from potstill.signals import open_store

__all__ = ["BareForward"]


class BareForward:
    """A teacher, the batches in which a capture would read these rows, and room for their logits."""

    def __init__(self, stand: Stand, numbers: Sequence[int], empty: Path) -> None:
        """`empty` becomes a store without pieces: all of them are missing."""
        recipe, transcript = transcript_of(stand, "k16")
        store = open_store(empty, stamp_for(recipe, transcript.encoding.spec), transcript.encoding.stride)
        windows = texts_to_read(stand.rows, numbers, store)
        found = [texts for window in windows for texts in _batches(window, transcript.batch_tokens)]
        self.model = stand.teacher.model
        self.batches = [_batch_of(texts).to(self.model.device) for texts in found]
        self.tokens = sum(len(text) for texts in found for text in texts)
        weight_VD = self.model.get_output_embeddings().weight
        most = max(int(batch.supervised_BT.sum()) for batch in self.batches)
        self.logits_NV = torch.empty(most, len(weight_VD), dtype=weight_VD.dtype, device=weight_VD.device)

    @torch.inference_mode()
    def time(self) -> float:
        """Wall seconds of all batches."""
        weight_VD = self.model.get_output_embeddings().weight
        began = time.perf_counter()
        for batch in self.batches:
            final_BTD = self.model.base_model(input_ids=batch.ids_BT, use_cache=False).last_hidden_state
            rows_ND = final_BTD[batch.supervised_BT]
            torch.mm(rows_ND, weight_VD.T, out=self.logits_NV[: len(rows_ND)])
        return time.perf_counter() - began
