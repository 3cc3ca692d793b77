"""Distances between relations: which position attends to which, which hidden states lie near which.

Suffixes: B rows, T positions, H heads, G key and value heads, E width of a head, D width, M attended positions,
S segments, N points of one segment, V vertices. Segments are those of a packed batch, int64 [B, T], 0 for padding. Only
positions of one segment are ever related, so that a document counts in a pack as it does alone. There is one value per
position [M] in batch order, or one per segment [S], in float32 (float64 for float64), under autocast too.
Refuses to know where maps and states come from, and to take a mean over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from potstill.losses.divergence import forward_kl
from potstill.types import AttentionVectors

__all__ = [
    "AttentionVectors",
    "attention_kl",
    "attention_mse",
    "gram_mse",
    "linear_cka",
    "minilm",
    "minilm_v2",
    "relation_kl",
    "rkd_angle",
    "rkd_distance",
]

Heads = Literal["matched", "averaged"]
"""Whether attention maps are compared head by head, or as the mean map of all heads."""
ANGLE_BYTES = 64 * 2**20
"""Target size of one block of angles."""


# ------------------------------------------------------------------------------------------------------ attention maps


def attention_mse(
    student_BHTT: Tensor, teacher_BHTT: Tensor, segments_BT: Tensor, *, causal: bool = True, heads: Heads = "matched"
) -> Tensor:
    """mean_h mean_k (student_hk - teacher_hk)^2 over the keys k that a query may attend to, one value per query [M].

    The maps may be scores before the softmax (the paper's choice) or probabilities, but both the same; what stands at
    padding, in another segment or, if `causal`, after the query is never read. For one unpacked sequence without a
    causal mask the mean over queries is the paper's. Raises ValueError for shapes or head counts that do not fit.
    Jiao et al. (2020), arXiv:1909.10351, eq. 7.
    """
    student_MHT, teacher_MHT, seen_M1T = _map_rows((student_BHTT, teacher_BHTT), segments_BT, causal, heads)
    squares_MH = (student_MHT - teacher_MHT).square().sum(-1) / seen_M1T.sum(-1)
    return squares_MH.mean(1)


def attention_kl(
    student_BHTT: Tensor, teacher_BHTT: Tensor, segments_BT: Tensor, *, causal: bool = True, heads: Heads = "matched"
) -> Tensor:
    """mean_h sum_k p_hk (log p_hk - log q_hk), teacher p, student q, in nats, one value per query [M].

    The maps are probabilities (after the softmax). They are normalised anew over the keys that the query may attend
    to, and count as the smallest normal number of their arithmetic where they are 0. Masks and `heads` are those of
    `attention_mse`. Where queries and keys are at hand, `relation_kl` is more exact. Raises ValueError for shapes or
    head counts that do not fit, and for values outside [0, 1]. Wang et al. (2020), arXiv:2002.10957, section 3.1.
    """
    *maps, seen_M1T = _map_rows((student_BHTT, teacher_BHTT), segments_BT, causal, heads)
    for role, map_MHT in zip(("student", "teacher"), maps, strict=True):
        _check_probabilities(role, map_MHT)
    student_MHT, teacher_MHT = (map_MHT.clamp_min(torch.finfo(map_MHT.dtype).tiny).log() for map_MHT in maps)
    return _mean_kl(student_MHT, teacher_MHT, seen_M1T)


def _map_rows(
    maps: tuple[Tensor, Tensor], segments_BT: Tensor, causal: bool, heads: Heads
) -> tuple[Tensor, Tensor, Tensor]:
    """Both maps' attended queries [M, H, T], 0 where a key is not theirs to see, and what they see [M, 1, T]."""
    _check_shapes(maps, segments_BT, "BHTT")
    if heads not in ("matched", "averaged"):
        raise ValueError(f"heads={heads!r} is not known: use 'matched' or 'averaged'.")
    if heads == "matched":
        _check_heads(*maps, "compare with heads='averaged'")
    attended_BT = segments_BT > 0
    seen_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    seen_M1T = (seen_BTT.tril() if causal else seen_BTT)[attended_BT].unsqueeze(1)
    rows = _wide(*(map_BHTT.transpose(1, 2)[attended_BT] for map_BHTT in maps))
    # Selected before any arithmetic: a masked -inf or NaN would otherwise come back as 0 * NaN in the gradient.
    student_MHT, teacher_MHT = (torch.where(seen_M1T, rows_MHT, 0.0) for rows_MHT in rows)
    if heads == "averaged":
        return student_MHT.mean(1, keepdim=True), teacher_MHT.mean(1, keepdim=True), seen_M1T
    return student_MHT, teacher_MHT, seen_M1T


def _mean_kl(student_MHT: Tensor, teacher_MHT: Tensor, seen_M1T: Tensor) -> Tensor:
    """Mean over the heads of the KL between softmaxes over the keys that are seen, [M]."""
    student_MHT, teacher_MHT = (logits.masked_fill(~seen_M1T, -math.inf) for logits in (student_MHT, teacher_MHT))
    return forward_kl(student_MHT.flatten(0, 1), teacher_MHT.flatten(0, 1)).view(student_MHT.shape[:2]).mean(1)


def _check_probabilities(role: str, map_MHT: Tensor) -> None:
    # A row of bfloat16 probabilities may hold a 1 rounded upwards, never as much as 1 % of it.
    if ((map_MHT < 0) | (map_MHT > 1.01)).any():
        raise ValueError(
            f"{role}: attention maps hold values from {map_MHT.min():.3g} to {map_MHT.max():.3g}, needs probabilities "
            "in [0, 1]. Give maps after the softmax, or compare scores with attention_mse."
        )


# ------------------------------------------------------------------------------------------------------------- MiniLM


def relation_kl(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], segments_BT: Tensor, *, causal: bool = True
) -> Tensor:
    """mean_h KL(p_h || q_h), relations softmax_j(left_i . right_j / sqrt E), p teacher, q student, per position i [M].

    Each side is (left, right), float [B, H, T, E] both; j runs over the positions of i's segment, up to i if `causal`.
    In nats. Widths may differ, head counts may not. Holds H N^2 numbers for each segment of N positions. Raises
    ValueError for shapes that do not fit. Wang et al. (2020), arXiv:2002.10957, sections 3.1 and 3.2.
    """
    for role, (left, right) in (("student", student), ("teacher", teacher)):
        if left.shape != right.shape:
            raise ValueError(
                f"{role}: left {tuple(left.shape)} and right {tuple(right.shape)} differ, needs [B, H, T, E] twice. "
                "Repeat grouped keys and values once a query head."
            )
    _check_shapes((student[0], teacher[0]), segments_BT, "BHTE")
    _check_heads(student[0], teacher[0], "re-split both as minilm_v2 does")
    vectors = [vectors_BHTE.transpose(1, 2) for vectors_BHTE in (*student, *teacher)]
    return _by_position(partial(_segment_relation_kl, causal=causal), vectors, segments_BT)


def minilm(student: AttentionVectors, teacher: AttentionVectors, segments_BT: Tensor, *, causal: bool = True) -> Tensor:
    """KL between softmax(Q K^T / sqrt E) plus KL between softmax(V V^T / sqrt E), one value per position [M].

    `relation_kl` twice, on one layer (the paper's: the last) and the same number of query heads. Grouped keys and
    values are repeated once a query head, as attention does. Raises ValueError for shapes or head counts that do not
    fit. Wang et al. (2020), arXiv:2002.10957, section 3.
    """
    student, teacher = _ungrouped(student), _ungrouped(teacher)
    student_QK, teacher_QK = ((side.queries_BHTE, side.keys_BGTE) for side in (student, teacher))
    student_VV, teacher_VV = ((side.values_BGTE, side.values_BGTE) for side in (student, teacher))
    attention_M = relation_kl(student_QK, teacher_QK, segments_BT, causal=causal)
    return attention_M + relation_kl(student_VV, teacher_VV, segments_BT, causal=causal)


def minilm_v2(
    student: AttentionVectors,
    teacher: AttentionVectors,
    segments_BT: Tensor,
    *,
    relation_heads: int,
    causal: bool = True,
) -> Tensor:
    """KL of the query-query, the key-key and the value-value relations, added up, one value per position [M].

    Each side's heads are joined and split anew into `relation_heads` of equal width, which scales its own products; so
    widths and head counts may differ. Raises ValueError for shapes that do not fit, and for `relation_heads` that do
    not divide a width. Wang et al. (2021), arXiv:2012.15828, section 3.1, with every weight 1.
    """
    pairs = (
        (student.queries_BHTE, teacher.queries_BHTE),
        (student.keys_BGTE, teacher.keys_BGTE),
        (student.values_BGTE, teacher.values_BGTE),
    )
    for pair in pairs:
        _check_shapes(pair, segments_BT, "BHTE")
    split = [[_resplit(vectors_BHTE, relation_heads) for vectors_BHTE in pair] for pair in pairs]
    values = [relation_kl((own, own), (other, other), segments_BT, causal=causal) for own, other in split]
    return values[0] + values[1] + values[2]


def _segment_relation_kl(*vectors_NHE: Tensor, causal: bool) -> Tensor:
    """`vectors_NHE`: the student's left and right, the teacher's left and right."""
    student_NHN, teacher_NHN = (
        torch.einsum("ihe,jhe->ihj", left_NHE / math.sqrt(left_NHE.shape[-1]), right_NHE)
        for left_NHE, right_NHE in (vectors_NHE[:2], vectors_NHE[2:])
    )
    seen_NN = torch.ones(len(student_NHN), len(student_NHN), dtype=torch.bool, device=student_NHN.device)
    return _mean_kl(student_NHN, teacher_NHN, (seen_NN.tril() if causal else seen_NN).unsqueeze(1))


def _ungrouped(vectors: AttentionVectors) -> AttentionVectors:
    heads, grouped = vectors.queries_BHTE.shape[1], (vectors.keys_BGTE, vectors.values_BGTE)
    if any(heads % part.shape[1] for part in grouped):
        raise ValueError(
            f"{heads} query heads, {grouped[0].shape[1]} key heads and {grouped[1].shape[1]} value heads do not fit: "
            "needs as many query heads, or a multiple. Give the queries, keys and values of one layer."
        )
    keys, values = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in grouped)
    return AttentionVectors(vectors.queries_BHTE, keys, values)


def _resplit(vectors_BHTE: Tensor, relation_heads: int) -> Tensor:
    heads, width = vectors_BHTE.shape[1], vectors_BHTE.shape[3]
    if relation_heads < 1 or (heads * width) % relation_heads:
        raise ValueError(
            f"relation_heads={relation_heads} does not divide {heads} heads x {width} = {heads * width}: use a divisor "
            "of the joined widths of queries, keys and values of both student and teacher."
        )
    joined_BTX = vectors_BHTE.transpose(1, 2).flatten(2)
    return joined_BTX.view(*joined_BTX.shape[:2], relation_heads, -1).transpose(1, 2)


# -------------------------------------------------------------------------------------------- between hidden states


def rkd_distance(student_BTD: Tensor, teacher_BTD: Tensor, segments_BT: Tensor) -> Tensor:
    """mean_j SmoothL1(d_ij, t_ij), d and t distances in units of their segment's mean, one value per position [M].

    That mean is over positive distances. j runs over the other positions of i's segment; a lone position has 0. The
    mean over a segment is that over its pairs. Widths may differ. Equal points have distance 0 and no gradient. Holds
    N^2 numbers a segment. For whole documents, give one row of pooled states. Raises ValueError for shapes that do not
    fit. Park et al. (2019), arXiv:1904.05068, section 3.2.1.
    """
    _check_shapes((student_BTD, teacher_BTD), segments_BT, "BTD")
    return _by_position(_segment_rkd_distance, (student_BTD, teacher_BTD), segments_BT)


def rkd_angle(student_BTD: Tensor, teacher_BTD: Tensor, segments_BT: Tensor) -> Tensor:
    """mean_ik SmoothL1(c_ijk, t_ijk), c and t the cosines of the angles at position j, one value per position [M].

    i and k run over pairs of the segment's other positions; with fewer than two the value is 0. The mean over a segment
    is that over its triplets. Widths may differ. A side of length 0 has cosine 0 and no gradient. Takes N^3 D steps a
    segment: meant for some hundred points. Holds N D numbers and a bounded block, which is computed again for the
    gradient. Raises ValueError for shapes that do not fit. Park et al. (2019), arXiv:1904.05068, section 3.2.2.
    """
    _check_shapes((student_BTD, teacher_BTD), segments_BT, "BTD")
    return _by_position(_segment_rkd_angle, (student_BTD, teacher_BTD), segments_BT)


def gram_mse(student_BTD: Tensor, teacher_BTD: Tensor, segments_BT: Tensor) -> Tensor:
    """mean_j (g_ij - t_ij)^2, g and t the rows of a segment's X X^T over their norms, one value per position [M].

    The mean over a segment of N positions is ||G - G_teacher||_F^2 / N^2, the similarity-preserving loss of the paper.
    Widths may differ. A state of zeros has a row of zeros. Holds N^2 numbers a segment. Raises ValueError for shapes
    that do not fit. Tung and Mori (2019), arXiv:1907.09682, section 2.
    """
    _check_shapes((student_BTD, teacher_BTD), segments_BT, "BTD")
    return _by_position(_segment_gram_mse, (student_BTD, teacher_BTD), segments_BT)


def linear_cka(student_BTD: Tensor, teacher_BTD: Tensor, segments_BT: Tensor) -> Tensor:
    """1 - ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F), X and Y centred, one value per segment [S], in [0, 1].

    Segments come row by row, by their number. Widths may differ. Biased where a segment has fewer positions than the
    states have dimensions: even unrelated states then look alike, and the value is too low. Where all states of one
    side are equal it is 1, of both sides 0, without gradient. Holds the smaller of N^2 and D^2 numbers a segment.
    Raises ValueError for shapes that do not fit. Kornblith et al. (2019), arXiv:1905.00414, section 3.
    """
    _check_shapes((student_BTD, teacher_BTD), segments_BT, "BTD")
    return _by_segment(_segment_linear_cka, (student_BTD, teacher_BTD), segments_BT)


def _segment_rkd_distance(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    student_NN, teacher_NN = _distances(student_ND), _distances(teacher_ND)
    values_NN = nn.functional.smooth_l1_loss(student_NN, teacher_NN, reduction="none")
    return values_NN.sum(1) / max(len(values_NN) - 1, 1)


def _distances(points_ND: Tensor) -> Tensor:
    points_ND = _placed(points_ND)
    # Differences, not products: |x|^2 - 2xy + |y|^2 cancels where points are near. cdist has gradient 0 at distance 0.
    distances_NN = torch.cdist(points_ND, points_ND, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances_NN.sum() / (distances_NN > 0).sum().clamp_min(1)
    return distances_NN / torch.where(mean != 0, mean, 1.0)


def _segment_rkd_angle(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    count, width = len(student_ND), max(student_ND.shape[1], teacher_ND.shape[1])
    at_once = max(1, ANGLE_BYTES // (student_ND.element_size() * count * (count + width)))
    sums = [
        checkpoint(_angle_sums, student_ND, teacher_ND, vertices_V, use_reentrant=False, preserve_rng_state=False)
        for vertices_V in torch.split(torch.arange(count, device=student_ND.device), at_once)
    ]
    return torch.cat(sums) / max((count - 1) * (count - 2), 1)


def _angle_sums(student_ND: Tensor, teacher_ND: Tensor, vertices_V: Tensor) -> Tensor:
    student_VNN, teacher_VNN = _cosines(student_ND, vertices_V), _cosines(teacher_ND, vertices_V)
    values_VNN = nn.functional.smooth_l1_loss(student_VNN, teacher_VNN, reduction="none")
    # A side with itself is no angle, yet differs where it has length 0 on one side only.
    itself_NN = torch.eye(len(student_ND), dtype=torch.bool, device=student_ND.device)
    return values_VNN.masked_fill(itself_NN, 0.0).sum((1, 2))


def _cosines(points_ND: Tensor, vertices_V: Tensor) -> Tensor:
    """Cosine of the angle at every vertex between every two points, [V, N, N]."""
    points_ND = _placed(points_ND)
    sides_VND = _unit(points_ND - points_ND[vertices_V].unsqueeze(1))
    return sides_VND @ sides_VND.mT


def _segment_gram_mse(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    student_ND, teacher_ND = _scaled(student_ND), _scaled(teacher_ND)
    return (_unit(student_ND @ student_ND.mT) - _unit(teacher_ND @ teacher_ND.mT)).square().mean(1)


def _segment_linear_cka(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    student_ND, teacher_ND = (points - points.mean(0) for points in (_placed(student_ND), _placed(teacher_ND)))
    count, own, other = len(student_ND), student_ND.shape[1], teacher_ND.shape[1]
    if count * (own + other) <= own * own + own * other + other * other:
        student_gram, teacher_gram = student_ND @ student_ND.mT, teacher_ND @ teacher_ND.mT
        cross = (student_gram * teacher_gram).sum()
    else:
        student_gram, teacher_gram = student_ND.mT @ student_ND, teacher_ND.mT @ teacher_ND
        cross = (teacher_ND.mT @ student_ND).square().sum()
    norms = torch.linalg.vector_norm(student_gram), torch.linalg.vector_norm(teacher_gram)
    size = norms[0] * norms[1]
    similarity = (cross / torch.where(size != 0, size, 1.0)).clamp(max=1.0)
    alike = (norms[0] == 0) & (norms[1] == 0)
    return 1.0 - similarity.masked_fill(alike, 1.0).unsqueeze(0)


def _placed(points_ND: Tensor) -> Tensor:
    """First point at 0, so that far from it no digit is lost. For what no shift changes: it needs no gradient."""
    return _scaled(points_ND - points_ND[0].detach())


def _scaled(points_ND: Tensor) -> Tensor:
    """Largest number 1, so that no square overflows. For what no scale changes: it needs no gradient."""
    largest = points_ND.detach().abs().amax()
    return points_ND / torch.where(largest != 0, largest, 1.0)


def _unit(vectors: Tensor) -> Tensor:
    """Divided by its norm along the last axis; a vector of zeros stays, and has gradient 0 where 1 / norm has none."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return torch.where(norms != 0, vectors / torch.where(norms != 0, norms, 1.0), 0.0)


def _by_position(measure: Callable[..., Tensor], states: Sequence[Tensor], segments_BT: Tensor) -> Tensor:
    """What `measure` says of each point of each segment, in batch order [M]."""
    order_M, _ = _pieces(segments_BT)
    return _by_segment(measure, states, segments_BT)[order_M.argsort()]


def _by_segment(measure: Callable[..., Tensor], states: Sequence[Tensor], segments_BT: Tensor) -> Tensor:
    """What `measure` says of the states [N, ...] of each segment, one after another. states [B, T, ...]."""
    order_M, sizes = _pieces(segments_BT)
    rows = [rows[order_M] for rows in _wide(*(state[segments_BT > 0] for state in states))]
    with torch.autocast(segments_BT.device.type, enabled=False):
        values = [measure(*piece) for piece in zip(*(torch.split(row, sizes) for row in rows), strict=True)]
    # Nothing, but of the states: a batch of padding has a graph too.
    return torch.cat([*(row.flatten()[:0] for row in rows), *values])


def _pieces(segments_BT: Tensor) -> tuple[Tensor, list[int]]:
    """The order that sorts attended positions by row and segment, int64 [M], and the length of every segment."""
    rows_M, columns_M = (segments_BT > 0).nonzero(as_tuple=True)
    names_M2 = torch.stack([rows_M, segments_BT[rows_M, columns_M].to(rows_M.dtype)], dim=1)
    _, piece_M, sizes_S = torch.unique(names_M2, dim=0, return_inverse=True, return_counts=True)
    return piece_M.argsort(stable=True), sizes_S.tolist()


def _wide(*tensors: Tensor) -> list[Tensor]:
    """All in one dtype: float32, or float64 where one of them is."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


def _check_shapes(sides: tuple[Tensor, Tensor], segments_BT: Tensor, axes: str) -> None:
    """B and T must be those of the segments, on both sides; other axes are free."""
    known = dict(zip("BT", segments_BT.shape, strict=False))
    fit = segments_BT.ndim == 2 and all(
        side.ndim == len(axes) and all(known.get(axis, n) == n for axis, n in zip(axes, side.shape, strict=True))
        for side in sides
    )
    if not fit:
        raise ValueError(
            f"student {tuple(sides[0].shape)}, teacher {tuple(sides[1].shape)} and segments {tuple(segments_BT.shape)} "
            f"do not fit: needs [{', '.join(axes)}] twice and [B, T]. Let both read the same batch."
        )


def _check_heads(student_BHTX: Tensor, teacher_BHTX: Tensor, remedy: str) -> None:
    if student_BHTX.shape[1] != teacher_BHTX.shape[1]:
        raise ValueError(
            f"the student has {student_BHTX.shape[1]} heads and the teacher {teacher_BHTX.shape[1]}: needs as many of "
            f"both to match them one to one; else {remedy}."
        )
