"""Whether the parts of one call of the loss fit each other. Refuses by name and shape, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from potstill.losses.terms import HeadTerm
from potstill.types import Head, Logits, Mixture, SparseLogits, States, TeacherLogits

__all__ = ["refuse_misfits", "refuse_unscorable"]

MASS_ERROR = 1e-2
"""How far the probabilities of a sparse teacher may be from 1: rounding of stored ones, not a forgotten tail."""


def refuse_misfits(
    student: States | Logits,
    targets_N: Tensor | None,
    terms: Sequence[HeadTerm],
    *,
    teacher: TeacherLogits | None,
    weights_N: Tensor | None = None,
) -> None:
    """Raises ValueError that names the term and the shapes, what is needed, and what to do."""
    _refuse_kinds(student, terms)
    teacher = teacher if any(term.needs_teacher for term in terms) else None
    _refuse_terms(terms, targets_N, teacher)
    _refuse_devices(student, targets_N=targets_N, weights_N=weights_N, teacher=teacher)
    rows, vocabulary = _refuse_student(student)
    _refuse_per_row(targets_N, weights_N, rows, vocabulary)
    if isinstance(teacher, SparseLogits):
        _refuse_sparse(teacher, terms, rows, vocabulary)
    elif teacher is not None:
        _refuse_teacher("teacher", teacher, rows, vocabulary)


def refuse_unscorable(arm: States | Mixture, teacher: States | Mixture, targets_N: Tensor) -> None:
    """Raises ValueError where two sides and the tokens that came do not fit, or a side is truncated."""
    for role, side in (("arm", arm), ("teacher", teacher)):
        if not isinstance(side, States | Mixture):
            raise ValueError(f"the {role} is a {type(side).__name__}: scores need whole distributions.")
    first = arm if isinstance(arm, States) else arm.members[0]
    rows, vocabulary = _refuse_student(first, "arm")
    _refuse_per_row(targets_N, None, rows, vocabulary)
    _refuse_teacher("arm", arm, rows, vocabulary)
    _refuse_teacher("teacher", teacher, rows, vocabulary)


def _refuse_student(student: States | Logits, role: str = "student") -> tuple[int, int]:
    """How many rows and tokens it has."""
    if isinstance(student, States):
        _refuse_states(role, student, student.rows_ND.shape[0])
        return student.rows_ND.shape[0], student.head.vocabulary
    shape, dtype = tuple(student.logits_NV.shape), student.logits_NV.dtype
    if len(shape) != 2 or not shape[1] or not dtype.is_floating_point:
        raise ValueError(f"the {role}'s logits are {shape}, {dtype}: needs floats [N, C], at least one class.")
    return shape[0], shape[1]


def _refuse_per_row(targets_N: Tensor | None, weights_N: Tensor | None, rows: int, vocabulary: int) -> None:
    for name, values_N in (("targets_N", targets_N), ("weights_N", weights_N)):
        if values_N is not None and values_N.shape != (rows,):
            raise ValueError(f"{name} {tuple(values_N.shape)} does not fit the student's {rows} rows: needs [N].")
    if targets_N is not None and targets_N.dtype is not torch.int64:
        raise ValueError(f"targets_N is {targets_N.dtype}: needs int64 token ids.")
    if weights_N is not None and (weights_N.requires_grad or not bool(weights_N.isfinite().all())):
        raise ValueError("weights_N must be finite and constant: no gradient flows to it, so detach it.")
    if targets_N is not None and rows and not _within(targets_N, vocabulary):
        raise ValueError(
            f"targets_N holds {int(targets_N.min())}..{int(targets_N.max())}, but the head has tokens "
            f"0..{vocabulary - 1}. Pass supervised rows only: leave out those whose target is a mask."
        )


def _refuse_kinds(student: States | Logits, terms: Sequence[HeadTerm]) -> None:
    if not isinstance(student, States | Logits):
        raise ValueError(f"student is a {type(student).__name__}: needs States(rows_ND, Head(weight_VD)), or Logits.")
    if not all(isinstance(term, HeadTerm) for term in terms):
        raise ValueError(f"terms {terms} are not all HeadTerms: needs for example [HeadTerm('forward_kl')].")


def _refuse_devices(student: States | Logits, **others: Tensor | TeacherLogits | None) -> None:
    """Names the first part that is elsewhere: torch would say so in the middle of a product."""
    device = _tensors(student)[0].device
    for name, part in (("the student's head", student), *others.items()):
        for tensor in _tensors(part):
            if tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device}, the student's rows are on {device}: move one of them.")


def _tensors(part: Tensor | TeacherLogits | None) -> tuple[Tensor, ...]:
    if isinstance(part, States):
        bias_V = part.head.bias_V
        return (part.rows_ND, part.head.weight_VD) if bias_V is None else (part.rows_ND, part.head.weight_VD, bias_V)
    if isinstance(part, Mixture):
        return part.weights_NM, *(tensor for member in part.members for tensor in _tensors(member))
    if isinstance(part, SparseLogits):
        listed = part.ids_NK, part.logprobs_NK
        return listed if part.tail_N is None else (*listed, part.tail_N)
    if isinstance(part, Logits):
        return (part.logits_NV,)
    return () if part is None else (part,)


def _refuse_terms(terms: Sequence[HeadTerm], targets_N: Tensor | None, teacher: TeacherLogits | None) -> None:
    if not terms:
        raise ValueError("terms is empty: give at least one HeadTerm.")
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise ValueError(
            f"terms {names} have a name twice, under which only one sum could be reported. Merge the two into one "
            "weight, or, where they differ, wrap one in a function with a name of its own."
        )
    asking = [term.name for term in terms if term.needs_teacher]
    if asking and teacher is None:
        raise ValueError(f"terms {asking} compare with a teacher: pass teacher.")
    if not (teacher is None or isinstance(teacher, TeacherLogits)):
        raise ValueError(f"teacher is a {type(teacher).__name__}: needs States, a Mixture, SparseLogits or Logits.")
    if len(asking) < len(names) and targets_N is None:
        raise ValueError("cross_entropy needs the tokens that came: pass targets_N.")


def _refuse_states(role: str, states: States, rows: int) -> None:
    weight_VD, bias_V = states.head.weight_VD, states.head.bias_V
    if not (states.rows_ND.is_floating_point() and weight_VD.is_floating_point()):
        raise ValueError(f"the {role}'s rows are {states.rows_ND.dtype}, its head {weight_VD.dtype}: needs floats.")
    if states.head.softcap is not None and not states.head.softcap > 0:
        raise ValueError(f"the {role}'s softcap {states.head.softcap} must be above 0, or None for none.")
    if states.rows_ND.ndim != 2 or states.rows_ND.shape != (rows, weight_VD.shape[-1]):
        raise ValueError(
            f"the {role}'s rows {tuple(states.rows_ND.shape)} and head {tuple(weight_VD.shape)} do not fit {rows} "
            "rows: needs [N, D] and [V, D]."
        )
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise ValueError(f"the {role}'s bias {tuple(bias_V.shape)} does not fit its head {tuple(weight_VD.shape)}.")
    _refuse_shards(role, states.head)


def _refuse_shards(role: str, head: Head) -> None:
    if any(hasattr(part, "full_tensor") for part in (head.weight_VD, head.bias_V)):
        raise ValueError(
            f"the {role}'s head is a DTensor, of which this process holds a part: a softmax over a part of the "
            "vocabulary would be wrong. Pass weight.full_tensor(), through which the gradient finds its way back."
        )


def _refuse_teacher(role: str, teacher: States | Mixture | Logits, rows: int, vocabulary: int) -> None:
    if isinstance(teacher, Logits):
        if tuple(teacher.logits_NV.shape) != (rows, vocabulary) or not teacher.logits_NV.is_floating_point():
            raise ValueError(
                f"the {role}'s logits {tuple(teacher.logits_NV.shape)}, {teacher.logits_NV.dtype}, do not fit the "
                f"student's {rows} rows and {vocabulary} tokens: needs floats [N, V]."
            )
        return
    if isinstance(teacher, Mixture):
        _refuse_weights(teacher, rows)
        for number, member in enumerate(teacher.members):
            _refuse_teacher(f"{role}'s member {number}", member, rows, vocabulary)
        return
    _refuse_states(role, teacher, rows)
    if teacher.head.vocabulary != vocabulary:
        raise ValueError(
            f"the heads of the student and the {role} have {vocabulary} and {teacher.head.vocabulary} "
            "tokens: slice both to the shared ones with Head.sliced."
        )


def _refuse_weights(mixture: Mixture, rows: int) -> None:
    weights_NM, members = mixture.weights_NM, len(mixture.members)
    if not members or weights_NM.shape != (rows, members):
        raise ValueError(
            f"weights_NM {tuple(weights_NM.shape)} does not fit {rows} rows and {members} teachers: needs [N, M]."
        )
    if not all(isinstance(member, States) for member in mixture.members):
        raise ValueError("a Mixture's members must be States: multiply the weights of one within another.")
    sums_N, rounding = weights_NM.double().sum(-1), members * torch.finfo(weights_NM.dtype).eps
    if rows and not (bool((weights_NM >= 0).all()) and bool(((sums_N - 1).abs() < 1e-3 + rounding).all())):
        raise ValueError("weights_NM must not be negative and must sum to 1 in every row: divide each row by its sum.")


def _refuse_sparse(teacher: SparseLogits, terms: Sequence[HeadTerm], rows: int, vocabulary: int) -> None:
    shapes = tuple(teacher.ids_NK.shape), tuple(teacher.logprobs_NK.shape)
    if len(shapes[0]) != 2 or shapes[0][0] != rows or shapes[0] != shapes[1] or not shapes[0][1]:
        raise ValueError(
            f"ids_NK {shapes[0]} and logprobs_NK {shapes[1]} do not fit {rows} rows: needs [N, K] of both."
        )
    if teacher.tail_N is not None and teacher.tail_N.shape != (rows,):
        raise ValueError(f"tail_N {tuple(teacher.tail_N.shape)} does not fit the student's {rows} rows: needs [N].")
    for term in terms:
        if term.needs_teacher and term.temperature != teacher.temperature:
            raise ValueError(
                f"{term.name}: temperature {term.temperature}, but the sparse teacher's log-probabilities hold at "
                f"{teacher.temperature}: a truncated list cannot be softened. Use that one, or capture at the other."
            )
        if term.needs_teacher and term.kind != "forward_kl" and not term.biased:
            raise ValueError(
                f"{term.name} has no unbiased form for a sparse teacher. Use forward_kl, a teacher's hidden states, or "
                "biased=True to compare the listed tokens and one class for the rest."
            )
        if term.needs_teacher and term.kind != "forward_kl" and teacher.tail_N is None:
            raise ValueError(f"{term.name} compares the unlisted tokens too: pass their log-mass as tail_N.")
    if rows and not _within(teacher.ids_NK, vocabulary):
        raise ValueError(f"ids_NK holds tokens outside of the head's 0..{vocabulary - 1}.")
    _refuse_repeats(teacher)
    mass_N = teacher.logprobs_NK.double().exp().sum(-1)
    mass_N = mass_N if teacher.tail_N is None else mass_N + teacher.tail_N.double().exp()
    if rows and not bool(((mass_N - 1).abs() < MASS_ERROR).all()):
        raise ValueError(
            f"the sparse teacher's probabilities sum to {float(mass_N.min()):.4g}..{float(mass_N.max()):.4g}: needs 1. "
            "Pass the log-mass of the unlisted tokens as tail_N, or renormalise if that is what you want."
        )


def _refuse_repeats(teacher: SparseLogits) -> None:
    """What fills up a row may repeat anything; it gets numbers of its own here."""
    fillers_K = -1 - torch.arange(teacher.ids_NK.shape[1], device=teacher.ids_NK.device)
    ids_NK = torch.where(teacher.logprobs_NK > -math.inf, teacher.ids_NK, fillers_K).sort(-1).values
    repeated_N = (ids_NK[:, 1:] == ids_NK[:, :-1]).any(-1)
    if bool(repeated_N.any()):
        row = int(repeated_N.nonzero()[0, 0])
        raise ValueError(
            f"ids_NK lists a token twice in row {row}: {teacher.ids_NK[row].tolist()[:16]}. Add up the probabilities "
            "of equal tokens first."
        )


def _within(ids: Tensor, vocabulary: int) -> bool:
    smallest, largest = torch.aminmax(ids)
    return bool((smallest >= 0) & (largest < vocabulary))
