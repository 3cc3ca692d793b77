"""Machines that run models. Teacher and student are roles; an engine plays either. Refuses to know what is learned."""

from potstill.engines.author import ApiAuthor
from potstill.engines.causal import CausalReader, TrainableCausal, head_of, read_causal
from potstill.engines.encoder import EncoderEngine, TrainableEncoder, pool_states, read_encoder, score_layer
from potstill.engines.ensemble import EnsembleEngine
from potstill.engines.insides import Insides, needs_eager, reading_insides
from potstill.engines.ledger import Ledger
from potstill.engines.local import LocalEngine, find_folder, load_model, load_tokenizer, pick_device
from potstill.engines.local_author import LocalAuthor
from potstill.engines.mixture import MixtureEngine, shares_of
from potstill.engines.openai import Endpoint
from potstill.engines.pretrained import load_encoder
from potstill.engines.probing import probe_encoder
from potstill.engines.recorded import RecordedReader, read_recorded
from potstill.engines.scripted import ScriptedAuthor
from potstill.engines.teachers import TeacherEngine, models_of

__all__ = [
    "ApiAuthor",
    "CausalReader",
    "EncoderEngine",
    "Endpoint",
    "EnsembleEngine",
    "Insides",
    "Ledger",
    "LocalAuthor",
    "LocalEngine",
    "MixtureEngine",
    "RecordedReader",
    "ScriptedAuthor",
    "TeacherEngine",
    "TrainableCausal",
    "TrainableEncoder",
    "find_folder",
    "head_of",
    "load_encoder",
    "load_model",
    "load_tokenizer",
    "models_of",
    "needs_eager",
    "pick_device",
    "pool_states",
    "probe_encoder",
    "read_causal",
    "read_encoder",
    "read_recorded",
    "reading_insides",
    "score_layer",
    "shares_of",
]
