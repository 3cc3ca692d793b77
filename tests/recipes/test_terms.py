"""Laws of the rules on teachers' terms: who is found by which access path, and that nothing unknown is allowed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.recipes.terms import UNKNOWN, find_terms, host_of, list_terms
from potstill.types import Role

OPENAI, AZURE = "https://api.openai.com/v1", "https://mine.openai.azure.com/openai/v1"
RELAY, HOME, OTHER = "https://openrouter.ai/api/v1", "http://localhost:8000/v1", "https://api.together.xyz/v1"
LLAMA = ["name_prefix", "notice", "users"]

HOSTS = [
    ("gpt-4o", OPENAI, "openai-api"),
    ("gpt-4o", "HTTPS://API.OpenAI.com:443/v1/", "openai-api"),
    ("gpt-4o", "https://eu.api.openai.com/v1", "openai-api"),
    ("gpt-4o", "https://api.openai.com./v1", "openai-api"),
    ("gpt-oss-120b", OPENAI, "openai-api"),
    ("whatever", OPENAI, "openai-api"),
    ("my-deployment", AZURE, "azure-openai"),
    ("gpt-4o", "https://mine.services.ai.azure.com/models", "azure-openai"),
    ("claude-sonnet-4-5", "https://api.anthropic.com/v1/", "anthropic-api"),
    ("gemini-2.5-pro", "https://generativelanguage.googleapis.com/v1beta/openai/", "gemini-api"),
    ("gemma-3-27b-it", "https://generativelanguage.googleapis.com/v1beta/openai/", "gemini-api"),
    ("grok-4", "https://api.x.ai/v1", "xai-api"),
    ("deepseek-reasoner", "https://api.deepseek.com/v1", "deepseek-api"),
]
NAMES = [
    # models that only their provider serves
    ("gpt-4o-mini-2024-07-18", "openai-api"), ("gpt-3.5-turbo", "openai-api"), ("gpt-35-turbo", "openai-api"),
    ("GPT-5.1", "openai-api"), ("gpt-4-32k", "openai-api"), ("gpt-4.1-nano", "openai-api"), ("o3-mini", "openai-api"),
    ("o1", "openai-api"), ("chatgpt-4o-latest", "openai-api"), ("ft:gpt-4o-mini:acme::id", "openai-api"),
    ("openai/o4-mini", "openai-api"), ("openai/some-new-model", "openai-api"),
    ("claude-3-5-sonnet-20241022", "anthropic-api"), ("us.anthropic.claude-sonnet-4-v1:0", "anthropic-api"),
    ("anthropic/claude-3.7-sonnet:beta", "anthropic-api"), ("google/gemini-2.5-flash", "gemini-api"),
    ("models/gemini-1.5-pro", "gemini-api"), ("x-ai/grok-4", "xai-api"), ("grok-code-fast-1", "xai-api"),
    ("qwen/qwen-max", "qwen-api"), ("qwen3-coder-plus", "qwen-api"), ("qwen2.5-max", "qwen-api"),
    # weights
    ("meta-llama/Llama-2-7b-chat-hf", "llama-2"), ("llama2:13b", "llama-2"), ("TheBloke/CodeLlama-7B-GGUF", "llama-2"),
    ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3.0"), ("llama3", "llama-3.0"), ("llama3:70b", "llama-3.0"),
    ("llama-3-8b", "llama-3.0"), ("llama3.0", "llama-3.0"),
    ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1"), ("llama-3.1-8b", "llama-3.1"),
    ("llama3.1:405b", "llama-3.1"),
    ("LLAMA_3.1_8B.Q4_K_M.gguf", "llama-3.1"), ("accounts/fireworks/models/llama-v3p1-8b-instruct", "llama-3.1"),
    ("meta.llama3-1-70b-instruct-v1:0", "llama-3.1"), ("NousResearch/Hermes-3-Llama-3.1-8B", "llama-3.1"),
    ("nvidia/Llama-3_1-Nemotron-70B-Instruct-HF", "llama-3.1"), ("ollama/llama3.1", "llama-3.1"),
    ("hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4", "llama-3.1"),
    ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "llama-3.2"), ("Llama-3.3-70B-Instruct-FP8", "llama-3.3"),
    ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "llama-4"), ("llama4:maverick", "llama-4"),
    ("huggyllama/llama-7b", "llama-of-unknown-version"), ("llama-3.7-8b", "llama-of-unknown-version"),
    ("meta-llama/next", "llama-of-unknown-version"), ("openlm-research/open_llama_3b", "llama-of-unknown-version"),
    ("google/gemma-2b", "gemma-1-3"), ("gemma:7b", "gemma-1-3"), ("google/gemma-1.1-2b-it", "gemma-1-3"),
    ("google/gemma-2-9b-it", "gemma-1-3"), ("gemma3:27b", "gemma-1-3"), ("gemma-3n-E4B-it", "gemma-1-3"),
    ("google/codegemma-7b", "gemma-1-3"), ("medgemma-4b-it", "gemma-1-3"), ("google/gemma-3-4b-it", "gemma-1-3"),
    ("google/gemma-4-31B-it", "gemma-4"), ("gemma4", "gemma-4"),
    ("Qwen/Qwen2.5-7B-Instruct", "qwen"), ("qwen3:8b", "qwen"), ("Qwen/Qwen3-235B-A22B", "qwen"), ("QwQ-32B", "qwen"),
    ("Qwen/Qwen2.5-72B-Instruct-AWQ", "qwen-72b"), ("qwen2-72b", "qwen-72b"), ("Qwen2.5-VL-72B", "qwen-72b"),
    ("Qwen/Qwen2.5-3B-Instruct", "qwen-research"), ("qwen2.5-coder-3b", "qwen-research"),
    ("Qwen/Qwen1.5-7B-Chat", "qwen-1"), ("Qwen/Qwen-72B", "qwen-1"),
    ("deepseek-ai/DeepSeek-R1", "deepseek"), ("DeepSeek-V3.1-Terminus", "deepseek"), ("deepseek-r1:671b", "deepseek"),
    ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "deepseek"), ("deepseek-coder-33b-instruct", "deepseek-before-r1"),
    ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "deepseek-distilled-llama"),
    ("deepseek-r1:70b", "deepseek-distilled-llama"),
    ("openai/gpt-oss-20b", "gpt-oss"), ("gpt-oss:120b", "gpt-oss"),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm"), ("sample:smollm2-135m-instruct", "smollm"),
    ("SmolLM3-3B", "smollm"),
    ("/cache/models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f249a16976918f6564b8830bc894c89659", "llama-3.1"),
    ("/home/claude/gpt-4/SmolLM2-135M", "smollm"), ("C:\\llama-2\\qwen3-8b.gguf", "qwen"),
    # what only looks like one of them
    ("tinyllama-1.1b", UNKNOWN), ("claudia-7b", UNKNOWN), ("openai-community/gpt2", UNKNOWN), ("marco-o1", UNKNOWN),
    ("gpt4all-j", UNKNOWN), ("EleutherAI/gpt-neo-1.3B", UNKNOWN), ("xai-org/grok-1", UNKNOWN), ("gemma-5-9b", UNKNOWN),
    ("/home/claude/teacher", UNKNOWN), ("./llama-2/teacher", UNKNOWN), ("teacher", UNKNOWN), ("", UNKNOWN),
    ("openrouter/auto", UNKNOWN),
]  # fmt: skip
USES = {
    "unknown": "ask", "openai-api": "forbidden", "azure-openai": "ask", "anthropic-api": "forbidden",
    "gemini-api": "forbidden", "xai-api": "forbidden", "deepseek-api": "allowed", "qwen-api": "ask",
    "llama-2": "forbidden", "llama-3.0": "forbidden", "llama-3.1": "conditional", "llama-3.2": "conditional",
    "llama-3.3": "conditional", "llama-4": "conditional", "llama-of-unknown-version": "ask",
    "gemma-1-3": "conditional", "gemma-4": "allowed", "qwen": "allowed", "qwen-72b": "conditional",
    "qwen-research": "conditional", "qwen-1": "ask", "deepseek": "allowed", "deepseek-before-r1": "conditional",
    "deepseek-distilled-llama": "conditional", "gpt-oss": "allowed", "smollm": "allowed",
}  # fmt: skip


@pytest.mark.parametrize(("model", "base_url", "rule"), HOSTS)
def test_at_a_providers_host_its_terms_hold_for_whatever_is_served(model, base_url, rule):
    assert find_terms(model, base_url).id == rule


@pytest.mark.parametrize(("model", "rule"), NAMES)
def test_at_an_address_of_ones_own_and_at_a_relay_the_name_decides(model, rule):
    assert find_terms(model, HOME).id == rule
    assert find_terms(model.upper(), HOME).id == rule
    assert find_terms(model, RELAY).id == rule
    assert [one.kind for one in find_terms(model, RELAY).obligations][-1] == "upstream"


def test_every_rule_is_found_by_some_path_and_says_what_it_must():
    found = {find_terms(model, HOME).id for model, _ in NAMES} | {find_terms(*one[:2]).id for one in HOSTS}
    assert {rule.id: rule.use for rule in list_terms()} == USES
    assert found == set(USES)


@pytest.mark.parametrize("rule", list_terms(), ids=lambda rule: rule.id)
def test_a_rule_has_clause_source_and_dates(rule):
    assert rule.clause.strip()
    assert "\n" not in rule.clause
    assert (rule.source is None) == (rule.id == UNKNOWN)
    assert rule.checked.isoformat() == "2026-11-22"
    assert rule.effective is None or rule.effective <= rule.checked
    assert bool(rule.obligations) == (rule.use == "conditional")
    assert {task for one in rule.exceptions for task in one.tasks} <= {role.value for role in Role}


def test_obligations_carry_what_must_be_shown():
    by_kind = {one.kind: one.value for one in find_terms("llama-3.3-70b", HOME).obligations}
    assert by_kind == {"name_prefix": "Llama", "notice": "Built with Llama", "users": "700000000"}
    assert [one.value for one in find_terms("qwen2.5-72b", HOME).obligations] == ["Built with Qwen"]
    assert [one.kind for one in find_terms("gemma-2-9b", HOME).obligations] == ["terms_propagate"]


def test_openai_excepts_models_that_classify_and_nobody_else_does():
    excepted = {rule.id: [one.tasks for one in rule.exceptions] for rule in list_terms() if rule.exceptions}
    assert excepted == {"openai-api": [["classification", "token_classification", "embedding"]]}


@pytest.mark.parametrize(
    ("model", "use", "kinds"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "ask", LLAMA),  # the licence goes on, the host's terms are unknown
        ("Qwen/Qwen2.5-7B-Instruct", "ask", []),
        ("meta-llama/Llama-2-70b-chat", "forbidden", []),
        ("gpt-4o", "forbidden", []),
        ("teacher", "ask", []),
    ],
)
def test_weights_behind_a_strangers_api_carry_its_unknown_terms(model, use, kinds):
    rule = find_terms(model, OTHER)
    assert (rule.use, [one.kind for one in rule.obligations]) == (use, kinds)
    if use == "ask":
        assert "api.together.xyz" in rule.clause


def test_a_providers_host_keeps_the_obligations_of_the_weights_that_it_serves():
    rule = find_terms("Llama-3.1-8B", "https://mine.services.ai.azure.com/models")
    assert (rule.id, [one.kind for one in rule.obligations]) == ("azure-openai", LLAMA)


PRIVATE = ["localhost", "127.0.0.1", "10.1.2.3", "192.168.0.9", "172.16.0.1", "169.254.1.1", "100.64.0.1", "[::1]",
           "[fe80::1%25eth0]", "[::ffff:10.0.0.1]", "vllm", "gpu-1.lan", "box.local", "llm.svc.cluster.local",
           "host.docker.internal", "LOCALHOST"]  # fmt: skip
PUBLIC = ["example.com", "8.8.8.8", "[2001:4860:4860::8888]", "[::ffff:8.8.8.8]", "localhost.example.com",
          "127.0.0.1.nip.io", "134744072", "0x08080808", "api.openai.com.example.com", "x-localhost.com"]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
@pytest.mark.parametrize("form", ["http://{}:8000/v1", "https://{}/v1", "http://user:secret@{}/v1"])
def test_an_address_of_ones_own_is_known_as_such(host, form):
    assert find_terms("qwen3-8b", form.format(host)).use == "allowed"


@pytest.mark.parametrize("host", PUBLIC)
def test_no_public_address_passes_for_ones_own(host):
    assert find_terms("qwen3-8b", f"https://{host}/v1").use == "ask"


@pytest.mark.parametrize(
    "base_url",
    ["https://api.openai.com@example.com/v1", "https://example.com/api.deepseek.com", "https://example.com#api.deepseek.com",
     "http://[broken", "http:///v1", "https://api.deepseek.com.example.com", "https://api-deepseek.com"],
)  # fmt: skip
def test_a_url_that_only_looks_like_a_providers_is_unknown(base_url):
    assert find_terms("teacher", base_url).use == "ask"


def test_the_host_is_read_as_a_client_reads_it():
    assert host_of("https://user:pw@API.x.AI.:8443/v1?q=api.openai.com") == "api.x.ai"
    assert host_of("nonsense") == ""


def test_weights_in_this_process_are_judged_by_licences_only():
    assert find_terms("claude-like-7b", None).id == UNKNOWN
    assert find_terms("openai-community/gpt2", None).id == UNKNOWN
    assert find_terms("meta-llama/Llama-2-7b", None).id == "llama-2"


@given(st.text(max_size=200), st.one_of(st.none(), st.text(max_size=60).map("https://{}".format)))
def test_no_name_and_no_url_breaks_the_search(model, base_url):
    rule = find_terms(model, base_url)
    assert rule.use in ("allowed", "conditional", "ask", "forbidden")


def test_the_document_lists_every_rule_as_the_data_has_it():
    text = (Path(__file__).parents[2] / "docs" / "terms.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([\w.-]+)` \| .+? \| (\w+) \|", text, flags=re.MULTILINE))
    assert listed == USES
    assert "not legal advice" in text.lower()
