"""Through bytes and back: unbiased, of mass one, of constant size, and exact where exactness is promised."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.errors import ModelError, NonFiniteError, RecipeError, StoreError
from potstill.signals import Encoding, SignalSpec, draw_uniforms, encoding_of, select_listed
from potstill.signals.bits import Estimate
from potstill.types import Head, Logits, SparseLogits, States

TRUNCATED = ["sampled", "topk", "topk_renormalised"]


def records_of(encoding: Encoding, said: torch.Tensor, key: bytes = b"piece") -> np.ndarray:
    return encoding.pack(encoding.select(said, draw_uniforms(key, len(said), encoding.randoms)))


def spread(listed: SparseLogits, vocabulary: int) -> torch.Tensor:
    """The listed probabilities at their places, float64 [n, V]."""
    p = torch.zeros(len(listed.ids_NK), vocabulary, dtype=torch.float64)
    return p.scatter_add(-1, listed.ids_NK, listed.logprobs_NK.double().exp())


@st.composite
def specs_and_logits(draw, kinds=TRUNCATED):
    vocabulary = draw(st.one_of(st.integers(1, 30), st.sampled_from([128, 257, 1500])))
    k = draw(st.one_of(st.integers(1, min(vocabulary, 70)), st.just(min(vocabulary, 400))))
    temperatures = draw(st.sampled_from([(1.0,), (1.0, 2.0), (0.5, 4.0, 1.0)]))
    spec = SignalSpec(draw(st.sampled_from(kinds)), vocabulary, k=k, temperatures=temperatures)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.0, 0.1, 2.0, 8.0, 1e4]))
    logits = scale * torch.randn(draw(st.integers(0, 5)), vocabulary, generator=generator)
    masked = torch.rand(logits.shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    masked[:, draw(st.integers(0, vocabulary - 1))] = False
    return spec, logits.masked_fill(masked, -math.inf)


@settings(deadline=None, max_examples=150)
@given(specs_and_logits())
def test_records_have_the_declared_stride_and_list_k_ascending_tokens_of_mass_one(case):
    spec, logits = case
    encoding = encoding_of(spec)
    records = records_of(encoding, logits)
    assert records.dtype == np.uint8
    assert records.shape == (len(logits), encoding.stride)
    for temperature in spec.temperatures:
        listed = encoding.unpack(records, temperature)
        assert (listed.ids_NK.dtype, listed.logprobs_NK.dtype) == (torch.int64, torch.float32)
        assert listed.temperature == temperature
        assert listed.ids_NK.shape == listed.logprobs_NK.shape == (len(logits), spec.k)
        assert (listed.ids_NK.diff(dim=-1) > 0).all()
        assert ((listed.ids_NK >= 0) & (listed.ids_NK < spec.vocabulary)).all()
        assert (listed.tail_N is None) == (spec.kind != "topk")
        mass = listed.logprobs_NK.double().exp().sum(-1)
        mass = mass if listed.tail_N is None else mass + listed.tail_N.double().exp()
        torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-5)
        # What is impossible stays so, but for the share of a code.
        impossible = (logits == -math.inf).gather(-1, listed.ids_NK)
        assert (listed.logprobs_NK[impossible] == -math.inf).all()


@settings(deadline=None, max_examples=100)
@given(specs_and_logits(["sampled"]))
def test_the_mass_of_a_sampled_record_is_one_in_float64(case):
    spec, logits = case
    records = records_of(encoding_of(spec), logits)
    section = Estimate(spec.vocabulary, spec.k)
    for place in range(len(spec.temperatures)):
        p = section.probabilities(records[:, place * section.stride : (place + 1) * section.stride])
        assert np.abs(p.sum(-1) - 1).max(initial=0) <= 1e-12
        assert (p >= 0).all()


@pytest.mark.parametrize(("k", "vocabulary", "scale"), [(4, 20, 2.0), (16, 60, 3.0), (16, 300, 1.0), (8, 40, 5.0)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_of_many_records_is_the_distribution_and_its_gradient_the_dense_one(k, vocabulary, scale, temperature):
    draws = 6000
    encoding = encoding_of(SignalSpec("sampled", vocabulary, k=k, temperatures=(1.0, 2.0)))
    logits = scale * torch.randn(1, vocabulary, dtype=torch.float64)
    records = records_of(encoding, logits.expand(draws, -1), key=f"{k} of {vocabulary}".encode())
    estimates = spread(encoding.unpack(records, temperature), vocabulary)
    p = (logits / temperature).softmax(-1)
    head_VD = torch.randn(vocabulary, 6, dtype=torch.float64)
    q = torch.randn(1, vocabulary, dtype=torch.float64).softmax(-1)
    for found, expected in ((estimates, p), ((q - estimates) @ head_VD, (q - p) @ head_VD)):
        error = found.mean(0) - expected[0]
        # Beyond chance there are float32's rounding, and of what is drawn less than once in all these records nothing.
        allowed = 4.5 * found.std(0) / math.sqrt(draws) + 1e-6
        if found is estimates:
            allowed = allowed + torch.where(p[0] * draws * k < 25, 25 / draws / k, 0.0)
        assert (error.abs() <= allowed).all()


def test_rounding_alone_is_unbiased():
    """One draw, rounded in 20,000 ways."""
    logits, draws = 2.0 * torch.randn(1, 30), 20_000
    encoding = encoding_of(SignalSpec("sampled", 30, k=16))
    uniforms = draw_uniforms(b"roundings", draws, 3)
    uniforms[:, 0] = 0.4
    records = encoding.pack(encoding.select(logits.expand(draws, -1), uniforms))
    rounded = Estimate(30, 16).probabilities(records)
    _, heads, tau, _ = encoding.select(logits, uniforms[:1])
    exact = torch.where(heads > 0, heads, tau.unsqueeze(-1))[0].numpy()
    error = rounded.mean(0) - exact
    assert np.ptp(rounded, axis=0).max() > 0
    assert (np.abs(error) <= 4.5 * rounded.std(0) / math.sqrt(draws) + 1e-8).all()


def test_a_top_list_is_dense_on_its_tokens_at_every_stored_temperature():
    vocabulary, k = 3000, 16
    encoding = encoding_of(SignalSpec("topk", vocabulary, k=k, temperatures=(1.0, 2.0)))
    logits = 3.0 * torch.randn(200, vocabulary)
    records = records_of(encoding, logits)
    for temperature in (1.0, 2.0):
        listed = encoding.unpack(records, temperature)
        dense = (logits.double() / temperature).log_softmax(-1)
        expected = dense.gather(-1, listed.ids_NK)
        assert torch.equal(listed.ids_NK, logits.topk(k).indices.sort(-1).values)
        rest = torch.log1p(-expected.exp().sum(-1))
        torch.testing.assert_close(listed.tail_N.double(), rest, rtol=0, atol=1e-3)
        # Half a step of the fourth root, and what the others' rounding does to the sum.
        share = expected.exp() / expected.exp().sum(-1, keepdim=True)
        found = listed.logprobs_NK.double().exp() / listed.logprobs_NK.double().exp().sum(-1, keepdim=True)
        assert ((found - share).abs() <= 0.04 * share + 0.01 * share.amax(-1, keepdim=True)).all()


def test_a_renormalised_list_is_the_other_one_without_its_tail():
    logits = 3.0 * torch.randn(20, 500)
    with_tail = encoding_of(SignalSpec("topk", 500, k=9))
    without = encoding_of(SignalSpec("topk_renormalised", 500, k=9))
    listed, alone = (one.unpack(records_of(one, logits)) for one in (with_tail, without))
    assert torch.equal(listed.ids_NK, alone.ids_NK)
    mass = torch.log1p(-listed.tail_N.double().exp())
    torch.testing.assert_close(alone.logprobs_NK.double(), listed.logprobs_NK - mass.unsqueeze(-1), rtol=0, atol=1e-5)
    assert without.stride == with_tail.stride - 2


@pytest.mark.parametrize(("kind", "k"), [("sampled", 1), ("sampled", 257), ("topk", 1), ("topk_renormalised", 300)])
def test_records_are_read_alike_in_any_order_and_number_and_from_a_file(kind, k, tmp_path):
    encoding = encoding_of(SignalSpec(kind, 300, k=k))
    records = records_of(encoding, 2.0 * torch.randn(64, 300))
    np.save(tmp_path / "records.npy", np.tile(records, (40, 1)))
    mapped = np.load(tmp_path / "records.npy", mmap_mode="r")
    order = torch.randperm(len(mapped))
    whole, some = encoding.unpack(mapped), encoding.unpack(mapped[order[:100].numpy()])
    for name in ("ids_NK", "logprobs_NK"):
        assert torch.equal(getattr(whole, name)[order[:100]], getattr(some, name))


def test_batching_changes_nothing():
    encoding = encoding_of(SignalSpec("sampled", 1000, k=16, temperatures=(1.0, 2.0)))
    logits = 3.0 * torch.randn(300, 1000)
    uniforms = draw_uniforms(b"a piece", 300, encoding.randoms)
    whole = encoding.pack(encoding.select(logits, uniforms))
    parts = [encoding.pack(encoding.select(logits[at : at + 77], uniforms[at : at + 77])) for at in range(0, 300, 77)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_uniform_numbers_depend_on_the_key_alone():
    first = draw_uniforms(b"key", 1000, 3)
    assert (first.dtype, first.shape) == (torch.float64, (1000, 3))
    assert torch.equal(draw_uniforms(b"key", 10, 3), first[:10])
    assert not torch.equal(draw_uniforms(b"kez", 10, 3), first[:10])
    assert (first >= 0).all()
    assert (first < 1).all()
    assert abs(first.mean() - 0.5) < 0.03
    assert draw_uniforms(b"key", 5, 0).shape == (5, 0)
    # Stored records of years ago are drawn again with the same numbers.
    assert first[0].tolist() == [0.23035591494158036, 0.021619704905003867, 0.5414708088828887]


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_hidden_states_come_back_bit_for_bit(name, dtype):
    head = Head(torch.randn(50, 7))
    encoding = encoding_of(SignalSpec("hidden", 50, width=7, dtype=name), head)
    rows = torch.randn(9, 7).to(dtype)
    records = records_of(encoding, rows)
    records.flags.writeable = False
    assert records.shape == (9, encoding.stride) == (9, 7 * dtype.itemsize)
    states = encoding.unpack(records, 3.0)
    assert isinstance(states, States)
    assert states.head is head
    assert states.rows_ND.dtype == dtype
    assert torch.equal(states.rows_ND, rows)
    assert encoding.unpack(records[:0]).rows_ND.shape == (0, 7)


def test_dense_logits_come_back_bit_for_bit():
    encoding = encoding_of(SignalSpec("dense", 50))
    logits = torch.randn(9, 50)
    logits[:, 3], logits[0, 4] = -math.inf, -0.0
    said = encoding.unpack(records_of(encoding, logits), 2.0)
    assert isinstance(said, Logits)
    assert said.logits_NV.numpy().tobytes() == logits.numpy().tobytes()


@pytest.mark.parametrize("kind", [*TRUNCATED, "dense", "hidden"])
def test_what_is_not_a_number_is_not_stored(kind):
    k = 4 if kind in TRUNCATED else 0
    spec = SignalSpec(kind, 20, k=k, **({"width": 20, "dtype": "fp32"} if kind == "hidden" else {}))
    said = torch.randn(3, 20)
    said[1, 5] = math.nan
    with pytest.raises(NonFiniteError, match="at 1 of 3 positions"):
        records_of(encoding_of(spec), said)


@pytest.mark.parametrize("kind", [*TRUNCATED, "dense"])
def test_another_vocabulary_is_refused(kind):
    encoding = encoding_of(SignalSpec(kind, 20, k=4 if kind in TRUNCATED else 0))
    with pytest.raises(ModelError, match=r"logits of 21 tokens, the store keeps 20"):
        records_of(encoding, torch.randn(3, 21))
    with pytest.raises(StoreError, match=rf"uint8 \[3, {encoding.stride + 1}\], this encoding reads"):
        encoding.unpack(np.zeros((3, encoding.stride + 1), np.uint8))


def test_states_of_another_form_and_states_without_a_head_are_refused():
    encoding = encoding_of(SignalSpec("hidden", 20, width=4, dtype="bf16"))
    with pytest.raises(ModelError, match=r"torch\.float32 of width 4, the store keeps torch\.bfloat16 of width 4"):
        records_of(encoding, torch.randn(3, 4))
    with pytest.raises(ModelError, match=r"of width 5, the store"):
        records_of(encoding, torch.randn(3, 5).bfloat16())
    with pytest.raises(ModelError, match="head"):
        encoding.unpack(records_of(encoding, torch.randn(3, 4).bfloat16()))


@pytest.mark.parametrize("kind", TRUNCATED)
def test_a_temperature_that_was_not_stored_is_refused(kind):
    encoding = encoding_of(SignalSpec(kind, 20, k=4, temperatures=(1.0, 2.0)))
    with pytest.raises(RecipeError, match=r"^signals\.temperatures=\[1\.0, 2\.0\]: a loss asks for 4\.0"):
        encoding.unpack(records_of(encoding, torch.randn(3, 20)), 4.0)


@st.composite
def likeliest_of_logits(draw):
    """A spec at T = 1, logits in float64, and the K likeliest of them with their log-probabilities."""
    vocabulary = draw(st.one_of(st.integers(1, 30), st.sampled_from([128, 257])))
    k = draw(st.integers(1, min(vocabulary, 40)))
    spec = SignalSpec(draw(st.sampled_from(["topk", "topk_renormalised"])), vocabulary, k=k)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits_nV = 3.0 * torch.randn(draw(st.integers(0, 5)), vocabulary, generator=generator, dtype=torch.float64)
    return spec, logits_nV, logits_nV.log_softmax(-1).topk(k)


@settings(deadline=None, max_examples=150)
@given(likeliest_of_logits())
def test_a_list_of_the_likeliest_makes_the_record_that_all_logits_make(case):
    spec, logits_nV, (logprobs_nK, ids_nK) = case
    encoding = encoding_of(spec)
    assert np.array_equal(encoding.pack(select_listed(spec, ids_nK, logprobs_nK)), records_of(encoding, logits_nV))


def test_what_fills_up_a_list_has_no_probability_and_the_rest_is_told():
    spec = SignalSpec("topk", 100, k=3)
    logprobs = torch.tensor([[math.log(0.6), -math.inf, -math.inf]], dtype=torch.float64)
    encoding = encoding_of(spec)
    listed = encoding.unpack(encoding.pack(select_listed(spec, torch.tensor([[9, 0, 1]]), logprobs)))
    assert listed.ids_NK.tolist() == [[0, 1, 9]]
    assert listed.logprobs_NK.exp().tolist() == [pytest.approx([0.0, 0.0, 0.6], abs=1e-3)]
    assert float(listed.tail_N.exp()) == pytest.approx(0.4, abs=1e-3)


def test_rounded_probabilities_above_1_leave_nothing():
    spec = SignalSpec("topk", 100, k=2)
    logprobs = torch.tensor([[math.log(0.7), math.log(0.3001)]], dtype=torch.float64)
    encoding = encoding_of(spec)
    listed = encoding.unpack(encoding.pack(select_listed(spec, torch.tensor([[4, 2]]), logprobs)))
    assert listed.tail_N.tolist() == [-math.inf]
    torch.testing.assert_close(listed.logprobs_NK.exp().sum(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("spec", "ids", "error", "words"),
    [
        (SignalSpec("sampled", 9, k=2), [3, 4], RecipeError, r"^signals\.kind: sampled is not made of the likeliest"),
        (SignalSpec("topk", 9, k=2, temperatures=(1.0, 2.0)), [3, 4], RecipeError, r"^signals\.temperatures=\[1\.0, 2"),
        (SignalSpec("topk", 9, k=3), [3, 4], ModelError, "it lists 2 tokens a position, the store keeps 3 below 9"),
        (SignalSpec("topk", 9, k=2), [3, 9], ModelError, "it lists 2 tokens a position, the store keeps 2 below 9"),
        (SignalSpec("topk", 9, k=2), [3, 3], ModelError, "it lists a token twice at one position"),
    ],
)
def test_lists_that_no_record_can_hold_are_refused(spec, ids, error, words):
    with pytest.raises(error, match=words):
        select_listed(spec, torch.tensor([ids]), torch.tensor([[-1.0, -2.0]], dtype=torch.float64))


def test_a_list_of_nothing_is_no_distribution():
    nothing = torch.full((1, 2), -math.inf, dtype=torch.float64)
    with pytest.raises(NonFiniteError):
        select_listed(SignalSpec("topk", 9, k=2), torch.tensor([[3, 4]]), nothing)
