"""Who can teach, whatever kind of machine it is. Refuses to make one: that is for whoever read the recipe."""

from __future__ import annotations

from typing import Any

from potstill.engines.encoder import EncoderEngine
from potstill.engines.ensemble import EnsembleEngine
from potstill.engines.local import LocalEngine
from potstill.engines.mixture import MixtureEngine
from potstill.engines.recorded import RecordedReader

__all__ = ["TeacherEngine", "models_of"]

TeacherEngine = LocalEngine | MixtureEngine | EncoderEngine | EnsembleEngine
"""The engines that can teach: those with models."""


def models_of(engine: TeacherEngine | RecordedReader) -> tuple[Any, ...]:
    """The models behind a teacher; none behind recorded answers."""
    return engine.models
