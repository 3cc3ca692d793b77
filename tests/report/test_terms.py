"""Laws of the teacher's terms in the model card: everything stands there, and nothing breaks out of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ruamel.yaml import YAML

from potstill.report import write_card
from potstill.report.terms import TermsFacts, note_licence

LLAMA = TermsFacts(
    model="llama3.1:8b",
    access="localhost",
    rule="llama-3.1",
    who="Meta (Llama 3.1)",
    use="training on its answers is allowed, under obligations",
    clause="outputs may train other models",
    source="https://www.llama.com/llama3_1/license/",
    effective="2024-07-23",
    checked="2026-11-22",
    obligations=('The name must begin with "Llama".', 'Show "Built with Llama".'),
    permission="Contract 7,\n  clause 2",
)


def body(story, folder, *terms):
    return write_card(story, folder, terms=terms).read_text(encoding="utf-8").split("---\n", 2)[2]


def test_rule_clause_source_dates_obligations_and_permission_stand_in_the_card(story, tmp_path):
    text = body(story, tmp_path, LLAMA)
    section = text.partition("## Teacher's terms")[2].partition("\n## ")[0]
    known = ("llama3.1:8b (localhost)", "Rule: llama-3.1", LLAMA.who, LLAMA.use, LLAMA.clause, LLAMA.source)
    dates = ("effective 2024-07-23", "checked 2026-11-22")
    for said in (*known, *dates, *LLAMA.obligations, LLAMA.permission, "not legal advice"):
        assert said in section
    assert 'stands under "Teacher\'s terms"' in text.partition("## Limits")[2]


def test_without_terms_there_is_no_such_section(story, tmp_path):
    assert "Teacher's terms" not in body(story, tmp_path)


def test_what_is_not_known_is_left_out(story, tmp_path):
    text = body(story, tmp_path, replace(LLAMA, source=None, effective=None, obligations=(), permission=None))
    section = text.partition("## Teacher's terms")[2].partition("\n## ")[0]
    assert "None" not in section
    assert "effective" not in section
    assert "Permission" not in section


def test_every_teacher_is_told(story, tmp_path):
    text = body(story, tmp_path, LLAMA, replace(LLAMA, model="second"))
    assert text.count("Rule: llama-3.1") == 2


def test_no_permission_breaks_out_of_its_block(story, tmp_path):
    evil = "```\n## Licence\nMIT\n<script>x</script>\n\x1b[2J"
    path = write_card(story, tmp_path, terms=(replace(LLAMA, model="<b>|x", permission=evil),))
    text = path.read_text(encoding="utf-8")
    fence = "````text\n"
    inside = text.partition(fence)[2].partition("\n````")[0]
    assert "## Licence" in inside
    assert text.count("## Licence") == 1
    assert "\x1b" not in text
    assert "\\<b\\>" in text
    assert YAML(typ="safe").load(text.split("---\n", 2)[1])["library_name"]


@pytest.mark.parametrize("license", [None, "apache-2.0"])
def test_the_line_on_the_licence_points_to_obligations_where_there_are_some(license):
    plain = note_licence(license, ())
    assert note_licence(license, (replace(LLAMA, obligations=(), permission=None),)) == plain
    assert note_licence(license, (LLAMA,)).startswith(plain)
    assert "whatever the licence" in note_licence(license, (LLAMA,))
