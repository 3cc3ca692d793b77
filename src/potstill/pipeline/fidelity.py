"""How true stored signals are: a sample of positions, learned from as the teacher said them and as a store gives them.

Refuses to judge from a value alone: what reaches the student is the gradient, so the gradient is compared.

Suffixes: N positions, V vocabulary, D the student's width, X what an encoding reads (V, or the teacher's width).
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from potstill.losses import HeadTerm, distillation_loss, logit_blocks
from potstill.signals.encodings import Encoding, draw_uniforms, encoding_of
from potstill.signals.spec import Kind, SignalSpec
from potstill.types import Logits, Mixture, States, TeacherLogits

__all__ = ["Fidelity", "describe_fidelity", "measure_fidelity"]

ROWS = 128
"""Positions that are compared: their logits are held whole, in float32."""

DRAWS = 4
"""Times that they are encoded with other random numbers, where an encoding uses any."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Forward KL and its gradients, learned from a decoded teacher instead of the dense one. KL in nats a position.

    kind                  of the encoding: a name of `SignalSpec`
    rows                  positions compared, at this temperature
    draws                 encodings of each with other random numbers; 1 where nothing is random
    bytes_per_token       of one position as encoded
    kl_dense              mean over the positions
    kl_estimate           the same of the decoded teacher, mean over the draws too
    kl_error_stderr       standard error, over the draws, of kl_estimate - kl_dense; None for one draw
    rows_gradient_error   ||g' - g|| / ||g|| of the gradient of the student's states [N, D]; root mean square over draws
    head_gradient_error   the same of the head's weight [V, D], summed over the positions: what a step sees
    head_gradient_cosine  between the two gradients of the head; mean over the draws
    head_gradient_bias    <g' - g, g> / ||g||^2 of the head, mean over the draws: 0 for an unbiased estimate
    head_gradient_bias_stderr  its standard error over the draws; None for one draw

    A share is None where the dense gradient is 0 and the other is not.
    """

    kind: Kind
    rows: int
    temperature: float
    draws: int
    bytes_per_token: int
    kl_dense: float
    kl_estimate: float
    kl_error_stderr: float | None
    rows_gradient_error: float | None
    head_gradient_error: float | None
    head_gradient_cosine: float | None
    head_gradient_bias: float | None
    head_gradient_bias_stderr: float | None

    @property
    def kl_error(self) -> float:
        """Signed: above 0 where the stored signals make the distance larger than it is."""
        return self.kl_estimate - self.kl_dense


def measure_fidelity(
    student: States,
    teacher: States | Mixture,
    spec: SignalSpec,
    *,
    temperature: float = 1.0,
    rows: int = ROWS,
    seed: int = 0,
) -> Fidelity:
    """Compare forward KL and its gradients from dense logits with those from encoded and decoded ones.

    student [N, D] and teacher hold the same positions, of which at most `rows` are drawn by the seed; both heads are
    cut to the spec's vocabulary. Holds [rows, V] logits and three gradients of the head in float32. Of a mixture, the
    mean of its members at T = 1 is encoded. Raises ValueError for no position, where shapes disagree, and for hidden
    states of a mixture, and what an encoding raises for a temperature that it does not hold.
    """
    if not len(student.rows_ND):
        raise ValueError("fidelity: got no position, needs at least one. Give rows with supervised positions.")
    places_n = _draw_places(len(student.rows_ND), rows, seed).to(student.rows_ND.device)
    student = replace(student, rows_ND=student.rows_ND[places_n]).sliced(spec.vocabulary)
    teacher = _pick(teacher, places_n).sliced(spec.vocabulary)
    encoding = encoding_of(spec, teacher.head if isinstance(teacher, States) else None)
    said_nX, dense = _speak(teacher, spec)
    exact, compared = _learn(student, dense, temperature), []
    for draw in range(DRAWS if encoding.randoms else 1):
        decoded = _store(encoding, said_nX, f"{seed} {draw}", temperature=temperature)
        compared.append(_compare(exact, _learn(student, decoded.to(student.rows_ND.device), temperature)))
    return Fidelity(
        kind=spec.kind,
        rows=len(places_n),
        temperature=temperature,
        draws=len(compared),
        bytes_per_token=encoding.stride,
        kl_dense=exact.kl,
        kl_estimate=statistics.fmean(found.kl for found in compared),
        kl_error_stderr=_standard_error([found.kl for found in compared]),
        rows_gradient_error=_root_mean_square([found.rows_error for found in compared]),
        head_gradient_error=_root_mean_square([found.head_error for found in compared]),
        head_gradient_cosine=_mean([found.cosine for found in compared]),
        head_gradient_bias=_mean([found.along for found in compared]),
        head_gradient_bias_stderr=_standard_error([found.along for found in compared]),
    )


def describe_fidelity(found: Fidelity) -> list[tuple[str, str, str]]:
    """Rows of (measure, value, meaning) for people, as the plan and the report show them."""
    places = f"{found.rows:,} position{'s' * (found.rows != 1)} at T = {found.temperature:g}"
    spread = f"mean and standard error of {found.draws} draws" if found.draws > 1 else "nothing is drawn"
    return [
        ("bytes a position", f"{found.bytes_per_token:,}", "as encoded"),
        ("KL, dense", f"{found.kl_dense:.4g} nats", f"mean of {places}"),
        ("KL, stored", f"{found.kl_estimate:.4g} nats", _KL_MEANINGS[found.kind]),
        ("KL, stored minus dense", _signed(found.kl_error, found.kl_error_stderr, "nats"), spread),
        (
            "gradient error of a position",
            _percent(found.rows_gradient_error),
            "||g' - g|| / ||g|| of the student's states" + (": noisy by design" if found.draws > 1 else ""),
        ),
        (
            "gradient error of a step",
            _percent(found.head_gradient_error),
            f"||g' - g|| / ||g|| of the head over {found.rows:,} positions"
            + (": noise averages out over more" if found.draws > 1 else ""),
        ),
        (
            "cosine of the gradients",
            _plain(found.head_gradient_cosine),
            "of the head, stored against dense: 1 is the same direction",
        ),
        (
            "gradient bias",
            _signed(found.head_gradient_bias, found.head_gradient_bias_stderr, "%"),
            f"how much longer the head's gradient is along the dense one: {spread}; 0 is unbiased",
        ),
    ]


# --- one teacher, twice ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pull:
    """What a teacher does to the student: the KL, mean of a position, and the gradients of its sum."""

    kl: float
    rows_ND: Tensor
    weight_VD: Tensor


@dataclass(frozen=True, slots=True)
class _Compared:
    """One draw against the dense teacher."""

    kl: float
    rows_error: float | None
    head_error: float | None
    cosine: float | None
    along: float | None


def _draw_places(count: int, rows: int, seed: int) -> Tensor:
    """Ascending numbers of the positions to compare. int64 [n]."""
    shuffled_N = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return shuffled_N[:rows].sort().values


def _pick(teacher: States | Mixture, places_n: Tensor) -> States | Mixture:
    if isinstance(teacher, States):
        return replace(teacher, rows_ND=teacher.rows_ND[places_n.to(teacher.rows_ND.device)])
    members = tuple(replace(m, rows_ND=m.rows_ND[places_n.to(m.rows_ND.device)]) for m in teacher.members)
    return Mixture(members, teacher.weights_NM[places_n.to(teacher.weights_NM.device)])


def _speak(teacher: States | Mixture, spec: SignalSpec) -> tuple[Tensor, TeacherLogits]:
    """What an encoding reads of the teacher, and the teacher to whom its copy is compared."""
    if spec.kind == "hidden":
        if not isinstance(teacher, States):
            raise ValueError("signals.kind=hidden: got several teachers, needs one. Use signals.kind: sampled.")
        return teacher.rows_ND, teacher
    logits_NV = torch.cat([tile_nV.clone() for _, tile_nV in logit_blocks(teacher)])
    return logits_NV, Logits(logits_NV)


def _store(encoding: Encoding, said_nX: Tensor, seed: str, *, temperature: float) -> TeacherLogits:
    """Through the encoding and back."""
    key = hashlib.blake2b(f"fidelity {seed}".encode(), digest_size=16).digest()
    uniforms_nU = draw_uniforms(key, len(said_nX), encoding.randoms).to(said_nX.device)
    return encoding.unpack(encoding.pack(encoding.select(said_nX, uniforms_nU)), temperature)


@torch.inference_mode(False)
@torch.enable_grad()
def _learn(student: States, teacher: TeacherLogits, temperature: float) -> _Pull:
    wide = torch.promote_types(student.rows_ND.dtype, torch.float32)
    rows_ND, weight_VD = (
        tensor.detach().to(wide, copy=True).requires_grad_() for tensor in (student.rows_ND, student.head.weight_VD)
    )
    term = HeadTerm("forward_kl", temperature=temperature, times_temperature_squared=False)
    own = States(rows_ND, replace(student.head, weight_VD=weight_VD))
    loss = distillation_loss(own, None, [term], teacher=teacher, compiled=False)
    rows_gradient_ND, weight_gradient_VD = torch.autograd.grad(loss.total, (rows_ND, weight_VD))
    return _Pull(float(loss.terms[term.name]) / loss.count, rows_gradient_ND, weight_gradient_VD)


def _compare(exact: _Pull, found: _Pull) -> _Compared:
    """Shares of lengths; equal gradients differ by exactly nothing, also where both are 0."""
    rows_error = _ratio((found.rows_ND - exact.rows_ND).norm(), exact.rows_ND.norm())
    dense_VD, difference_VD, norm = exact.weight_VD, found.weight_VD - exact.weight_VD, exact.weight_VD.norm()
    if not difference_VD.any():
        return _Compared(found.kl, rows_error, 0.0, 1.0, 0.0)
    return _Compared(
        found.kl,
        rows_error,
        _ratio(difference_VD.norm(), norm),
        _ratio((found.weight_VD * dense_VD).sum(), norm * found.weight_VD.norm()),
        _ratio((difference_VD * dense_VD).sum(), norm.square()),
    )


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    """0 for nothing of nothing, None for something of nothing."""
    if not whole:
        return None if part else 0.0
    return float(part / whole)


# --- over the draws, and in words ------------------------------------------------------------------------------------


def _known(values: Sequence[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return statistics.fmean(known) if known else None


def _root_mean_square(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return math.sqrt(statistics.fmean(value * value for value in known)) if known else None


def _standard_error(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return statistics.stdev(known) / math.sqrt(len(known)) if known and len(known) > 1 else None


_KL_MEANINGS: dict[Kind, str] = {
    "sampled": "drawn tokens have less entropy than all: that adds to the value, and not to the gradient",
    "topk": "a lower bound: all unlisted tokens count as one",
    "topk_renormalised": "of the listed tokens as if there were no others: biased",
    "hidden": "from the teacher's own hidden states",
    "dense": "from all logits",
}


def _signed(value: float | None, error: float | None, unit: str) -> str:
    """`+1.83 ± 0.016 nats`, or a share in percent."""
    if value is None:
        return "undefined"
    factor = 100.0 if unit == "%" else 1.0
    spread = "" if error is None else f" ± {error * factor:.2g}"
    text = f"{value * factor:+.3g}".replace("-", "−") if value else "0"
    return f"{text}{spread} {unit}"


def _percent(share: float | None) -> str:
    return "undefined" if share is None else f"{share * 100:.3g} %"


def _plain(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.6g}"
