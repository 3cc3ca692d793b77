"""The search finds layers that are known to do nothing, tries what it says it tries, and ends in time."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from potstill.students import choose_greedily, cut_layers, even_layers
from potstill.students.blocks import find_blocks

AMPLE = 1e9


@given(st.integers(1, 200).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total))))
def test_even_layers_ascend_are_distinct_and_reach_both_ends(sizes):
    total, count = sizes
    layers = even_layers(total, count)
    assert len(layers) == count
    assert list(layers) == sorted(set(layers))
    assert layers[0] == 0
    assert count == 1 or layers[-1] == total - 1
    gaps = [later - earlier for earlier, later in itertools.pairwise(layers)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(st.integers(1, 20), st.integers(1, 20))
def test_a_deep_student_maps_onto_a_shallow_teacher_in_order(total, more):
    layers = even_layers(total, total + more)
    assert list(layers) == sorted(layers)
    assert set(layers) == set(range(total))


def silence(model, *layers):
    """Make these blocks identities: nothing is added to the residual stream."""
    for layer in layers:
        block = find_blocks(model)[1][layer]
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()


@pytest.fixture
def search(ids_BT):
    """Search a model against its own uncut self; gives the choice and how many times the body ran."""

    def start(model, count, **options):
        runs = []

        def run():
            runs.append(1)
            return model.base_model(ids_BT, use_cache=False).last_hidden_state

        with torch.inference_mode():
            target = run().clone()
            runs.clear()
            distance = options.pop("distance", lambda final: float((final - target).norm()))
            choice = choose_greedily(model, run, distance, count, **{"shortlist": 8, "seconds": AMPLE} | options)
        return choice, len(runs)

    return start


def test_layers_that_do_nothing_go_first_and_leave_no_distance(llama, search):
    silence(llama, 1, 4)
    choice, _ = search(llama, 3)
    assert {layer for layer, _ in choice.removed[:2]} == {1, 4}
    assert [value for _, value in choice.removed[:2]] == [0.0, 0.0]
    assert choice.removed[2][1] > 0.1
    assert len(choice.keep) == 3
    assert sorted((*choice.keep, *(layer for layer, _ in choice.removed))) == list(range(6))


@torch.inference_mode()
def final_of(model, ids_BT):
    return model.eval().base_model(ids_BT, use_cache=False).last_hidden_state


def test_a_try_that_starts_in_the_middle_is_the_whole_model_without_the_layer(teacher, search, ids_BT):
    seen = []

    def distance(final):
        seen.append(final.clone())
        return float(len(seen) - 1 != 3)  # the fourth try wins the first round, so that the second is without layer 3

    choice, _ = search(teacher, 4, distance=distance)
    assert choice.removed[0] == (3, 0.0)
    expected = [[j for j in range(6) if j != i] for i in range(6)]
    expected += [[j for j in range(6) if j not in (3, i)] for i in range(6) if i != 3]
    assert len(seen) == len(expected)
    for final, keep in zip(seen, expected, strict=True):
        assert_close(final, final_of(cut_layers(teacher, keep), ids_BT), rtol=1e-5, atol=1e-5)


def test_each_removal_is_the_best_of_all(llama, search, ids_BT):
    choice, _ = search(llama, 4)
    kept = list(range(6))
    for layer, value in choice.removed:
        tries = {}
        for candidate in kept:
            final = final_of(cut_layers(llama, [other for other in kept if other != candidate]), ids_BT)
            tries[candidate] = float((final - final_of(llama, ids_BT)).norm())
        assert layer == min(tries, key=tries.get)
        assert value == pytest.approx(tries[layer], rel=1e-4)
        kept.remove(layer)


def test_later_rounds_try_the_shortlist_only(llama, search):
    _, runs = search(llama, 3, shortlist=2)
    assert runs == (1 + 6) + (1 + 2) + (1 + 2), "one run a round for the inputs, and one a try"


def test_a_shortlist_of_one_takes_the_least_first_rises_in_order(llama, search):
    choice, _ = search(llama, 3, shortlist=1)
    assert len(choice.keep) == 3
    assert all(value is not None for _, value in choice.removed)


def test_the_shortlist_goes_by_what_a_layer_added_and_not_by_where_it_led(llama, search):
    first, second = [10.0, 1.0, 2.0, 8.0, 9.0, 7.0], [8.6, 8.5]  # of layers 2 and 5, after layer 1 is gone at 1.0
    values = iter([*first, *second, 20.0, 30.0])  # layer 2 added 7.6, so that it comes before layer 3, which added 8.0
    choice, _ = search(llama, 3, shortlist=2, distance=lambda _: next(values))
    assert choice.removed == ((1, 1.0), (5, 8.5), (2, 20.0))


def test_without_time_influence_decides_at_the_cost_of_one_run(llama, search):
    silence(llama, 2, 5)
    choice, runs = search(llama, 2, seconds=0.0)
    assert len(choice.keep) == 2
    assert {layer for layer, _ in choice.removed[:2]} == {2, 5}
    assert [value for _, value in choice.removed] == [None] * 4
    assert runs == 1


def test_when_time_runs_out_the_last_rises_decide(llama, search, monkeypatch):
    first, _ = search(llama, 5)
    order = []
    clock = iter([0.0] + [1.0] * 7 + [100.0] * 50)
    monkeypatch.setattr("potstill.students.importance.time.monotonic", lambda: next(clock))
    values = iter([5.0, 1.0, 4.0, 2.0, 6.0, 3.0])
    choice, runs = search(
        llama, 3, seconds=10.0, distance=lambda _: next(values), progress=lambda n, value: order.append((n, value))
    )
    assert choice.removed == ((1, 1.0), (3, None), (5, None))
    assert choice.keep == (0, 2, 4)
    assert order == [(1, 1.0), (2, None), (3, None)]
    assert runs == 7
    assert len(first.keep) == 5


def test_half_a_round_is_not_judged(llama, search, monkeypatch):
    silence(llama, 4)
    clock = iter([0.0] + [1.0] * 3 + [100.0] * 50)
    monkeypatch.setattr("potstill.students.importance.time.monotonic", lambda: next(clock))
    choice, _ = search(llama, 5, seconds=10.0)
    assert choice.removed == ((4, None),)


def test_progress_hears_of_every_removal(llama, search):
    heard = []
    choice, _ = search(llama, 3, progress=lambda number, value: heard.append((number, value)))
    assert heard == [(number, value) for number, (_, value) in enumerate(choice.removed, 1)]


def test_a_distance_that_is_no_number_never_wins(llama, search):
    values = iter([math.nan, 3.0, math.nan, 2.0, 5.0, math.inf])
    choice, _ = search(llama, 5, distance=lambda _: next(values))
    assert choice.removed == ((3, 2.0),)


def test_keeping_all_asks_nothing(llama, search):
    choice, runs = search(llama, 6)
    assert (choice.keep, choice.removed, runs) == ((0, 1, 2, 3, 4, 5), (), 0)


def test_a_search_leaves_the_model_as_it_was(teacher, search):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    config = teacher.config.to_dict()
    hooks = [len(block._forward_pre_hooks) + len(block._forward_hooks) for block in find_blocks(teacher)[1]]
    search(teacher, 4)
    after = teacher.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert teacher.config.to_dict() == config
    assert hooks == [len(block._forward_pre_hooks) + len(block._forward_hooks) for block in find_blocks(teacher)[1]]


def test_a_search_that_fails_leaves_the_model_as_it_was(llama, search):
    def fail(_):
        raise ZeroDivisionError

    blocks = find_blocks(llama)[1]
    with pytest.raises(ZeroDivisionError):
        search(llama, 4, distance=fail)
    assert find_blocks(llama)[1] is blocks
    assert llama.config.num_hidden_layers == 6


def test_a_search_among_the_blocks_of_an_encoder_tries_the_models_that_can_be_cut(encoder, ids_BT):
    tried = []

    def run():
        return encoder.base_model(ids_BT).last_hidden_state

    with torch.inference_mode():
        target = run().clone()
        choice = choose_greedily(
            encoder,
            run,
            lambda final: tried.append(final.clone()) or float((final - target).norm()),
            4,
            shortlist=6,
            seconds=AMPLE,
        )
    assert len(tried) == 6 + 5
    for layer in range(1, 6):
        student = cut_layers(encoder, [other for other in range(6) if other != layer]).eval()
        with torch.no_grad():
            assert_close(tried[layer], student.base_model(ids_BT).last_hidden_state, rtol=1e-5, atol=1e-5)
    assert choice.removed[0][1] == min(float((final - target).norm()) for final in tried[:6])
