"""What an arm takes up: parameters, bytes of its folders, memory at work. Refuses to guess where the system is silent.

The memory of a GPU is counted by torch, that of the process by the system.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from potstill.engines import find_folder
from potstill.evaluation import folder_bytes
from potstill.pipeline.memory import peak_memory_bytes, release_memory, reset_peak_memory, resident_memory_bytes
from potstill.types import Measurement

__all__ = ["held_bytes", "measure_peak", "measure_sizes", "peak_bytes", "reset_peak"]


def measure_sizes(arm: str, parameters: int, models: Sequence[str]) -> list[Measurement]:
    """Parameters, and the bytes of the models' folders where all of them have a copy here."""
    found = [_measured(arm, "parameters", parameters, "")]
    places = [find_folder(model) for model in models]  # a teacher's may be a hub id
    sizes = [folder_bytes(place) for place in places if place]
    return [*found, _measured(arm, "folder_bytes", sum(sizes), "bytes")] if len(sizes) == len(places) else found


def measure_peak(arm: str, peak: int, device: torch.device) -> list[Measurement]:
    """What the arm took at its `peak`, over what is still held now that it has gone; nothing where peak is 0."""
    return [_measured(arm, "peak_memory_bytes", peak - held_bytes(device), "bytes")] if peak else []


def reset_peak(device: torch.device) -> bool:
    """Measure peak memory from now on; False where that cannot be done."""
    release_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    return reset_peak_memory()


def peak_bytes(device: torch.device) -> int:
    """The largest memory in use since `reset_peak`."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_memory_bytes()


def held_bytes(device: torch.device) -> int:
    """What is in use now."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else resident_memory_bytes()


def _measured(arm: str, name: str, value: float, unit: str) -> Measurement:
    return Measurement(arm, name, "test", value, None, None, 1, unit)
