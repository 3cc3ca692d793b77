"""The teacher reads once what is missing, whatever happens meanwhile, and the training needs no teacher."""

from __future__ import annotations

import json
import math
import multiprocessing
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from potstill.data import PackedRows
from potstill.errors import Interrupted, RecipeError, RunError, StoreError
from potstill.pipeline import build, capture, disk, inspection, recall, transcribe
from potstill.pipeline.run import STAGES, explain_run, run_part, run_recipe, stage_fingerprints
from potstill.pipeline.rundir import RunDir
from potstill.pipeline.stopping import Stopping
from potstill.recipes import Recipe, load_recipe
from potstill.signals import Store, pieces_of, reopen_store

SAMPLED = "signals={kind: sampled, k: 8}"
HIDDEN = "signals={kind: hidden}"
KINDS = {
    "sampled": SAMPLED,
    "topk": "signals={kind: topk, k: 8}",
    "topk_renormalised": "signals={kind: topk_renormalised, k: 8}",
    "dense": "signals={kind: dense}",
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads cost such small products more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def load(tiny_recipe):
    short = ["training.steps=6", "control.enabled=false"]
    return lambda *overrides: load_recipe(tiny_recipe, [*short, *overrides])


def facts(recipe: Recipe) -> dict[str, Any]:
    return dict(RunDir(recipe.folder).manifest("capture").facts)


def weights(recipe: Recipe, arm: str = "train") -> dict[str, torch.Tensor]:
    return load_file(recipe.folder / arm / "student" / "model.safetensors")


def same_student(one: Recipe, other: Recipe) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def lines(recipe: Recipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (recipe.folder / "train" / "metrics.jsonl").read_text().splitlines()]


def content(recipe: Recipe) -> dict[bytes, tuple[bytes, bytes]]:
    """All that the store of a finished capture holds: records and note by key."""
    store, found = reopen_store(facts(recipe)["store"]), {}
    for key in store:
        records = store.read([key])
        found[key] = (records.records_NS.tobytes(), records.notes[0])
    return found


def flip_a_byte(recipe: Recipe) -> None:
    """Damages the data of the largest shard."""
    shard = max((Path(facts(recipe)["store"]) / "shards").iterdir(), key=lambda path: path.stat().st_size)
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 0x10
    shard.write_bytes(raw)


def forbid(monkeypatch, *places: tuple[Any, str]) -> None:
    def called(*_, **__):
        raise AssertionError("the teacher was asked again")

    for place, name in places:
        monkeypatch.setattr(place, name, called)


def no_reading(monkeypatch) -> None:
    forbid(monkeypatch, (capture, "capture_rows"))


def no_teacher(monkeypatch) -> None:
    forbid(monkeypatch, (build, "build_teacher"))


def no_room(monkeypatch, free_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_bytes))


# What is captured


def test_only_what_the_training_draws_is_read_and_stored(load):
    recipe = load(SAMPLED)
    run_recipe(recipe, until="capture")
    rows = PackedRows(recipe.folder / "prepare" / "train")
    numbers = capture.rows_to_train(recipe, rows)
    assert len(numbers) == 6 * 4 < len(rows)
    keys = {piece.key for piece in pieces_of(rows.batch(numbers))}
    assert set(content(recipe)) == keys
    found = facts(recipe)
    supervised = int(rows.batch(numbers).supervised_BT.sum())
    assert (found["pieces"], found["captured"]) == (len(keys), len(keys))
    assert found["positions"] == found["stored_positions"]
    assert found["positions"] <= supervised
    assert found["quarantined"] == {"blocks": 0, "shards": 0, "pieces": 0}
    assert sum(len(records) for records, _ in content(recipe).values()) == found["stride"] * found["stored_positions"]


def test_more_steps_read_the_new_rows_only(load):
    run_recipe(load(SAMPLED), until="capture")
    before = content(load(SAMPLED))
    longer = load(SAMPLED, "training.steps=8")
    run_recipe(longer, until="capture")
    assert 0 < facts(longer)["captured"] == facts(longer)["pieces"] - len(before)
    assert before.items() <= content(longer).items()


def test_another_epoch_reads_nothing(load, monkeypatch):
    recipe = load(SAMPLED, "training.steps=", "training.epochs=1")
    run_recipe(recipe, until="capture")
    no_reading(monkeypatch)
    again = load(SAMPLED, "training.steps=", "training.epochs=2")
    run_recipe(again, until="capture")
    assert facts(again)["captured"] == 0


def test_another_student_in_another_folder_finds_all(load, tmp_path, monkeypatch):
    first = load(SAMPLED)
    run_recipe(first, until="train")
    no_reading(monkeypatch)
    second = load(SAMPLED, "student.count=3", "training.learning_rate=1e-3", f"run_dir={tmp_path / 'second'}")
    run_recipe(second, until="train")
    assert facts(second)["captured"] == 0
    assert (facts(second)["store"], facts(second)["pieces"]) == (facts(first)["store"], facts(first)["pieces"])


def test_where_all_is_there_no_teacher_is_loaded(load, monkeypatch):
    recipe = load(SAMPLED)
    run_recipe(recipe, until="capture")
    no_teacher(monkeypatch)
    run_recipe(recipe, until="train")
    assert facts(recipe)["captured"] > 0


@pytest.mark.parametrize("positions", ["random", "highest_entropy"])
def test_some_positions_are_stored_and_learned_from(load, positions):
    some = f"signals.positions={{kind: {positions}, share: 0.3}}"
    recipe = load(SAMPLED, some, "losses=[{kind: cross_entropy}, {kind: forward_kl}]", "training.steps=12")
    run_recipe(recipe, until="train")
    rows = PackedRows(recipe.folder / "prepare" / "train")
    batch = rows.batch(capture.rows_to_train(recipe, rows))
    counts = {one.key: int(batch.supervised_BT[one.row, one.start : one.stop].sum()) for one in pieces_of(batch)}
    expected = sum(math.ceil(0.3 * count) for count in counts.values())
    assert facts(recipe)["stored_positions"] == facts(recipe)["positions"] == expected
    assert falls([line["loss"] for line in lines(recipe)])


def falls(values: list[float]) -> bool:
    return sum(values[-4:]) < sum(values[:4])


# Offline is online


def test_hidden_states_train_the_student_that_an_online_teacher_trains(load, tmp_path):
    """Up to the rounding of what the teacher says of texts in other batches than those of the training."""
    losses = "losses=[{kind: cross_entropy, weight: 0.3}, {kind: forward_kl, temperature: 2}, {kind: reverse_kl}]"
    online, offline = load(losses), load(losses, HIDDEN, f"run_dir={tmp_path / 'offline'}")
    for recipe in (online, offline):
        run_recipe(recipe, until="train")
    ours, theirs = weights(offline), weights(online)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-4, rtol=1e-3)
    for one, other in zip(lines(offline), lines(online), strict=True):
        for name in one.keys() - {"seconds"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("kind", ["sampled", "topk", "topk_renormalised"])
def test_lists_lower_the_loss(load, kind):
    recipe = load(KINDS[kind], "training.steps=16")
    run_recipe(recipe, until="train")
    assert falls([line["loss"] for line in lines(recipe)])


def test_the_first_validation_is_the_same_whatever_is_stored(load, tmp_path):
    """Curves are drawn with the teacher's whole distributions, also where lists are what is learned from."""
    every = ["training.validate_every=3", "training.steps=3"]
    first = []
    for name, signals in {"online": [], "sampled": [SAMPLED], "dense": [KINDS["dense"]]}.items():
        recipe = load(*every, *signals, "training.learning_rate=1e-12", f"run_dir={tmp_path / name}")
        run_recipe(recipe, until="train")
        found = [{name: value for name, value in line.items() if "validation" in name} for line in lines(recipe)]
        first.append(next(line for line in found if line))
    assert len(first[0]) >= 2
    for other in first[1:]:
        assert other == pytest.approx(first[0], rel=1e-5)


def test_a_control_arm_asks_no_store(load):
    recipe = load(SAMPLED, "control.enabled=true")
    run_recipe(recipe, until="train")
    shutil.rmtree(facts(recipe)["store"])
    run_recipe(recipe, until="control")
    assert [status.state for status in explain_run(recipe)][:5] == ["done"] * 5


# Sharing the work


def test_two_parts_leave_nothing_to_do(load, monkeypatch):
    recipe = load(SAMPLED)
    run_recipe(recipe, until="initialise")
    said = [run_part(recipe, part, Stopping()) for part in ("1/2", "2/2")]
    assert [one.startswith(f"part {part}: ") for one, part in zip(said, ("1/2", "2/2"), strict=True)] == [True, True]
    no_reading(monkeypatch)
    run_recipe(recipe, until="train")
    assert facts(recipe)["captured"] == 0


def test_parts_end_in_the_student_that_one_process_trains(load, tmp_path):
    alone, shared = (load(HIDDEN, "signals.batch_tokens=1", f"run_dir={tmp_path / name / 'run'}") for name in "ab")
    run_recipe(alone, until="train")
    run_recipe(shared, until="initialise")
    for part in ("3/3", "1/3", "2/3"):
        run_part(shared, part, Stopping())
    run_recipe(shared, until="train")
    assert content(shared) == content(alone)
    same_student(shared, alone)


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3", "1/2\n", "", "01/2"])
def test_a_part_that_is_none_is_refused(load, part):
    with pytest.raises(RecipeError, match=r"^--part: got .*, needs I/N with I from 1 to N, for example 1/4\."):
        run_part(load(SAMPLED), part, Stopping())


def test_a_part_of_nothing_is_refused(load):
    with pytest.raises(RecipeError, match=r"^signals\.kind: online keeps nothing"):
        run_part(load(), "1/2", Stopping())
    with pytest.raises(RecipeError, match=r"^signals\.kind: online keeps nothing"):
        run_recipe(load(), until="capture")


def test_a_part_needs_the_stages_before(load):
    with pytest.raises(RunError, match=r"^--part: prepare is not done in .*potstill initialise"):
        run_part(load(SAMPLED), "1/2", Stopping())


# Interruptions


def patient(recipe: Recipe, until: str | None = None) -> None:
    """A run whose teacher is slow and whose store is written often, so that kills meet all that can be half done."""
    torch.set_num_threads(1)
    read = transcribe._select

    def slow(*arguments):
        time.sleep(0.06)
        return read(*arguments)

    transcribe._select = slow
    Store.writer = lambda self, whole=Store.writer: whole(self, shard_bytes=1500)
    run_recipe(recipe, until=until)


@pytest.fixture(scope="module")
def processes():
    """Processes forked from a server that has imported all and computed nothing: quick to start, safe to kill."""
    context = multiprocessing.get_context("forkserver")
    ours = [f"potstill.pipeline.{name}" for name in ("arms", "capture", "run", "stages")]
    theirs = ["torch._dynamo", "transformers.models.llama.modeling_llama", "transformers.generation.utils"]
    context.set_forkserver_preload([*ours, *theirs])
    return context


def killed(processes, recipe: Recipe, moments: list[float]) -> list[int]:
    """Kills captures so many seconds after the first shard of each; returns the number of shards after each kill."""
    shards = recipe.folder.parent / "signals"
    found = []
    for moment in moments:
        before = len(list(shards.glob("*/shards/*.shard")))
        process = processes.Process(target=patient, args=(recipe, "capture"))
        process.start()
        until = time.monotonic() + 60
        while process.is_alive() and len(list(shards.glob("*/shards/*.shard"))) == before:
            assert time.monotonic() < until
            time.sleep(0.005)
        process.join(moment)
        process.kill()
        process.join()
        found.append(len(list(shards.glob("*/shards/*.shard"))))
    return found


def check_kills_change_nothing(processes, load, tmp_path: Path, kills: int) -> None:
    # Some texts a batch: what a model says of one may depend, in the last bit, on those beside it; these stay the same.
    settings = [SAMPLED, "signals.batch_tokens=64", "training.steps=20"]
    undisturbed, disturbed = (load(*settings, f"run_dir={tmp_path / name / 'run'}") for name in ("a", "b"))
    run_recipe(undisturbed, until="train")
    draw = random.Random(0)
    shards = killed(processes, disturbed, [draw.uniform(0.0, 0.4 / kills) for _ in range(kills)])
    assert shards == sorted(set(shards))  # every attempt went on from what was there
    missing = [status.state for status in explain_run(disturbed) if status.stage == "capture"] != ["done"]
    assert missing
    run_recipe(disturbed, until="train")
    assert content(disturbed) == content(undisturbed)
    assert facts(disturbed)["captured"] == facts(undisturbed)["captured"]  # in all attempts together
    assert facts(disturbed)["quarantined"] == {"blocks": 0, "shards": 0, "pieces": 0}
    same_student(disturbed, undisturbed)


def test_killed_five_times_a_capture_ends_as_if_undisturbed(processes, load, tmp_path):
    check_kills_change_nothing(processes, load, tmp_path, 5)


@pytest.mark.slow
def test_killed_ten_times_a_capture_ends_as_if_undisturbed(processes, load, tmp_path):
    check_kills_change_nothing(processes, load, tmp_path, 10)


def test_asked_to_stop_a_capture_keeps_what_was_read(load, tmp_path, monkeypatch):
    settings = [SAMPLED, "signals.batch_tokens=64"]
    undisturbed, recipe = (load(*settings, f"run_dir={tmp_path / name / 'run'}") for name in ("a", "b"))
    run_recipe(undisturbed, until="train")
    stopping, select, read = Stopping(), transcribe._select, []

    def select_and_ask(*arguments):
        read.append(len(arguments[1]))
        if len(read) == 5:
            stopping.receive(2)
        return select(*arguments)

    monkeypatch.setattr(transcribe, "_select", select_and_ask)
    pieces = facts(undisturbed)["pieces"]
    with pytest.raises(Interrupted) as stopped:
        run_recipe(recipe, stopping=stopping)
    assert len(read) == 5
    assert str(stopped.value) == f"stopped after {sum(read)} of {pieces} pieces; the same command continues."
    monkeypatch.undo()
    assert [status.state for status in explain_run(recipe) if status.stage == "train"] == ["missing"]
    run_recipe(recipe, until="train")
    assert facts(recipe)["captured"] == pieces
    assert content(recipe) == content(undisturbed)
    same_student(recipe, undisturbed)


def test_asked_to_stop_with_the_last_piece_the_capture_is_finished(load, monkeypatch):
    recipe, stopping, select = load(SAMPLED), Stopping(), transcribe._select

    def select_and_ask(*arguments):
        stopping.receive(2)
        return select(*arguments)

    monkeypatch.setattr(transcribe, "_select", select_and_ask)
    with pytest.raises(Interrupted, match=r"^stopped before train"):
        run_recipe(recipe, stopping=stopping)
    assert [status.state for status in explain_run(recipe) if status.stage == "capture"] == ["done"]


# Damage and loss


def test_a_flipped_byte_is_named_captured_again_and_counted(load, tmp_path):
    settings = [SAMPLED, "signals.batch_tokens=1"]
    undisturbed, recipe = (load(*settings, f"run_dir={tmp_path / name / 'run'}") for name in ("a", "b"))
    run_recipe(undisturbed, until="train")
    run_recipe(recipe, until="capture")
    flip_a_byte(recipe)
    with pytest.raises(StoreError, match=r"^signals\.store: .*\.shard"):
        run_recipe(recipe, until="train")
    (status,) = [status for status in explain_run(recipe) if status.stage == "capture"]
    assert status.state == "damaged"
    assert "of the pieces since; they will be captured again" in status.why
    run_recipe(recipe, until="train")
    assert facts(recipe)["captured"] > 0
    assert facts(recipe)["quarantined"] == {"blocks": 1, "shards": 0, "pieces": facts(recipe)["captured"]}
    assert content(recipe) == content(undisturbed)
    same_student(recipe, undisturbed)


def test_a_byte_that_flipped_before_a_capture_is_found_by_it(load, tmp_path):
    """A second student's run looks at every byte that it will read before it counts on it."""
    first = load(SAMPLED, "signals.batch_tokens=1")
    run_recipe(first, until="train")
    before = content(first)
    flip_a_byte(first)
    second = load(SAMPLED, "signals.batch_tokens=1", "student.count=3", f"run_dir={tmp_path / 'second'}")
    run_recipe(second, until="capture")
    assert facts(second)["quarantined"]["blocks"] == 1
    assert facts(second)["quarantined"]["pieces"] == facts(second)["captured"] > 0
    assert content(second) == before


def test_a_deleted_store_is_filled_again_while_it_is_needed(load, tmp_path, monkeypatch):
    recipe = load(SAMPLED)
    run_recipe(recipe, until="capture")
    before = content(recipe)
    shutil.rmtree(facts(recipe)["store"])
    (status,) = [status for status in explain_run(recipe) if status.stage == "capture"]
    assert status.state == "damaged"
    run_recipe(recipe, until="train")
    assert content(recipe) == before
    shutil.rmtree(facts(recipe)["store"])
    no_teacher(monkeypatch)
    run_recipe(recipe, until="train")
    assert [status.state for status in explain_run(recipe)][:4] == ["done"] * 4


@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_a_lost_head_of_hidden_states_is_written_again(load, damage):
    recipe = load(HIDDEN)
    run_recipe(recipe, until="capture")
    (head,) = (Path(facts(recipe)["store"]) / "files").iterdir()
    raw = bytearray(head.read_bytes())
    raw[-1] ^= 1
    head.write_bytes(raw) if damage == "flipped" else head.unlink()
    run_recipe(recipe, until="train")
    assert [status.state for status in explain_run(recipe) if status.stage == "train"] == ["done"]


@pytest.mark.parametrize("name", [recall.PLAN, capture.HELD_OUT_LESSONS])
@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04"])
def test_a_torn_file_of_an_interrupted_capture_is_written_again(load, name, raw):
    recipe = load(SAMPLED)
    run_recipe(recipe, until="capture")
    folder = recipe.folder / "capture"
    (folder / "manifest.json").unlink()
    (folder / name).write_bytes(raw)
    run_recipe(recipe, until="train")
    assert facts(recipe)["captured"] > 0 or name == recall.PLAN


def test_a_store_that_another_run_made_larger_may_not_lose_what_this_one_needs(load, tmp_path):
    recipe = load(SAMPLED)
    run_recipe(recipe, until="capture")
    ours = set((Path(facts(recipe)["store"]) / "shards").iterdir())
    run_recipe(load(SAMPLED, "training.steps=30", f"run_dir={tmp_path / 'larger'}"), until="capture")
    for shard in ours:
        shard.unlink()
    run_recipe(recipe, until="train")
    assert facts(recipe)["captured"] > 0


def test_a_store_that_cannot_be_read_costs_no_finished_capture(load):
    recipe = load(SAMPLED)
    run_recipe(recipe, until="capture")
    manifest = Path(facts(recipe)["store"]) / "store.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:-2])
    with pytest.raises(StoreError, match=r"store\.json is damaged"):
        run_recipe(recipe, until="train")
    manifest.write_bytes(whole)
    assert [status.state for status in explain_run(recipe) if status.stage == "capture"] == ["done"]


def test_a_part_that_was_stopped_says_so(load):
    recipe = load(SAMPLED)
    run_recipe(recipe, until="initialise")
    stopping = Stopping()
    stopping._asked = True
    with pytest.raises(Interrupted, match=r"of this part, \d+ are left"):
        run_part(recipe, "1/1", stopping)


def test_a_part_of_losses_that_the_store_cannot_teach_is_refused(load):
    recipe = load(SAMPLED, "losses=[{kind: reverse_kl}]")
    run_recipe(load(SAMPLED), until="initialise")
    with pytest.raises(RecipeError, match=r"reverse_kl has no unbiased form"):
        run_part(recipe, "1/1", Stopping())


def test_a_full_store_is_not_asked_room_for_again(load, tmp_path, monkeypatch):
    recipe = load(SAMPLED)
    run_recipe(recipe, until="capture")
    size = disk.folder_bytes(Path(facts(recipe)["store"]))
    again = load(SAMPLED, f"run_dir={recipe.folder.parent / 'again'}")
    found = inspection.inspect_recipe(again)
    no_room(monkeypatch, 1)
    monkeypatch.setattr(inspection, "folder_bytes", lambda _: 10 * size)
    inspection.check_store_room(again, found)
    monkeypatch.setattr(inspection, "folder_bytes", lambda _: 0)
    with pytest.raises(RunError, match=r"^signals\.store: .* GB free"):
        inspection.check_store_room(again, found)


def test_a_store_of_another_teacher_is_refused_with_both_fingerprints(load, tmp_path):
    place = f"signals.store={tmp_path / 'store'}"
    run_recipe(load(SAMPLED, place), until="capture")
    theirs = reopen_store(tmp_path / "store").stamp
    other = load(SAMPLED, place, "teacher.dtype=bf16", f"run_dir={tmp_path / 'other'}")
    with pytest.raises(StoreError) as caught:
        run_recipe(other, until="capture")
    ours = capture.stamp_for(other, capture.spec_for(other, 300, build.teacher_config(other)))
    assert str(caught.value).startswith("signals.store: ")
    assert theirs.teacher in str(caught.value)
    assert ours.teacher in str(caught.value)
    spec = load("signals={kind: sampled, k: 9}", place, f"run_dir={tmp_path / 'spec'}")
    with pytest.raises(StoreError, match=rf"another spec: its fingerprint is {theirs.spec}"):
        run_recipe(spec, until="capture")


def test_a_disk_without_room_for_the_store_is_refused_before_the_teacher_is_loaded(load, monkeypatch, tmp_path):
    recipe = load("signals={kind: dense}", f"signals.store={tmp_path / 'store'}")
    run_recipe(recipe, until="initialise")
    no_teacher(monkeypatch)
    monkeypatch.setattr("potstill.pipeline.run.check_disk", lambda *_: None)  # of the run folder's disk, say
    no_room(monkeypatch, 1000)
    with pytest.raises(RunError, match=r"^signals\.store: .* GB free, but what the teacher will say needs"):
        run_recipe(recipe, until="capture")


# What makes stale


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ("signals.k=9", {"capture", "train"}),
        ("signals.positions={kind: random, share: 0.5}", {"capture", "train"}),
        ("training.steps=7", {"capture", "train", "control"}),
        ("training.learning_rate=2e-3", {"train", "control"}),
        ("signals.temperatures=[1, 2]", {"capture", "train"}),
        ("signals.batch_tokens=64", set()),
        ("signals.store=/elsewhere", set()),
    ],
)
def test_a_change_makes_stale_what_it_changes_and_no_more(load, change, stale):
    before = stage_fingerprints(load(SAMPLED, "control.enabled=true"))
    after = stage_fingerprints(load(SAMPLED, "control.enabled=true", change))
    later = {"evaluate", "report"} if "train" in stale else set()
    assert {name for name in before if before[name] != after[name]} == stale | later
    assert tuple(before) == tuple(name for name in STAGES if name not in ("generate", "finetune", "static"))


def test_online_recipes_have_no_capture(load):
    online = stage_fingerprints(load("control.enabled=true"))
    assert "capture" not in online
    assert online == stage_fingerprints(load("control.enabled=true", "signals={kind: online}"))
    stored = stage_fingerprints(load("control.enabled=true", SAMPLED))
    assert {name for name in online if online[name] == stored[name]} == {"prepare", "initialise", "control"}
