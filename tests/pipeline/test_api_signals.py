"""An endpoint scores the student's texts once, and what is stored is what a teacher in this process would have said."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time

import numpy as np
import pytest
import torch
from tests.servers.api import serve
from tests.servers.faults import Settings

from potstill.data import PackedRows
from potstill.engines import load_model
from potstill.errors import BudgetError, RecipeError, TeacherError, VocabularyMismatch
from potstill.pipeline import scored as scored_stage
from potstill.pipeline.capture import open_held_out, rows_to_train
from potstill.pipeline.inspection import inspect_recipe
from potstill.pipeline.plan import print_plan
from potstill.pipeline.run import inputs_of, run_part, run_recipe
from potstill.pipeline.rundir import RunDir
from potstill.pipeline.stopping import Stopping
from potstill.recipes import load_recipe
from potstill.signals import SignalSpec, encoding_of, pieces_of, reopen_store
from potstill.types import SparseLogits

K = 8
SHORT = ["training.steps=4", "control.enabled=false"]
TOPK = f"signals={{kind: topk, k: {K}}}"


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scored(tiny_llama, tiny_tokenizer):
    """What a vLLM server with the tiny model answers: at every place its K likeliest tokens, and the one there."""
    model = load_model(str(tiny_llama), "fp32", torch.device("cpu"), "teacher")
    lock, size = threading.Lock(), len(tiny_tokenizer)

    @torch.inference_mode()
    def answer(body):
        ids = torch.tensor(body["prompt"])
        with lock:
            logits_TV = model(ids[None]).logits[0, :, :size].float()
        logprobs_TV = logits_TV.log_softmax(-1)
        listed = [None]
        for place in range(1, len(ids)):
            said_V = logprobs_TV[place - 1]
            numbers = dict.fromkeys([*said_V.topk(body["prompt_logprobs"]).indices.tolist(), int(ids[place])])
            listed.append({str(n): {"logprob": float(said_V[n]), "rank": 1, "decoded_token": ""} for n in numbers})
        return {"content": "", "prompt_logprobs": listed}

    return answer


@pytest.fixture
def load(tiny_recipe, tiny_llama):
    """A recipe whose teacher is a server that scores; `name` is that of its folder, beside which its store is."""

    def make(server, *overrides, name="api", **keys):
        teacher = {
            "kind": "openai",
            "model": "teacher",
            "base_url": server.url,
            "api": "completion",
            "api_key": None,
            "permission": "ours",
            "attempts": 1,
            "tokenizer": str(tiny_llama),
        } | keys
        student = {"kind": "layers", "keep": "even", "count": 2, "model": str(tiny_llama)}
        given = [f"teacher={json.dumps(teacher)}", f"student={json.dumps(student)}", TOPK]
        folder = f"run_dir={tiny_recipe.parent / name / 'run'}"
        return load_recipe(tiny_recipe, [*SHORT, folder, *given, *overrides])

    return make


def facts(recipe, stage="capture"):
    return RunDir(recipe.folder).manifest(stage).facts


def content(recipe):
    store, found = reopen_store(facts(recipe)["store"]), {}
    for key in store:
        records = store.read([key])
        found[key] = records.records_NS, records.notes[0]
    return found


def keys_of(recipe):
    """Of all pieces that are drawn, and of the validation rows."""
    train, held_out = (PackedRows(recipe.folder / "prepare" / split) for split in ("train", "validation"))
    some = range(min(len(held_out), recipe.training.validation_rows))
    batches = train.batch(rows_to_train(recipe, train)), held_out.batch(some)
    return {piece.key for batch in batches for piece in pieces_of(batch)}


def test_what_is_stored_is_what_a_local_teacher_says_position_by_position(load, scored, tiny_recipe):
    local = load_recipe(tiny_recipe, [*SHORT, TOPK, f"run_dir={tiny_recipe.parent / 'local' / 'run'}"])
    run_recipe(local, until="capture")
    with serve(Settings(answer=scored)) as server:
        recipe = load(server)
        run_recipe(recipe, until="capture")
        assert server.stats()["answered_again"] == 0
    ours, theirs = content(recipe), content(local)
    assert set(ours) == keys_of(recipe) > set(theirs)
    records, others = (np.concatenate([found[key][0] for key in theirs]) for found in (ours, theirs))
    assert records.shape == others.shape
    # The two read in batches of other shapes, whose last bits may differ: a code in thousands rounds the other way.
    assert (records == others).all(-1).mean() > 0.99
    encoding = encoding_of(SignalSpec.from_json(facts(recipe)["spec"]))
    one, other = encoding.unpack(records), encoding.unpack(others)
    assert torch.equal(one.ids_NK, other.ids_NK)
    torch.testing.assert_close(one.logprobs_NK.exp(), other.logprobs_NK.exp(), rtol=0, atol=0.02)
    torch.testing.assert_close(one.tail_N.exp(), other.tail_N.exp(), rtol=0, atol=1e-4)


def test_a_whole_run_needs_no_teacher_and_says_that_it_was_not_measured(load, scored):
    with serve(Settings(answer=scored)) as server:
        recipe = load(server, "control.enabled=true", "evaluation.speed=false")
        run_recipe(recipe, until="capture")
        asked = server.stats()["answered"]
    run_recipe(recipe)  # the server is gone: nobody needs it any more
    assert asked == len(keys_of(recipe))
    rows = json.loads((recipe.folder / "evaluate" / "measurements.json").read_text())
    assert {row["arm"] for row in rows if row["name"] == "nll"} == {"untrained", "control", "student"}
    assert {"nll_gain_over_control", "nll_gain_over_untrained"} <= {row["name"] for row in rows}
    assert not {"kl_to_teacher", "agreement", "retention", "recovered_kl"} & {row["name"] for row in rows}
    assert any("was not measured" in note for note in facts(recipe, "evaluate")["notes"])
    page = (recipe.folder / "report" / "report.md").read_text()
    assert "the teacher is behind an API and was not measured" in page
    assert facts(recipe)["scoring"]["served"] == {"teacher": asked}


def test_validation_is_drawn_by_what_the_store_knows_of_held_out_rows(load, scored):
    with serve(Settings(answer=scored)) as server:
        recipe = load(server, "signals.positions={kind: random, share: 0.5}")
        run_recipe(recipe, until="train")
    lessons = open_held_out(recipe, inputs_of(recipe), torch.device("cpu"))
    for lesson in lessons:
        assert isinstance(lesson.signal.logits, SparseLogits)
        assert int(lesson.batch.taught_BT.sum()) == len(lesson.signal.logits.ids_NK)
        assert int(lesson.batch.taught_BT.sum()) < int(lesson.batch.supervised_BT.sum())
    lines = [json.loads(line) for line in (recipe.folder / "train" / "metrics.jsonl").read_text().splitlines()]
    assert any("validation_forward_kl" in line for line in lines)


def test_another_run_and_a_lost_store_ask_nothing_again(load, scored):
    with serve(Settings(answer=scored)) as server:
        first = load(server)
        run_recipe(first, until="capture")
        asked = server.stats()["answered"]
        ours = content(first)
        second = load(server, f"run_dir={first.folder.parent / 'second'}")
        run_recipe(second, until="capture")
        assert facts(second)["captured"] == 0
        for file in sorted((first.folder.parent / "signals").rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        run_recipe(first, until="capture")
        assert server.stats()["answered"] == asked
    assert facts(first)["scoring"]["answered_before"] == asked
    found = content(first)
    assert all(np.array_equal(found[key][0], records) for key, (records, _) in ours.items())


def test_a_server_that_dies_stops_the_run_and_the_same_command_continues(load, scored):
    with serve(Settings(answer=scored, schedule={12: "http_401"})) as server:
        recipe = load(server)
        with pytest.raises(TeacherError, match=r"^teacher\.api_key: "):
            run_recipe(recipe, until="capture")
        assert 0 < server.stats()["answered"] < len(keys_of(recipe))
        run_recipe(recipe, until="capture")
        assert server.stats()["answered"] == len(keys_of(recipe))
        assert server.stats()["answered_again"] == 0
    assert set(content(recipe)) == keys_of(recipe)


def capture_slowly(recipe):
    torch.set_num_threads(1)
    run_recipe(recipe, until="capture")


def test_killed_a_capture_goes_on_with_what_was_answered(load, scored):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["potstill.pipeline.scored", "potstill.pipeline.stages"])
    with serve(Settings(answer=scored, delay_s=0.05)) as server:
        recipe = load(server, "signals.batch_tokens=64")  # two at once
        process = context.Process(target=capture_slowly, args=(recipe,))
        process.start()
        end = time.monotonic() + 60
        while server.stats()["answered"] < 10 and process.is_alive():
            assert time.monotonic() < end
            time.sleep(0.01)
        process.kill()
        process.join()
        assert server.stats()["answered"] < len(keys_of(recipe))
        run_recipe(recipe, until="capture")
        # What was under way in the moment of the kill could not be kept.
        assert server.stats()["answered_again"] <= 2
    assert set(content(recipe)) == keys_of(recipe)


@pytest.mark.parametrize(("tokens", "most"), [(4096, 32), (96, 3), (95, 2), (8, 1)])
def test_tokens_in_flight_stay_within_batch_tokens(load, tokens, most):
    with serve() as server:
        recipe = load(server, f"signals.batch_tokens={tokens}")
    assert recipe.data.sequence_length == 32
    assert scored_stage._within_limits(recipe).teacher.limits.concurrency == most


def write_only(body):
    """A server that does not know the field, and goes on with the text."""
    del body["prompt_logprobs"]
    return "x"


def test_an_endpoint_without_the_field_is_told_at_the_first_answer(load):
    with serve(Settings(answer=write_only)) as server:
        recipe = load(server, attempts=6)
        with pytest.raises(TeacherError, match=r"^teacher\.base_url: .* answers without prompt_logprobs.*vLLM"):
            run_recipe(recipe, until="capture")
        assert server.stats()["counts"]["received"] == 1


def test_an_endpoint_that_learns_to_score_is_asked_again(load, scored):
    able = [False]

    def answer(body):
        return scored(body) if able[0] else write_only(body)

    with serve(Settings(answer=answer)) as server:
        recipe = load(server)
        with pytest.raises(TeacherError):
            run_recipe(recipe, until="capture")
        able[0] = True
        run_recipe(recipe, until="capture")
    assert set(content(recipe)) == keys_of(recipe)


def test_what_the_server_refuses_is_told_after_one_request(load, scored):
    with serve(Settings(answer=scored, faults={"http_400": 1.0})) as server:
        with pytest.raises(
            TeacherError, match=r"no log-probabilities of 1 of 1 texts .*http_400.*--max-logprobs.*34 tok"
        ):
            run_recipe(load(server), until="capture")
        assert server.stats()["counts"]["received"] == 1


def test_lists_of_other_places_are_never_stored(load, scored):
    def shifted(body):
        said = scored(body)
        said["prompt_logprobs"] = [None, *said["prompt_logprobs"][2:], said["prompt_logprobs"][1]]
        return said

    with (
        serve(Settings(answer=shifted)) as server,
        pytest.raises(TeacherError, match=r"not_the_prompt.*name another teacher\.ledger\.$"),
    ):
        run_recipe(load(server), until="capture")


def test_a_budget_that_is_used_up_stops_the_run_and_more_of_it_continues(load, scored):
    with serve(Settings(answer=scored)) as server:
        recipe = load(server, budget={"requests": 20})
        with pytest.raises(BudgetError, match=r"^teacher\.budget: requests=20 was used up with \d+ of \d+ texts to go"):
            run_recipe(recipe, until="capture")
        run_recipe(load(server, budget={"requests": 2000}), until="capture")
        assert server.stats()["answered_again"] == 0


def test_a_tokenizer_that_numbers_otherwise_is_refused_before_anything_is_sent(load, scored, tiny_tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast

    other = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    words = other["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")).save_pretrained(tmp_path / "other")
    with serve(Settings(answer=scored)) as server:
        recipe = load(server, tokenizer=str(tmp_path / "other"))
        with pytest.raises(VocabularyMismatch, match="as number"):
            inspect_recipe(recipe)
        assert server.stats()["counts"].get("received", 0) == 0


def test_the_plan_knows_no_teacher_here(load, scored, capsys):
    with serve(Settings(answer=scored)) as server:
        print_plan(load(server), measure=True)
    told = capsys.readouterr().out
    assert "scores given text" in told
    assert "every model runs here" not in told


def test_a_part_of_a_capture_is_refused(load, scored):
    with serve(Settings(answer=scored)) as server, pytest.raises(RecipeError, match=r"^--part: an endpoint is asked"):
        run_part(load(server), "1/2", Stopping())
