"""Training is exact: however it is cut into micro-batches, processes or sittings, the same weights come out."""

from __future__ import annotations

import copy
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from potstill.errors import CheckpointError, Interrupted, NonFiniteError, RunError
from potstill.losses import HeadLoss, HeadTerm, Objective, Ramp, Schedule
from potstill.training import Callbacks, CheckpointStore, Training, train
from potstill.types import IGNORE, Batch, Head, Signal, States, Wants

SCHEDULES = {
    "forward_kl": Schedule(Ramp(0.0, 1.5), Ramp(4.0, 1.0, "cosine")),
    "hidden_mse": Schedule(weight=Ramp(1.0, 0.0)),
}


class Killed(BaseException):
    """As good as `kill -9`: nothing is saved or cleaned up on the way out."""


def die_after(step):
    def log(line):
        if line["step"] == step:
            raise Killed

    return Callbacks(log=log)


def assert_bitwise(left, right):
    assert list(left) == list(right)
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert different == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rows_at_once", [8, 2])
def test_20_steps_are_10_and_a_kill_and_10_more_bitwise(run, precision, rows_at_once):
    settings = {"precision": precision, "rows_at_once": rows_at_once, "dropout": 0.2}
    whole = run(20, "whole", **settings)
    with pytest.raises(Killed):
        run(20, "killed", plan={"checkpoint_steps": 5}, callbacks=die_after(12), **settings)
    torch.rand(5)
    assert_bitwise(run(20, "killed", **settings), whole)


def mask_anew(batch, drawn):
    """Hide some tokens, others in every epoch: what is random follows from how many rows were drawn before."""
    hidden_BT = torch.rand(batch.ids_BT.shape, generator=torch.Generator().manual_seed(drawn)) < 0.3
    hidden_BT[:, drawn % 12] = True
    return replace(
        batch,
        ids_BT=torch.where(hidden_BT, 0, batch.ids_BT),
        targets_BT=torch.where(hidden_BT, batch.ids_BT, IGNORE),
        taught_BT=batch.segments_BT > 0,
    )


def by_parity(epoch):
    """Even rows first, or odd ones."""
    return torch.arange(22).view(11, 2).T.flatten().roll(11 * (epoch % 2))


@pytest.mark.parametrize("rows_at_once", [8, 3])
def test_masks_that_are_drawn_anew_and_an_order_of_ones_own_continue_bitwise(run, rows_at_once):
    settings = {"rows_at_once": rows_at_once, "dropout": 0.2, "order": by_parity, "prepare": mask_anew}
    whole, lines = run(20, "whole", **settings), []
    with pytest.raises(Killed):
        run(20, "killed", plan={"checkpoint_steps": 10}, callbacks=die_after(13), **settings)
    torch.rand(5)
    assert_bitwise(run(20, "killed", callbacks=Callbacks(log=lines.append), **settings), whole)
    assert [line["step"] for line in lines] == list(range(11, 21))
    for name in ("order", "prepare"):
        other = run(20, f"without {name}", **{**settings, name: None})
        assert any(not torch.equal(other[key], whole[key]) for key in whole)


@pytest.mark.parametrize("rows_at_once", [8, 2])
def test_what_moves_is_logged_as_it_is_whatever_the_micro_batches(run, rows_at_once):
    lines = []
    run(5, rows_at_once=rows_at_once, schedules=SCHEDULES, callbacks=Callbacks(log=lines.append))
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [line["weight_forward_kl"] for line in lines] == [1.5 * share for share in shares]
    assert [line["temperature_forward_kl"] for line in lines] == [Ramp(4.0, 1.0, "cosine").at(s) for s in shares]
    assert [line["weight_hidden_mse"] for line in lines] == pytest.approx([0.3 * (1 - share) for share in shares])
    assert not any("weight_cross_entropy" in line for line in lines)
    for line in lines:
        told = {name: line[f"weight_{name}"] for name in SCHEDULES}
        told["forward_kl"] *= line["temperature_forward_kl"] ** 2
        by_hand = sum(told[name] * line[name] for name in SCHEDULES) + 0.5 * line["cross_entropy"]
        assert line["loss"] == pytest.approx(by_hand, rel=1e-5)


def test_a_training_of_one_step_is_at_its_start(run):
    lines = []
    run(1, schedules=SCHEDULES, callbacks=Callbacks(log=lines.append))
    assert (lines[0]["weight_forward_kl"], lines[0]["temperature_forward_kl"]) == (0.0, 4.0)


def test_what_moves_goes_on_exactly_after_a_kill(run):
    lines, settings = {"whole": [], "killed": []}, {"schedules": SCHEDULES, "dropout": 0.2}
    whole = run(20, "whole", callbacks=Callbacks(log=lines["whole"].append), **settings)
    with pytest.raises(Killed):
        run(20, "killed", plan={"checkpoint_steps": 5}, callbacks=die_after(12), **settings)
    assert_bitwise(run(20, "killed", callbacks=Callbacks(log=lines["killed"].append), **settings), whole)
    for before, after in zip(lines["whole"][10:], lines["killed"], strict=True):
        assert {**before, "seconds": 0} == {**after, "seconds": 0}
    assert not all(torch.equal(whole[name], value) for name, value in run(20, "fixed", dropout=0.2).items())


def test_training_changes_all_weights_and_lowers_the_loss(kit, run, tmp_path):
    untrained = kit.learned(kit.training())
    losses = []
    trained = run(20, callbacks=Callbacks(log=lambda line: losses.append(line["loss"])))
    assert not [name for name in trained if torch.equal(trained[name], untrained[name])]
    assert any(name.startswith("objective.") for name in trained)
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_kill_right_after_each_checkpoint_is_survived(run):
    whole = run(6, "whole")
    for step in range(1, 6):
        with pytest.raises(Killed):
            run(6, "killed", plan={"checkpoint_steps": 1}, callbacks=die_after(step + 1))
    assert_bitwise(run(6, "killed"), whole)


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 4])
def test_accumulating_changes_nothing(kit, run, rows_at_once):
    # A large eps, for where a gradient is nearly 0 Adam makes a step of the rounding error's sign.
    plan = {"eps": 1e-2}
    at_once, accumulated = run(3, "a", rows_at_once=8, plan=plan), run(3, "b", rows_at_once=rows_at_once, plan=plan)
    for name in at_once:
        assert_close(accumulated[name], at_once[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n} {m}")
    counts = [int(kit.rows().batch([row]).supervised_BT.sum()) for row in range(22)]
    assert len(set(counts)) == 13, "rows with equal counts would hide a mean of means"


def test_a_step_that_teaches_nothing_decays_matrices_and_nothing_else(kit, tmp_path):
    training = kit.training(projections=False)
    rows = kit.rows()
    rows.targets.fill_(IGNORE)
    training.source._rows = rows
    before = kit.learned(training)
    train(training, kit.plan(1, weight_decay=0.5, rate=lambda _: 0.1), CheckpointStore(tmp_path))
    for name, value in kit.learned(training).items():
        assert_close(value, before[name] * (1 - 0.1 * 0.5) if value.ndim >= 2 else before[name], rtol=1e-6, atol=0)
    assert {value.ndim for value in before.values()} == {1, 2}


def test_frozen_weights_stay(kit, tmp_path):
    training = kit.training()
    training.student.embed.requires_grad_(False)
    before = training.student.embed.weight.clone()
    train(training, kit.plan(2), CheckpointStore(tmp_path))
    assert torch.equal(training.student.embed.weight, before)


def test_clipping_scales_the_gradient_to_the_norm_allowed(kit, tmp_path):
    moved, norms = {}, {}
    for clip in (None, 0.01):
        lines = []
        training = kit.training()
        before = kit.learned(training)
        # With a huge eps Adam's first step is the gradient, up to a factor.
        plan = kit.plan(1, clip_norm=clip, eps=1e4, weight_decay=0.0, rate=lambda _: 1e4)
        train(training, plan, CheckpointStore(tmp_path / str(clip)), Callbacks(log=lines.append))
        moved[clip] = {name: before[name] - value for name, value in kit.learned(training).items()}
        norms[clip] = lines[0]["gradient_norm"]
    assert norms[None] == pytest.approx(norms[0.01])
    assert norms[None] > 0.1
    whole = math.sqrt(sum(float(value.square().sum()) for value in moved[None].values()))
    assert whole == pytest.approx(norms[None], rel=1e-2)
    for name, value in moved[0.01].items():
        assert_close(value, moved[None][name] * 0.01 / norms[None], rtol=1e-2, atol=1e-6)


def test_a_line_of_metrics_says_what_happened(kit, tmp_path):
    lines = []
    training = kit.training(rows_at_once=4)
    twin = kit.training(rows_at_once=8)
    plan = kit.plan(3)
    train(training, plan, CheckpointStore(tmp_path), Callbacks(log=lines.append))
    fields = {"step", "tokens", "loss", "forward_kl", "cross_entropy", "hidden_mse", "gradient_norm", "learning_rate"}
    assert all(set(line) == fields | {"seconds"} for line in lines)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["tokens"] for line in lines] == [96, 192, 288]
    assert [line["learning_rate"] for line in lines] == [plan.rate(step) for step in range(3)]
    assert 0 < lines[0]["seconds"] < lines[1]["seconds"] < lines[2]["seconds"] == training.seconds
    (batch,) = twin.source.draw()
    wants = twin.objective.wants()[0]
    loss, terms = twin.objective(twin.student(batch, wants), twin.source.lesson(batch), twin.objective.counts([batch]))
    assert lines[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, value in terms.items():
        assert lines[0][name] == pytest.approx(float(value), rel=1e-5)
    assert (training.step, training.positions) == (3, 288)


def test_validation_comes_regularly_and_at_the_end_and_leaves_training_alone(kit, run):
    lines, lessons = [], kit.lessons()
    examiner = Objective([HeadLoss([HeadTerm("forward_kl"), HeadTerm("cross_entropy")], 32)])
    options = {"validation": lessons, "examiner": examiner, "dropout": 0.2}
    validated = run(7, "a", plan={"validate_every": 3}, callbacks=Callbacks(log=lines.append), **options)
    with_validation = [line["step"] for line in lines if "validation_forward_kl" in line]
    assert with_validation == [3, 6, 7]
    assert [line["step"] for line in lines if "validation_cross_entropy" in line] == with_validation
    assert "validation_hidden_mse" not in lines[-1]
    assert_bitwise(validated, run(7, "b", dropout=0.2))


def test_validation_is_the_mean_over_all_held_out_positions(kit, tmp_path):
    lines, lessons = [], kit.lessons()
    examiner = Objective([HeadLoss([HeadTerm("cross_entropy")], 32)])
    training = kit.training(validation=lessons, examiner=examiner, dropout=0.3)
    plan = kit.plan(1, validate_every=1)
    train(training, plan, CheckpointStore(tmp_path), Callbacks(log=lines.append))
    training.student.eval()
    nll = []
    for lesson in lessons:
        view = training.student(lesson.batch)
        logits_NV = view.final_ND @ view.head.weight_VD.T + view.head.bias_V
        nll += torch.nn.functional.cross_entropy(logits_NV, lesson.batch.targets_N, reduction="none").tolist()
    assert lines[0]["validation_cross_entropy"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)


def test_a_stop_is_saved_and_the_same_call_continues(kit, run, tmp_path):
    whole = run(10, "whole", dropout=0.2)
    lines, rewound = [], []
    callbacks = Callbacks(log=lines.append, stopping=lambda: len(lines) == 4, rewind=rewound.append)
    with pytest.raises(Interrupted, match=r"^stopped after step 4 of 10; run the same command to continue\.$"):
        run(10, "stopped", callbacks=callbacks, dropout=0.2)
    assert CheckpointStore(tmp_path / "stopped").steps() == [4]
    assert_bitwise(run(10, "stopped", callbacks=callbacks, dropout=0.2), whole)
    assert rewound == [0, 4]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["tokens"] for line in lines] == [96 * step for step in range(1, 11)]
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


def test_a_stop_at_the_last_step_is_the_end(run):
    lines = []
    run(3, callbacks=Callbacks(log=lines.append, stopping=lambda: len(lines) == 3))
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("plan", "saved"),
    [
        ({"checkpoint_steps": 2}, [2, 4, 6]),
        ({"checkpoint_seconds": 0.0}, [1, 2, 3, 4, 5, 6]),
        ({"checkpoint_seconds": 1e9}, []),
        ({"checkpoint_steps": 4, "checkpoint_seconds": 1e9}, [4]),
        ({}, []),
    ],
)
def test_checkpoints_come_when_they_are_due_and_never_after_the_end(kit, tmp_path, plan, saved):
    store = CheckpointStore(tmp_path, keep=100)
    train(kit.training(), kit.plan(7, **plan), store)
    assert store.steps() == saved


def test_what_the_losses_learn_is_trained_and_saved(kit, tmp_path):
    training = kit.training()
    before = copy.deepcopy(training.objective.state_dict())
    train(training, kit.plan(3, checkpoint_steps=2), CheckpointStore(tmp_path))
    assert before
    assert all(not torch.equal(value, before[name]) for name, value in training.objective.state_dict().items())
    _, state = CheckpointStore(tmp_path).load_newest()
    assert set(state["objective"]) == set(before)
    assert not any(torch.equal(state["objective"][name], before[name]) for name in before)


def test_a_damaged_newest_checkpoint_costs_an_interval_and_no_more(run, tmp_path, caplog):
    whole = run(12, "whole", dropout=0.2)
    with pytest.raises(Killed):
        run(12, "killed", plan={"checkpoint_steps": 3}, callbacks=die_after(10), dropout=0.2)
    (tmp_path / "killed" / "step-000000009" / "state.pt").write_bytes(b"not a checkpoint")
    assert_bitwise(run(12, "killed", plan={"checkpoint_steps": 3}, dropout=0.2), whole)
    assert "step-000000009 is damaged" in caplog.text


def test_when_no_checkpoint_is_whole_nothing_is_trained(run, tmp_path):
    with pytest.raises(Killed):
        run(12, plan={"checkpoint_steps": 3}, callbacks=die_after(10))
    for file in tmp_path.glob("checkpoints/step-*/state.pt"):
        file.write_bytes(b"")
    lines = []
    with pytest.raises(CheckpointError, match="is whole"):
        run(12, callbacks=Callbacks(log=lines.append))
    assert lines == []


def test_an_unwritable_folder_is_told(run, tmp_path):
    (tmp_path / "checkpoints").write_text("a file is in the way")
    with pytest.raises(RunError, match=r"^training\.checkpoint: the state after step 1 cannot be written"):
        run(2, plan={"checkpoint_steps": 1})


class NaNTeacher:
    """Says NaN of one row, and zeros of all others."""

    def __init__(self, row):
        self.row = row

    def read(self, batch, wants):
        count = int(batch.supervised_BT.sum())
        bad = any(f"doc-{self.row}-a" in names for names in batch.examples)
        states_ND = torch.full((count, 16), math.nan if bad else 0.0)
        return Signal(States(states_ND, Head(torch.zeros(32, 16))))


def test_a_teacher_that_says_nan_stops_before_a_weight_is_touched(kit, run, tmp_path):
    order = kit.training().source
    steps = [[name for batch in order.draw() for names in batch.examples for name in names] for _ in range(2)]
    only_later = next(name for name in steps[1] if name not in steps[0] and name.endswith("-a") and "-0-" not in name)
    store, lines = CheckpointStore(tmp_path), []
    training = kit.training(teacher=NaNTeacher(int(only_later.split("-")[1])), projections=False)
    after_first = {}

    def log(line):
        lines.append(line)
        after_first.update(kit.learned(training))

    with pytest.raises(NonFiniteError) as caught:
        train(training, kit.plan(5), store, Callbacks(log=log))
    message = str(caught.value)
    assert re.match(
        r"training: loss is nan.* in step 2, before any weight was changed\. The batch's examples: ", message
    )
    assert all(f"{name}," in message or f"{name}." in message for name in steps[1])
    assert "\n" not in message
    assert [line["step"] for line in lines] == [1]
    assert_bitwise(kit.learned(training), after_first)
    # No checkpoint was due: the state before the bad step is saved with its draw undone, so the same batch comes again.
    assert f"saved in {store.folder}; the same command meets the same batch again" in message
    assert store.load_newest()[0] == 1
    with pytest.raises(NonFiniteError, match=re.escape(message.partition("The state")[0])):
        train(kit.training(teacher=NaNTeacher(int(only_later.split("-")[1])), projections=False), kit.plan(5), store)


def test_a_state_that_cannot_be_saved_does_not_hide_the_examples(kit, tmp_path):
    (tmp_path / "file").write_text("in the way")
    training = kit.training(batch_rows=20, teacher=NaNTeacher(1), projections=False)
    with pytest.raises(NonFiniteError, match=r"examples: doc-.* could not be saved \(training\.checkpoint: "):
        train(training, kit.plan(2), CheckpointStore(tmp_path / "file"))


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_a_weight_that_is_no_number_is_found_and_no_other_touched(kit, tmp_path, poison):
    training = kit.training()
    training.student.embed.weight.data[:, 3] = poison
    before = kit.learned(training)
    with pytest.raises(NonFiniteError, match="in step 1, before any weight was changed"):
        train(training, kit.plan(2), CheckpointStore(tmp_path))
    after = kit.learned(training)
    assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)


def test_many_examples_are_named_in_part(kit, tmp_path):
    training = kit.training(batch_rows=20, teacher=NaNTeacher(1), projections=False)
    with pytest.raises(
        NonFiniteError, match=r"doc-\d+-[ab] and 20 more\. The state before this step is saved in \S+; the same command"
    ):
        train(training, kit.plan(2), CheckpointStore(tmp_path))


def llama_training(kit, folder, precision):
    from potstill.engines import CausalReader, TrainableCausal, load_model

    cpu = torch.device("cpu")
    student, teacher = (load_model(str(folder), "fp32", cpu, "student") for _ in range(2))
    with torch.no_grad():
        student.model.layers[1].self_attn.o_proj.weight.zero_()  # else there is nothing to learn
    training = kit.training(teacher=CausalReader(teacher, 300))
    objective = Objective([HeadLoss([HeadTerm("forward_kl"), HeadTerm("cross_entropy", 0.5)], 300)])
    training.source._wants = Wants(final=True)
    return Training(TrainableCausal(student.train(), precision), objective, training.source, training.accelerator)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_real_architecture_continues_bitwise(kit, tiny_llama, tmp_path, precision):
    trainings = {name: llama_training(kit, tiny_llama, precision) for name in ("whole", "killed", "continued")}
    plan, untrained = kit.plan(6, checkpoint_steps=3), kit.learned(trainings["whole"])
    train(trainings["whole"], plan, CheckpointStore(tmp_path / "whole"))
    store = CheckpointStore(tmp_path / "killed")
    with pytest.raises(Killed):
        train(trainings["killed"], plan, store, die_after(5))
    train(trainings["continued"], plan, store)
    whole = kit.learned(trainings["whole"])
    assert_bitwise(kit.learned(trainings["continued"]), whole)
    assert not any(torch.equal(value, untrained[name]) for name, value in whole.items())
    assert {p.dtype for p in trainings["whole"].student.parameters()} == {torch.float32}


def launch(kit, folder, steps, precision="fp32", **environment):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(kit.script), str(folder), str(steps), precision]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )


def finish(process):
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ten_kills_at_random_moments_leave_the_same_weights(kit, tmp_path, precision):
    steps, draw = 400, random.Random(precision)
    finish(launch(kit, tmp_path / "whole", steps, precision))
    kills = 0
    while kills < 10:
        process = launch(kit, tmp_path / "killed", steps, precision)
        assert process.stdout.readline().startswith("step "), process.stderr.read()[-3000:]
        time.sleep(draw.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run was over before it was killed ten times"
        kills += 1
    first = finish(launch(kit, tmp_path / "killed", steps, precision)).splitlines()[0]
    assert int(first.split()[1]) > 10
    whole, killed = (torch.load(tmp_path / name / "final.pt") for name in ("whole", "killed"))
    assert_bitwise(killed, whole)


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(kit, tmp_path):
    finish(launch(kit, tmp_path / "one", 6))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [launch(kit, tmp_path / "two", 6, RANK=str(r), LOCAL_RANK=str(r), **shared) for r in range(2)]
    told = [finish(process) for process in ranks]
    one, two = (torch.load(tmp_path / name / "final.pt") for name in ("one", "two"))
    for name in one:
        assert_close(two[name], one[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n} {m}")
    assert told[0] == told[1], "both ranks tell the loss of all rows"


def test_batches_go_where_the_training_is(kit, tmp_path):
    seen = []
    training = kit.training()
    plain = training.student.forward
    training.student.forward = lambda batch, wants: seen.append(batch) or plain(batch, wants)
    train(training, kit.plan(1), CheckpointStore(tmp_path))
    assert all(isinstance(batch, Batch) and batch.ids_BT.device == training.accelerator.device for batch in seen)
    assert [len(batch) for batch in seen] == [4, 4]
