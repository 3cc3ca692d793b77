"""Machines that run models. Teacher and student are roles; an engine plays either. Refuses to know what is learned."""

from potstill.engines.causal import CausalReader, TrainableCausal, head_of, read_causal
from potstill.engines.local import LocalEngine, find_folder, load_model, load_tokenizer, pick_device
from potstill.engines.mixture import MixtureEngine, TeacherEngine, models_of, shares_of

__all__ = [
    "CausalReader",
    "LocalEngine",
    "MixtureEngine",
    "TeacherEngine",
    "TrainableCausal",
    "find_folder",
    "head_of",
    "load_model",
    "load_tokenizer",
    "models_of",
    "pick_device",
    "read_causal",
    "shares_of",
]
