"""Machines that run models. Teacher and student are roles; an engine plays either. Refuses to know what is learned."""

from potstill.engines.causal import CausalReader, TrainableCausal, read_causal
from potstill.engines.local import LocalEngine, find_folder, load_model, load_tokenizer, pick_device

__all__ = [
    "CausalReader",
    "LocalEngine",
    "TrainableCausal",
    "find_folder",
    "load_model",
    "load_tokenizer",
    "pick_device",
    "read_causal",
]
