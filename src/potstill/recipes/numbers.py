"""The numbers that a recipe asks for. Refuses true and false where a number is needed: they are not 1 and 0."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticKnownError

__all__ = ["Count", "Fraction", "Layer", "Positive", "Real", "Share", "Whole"]


def _refuse_truth(kind: Literal["int_type", "float_type"]) -> BeforeValidator:
    """`true` is not 1: a switch where a number is asked for is a slip."""

    def check(value: object) -> object:
        if isinstance(value, bool):
            raise PydanticKnownError(kind)
        return value

    return BeforeValidator(check)


Whole = Annotated[int, _refuse_truth("int_type")]
Real = Annotated[float, _refuse_truth("float_type")]
Layer = Annotated[Whole, Field(ge=0)]
Count = Annotated[Whole, Field(ge=1, le=10**12)]
Fraction = Annotated[Real, Field(ge=0.0, lt=1.0)]
Share = Annotated[Real, Field(gt=0.0, lt=1.0)]
Positive = Annotated[Real, Field(gt=0.0)]
