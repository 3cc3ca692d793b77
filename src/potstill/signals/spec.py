"""What is kept of a teacher's words: the form, its size, the temperatures, and the positions at which it speaks.

Refuses forms that no store can hold: more tokens than the vocabulary has, a temperature of zero, a width of nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from potstill.errors import RecipeError

__all__ = ["Dtype", "Kind", "Positions", "SignalSpec"]

Kind = Literal["sampled", "topk", "topk_renormalised", "hidden", "dense"]
Positions = Literal["all", "random", "highest_entropy"]
Dtype = Literal["bf16", "fp16", "fp32"]

LARGEST_VOCABULARY = 1 << 24
"""Token numbers and their codes are read through windows of 32 bits, of which 7 may belong to a neighbour."""


@dataclass(frozen=True, slots=True)
class SignalSpec:
    """What a store holds of each position. Equal specs have equal fingerprints, and records of equal meaning.

    kind          sampled, topk, topk_renormalised, hidden or dense
    vocabulary    tokens that teacher and student share
    k             tokens a position lists; 0 for hidden and dense, which list all
    temperatures  at which a list may be read, each once; (1.0,) for hidden and dense, which serve every one
    width, dtype  of the final hidden states; 0 and None for all other kinds
    positions     all, random, or highest_entropy: at which supervised positions the teacher speaks
    share         of the supervised positions, in (0, 1]; 1 where it speaks at all of them

    Raises RecipeError naming the recipe's key.
    """

    kind: Kind
    vocabulary: int
    k: int = 0
    temperatures: tuple[float, ...] = (1.0,)
    width: int = 0
    dtype: Dtype | None = None
    positions: Positions = "all"
    share: float = 1.0

    def __post_init__(self) -> None:
        _check_choice("kind", self.kind, get_args(Kind))
        _check_choice("positions", self.positions, get_args(Positions))
        for name in ("vocabulary", "k", "width"):
            _check_integer(name, getattr(self, name))
        self._check_sizes()
        self._check_temperatures()
        self._check_share()

    @property
    def lists(self) -> bool:
        """Whether a position lists some tokens only."""
        return self.kind not in ("hidden", "dense")

    @property
    def fingerprint(self) -> str:
        """Hash of all settings, 32 hexadecimal digits."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """All settings as JSON values; `from_json` reads them back."""
        return {**asdict(self), "temperatures": list(self.temperatures)}

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> SignalSpec:
        """The spec that `to_json` wrote. Raises RecipeError for settings of another version."""
        known = {field.name for field in fields(cls)}
        if settings.keys() != known:
            odd = ", ".join(sorted(settings.keys() ^ known))
            raise RecipeError(
                f"signals: the stored settings differ from those of this version in {odd}. Use the version of potstill "
                f"that wrote them, or another signals.store."
            )
        temperatures = settings["temperatures"]
        if not isinstance(temperatures, list | tuple):
            raise RecipeError(f"signals.temperatures={temperatures!r}: a list of numbers is needed, as in [1.0, 2.0].")
        return cls(**{**settings, "temperatures": tuple(temperatures)})

    def _check_sizes(self) -> None:
        if not 1 <= self.vocabulary <= LARGEST_VOCABULARY:
            raise RecipeError(
                f"signals: a vocabulary of {self.vocabulary} tokens cannot be stored, only 1 to {LARGEST_VOCABULARY}. "
                f"Use another teacher.model."
            )
        if self.lists and not 1 <= self.k <= self.vocabulary:
            raise RecipeError(
                f"signals.k={self.k}: the vocabulary has {self.vocabulary} tokens. Use a k of 1 to {self.vocabulary}."
            )
        if not self.lists and self.k:
            raise RecipeError(f"signals.k={self.k}: kind={self.kind} keeps every token. Remove k, or use kind=sampled.")
        if self.kind == "hidden":
            _check_choice("dtype", self.dtype, get_args(Dtype))
        if (self.width > 0, self.dtype is not None) != (self.kind == "hidden",) * 2:
            raise RecipeError(
                f"signals.width={self.width}, dtype={self.dtype}: kind=hidden needs both, kind={self.kind} neither. "
                f"Use kind=hidden with both, or another kind with neither."
            )

    def _check_temperatures(self) -> None:
        for value in self.temperatures:
            if not isinstance(value, float) or not (math.isfinite(value) and value > 0):
                raise RecipeError(f"signals.temperatures: {value!r} is no temperature. Use numbers above 0, as in 2.0.")
        if not self.temperatures or len(set(self.temperatures)) < len(self.temperatures):
            raise RecipeError(
                f"signals.temperatures={list(self.temperatures)}: one or more are needed, each once. "
                f"List those of the losses."
            )
        if not self.lists and self.temperatures != (1.0,):
            raise RecipeError(
                f"signals.temperatures={list(self.temperatures)}: kind={self.kind} is exact at every temperature. "
                f"Remove temperatures."
            )

    def _check_share(self) -> None:
        if not isinstance(self.share, float) or not 0 < self.share <= 1:
            raise RecipeError(
                f"signals.positions.share={self.share!r}: a share of the positions is needed. Use a number above 0 and "
                f"not above 1."
            )
        if self.positions == "all" and self.share != 1:
            raise RecipeError(
                f"signals.positions.share={self.share}: kind=all takes every position. Remove share, or use "
                f"kind=random or kind=highest_entropy."
            )


def _check_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RecipeError(f"signals.{key}={value!r}: not known. Use one of {', '.join(choices)}.")


def _check_integer(key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise RecipeError(f"signals.{key}={value!r}: a whole number is needed. Use one that is not below 0.")
