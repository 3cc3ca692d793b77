"""Distances between relations: by hand in plain floats, blind to padding and to other documents, finite everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from potstill.losses import relation
from potstill.losses.relation import (
    AttentionVectors,
    attention_kl,
    attention_mse,
    gram_mse,
    linear_cka,
    minilm,
    minilm_v2,
    relation_kl,
    rkd_angle,
    rkd_distance,
)

Points = Sequence[Sequence[float]]
Distance = Callable[[Tensor, Tensor, Tensor], Tensor]

# Documents of 4, 3, 1 and 5 positions; the second row numbers its own out of order, and has one in two pieces.
SEGMENTS_BT = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0], [3, 0, 1, 1, 1, 0, 1, 1]])
DOCUMENTS = [(0, [0, 1, 2, 3]), (0, [4, 5, 6]), (1, [2, 3, 4, 6, 7]), (1, [0])]
"""Row and columns of every document, row by row and by number."""
HEADS = 2

some_examples = settings(deadline=None, max_examples=20)


def vectors_of(states_BTD: Tensor, heads: int = HEADS) -> AttentionVectors:
    """Queries, keys and values of some heads, out of states whose width is a multiple of 3 * heads."""
    parts = states_BTD.unflatten(-1, (3, heads, -1))
    return AttentionVectors(*(parts[:, :, part].transpose(1, 2) for part in range(3)))


def keys_to_values(student_BTD: Tensor, teacher_BTD: Tensor, segments_BT: Tensor) -> Tensor:
    student, teacher = vectors_of(student_BTD), vectors_of(teacher_BTD)
    pairs = [(side.keys_BGTE, side.values_BGTE) for side in (student, teacher)]
    return relation_kl(*pairs, segments_BT, causal=False)


def of_vectors(student_BTD: Tensor, teacher_BTD: Tensor, segments_BT: Tensor) -> Tensor:
    return minilm(vectors_of(student_BTD), vectors_of(teacher_BTD), segments_BT)


def of_resplit_vectors(student_BTD: Tensor, teacher_BTD: Tensor, segments_BT: Tensor) -> Tensor:
    student, teacher = vectors_of(student_BTD, heads=4), vectors_of(teacher_BTD, heads=1)
    return minilm_v2(student, teacher, segments_BT, relation_heads=HEADS, causal=False)


DISTANCES: dict[str, Distance] = {
    "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
    "gram_mse": gram_mse,
    "linear_cka": linear_cka,
    "relation_kl": keys_to_values,
    "minilm": of_vectors,
    "minilm_v2": of_resplit_vectors,
}
BETWEEN_STATES = ["rkd_distance", "rkd_angle", "gram_mse", "linear_cka"]

every_distance = pytest.mark.parametrize("name", DISTANCES)
every_distance_between_states = pytest.mark.parametrize("name", BETWEEN_STATES)


def states(width: int = 12, segments_BT: Tensor = SEGMENTS_BT) -> Tensor:
    return torch.randn(*segments_BT.shape, width, dtype=torch.float64)


@st.composite
def state_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher states of any multiple of 12 wide, and segments drawn at random."""
    rows, positions = draw(st.integers(1, 2)), draw(st.integers(1, 7))
    numbers = st.lists(st.integers(0, 3), min_size=positions, max_size=positions)
    segments_BT = torch.tensor(draw(st.lists(numbers, min_size=rows, max_size=rows)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    student_BTD, teacher_BTD = (
        torch.randn(rows, positions, draw(st.sampled_from([12, 24])), generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    return student_BTD, teacher_BTD, segments_BT


# ---------------------------------------------------------------------------------------- the formulas, a second time


def smooth_l1(a: float, b: float) -> float:
    return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def softmax(scores: Sequence[float]) -> list[float]:
    top = max(scores)
    total = math.fsum(math.exp(score - top) for score in scores)
    return [math.exp(score - top) / total for score in scores]


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def rkd_distance_by_hand(student: Points, teacher: Points) -> list[float]:
    def distances(points: Points) -> list[list[float]]:
        raw = [[math.dist(a, b) for b in points] for a in points]
        positive = [distance for row in raw for distance in row if distance > 0]
        return [[distance / fmean(positive) if positive else 0.0 for distance in row] for row in raw]

    own, other = distances(student), distances(teacher)
    count = len(student)
    return [
        math.fsum(smooth_l1(own[i][j], other[i][j]) for j in range(count) if j != i) / max(count - 1, 1)
        for i in range(count)
    ]


def rkd_angle_by_hand(student: Points, teacher: Points) -> list[float]:
    def cosine(points: Points, i: int, j: int, k: int) -> float:
        a, b = ([x - y for x, y in zip(points[end], points[j], strict=True)] for end in (i, k))
        size = math.hypot(*a) * math.hypot(*b)
        return dot(a, b) / size if size > 0 else 0.0

    values = []
    for j in range(len(student)):
        others = [i for i in range(len(student)) if i != j]
        angles = [(i, j, k) for i in others for k in others if i < k]
        losses = [smooth_l1(cosine(student, *angle), cosine(teacher, *angle)) for angle in angles]
        values.append(fmean(losses) if losses else 0.0)
    return values


def gram_mse_by_hand(student: Points, teacher: Points) -> list[float]:
    def rows(points: Points) -> list[list[float]]:
        raw = [[dot(a, b) for b in points] for a in points]
        return [[value / math.hypot(*row) for value in row] for row in raw]

    pairs = zip(rows(student), rows(teacher), strict=True)
    return [fmean((a - b) ** 2 for a, b in zip(*pair, strict=True)) for pair in pairs]


def linear_cka_by_hand(student: Points, teacher: Points) -> list[float]:
    def columns(points: Points) -> list[list[float]]:
        return [[value - fmean(column) for value in column] for column in zip(*points, strict=True)]

    def squares(a: Points, b: Points) -> float:
        return math.fsum(dot(x, y) ** 2 for x in a for y in b)

    if len(student) == 1:
        return [0.0]
    x, y = columns(student), columns(teacher)
    return [1.0 - squares(y, x) / math.sqrt(squares(x, x) * squares(y, y))]


def relation_by_hand(left: Points, right: Points, heads: int, causal: bool) -> list[list[list[float]]]:
    """Per position, per head: the softmax over the positions that it sees."""
    width = len(left[0]) // heads
    cuts = [slice(head * width, (head + 1) * width) for head in range(heads)]
    return [
        [
            softmax([dot(query[cut], key[cut]) / math.sqrt(width) for key in (right[: at + 1] if causal else right)])
            for cut in cuts
        ]
        for at, query in enumerate(left)
    ]


def relations_by_hand(which: Sequence[tuple[int, int]], causal: bool) -> Callable[[Points, Points], list[float]]:
    """Sum over pairs of parts (0 queries, 1 keys, 2 values) of the KL between their relations."""

    def by_hand(student: Points, teacher: Points) -> list[float]:
        def relations(points: Points, pair: tuple[int, int]) -> list[list[list[float]]]:
            third = len(points[0]) // 3
            left, right = ([point[part * third : (part + 1) * third] for point in points] for part in pair)
            return relation_by_hand(left, right, HEADS, causal)

        totals = [0.0] * len(student)
        for pair in which:
            for at, (q, p) in enumerate(zip(relations(student, pair), relations(teacher, pair), strict=True)):
                totals[at] += fmean(kl(p[head], q[head]) for head in range(HEADS))
        return totals

    return by_hand


BY_HAND: dict[str, Callable[[Points, Points], list[float]]] = {
    "rkd_distance": rkd_distance_by_hand,
    "rkd_angle": rkd_angle_by_hand,
    "gram_mse": gram_mse_by_hand,
    "linear_cka": linear_cka_by_hand,
    "relation_kl": relations_by_hand([(1, 2)], causal=False),
    "minilm": relations_by_hand([(0, 1), (2, 2)], causal=True),
    "minilm_v2": relations_by_hand([(0, 0), (1, 1), (2, 2)], causal=False),
}


def documents_of(segments_BT: Tensor) -> list[tuple[int, list[int]]]:
    rows = list(enumerate(segments_BT.tolist()))
    return [
        (row, [column for column, number in enumerate(numbers) if number == document])
        for row, numbers in rows
        for document in sorted(set(numbers) - {0})
    ]


def in_batch_order(name: str, values: Sequence[Tensor], documents: Sequence[tuple[int, list[int]]]) -> Tensor:
    """Values of documents as a distance gives them: those of positions by row and column, one a document as is."""
    if not values:
        return torch.zeros(0, dtype=torch.float64)
    if name == "linear_cka":
        return torch.cat(list(values))
    places = [(row, column) for row, columns in documents for column in columns]
    flat = torch.cat(list(values))
    return flat[sorted(range(len(places)), key=places.__getitem__)]


def test_the_documents_of_these_tests_are_those_of_their_segments():
    assert documents_of(SEGMENTS_BT) == DOCUMENTS


# -------------------------------------------------------------------------------------------------- laws of all of them


@every_distance
@some_examples
@given(state_pairs())
def test_values_are_those_of_the_formula(name, pair):
    student_BTD, teacher_BTD, segments_BT = pair
    documents = documents_of(segments_BT)
    by_hand = [
        torch.tensor(
            BY_HAND[name](student_BTD[row, columns].tolist(), teacher_BTD[row, columns].tolist()), dtype=torch.float64
        )
        for row, columns in documents
    ]
    found = DISTANCES[name](student_BTD, teacher_BTD, segments_BT)
    assert_close(found, in_batch_order(name, by_hand, documents), rtol=1e-8, atol=1e-11)


@every_distance
@some_examples
@given(state_pairs())
def test_zero_at_equality_and_never_below(name, pair):
    student_BTD, teacher_BTD, segments_BT = pair
    own = DISTANCES[name](student_BTD, student_BTD, segments_BT)
    assert_close(own, torch.zeros_like(own), rtol=0.0, atol=1e-13)
    assert (DISTANCES[name](student_BTD, teacher_BTD, segments_BT) >= -1e-13).all()


@every_distance
def test_gradcheck(name):
    segments_BT = torch.tensor([[1, 1, 1, 0], [1, 2, 2, 2]])
    student_BTD, teacher_BTD = states(12, segments_BT).requires_grad_(), states(24, segments_BT)
    assert torch.autograd.gradcheck(lambda rows: DISTANCES[name](rows, teacher_BTD, segments_BT), student_BTD)


@every_distance
def test_a_document_counts_in_a_pack_as_it_does_alone(name):
    student_BTD, teacher_BTD = states().requires_grad_(), states()
    packed = DISTANCES[name](student_BTD, teacher_BTD, SEGMENTS_BT)
    alone = [
        DISTANCES[name](
            student_BTD[row : row + 1, columns],
            teacher_BTD[row : row + 1, columns],
            torch.ones(1, len(columns), dtype=torch.long),
        )
        for row, columns in DOCUMENTS
    ]
    expected = in_batch_order(name, alone, DOCUMENTS)
    assert_close(packed, expected)
    (found_BTD,) = torch.autograd.grad(packed.sum(), student_BTD)
    (expected_BTD,) = torch.autograd.grad(expected.sum(), student_BTD)
    assert_close(found_BTD, expected_BTD)


@every_distance
@pytest.mark.parametrize("junk", [1e6, math.inf, math.nan])
def test_padding_changes_nothing_and_learns_nothing(name, junk):
    padding_BT1 = (SEGMENTS_BT == 0).unsqueeze(-1)
    clean = [states(), states()]
    dirty = [state.masked_fill(padding_BT1, junk) for state in clean]
    results = []
    for student_BTD, teacher_BTD in (clean, dirty):
        student_BTD.requires_grad_()
        values = DISTANCES[name](student_BTD, teacher_BTD, SEGMENTS_BT)
        values.sum().backward()
        results.append((values.detach(), student_BTD.grad))
    (values, grad_BTD), (dirty_values, dirty_grad_BTD) = results
    assert torch.equal(values, dirty_values)
    assert torch.equal(grad_BTD, dirty_grad_BTD)
    assert (dirty_grad_BTD.masked_select(padding_BT1) == 0).all()
    assert dirty_grad_BTD.abs().sum() > 0


@every_distance
def test_a_batch_of_padding_gives_zero_with_a_graph(name):
    student_BTD = torch.full((2, 8, 12), math.nan, requires_grad=True)
    values = DISTANCES[name](student_BTD, torch.full((2, 8, 24), math.nan), torch.zeros_like(SEGMENTS_BT))
    values.sum().backward()
    assert (values.numel(), values.sum().item()) == (0, 0.0)
    assert torch.equal(student_BTD.grad, torch.zeros_like(student_BTD))


@every_distance
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_states_are_compared_in_float32_under_autocast_too(name, dtype):
    student_BTD, teacher_BTD = states().to(dtype), states().to(dtype)
    exact = DISTANCES[name](student_BTD.double(), teacher_BTD.double(), SEGMENTS_BT)
    plain = DISTANCES[name](student_BTD, teacher_BTD, SEGMENTS_BT)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = DISTANCES[name](student_BTD, teacher_BTD, SEGMENTS_BT)
    assert plain.dtype is torch.float32
    assert exact.dtype is torch.float64
    assert torch.equal(plain, under_autocast)
    assert_close(plain.double(), exact, rtol=1e-5, atol=1e-6)


@every_distance
def test_shapes_that_do_not_fit_are_refused_and_named(name):
    for student_BTD, teacher_BTD in ((states()[:, :7], states()), (states(), states()[:1])):
        with pytest.raises(ValueError, match=r"do not fit: needs \[B, .*Let both read the same batch") as caught:
            DISTANCES[name](student_BTD, teacher_BTD, SEGMENTS_BT)
        assert "segments (2, 8)" in str(caught.value)
    with pytest.raises(ValueError, match=r"segments \(8,\) do not fit"):
        DISTANCES[name](states(), states(), SEGMENTS_BT[0])


# ------------------------------------------------------------------------------------------------ between hidden states


def rotation(width: int) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q


@every_distance_between_states
def test_a_turned_and_scaled_copy_is_no_distance_away(name):
    teacher_BTD = states()
    values = DISTANCES[name](0.3 * teacher_BTD @ rotation(12), teacher_BTD, SEGMENTS_BT)
    assert_close(values, torch.zeros_like(values), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle", "linear_cka"])
def test_a_shifted_copy_is_no_distance_away(name):
    teacher_BTD = states()
    values = DISTANCES[name](teacher_BTD + states()[:1, :1], teacher_BTD, SEGMENTS_BT)
    assert_close(values, torch.zeros_like(values), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle", "linear_cka"])
def test_far_from_the_origin_no_digit_is_lost_in_float32(name):
    student_BTD, teacher_BTD = torch.randint(-32, 32, (2, 8, 3)) / 8, states().float()
    values = DISTANCES[name](student_BTD + 3 * 2**18, teacher_BTD, SEGMENTS_BT)
    assert_close(values, DISTANCES[name](student_BTD, teacher_BTD, SEGMENTS_BT), rtol=1e-5, atol=1e-6)


@every_distance_between_states
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_no_square_overflows_or_vanishes_in_float32(name, scale):
    student_BTD, teacher_BTD = states().float(), states().float()
    far_BTD = (scale * student_BTD).requires_grad_()
    values = DISTANCES[name](far_BTD, teacher_BTD, SEGMENTS_BT)
    values.sum().backward()
    assert_close(values, DISTANCES[name](student_BTD, teacher_BTD, SEGMENTS_BT))
    assert torch.isfinite(far_BTD.grad).all()


@every_distance_between_states
@pytest.mark.parametrize("place", [0.0, 0.1, 1e4])
def test_equal_points_have_finite_values_and_small_gradients(name, place):
    twins_BTD = states().float()
    twins_BTD[0, 1] = twins_BTD[0, 0]
    same_BTD = torch.full_like(twins_BTD, place)
    for student_BTD in (twins_BTD.requires_grad_(), same_BTD.requires_grad_()):
        values = DISTANCES[name](student_BTD, states().float(), SEGMENTS_BT)
        values.sum().backward()
        assert torch.isfinite(values).all()
        assert student_BTD.grad.abs().max() < 100.0


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
def test_equal_points_have_distance_zero_and_right_angles(name):
    segments_BT = torch.ones(1, 5, dtype=torch.long)
    student_BTD, teacher_BTD = states(3, segments_BT), states(3, segments_BT)
    student_BTD[0, 1] = student_BTD[0, 0]
    expected = BY_HAND[name](student_BTD[0].tolist(), teacher_BTD[0].tolist())
    assert DISTANCES[name](student_BTD, teacher_BTD, segments_BT).tolist() == pytest.approx(expected, rel=1e-9)


def test_one_state_of_zeros_has_no_direction_but_a_finite_gradient():
    student_BTD = states()
    student_BTD[0, 0] = 0.0
    gram_mse(student_BTD.requires_grad_(), states(), SEGMENTS_BT).sum().backward()
    assert student_BTD.grad.abs().max() < 100.0


def test_states_that_do_not_vary_are_unlike_all_but_their_kind():
    segments_BT = torch.ones(1, 7, dtype=torch.long)
    same_BTD = torch.randn(1, 1, 30).expand(1, 7, 30)
    varied_BTD = torch.randn(1, 7, 5)
    assert linear_cka(same_BTD, varied_BTD, segments_BT).tolist() == [1.0]
    assert linear_cka(varied_BTD, same_BTD, segments_BT).tolist() == [1.0]
    assert linear_cka(same_BTD, 7.3 * same_BTD, segments_BT).tolist() == [0.0]


@pytest.mark.parametrize("count", [4, 40])
def test_the_two_ways_to_cka_agree_on_many_points_and_on_few(count, watch):
    student_BTD, teacher_BTD = (torch.randn(1, count, width, dtype=torch.float64) for width in (6, 9))
    expected = linear_cka_by_hand(student_BTD[0].tolist(), teacher_BTD[0].tolist())
    with watch:
        found = linear_cka(student_BTD, teacher_BTD, torch.ones(1, count, dtype=torch.long))
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    assert watch.largest <= count * 9


def test_rounding_never_makes_a_copy_nearer_than_equal():
    copies_BTD = torch.randn(200, 5, 3)
    values_S = linear_cka(copies_BTD, copies_BTD, torch.ones(200, 5, dtype=torch.long))
    assert ((values_S >= 0) & (values_S < 1e-6)).all()


def test_a_blockwise_angle_is_the_angle_and_never_holds_all_triplets(monkeypatch, watch):
    student_BTD, teacher_BTD = (torch.randn(1, 20, 4, dtype=torch.float64) for _ in range(2))
    segments_BT = torch.ones(1, 20, dtype=torch.long)

    def value_and_gradient() -> tuple[Tensor, Tensor]:
        leaf_BTD = student_BTD.clone().requires_grad_()
        values_M = rkd_angle(leaf_BTD, teacher_BTD, segments_BT)
        return values_M, torch.autograd.grad(values_M.sum(), leaf_BTD)[0]

    whole = value_and_gradient()
    monkeypatch.setattr(relation, "ANGLE_BYTES", 3 * 8 * 20 * 24)
    with watch:
        blocks = value_and_gradient()
    assert_close(blocks, whole)
    assert watch.largest == 3 * 20 * 20


# ------------------------------------------------------------------------------------------------------- attention maps

MAPS = {"attention_mse": attention_mse, "attention_kl": attention_kl}
every_map_distance = pytest.mark.parametrize("name", MAPS)
causal_or_not = pytest.mark.parametrize("causal", [True, False])


def seen_of(segments_BT: Tensor, causal: bool) -> Tensor:
    """Which keys each query may attend to, [B, 1, T, T], written as a loop."""
    rows, positions = segments_BT.shape
    seen_B1TT = torch.zeros(rows, 1, positions, positions, dtype=torch.bool)
    for row, columns in documents_of(segments_BT):
        for query in columns:
            for key in columns:
                seen_B1TT[row, 0, query, key] = key <= query or not causal
    return seen_B1TT


def maps(causal: bool = True, heads: int = HEADS, junk: float = 0.0) -> Tensor:
    """Attention probabilities [B, H, T, T], `junk` where a query may not attend."""
    seen_B1TT = seen_of(SEGMENTS_BT, causal)
    scores_BHTT = torch.randn(2, heads, 8, 8, dtype=torch.float64)
    return scores_BHTT.masked_fill(~seen_B1TT, -1e9).softmax(-1).masked_fill(~seen_B1TT, junk)


def maps_by_hand(name: str, student_BHTT: Tensor, teacher_BHTT: Tensor, causal: bool) -> Tensor:
    seen_B1TT, values = seen_of(SEGMENTS_BT, causal), []
    for row, query in (SEGMENTS_BT > 0).nonzero().tolist():
        keys = seen_B1TT[row, 0, query].nonzero().flatten()
        pairs = zip(student_BHTT[row, :, query, keys].tolist(), teacher_BHTT[row, :, query, keys].tolist(), strict=True)
        if name == "attention_kl":
            values.append(fmean(kl(p, q) for q, p in pairs))
        else:
            values.append(fmean(fmean((a - b) ** 2 for a, b in zip(*pair, strict=True)) for pair in pairs))
    return torch.tensor(values, dtype=torch.float64)


@every_map_distance
@causal_or_not
def test_map_values_are_those_of_the_formula_and_zero_at_equality(name, causal):
    student_BHTT, teacher_BHTT = maps(causal), maps(causal)
    found_M = MAPS[name](student_BHTT, teacher_BHTT, SEGMENTS_BT, causal=causal)
    assert_close(found_M, maps_by_hand(name, student_BHTT, teacher_BHTT, causal), rtol=1e-10, atol=1e-12)
    own_M = MAPS[name](student_BHTT, student_BHTT, SEGMENTS_BT, causal=causal)
    assert_close(own_M, torch.zeros_like(own_M), rtol=0.0, atol=1e-14)


@every_map_distance
@causal_or_not
@pytest.mark.parametrize("junk", [-math.inf, math.nan, 5.0])
def test_what_may_not_be_attended_to_changes_nothing_and_learns_nothing(name, causal, junk):
    hidden_B1TT = ~seen_of(SEGMENTS_BT, causal)
    student_BHTT, teacher_BHTT = maps(causal), maps(causal)
    dirty_BHTT = student_BHTT.masked_fill(hidden_B1TT, junk).requires_grad_()
    values_M = MAPS[name](dirty_BHTT, teacher_BHTT.masked_fill(hidden_B1TT, junk), SEGMENTS_BT, causal=causal)
    values_M.sum().backward()
    assert torch.equal(values_M, MAPS[name](student_BHTT, teacher_BHTT, SEGMENTS_BT, causal=causal))
    assert (dirty_BHTT.grad.masked_select(hidden_B1TT) == 0).all()
    assert torch.isfinite(dirty_BHTT.grad).all()
    assert dirty_BHTT.grad.abs().sum() > 0


@every_map_distance
@pytest.mark.parametrize("heads", ["matched", "averaged"])
def test_gradcheck_of_maps(name, heads):
    segments_BT = torch.tensor([[1, 1, 2, 0]])
    student_BHTT, teacher_BHTT = (torch.rand(1, 2, 4, 4, dtype=torch.float64) * 0.8 + 0.1 for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda maps_BHTT: MAPS[name](maps_BHTT, teacher_BHTT, segments_BT, heads=heads), student_BHTT.requires_grad_()
    )


@every_map_distance
def test_averaged_heads_are_one_head_that_is_their_mean(name):
    student_BHTT, teacher_BHTT = maps(heads=2), maps(heads=3)
    means = [maps_BHTT.mean(1, keepdim=True) for maps_BHTT in (student_BHTT, teacher_BHTT)]
    found_M = MAPS[name](student_BHTT, teacher_BHTT, SEGMENTS_BT, heads="averaged")
    assert_close(found_M, MAPS[name](*means, SEGMENTS_BT))
    with pytest.raises(ValueError, match=r"student has 2 heads and the teacher 3.*averaged"):
        MAPS[name](student_BHTT, teacher_BHTT, SEGMENTS_BT)
    with pytest.raises(ValueError, match="heads='best'"):
        MAPS[name](student_BHTT, teacher_BHTT, SEGMENTS_BT, heads="best")


@every_map_distance
def test_a_batch_of_padding_gives_zero_with_a_graph_for_maps_too(name):
    student_BHTT = torch.full((2, 2, 8, 8), math.nan, requires_grad=True)
    values_M = MAPS[name](student_BHTT, student_BHTT.detach(), torch.zeros_like(SEGMENTS_BT))
    values_M.sum().backward()
    assert (values_M.numel(), values_M.sum().item()) == (0, 0.0)
    assert torch.equal(student_BHTT.grad, torch.zeros_like(student_BHTT))


@every_map_distance
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_maps_are_compared_in_float32(name, dtype):
    student_BHTT, teacher_BHTT = maps().to(dtype), maps().to(dtype)
    found_M = MAPS[name](student_BHTT, teacher_BHTT, SEGMENTS_BT)
    exact_M = MAPS[name](student_BHTT.double(), teacher_BHTT.double(), SEGMENTS_BT)
    assert found_M.dtype is torch.float32
    assert_close(found_M.double(), exact_M, rtol=1e-5, atol=1e-6)


@every_map_distance
def test_maps_of_other_positions_are_refused_and_named(name):
    with pytest.raises(ValueError, match=r"teacher \(2, 2, 8, 7\) and segments \(2, 8\) do not fit.*\[B, H, T, T\]"):
        MAPS[name](maps(), maps()[..., :7], SEGMENTS_BT)


def test_scores_are_no_probabilities():
    with pytest.raises(ValueError, match=r"teacher: attention maps hold values from -3 to .*attention_mse"):
        attention_kl(maps(), maps().masked_fill(seen_of(SEGMENTS_BT, causal=True), -3.0), SEGMENTS_BT)
    with pytest.raises(ValueError, match=r"student: attention maps hold values from .* to 1\.5"):
        attention_kl(maps().clamp_min(1.5), maps(), SEGMENTS_BT)


def test_a_probability_of_zero_costs_much_but_not_everything():
    student_BHTT = torch.eye(2).expand(1, 1, 2, 2).clone().requires_grad_()
    values_M = attention_kl(student_BHTT, torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 2, dtype=torch.long))
    values_M.sum().backward()
    assert values_M.tolist() == pytest.approx([0.0, math.log(0.5) - 0.5 * math.log(torch.finfo(torch.float32).tiny)])
    assert torch.isfinite(student_BHTT.grad).all()


def test_without_mask_and_padding_the_mean_over_queries_is_that_over_the_map():
    student_BHTT, teacher_BHTT = torch.randn(1, 3, 5, 5), torch.randn(1, 3, 5, 5)
    values_M = attention_mse(student_BHTT, teacher_BHTT, torch.ones(1, 5, dtype=torch.long), causal=False)
    assert_close(values_M.mean(), torch.nn.functional.mse_loss(student_BHTT, teacher_BHTT))


@causal_or_not
def test_maps_and_the_vectors_that_make_them_have_the_same_kl(causal):
    def side(width: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        left_BHTE, right_BHTE = (torch.randn(2, 3, 8, width, dtype=torch.float64) for _ in range(2))
        scores_BHTT = left_BHTE @ right_BHTE.mT / math.sqrt(width)
        return (left_BHTE, right_BHTE), scores_BHTT.masked_fill(~seen_of(SEGMENTS_BT, causal), -1e9).softmax(-1)

    (student, student_BHTT), (teacher, teacher_BHTT) = side(4), side(6)
    found_M = relation_kl(student, teacher, SEGMENTS_BT, causal=causal)
    assert_close(found_M, attention_kl(student_BHTT, teacher_BHTT, SEGMENTS_BT, causal=causal))


# ------------------------------------------------------------------------------------------------------------- MiniLM


def test_grouped_keys_and_values_are_those_repeated_once_a_query_head():
    def side(width: int) -> tuple[AttentionVectors, AttentionVectors]:
        queries, keys, values = (torch.randn(2, heads, 8, width) for heads in (6, 2, 3))
        grouped = AttentionVectors(queries, keys, values)
        return grouped, AttentionVectors(queries, keys.repeat_interleave(3, 1), values.repeat_interleave(2, 1))

    student, teacher = side(4), side(5)
    assert_close(minilm(student[0], teacher[0], SEGMENTS_BT), minilm(student[1], teacher[1], SEGMENTS_BT))


def test_a_causal_relation_does_not_see_what_follows():
    student_BTD, teacher_BTD = states(), states()
    before = of_vectors(student_BTD, teacher_BTD, SEGMENTS_BT)
    student_BTD[0, 3] = 9.0
    changed_M = of_vectors(student_BTD, teacher_BTD, SEGMENTS_BT) != before
    assert changed_M.nonzero().flatten().tolist() == [3]


def test_head_counts_that_do_not_fit_are_refused_with_both():
    vectors = {heads: vectors_of(states(), heads) for heads in (2, 4)}
    with pytest.raises(ValueError, match=r"student has 2 heads and the teacher 4.*minilm_v2"):
        minilm(vectors[2], vectors[4], SEGMENTS_BT)
    mixed = AttentionVectors(vectors[2].queries_BHTE, vectors[4].keys_BGTE, vectors[4].values_BGTE)
    with pytest.raises(ValueError, match="2 query heads, 4 key heads and 4 value heads"):
        minilm(mixed, mixed, SEGMENTS_BT)
    with pytest.raises(ValueError, match="relation_heads=3 does not divide 2 heads x 2 = 4"):
        minilm_v2(vectors[2], vectors[4], SEGMENTS_BT, relation_heads=3)
    with pytest.raises(ValueError, match="relation_heads=0"):
        minilm_v2(vectors[2], vectors[4], SEGMENTS_BT, relation_heads=0)
    with pytest.raises(ValueError, match=r"teacher: left \(2, 2, 8, 2\) and right \(2, 4, 8, 1\) differ"):
        relation_kl(
            (vectors[2].keys_BGTE,) * 2, (vectors[2].keys_BGTE, vectors[4].keys_BGTE), SEGMENTS_BT, causal=False
        )
