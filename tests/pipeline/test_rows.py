"""What trainings read: masks that follow from the seed and a row's place alone, and the rows that labels can teach."""

from __future__ import annotations

import pytest
import torch

from potstill.engines import load_tokenizer
from potstill.pipeline.cast import cast_of
from potstill.pipeline.rows import held_out_batches, mask_rule, masked, open_rows
from potstill.pipeline.run import run_recipe
from potstill.training import RowSource
from potstill.types import IGNORE


def prepared(recipe):
    run_recipe(recipe, until="prepare")
    return recipe.folder / "prepare"


def local(model):
    return {"kind": "local", "model": str(model), "dtype": "fp32"}


@pytest.fixture
def hidden(task, make_encoder):
    """A masked language model's recipe, its tokenizer, and where it was prepared."""
    model = make_encoder("masked")
    recipe = task(task={"kind": "masked_lm", "masked": 0.3}, teacher=local(model))
    return recipe, load_tokenizer(str(model), "teacher.model"), prepared(recipe)


def batches_of(recipe, rows):
    return recipe.training.model_copy(update={"batch_rows": rows})


def source(recipe, rows, at_once):
    return RowSource(rows.rows, seed=recipe.seed, batch_rows=6, rows_at_once=at_once, prepare=rows.prepare)


def drawn(stream, steps):
    """Ids and targets of so many steps, a row each."""
    batches = [batch for _ in range(steps) for batch in stream.draw()]
    return torch.cat([b.ids_BT for b in batches]), torch.cat([b.targets_BT for b in batches])


def test_masks_depend_on_no_micro_batch_and_go_on_where_they_were_left(hidden):
    recipe, tokenizer, folder = hidden
    rows = open_rows(recipe, cast_of(recipe, folder), folder, tokenizer=tokenizer, training=batches_of(recipe, 6))
    whole, parts, resumed = (source(recipe, rows, at_once) for at_once in (6, 2, 3))
    ids_BT, targets_BT = drawn(whole, 5)
    for ours, theirs in zip(drawn(parts, 5), (ids_BT, targets_BT), strict=True):
        assert ours.equal(theirs)
    resumed.load_state_dict({**resumed.state_dict(), "drawn": 12})
    for ours, theirs in zip(drawn(resumed, 3), (ids_BT[12:], targets_BT[12:]), strict=True):
        assert ours.equal(theirs)


def test_a_row_is_masked_anew_when_it_comes_again(hidden):
    recipe, tokenizer, folder = hidden
    rows = open_rows(recipe, cast_of(recipe, folder), folder, tokenizer=tokenizer, training=batches_of(recipe, 6))
    batch = rows.rows.batch([0])
    draws = [masked(batch, mask_rule(recipe, tokenizer), recipe.seed, number).targets_BT for number in range(8)]
    assert any(not one.equal(draws[0]) for one in draws)
    again = masked(batch, mask_rule(recipe, tokenizer), recipe.seed, 0).targets_BT
    assert again.equal(draws[0])


def test_special_tokens_are_never_hidden_and_the_teacher_speaks_wherever_there_is_text(hidden):
    recipe, tokenizer, folder = hidden
    rows = open_rows(recipe, cast_of(recipe, folder), folder, tokenizer=tokenizer, training=batches_of(recipe, 6))
    plain = rows.rows.batch(range(len(rows)))
    batch = masked(plain, mask_rule(recipe, tokenizer), recipe.seed, 0)
    special_BT = torch.isin(plain.ids_BT, torch.tensor(tokenizer.all_special_ids))
    assert not (batch.targets_BT[special_BT] != IGNORE).any()
    chosen_BT = batch.targets_BT != IGNORE
    assert chosen_BT.any()
    assert batch.targets_BT[chosen_BT].equal(plain.ids_BT[chosen_BT])
    assert batch.taught_BT.equal(plain.segments_BT > 0)


def test_held_out_rows_are_masked_once_and_for_all(hidden):
    recipe, tokenizer, folder = hidden

    def read():
        batches = held_out_batches(
            recipe, cast_of(recipe, folder), folder, tokenizer=tokenizer, most=4, at_once=2, split="validation"
        )
        return [batch.targets_BT for batch in batches]

    first, second = read(), read()
    assert len(first) > 0
    assert all(one.equal(other) for one, other in zip(first, second, strict=True))


@pytest.fixture
def partly_labelled(task, make_encoder, queries, write_rows):
    """A recipe of which every third training text has a label."""
    rows = [
        {**row, "split": "validation" if n < 8 else "test" if n < 16 else "train"} for n, row in enumerate(queries(70))
    ]
    for number, row in enumerate(rows[16:]):
        row["label"] = row["label"] if number % 3 == 0 else None
    model = make_encoder("classes", labels=("counting", "finding", "painting"))
    recipe = task(data={"source": str(write_rows(rows))}, teacher=local(model))
    return recipe, load_tokenizer(str(model), "teacher.model"), prepared(recipe)


def test_labels_teach_labelled_texts_only_and_a_teacher_speaks_of_all(partly_labelled):
    recipe, tokenizer, folder = partly_labelled
    rows = open_rows(recipe, cast_of(recipe, folder), folder, tokenizer=tokenizer, training=batches_of(recipe, 4))
    labelled = rows.labelled(batches_of(recipe, 4), recipe.seed)
    assert (len(rows), len(labelled)) == (54, 18)
    assert all(text.label for text in labelled.rows.texts)
    assert sorted(labelled.order(0).tolist()) == list(range(18))
    batch = rows.rows.batch(range(54))
    assert batch.taught_BT[:, 0].all()
    assert int(batch.supervised_BT.sum()) == 18


def test_where_all_is_labelled_the_rows_stay_as_they_are(hidden):
    recipe, tokenizer, folder = hidden
    rows = open_rows(recipe, cast_of(recipe, folder), folder, tokenizer=tokenizer, training=batches_of(recipe, 6))
    assert rows.labelled(batches_of(recipe, 6), 0) is rows


def test_texts_that_are_cut_are_counted(partly_labelled, task):
    recipe, tokenizer, folder = partly_labelled
    short = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sequence_length": 5})})
    rows = open_rows(short, cast_of(short, folder), folder, tokenizer=tokenizer, training=batches_of(recipe, 4))
    assert rows.facts == {"overlong": 54}
    assert max(rows.rows.lengths) == 5


def test_held_out_texts_are_drawn_once_whatever_their_order_in_the_file(partly_labelled):
    recipe, tokenizer, folder = partly_labelled

    def read(most):
        batches = held_out_batches(
            recipe, cast_of(recipe, folder), folder, tokenizer=tokenizer, most=most, at_once=3, split="validation"
        )
        return [name for batch in batches for names in batch.examples for name in names]

    assert read(4) == read(4)
    assert len(set(read(4))) == 4
    assert len(set(read(None))) == len(read(None)) == 8
