"""What every part of a recipe is: frozen, and closed to keys that it does not know. Refuses NaN and infinity."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Part"]


class Part(BaseModel):
    """A mapping of a recipe. What stands below a field is its meaning, in errors and in the JSON Schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
