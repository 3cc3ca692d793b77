"""Laws of the teacher's terms in a recipe: refused before anything is spent, or told with all that they oblige to."""

from __future__ import annotations

import pytest

from potstill.errors import RecipeError
from potstill.pipeline.licence import HERE, check_terms, describe_terms, tell_terms
from potstill.recipes import Recipe
from potstill.recipes.endpoints import OpenAITeacher
from potstill.recipes.terms import list_terms

OPENAI, HOME = "https://api.openai.com/v1", "http://localhost:8000/v1"
LOCAL = {"kind": "local", "model": "SmolLM2"}


def recipe(teacher: dict, task: str = "language_model", **more) -> Recipe:
    base = {
        "name": "r",
        "task": {"kind": task},
        "data": {"source": "rows.jsonl"},
        "teacher": LOCAL if teacher["kind"] == "openai" else teacher,
        "student": {"kind": "model", "model": "small"},
        "losses": [{"kind": "cross_entropy"}],
        "training": {"steps": 3},
    }
    read = Recipe.model_validate({**base, **more})
    # A copy, because which tasks an API may teach is judged elsewhere.
    return read.model_copy(update={"teacher": OpenAITeacher(**teacher)}) if teacher["kind"] == "openai" else read


def api(model: str, base_url: str = OPENAI, **more) -> dict:
    return {"kind": "openai", "model": model, "base_url": base_url, **more}


REFUSED = [
    (api("gpt-4o"), "language_model",
     "teacher.model: the terms of 'gpt-4o' at api.openai.com do not allow to train a model on its answers: output may "
     "not be used to develop models that compete with OpenAI (OpenAI, https://openai.com/policies/services-agreement/, "
     "effective 2025-05-31, checked 2026-11-22). Use another teacher, or state in teacher.permission on what ground "
     "its answers may be used."),
    (api("gpt-4o", HOME), "language_model", "terms of 'gpt-4o' at localhost do not allow"),
    (api("anthropic/claude-3.7-sonnet", "https://openrouter.ai/api/v1"), "classification", "needs Anthropic's prior"),
    (api("gemini-2.5-pro", "https://generativelanguage.googleapis.com/v1beta/openai/"), "classification", "compete"),
    (api("grok-4", "https://api.x.ai/v1"), "embedding", "unless the order form allows it"),
    (api("llama-2-7b", HOME), "classification", "may not be used to improve any other large language model"),
    (api("mine", "https://me.openai.azure.com/openai/v1"), "classification", "are not clear: the customer's agreement"),
    (api("teacher", HOME), "classification",
     "are not clear: potstill knows no terms of this access path, and unknown does not mean allowed"),
    (api("qwen3-8b", "https://llm.example.com/v1"), "language_model", "does not know those of 'llm.example.com'"),
]  # fmt: skip


@pytest.mark.parametrize(("teacher", "task", "says"), REFUSED)
def test_what_is_forbidden_or_unknown_is_refused_in_one_line_until_the_permission_is_stated(teacher, task, says):
    for blank in ({}, {"permission": None}, {"permission": " \n"}):
        with pytest.raises(RecipeError) as caught:
            check_terms(recipe({**teacher, **blank}, task))
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "teacher.permission" in str(caught.value)
    (verdict,) = check_terms(recipe({**teacher, "permission": "Contract 7, § 3"}, task)).verdicts
    assert verdict.permission == "Contract 7, § 3"
    assert verdict.use in ("forbidden", "ask")


@pytest.mark.parametrize(
    ("teacher", "use", "kinds"),
    [
        (api("deepseek-chat", "https://api.deepseek.com/v1"), "allowed", []),
        (api("SmolLM2-135M-Instruct", HOME), "allowed", []),
        (api("llama3.1:8b", HOME), "conditional", ["name_prefix", "notice", "users"]),
        (api("google/gemma-3-27b-it", HOME), "conditional", ["terms_propagate"]),
        (api("qwen/qwen2.5-72b-instruct", "https://openrouter.ai/api/v1"), "conditional", ["notice", "upstream"]),
    ],
)
def test_what_is_allowed_goes_on_with_its_obligations(teacher, use, kinds):
    (verdict,) = check_terms(recipe(teacher)).verdicts
    assert (verdict.use, [one.kind for one in verdict.obligations]) == (use, kinds)


@pytest.mark.parametrize("base_url", [OPENAI, HOME, "https://openrouter.ai/api/v1"])
@pytest.mark.parametrize("task", ["classification", "token_classification", "embedding"])
def test_openai_may_label_for_a_model_that_stays_with_its_owner(task, base_url):
    (verdict,) = check_terms(recipe(api("gpt-4o-mini", base_url), task)).verdicts
    assert verdict.use == "conditional"
    assert verdict.obligations[0].kind == "not_distributed"
    assert "if nobody else gets or buys them" in verdict.clause


@pytest.mark.parametrize(
    ("teacher", "uses"),
    [
        ({"kind": "local", "model": "meta-llama/Llama-2-7b-hf"}, ["forbidden"]),
        ({"kind": "local", "model": "google/gemma-2-2b"}, ["conditional"]),
        ({"kind": "finetune", "model": "google/gemma-2-2b", "training": {"epochs": 1}}, ["conditional"]),
        ({"kind": "mixture", "members": [{"model": "Llama-3.2-1B"}, {"model": "mine"}, {"model": "Qwen3-4B"}]},
         ["conditional", "allowed"]),
        ({"kind": "local", "model": "google-bert/bert-base-uncased"}, []),
        ({"kind": "local", "model": "claude-like"}, []),
        ({"kind": "recorded", "path": "said.jsonl", "label": "x"}, []),
    ],
)  # fmt: skip
def test_weights_that_run_here_are_never_refused_and_their_licence_is_told_where_it_is_known(teacher, uses):
    verdicts = check_terms(recipe(teacher)).verdicts
    assert [one.use for one in verdicts] == uses
    assert {one.access for one in verdicts} <= {HERE}
    assert all(one.obligations for one in verdicts if one.use == "conditional")


def test_the_key_of_a_member_is_told():
    teacher = {"kind": "mixture", "members": [{"model": "mine"}, {"model": "Llama-3.2-1B"}]}
    assert [one.key for one in check_terms(recipe(teacher)).verdicts] == ["teacher.members[1].model"]


def test_the_teacher_of_a_phase_counts_by_the_task_of_the_phase():
    plain = recipe(LOCAL, phases=[{"name": "first"}])
    teacher = OpenAITeacher(**api("gpt-4o"))
    (phase,) = plain.phases
    with pytest.raises(
        RecipeError, match=r"^phases\[0\]\.teacher\.model: .* state in phases\[0\]\.teacher\.permission "
    ):
        check_terms(plain.model_copy(update={"phases": [phase.model_copy(update={"teacher": teacher})]}))


def test_what_an_assistant_learned_from_binds_its_own_student(tmp_path):
    (tmp_path / "assistant.yaml").write_text(
        "name: assistant\ndata: {source: a.jsonl}\nteacher: {kind: local, model: google/gemma-2-2b}\n"
        "student: {kind: layers, count: 2}\nlosses: [{kind: forward_kl}]\ntraining: {steps: 1}\n",
        encoding="utf-8",
    )
    (verdict,) = check_terms(recipe({"kind": "run", "recipe": str(tmp_path / "assistant.yaml")})).verdicts
    assert verdict.key == "assistant: teacher.model"
    assert verdict.obligations[0].kind == "terms_propagate"


def test_a_teacher_of_several_trainings_is_told_once():
    teacher = {"kind": "local", "model": "google/gemma-2-2b"}
    assert len(check_terms(recipe(teacher, phases=[{"name": "a"}, {"name": "b"}])).verdicts) == 1


def test_the_lines_name_clause_source_obligations_and_permission_and_are_no_advice():
    finding = check_terms(recipe(api("llama3.1:8b", "https://llm.example.com/v1", permission="Contract 7,\nclause 2")))
    lines = describe_terms(finding)
    assert "llm.example.com" in lines[0]
    assert "checked 2026-11-22" in lines[0]
    assert any('must begin with "Llama"' in line for line in lines)
    assert "  - permission that the recipe states: Contract 7, clause 2" in lines
    assert lines[-1] == "  (not legal advice)"
    assert not any("\n" in line for line in lines)
    assert describe_terms(check_terms(recipe({"kind": "local", "model": "mine"}))) == []


def test_the_card_gets_the_permission_word_for_word():
    finding = check_terms(recipe(api("gpt-4o", permission="Contract 7,\n  clause 2")))
    (told,) = tell_terms(finding)
    assert told.permission == "Contract 7,\n  clause 2"
    assert (told.rule, told.effective, told.checked) == ("openai-api", "2025-05-31", "2026-11-22")


@pytest.mark.parametrize("rule", [one for one in list_terms() if one.hosts], ids=lambda rule: rule.id)
def test_every_provider_is_judged_at_its_own_host(rule):
    teacher = api("some-model", f"https://{rule.hosts[0].replace('*', 'mine')}/v1", permission="stated")
    (verdict,) = check_terms(recipe(teacher)).verdicts
    assert (verdict.rule.id, verdict.use) == (rule.id, rule.use)
