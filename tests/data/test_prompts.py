"""Laws of prompts: where they come from, and that what belongs together is held out together."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.data.prompts import Prompt, grid_prompts, gym_prompts, row_prompts, split_prompts
from potstill.errors import DataError, MissingExtra, RecipeError

USER = {"role": "user", "content": "Who?"}
ANSWER = {"role": "assistant", "content": "I."}


def rows(*cells):
    return [(f"file:{number}", one) for number, one in enumerate(cells, 1)]


def test_a_row_keeps_its_columns_and_is_named_by_its_id_or_place():
    found, dropped = row_prompts(rows({"id": "a", "q": "Who?", "a": 7}, {"q": "What?", "a": 8}), template="Say: {q}")
    assert [(one.id, one.text, one.row["a"], one.group, one.origin) for one in found] == [
        ("a", "Say: Who?", 7, "a", "row"),
        ("file:2", "Say: What?", 8, "file:2", "row"),
    ]
    assert not dropped


def test_ids_are_unique_whatever_the_rows_say():
    found, _ = row_prompts(rows(*[{"id": "a", "prompt": str(number)} for number in range(5)]), template="{prompt}")
    assert len({one.id for one in found}) == 5


@pytest.mark.parametrize("cell", [[USER, ANSWER], (USER,), '[{"role": "user", "content": "Who?"}]'])
def test_a_conversation_is_asked_up_to_its_last_question(cell):
    found, _ = row_prompts(rows({"messages": cell}), template="{prompt}")
    assert found[0].messages == (USER,)
    assert found[0].text is None


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"messages": [ANSWER]}, "messages cannot be asked"),
        ({"messages": "[broken"}, "messages cannot be asked"),
        ({"messages": [{"role": "system", "content": "Be."}]}, "messages cannot be asked"),
        ({"messages": [USER, {"role": "user", "content": 3}]}, "messages cannot be asked"),
        ({"messages": {"role": "user"}}, "messages cannot be asked"),
        ({"prompt": None}, "the template cannot be filled"),
        ({"prompt": " \n"}, "the template cannot be filled"),
        ({"other": "x"}, "the template cannot be filled"),
    ],
)
def test_a_row_that_cannot_be_asked_is_counted_and_alone_refused(cells, reason):
    found, dropped = row_prompts(rows({"prompt": "Who?"}, cells), template="{prompt}")
    assert [one.text for one in found] == ["Who?"]
    assert dropped == Counter({reason: 1})
    with pytest.raises(DataError):
        row_prompts(rows(cells), template="{prompt}")


def test_no_rows_and_no_template_are_refused():
    with pytest.raises(DataError, match="holds no rows"):
        row_prompts([], template="{prompt}")
    with pytest.raises(DataError, match="cannot be read"):
        row_prompts(rows({"prompt": "x"}), template="{prompt")


axes = st.dictionaries(
    st.sampled_from("abcd"), st.lists(st.sampled_from("uvwxyz"), min_size=1, max_size=4, unique=True), min_size=1
)


@given(axes, st.data())
def test_a_grid_holds_every_combination_once_and_a_draw_none_twice(values, data):
    template = " ".join(f"{name}={{{name}}}" for name in values)
    every = [one.text for one in grid_prompts(values, template, count=None, seed=0)]
    expected = [" ".join(f"{n}={v}" for n, v in zip(values, row, strict=True)) for row in product(*values.values())]
    assert every == expected
    count = data.draw(st.integers(1, len(every)))
    drawn = list(grid_prompts(values, template, count=count, seed=5))
    assert len({one.text for one in drawn}) == len({one.id for one in drawn}) == count
    assert all(every[int(one.id.removeprefix("grid:"))] == one.text for one in drawn)
    assert drawn == list(grid_prompts(values, template, count=count, seed=5))


@pytest.mark.parametrize("each", [400, 20_000])
def test_a_product_too_large_to_hold_is_drawn_from(each):
    values = {name: [str(number) for number in range(each)] for name in "abcde"}
    drawn = list(grid_prompts(values, "{a} {b} {c} {d} {e}", count=50, seed=1))
    assert len({one.text for one in drawn}) == 50
    assert drawn != list(grid_prompts(values, "{a} {b} {c} {d} {e}", count=50, seed=2))


def test_a_value_that_is_there_twice_counts_once():
    assert len(list(grid_prompts({"a": ["x", "x", "y"]}, "{a}", count=None, seed=0))) == 2


@pytest.mark.parametrize(
    ("values", "template", "count", "says"),
    [
        ({"a": ["x"]}, "{a}", 2, r"generate\.prompts\.count: 2, but the axes have only 1 combinations"),
        ({"a": []}, "{a}", None, r"generate\.prompts\.axes\.a: has no values"),
        ({"a": ["x"]}, "{b}", None, "no column 'b'"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_at_once(values, template, count, says):
    with pytest.raises((RecipeError, DataError), match=says):
        grid_prompts(values, template, count=count, seed=0)


def test_problems_are_distinct_and_the_same_again():
    pytest.importorskip("reasoning_gym")
    small = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
    found = gym_prompts("chain_sum", 60, seed=3, settings=small)
    assert len({one.text for one in found}) == len({one.id for one in found}) == 60
    assert found == gym_prompts("chain_sum", 60, seed=3, settings=small)
    assert {one.origin for one in found} == {"reasoning_gym"}
    assert all(one.row["answer"] and one.row["metadata"]["source_dataset"] == "chain_sum" for one in found)
    asked = gym_prompts("chain_sum", 1, seed=3, settings=small, template="Think. {prompt}")
    assert asked[0].text == f"Think. {found[0].text}"


@pytest.mark.parametrize(
    ("task", "chosen", "count", "says"),
    [
        ("chain_sun", {}, 3, r"no task 'chain_sun'\. Nearest are: chain_sum"),
        ("chain_sum", {"terms": 2}, 3, r"settings\.terms: chain_sum has no such setting\. It has: min_terms"),
        ("chain_sum", {"seed": 2}, 3, r"settings\.seed: "),
        ("chain_sum", {"min_terms": -1}, 3, "makes no problems of them"),
        ("chain_sum", {"min_terms": "two"}, 3, "makes no problems of them"),
        ("coin_flip", {"min_trials": 1, "max_trials": 1}, 5000, r"gave only \d+ distinct problems"),
    ],
)
def test_a_task_that_cannot_give_what_is_asked_is_refused_in_one_line(task, chosen, count, says):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(RecipeError, match=says) as caught:
        gym_prompts(task, count, seed=0, settings=chosen)
    assert "\n" not in str(caught.value)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(MissingExtra, match=r'pip install "potstill\[reasoning\]"'):
        gym_prompts("chain_sum", 1, seed=0, settings={})


@st.composite
def families(draw):
    """Seeds with versions; some texts are equal, also over families."""
    texts = st.integers(0, 25).map(lambda number: f"Text {number}")
    found = []
    for number in range(draw(st.integers(4, 25))):
        found.append(Prompt(f"s{number}", draw(texts), group=f"s{number}"))
        found += [
            Prompt(f"s{number}~{k}", draw(texts).upper(), group=f"s{number}", origin="evolved")
            for k in range(draw(st.integers(0, 2)))
        ]
    return found


def split_or_nothing(prompts, **keys):
    try:
        return split_prompts(prompts, **keys)
    except DataError:
        return None


@given(families(), st.sampled_from([None, 1, 3, 6]), st.integers(0, 9))
@settings(max_examples=150)
def test_neither_a_group_nor_equal_words_stand_on_two_sides(prompts, held_out, seed):
    split = split_or_nothing(prompts, seed=seed, validation=0.2, test=0.3, held_out=held_out)
    if split is None:
        return
    assert sorted(one.id for rows in split.values() for one in rows) == sorted(one.id for one in prompts)
    for of in (lambda one: one.group, lambda one: one.normal_form):
        sides = [{of(one) for one in rows} for rows in split.values()]
        assert sum(map(len, sides)) == len(set().union(*sides))
    if held_out is not None:
        assert len(split["test"]) >= held_out


@given(st.lists(st.integers(), min_size=12, max_size=30, unique=True), st.integers(0, 9))
def test_lone_prompts_are_held_out_exactly_as_counted_in_any_order(numbers, seed):
    prompts = [Prompt(str(number), f"Text {number}") for number in numbers]
    split = split_prompts(prompts, seed=seed, validation=0.01, test=0.5, held_out=5)
    again = split_prompts(prompts[::-1], seed=seed, validation=0.01, test=0.5, held_out=5)
    assert len(split["test"]) == 5
    assert {one.id for one in split["test"]} == {one.id for one in again["test"]}


def test_more_prompts_and_versions_move_no_others():
    few = [Prompt(str(number), f"Text {number}", group=str(number)) for number in range(40)]
    more = [Prompt(f"{number}~1", f"A version {number}", group=str(number)) for number in range(40)]
    more += [Prompt(str(number), f"Text {number}", group=str(number)) for number in range(40, 80)]
    before = split_prompts(few, seed=1, validation=0.2, test=0.2)
    after = split_prompts(few + more, seed=1, validation=0.2, test=0.2)
    for name, kept in before.items():
        assert {one.id for one in kept} <= {one.id for one in after[name]}
        assert kept


def test_nothing_left_to_train_on_is_refused():
    with pytest.raises(DataError, match=r"generate\.held_out: of 3 prompts 3 are held out"):
        split_prompts([Prompt(str(n), f"Text {n}") for n in range(3)], seed=0, validation=0.1, test=0.1, held_out=3)


def test_a_prompt_is_text_or_messages():
    for wrong in ({}, {"text": "a", "messages": (USER,)}):
        with pytest.raises(ValueError, match="exactly one"):
            Prompt("a", **wrong)
