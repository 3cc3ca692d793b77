"""One term of a loss over the vocabulary: which divergence, how strong, how soft.

Refuses a term that could not be computed, at once and by name, instead of in the middle of a step.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from potstill.losses.divergence import DIVERGENCES, Divergence, cross_entropy
from potstill.losses.fused import FUSED

__all__ = ["HeadTerm"]


@dataclass(frozen=True, slots=True)
class HeadTerm:
    """One term of the loss over the vocabulary: weight * T^2 * divergence, or weight * cross-entropy.

    kind         a name in `DIVERGENCES`, "cross_entropy", or your own function (student_logits_NV, teacher_logits_NV,
                 temperature, **settings) -> [N]. Define it once: every new function is compiled anew. It must not write
                 to its arguments, and parameters that it holds get no gradient
    settings     keyword arguments of that function, for example {"beta": 0.1}
    times_temperature_squared  Hinton et al. (2015), section 2.1; without effect on cross-entropy, which is at T = 1
    biased       let a divergence other than forward KL compare with a sparse teacher: over the listed tokens and one
                 class for the rest, which is not the divergence of the whole distributions, nor unbiased

    Raises ValueError where the kind is not known, or a number is out of its range.
    """

    kind: str | Divergence
    weight: float = 1.0
    temperature: float = 1.0
    times_temperature_squared: bool = True
    settings: Mapping[str, float] = field(default_factory=dict, hash=False)
    biased: bool = False

    def __post_init__(self) -> None:
        """Try a function of ours on two tokens: it knows best which settings it takes, and in which ranges."""
        own = not isinstance(self.kind, str)
        if own and self.kind in (*DIVERGENCES.values(), cross_entropy):
            object.__setattr__(self, "kind", self.name)
        if isinstance(self.kind, str) and self.kind not in (*DIVERGENCES, "cross_entropy"):
            known = ", ".join(("cross_entropy", *DIVERGENCES))
            raise ValueError(f"{self.kind} is not a known divergence: use one of {known}, or pass your own function.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"{self.name}: temperature {self.temperature} must be a number above 0.")
        if not math.isfinite(self.weight):
            raise ValueError(f"{self.name}: weight {self.weight} must be a finite number.")
        arguments = (None, None, 1.0) if self.needs_teacher else (None, None)
        try:
            hash(self.kind)
            inspect.signature(self._function).bind(*arguments, **self.settings)
        except TypeError as error:
            needed = (
                "(student_logits_NV, teacher_logits_NV, temperature, **settings)" if own else "its settings by name"
            )
            raise ValueError(
                f"{self.name}: settings {dict(self.settings)} do not fit ({error}). Needs {needed}, and to be hashable."
            ) from None
        if isinstance(self.kind, str):
            second = torch.zeros(1, 2) if self.needs_teacher else torch.zeros(1, dtype=torch.long)
            self._function(torch.zeros(1, 2), second, **self.settings)

    @property
    def name(self) -> str:
        """The kind, or the name of one's own function."""
        return self.kind if isinstance(self.kind, str) else getattr(self.kind, "__name__", type(self.kind).__name__)

    @property
    def needs_teacher(self) -> bool:
        """Whether the term compares with a teacher's distribution."""
        return self.kind != "cross_entropy"

    @property
    def factor(self) -> float:
        """Weight times T^2 where that is asked for."""
        squared = self.temperature**2 if self.needs_teacher and self.times_temperature_squared else 1.0
        return self.weight * squared

    @property
    def pattern(self) -> HeadTerm:
        """The term without the numbers that may change from step to step: what one compiled kernel is good for."""
        temperature = 1.0 if self.temperature == 1.0 else 2.0
        return replace(self, weight=1.0, temperature=temperature, times_temperature_squared=True, biased=False)

    def hard(self, student_logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        """The unweighted value of a term of hard labels at each position, [N]."""
        return cross_entropy(student_logits_NV, targets_N, **self.settings)

    def soft(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
        """The unweighted value of a term that compares with a teacher at each position, [N]."""
        values_N = self._function(student_logits_NV, teacher_logits_NV, temperature, **self.settings)
        if values_N.shape != student_logits_NV.shape[:1]:
            raise ValueError(
                f"{self.name} gave {tuple(values_N.shape)} for logits {tuple(student_logits_NV.shape)}: needs one "
                "value a row, [N]."
            )
        return values_N

    @property
    def _function(self) -> Callable[..., Tensor]:
        if not isinstance(self.kind, str):
            return self.kind
        return FUSED.get(self.kind) or DIVERGENCES.get(self.kind, cross_entropy)
