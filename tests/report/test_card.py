"""Laws of the model card."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from potstill.report import write_card


def front_matter(path):
    _, yaml, body = path.read_text(encoding="utf-8").split("---\n", 2)
    return YAML(typ="safe").load(yaml), body


def test_the_front_matter_is_what_the_hub_reads(story, tmp_path):
    story = replace(story, base_model="HuggingFaceTB/SmolLM2-135M-Instruct", license="apache-2.0")
    path = write_card(story, tmp_path)
    assert path == tmp_path / "README.md"
    assert front_matter(path)[0] == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
        "tags": ["distillation", "potstill"],
    }


def test_a_licence_that_nobody_stated_is_not_named(story, tmp_path):
    matter, body = front_matter(write_card(story, tmp_path))
    assert "license" not in matter
    assert "base_model" not in matter
    assert "The licence is not known to this card" in body


def test_the_card_tells_the_headline_the_table_the_making_and_the_loading(story, tmp_path):
    _, body = front_matter(write_card(story, tmp_path))
    for part in (
        "distillation added +8.5 points [7.4, 9.6]",
        "But the student is worse than the control arm by NLL",
        "| KL to the teacher | 0 nats by definition | 2.42 nats [2.39, 2.45] |",
        "Losses: forward_kl (T = 1)",
        "122,400 tokens",
        "Note: 3 rows unusable: empty text",
        "AutoModelForCausalLM.from_pretrained(folder)",
        "## Limits",
    ):
        assert part in body


@given(text=st.text(st.characters(), max_size=30))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_name_makes_valid_front_matter(story, tmp_path, text):
    matter, _ = front_matter(write_card(replace(story, base_model=text, license=text, title=text), tmp_path))
    assert matter["library_name"] == "transformers"
    assert isinstance(matter.get("license", ""), str)
