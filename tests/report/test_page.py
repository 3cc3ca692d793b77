"""Laws of the page: offline, escaped, complete, honest about holes, the same for the same story."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from potstill.errors import RunError
from potstill.report import CurvePoint, DataFacts, ReliabilityPoint, Sample, SignalFacts, StageCost, write_report
from potstill.report.figures import dark_twins, packed_plotly
from potstill.types import Measurement

SIGNALS = SignalFacts("16 sampled tokens a position", "a store", 1, 2, 3, 4.0, 1, 0, fidelity=(("a", "b", "c"),))

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>|`a` \x00\x1b \ud800 \u202e {{ 7*7 }} &lt; %{y}"
)
VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """Tags with their attributes, the visible text, and whether every element that opens also closes."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.words, self.scripts, self.open = [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.scripts.append(data)
        elif inside != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page_of(story, folder):
    return Page(write_report(story, folder).read_text(encoding="utf-8"))


def hostile(story):
    return replace(
        story,
        title=HOSTILE, description=HOSTILE, teacher=HOSTILE, student=HOSTILE, student_origin=HOSTILE, objective=HOSTILE,
        recipe=HOSTILE, machine=HOSTILE, notes=(HOSTILE,), versions={HOSTILE: HOSTILE},
        measurements=(*story.measurements, Measurement(HOSTILE, HOSTILE, HOSTILE, 1.0, None, None, 1, HOSTILE)),
        curves={HOSTILE: (CurvePoint(1, 10, 1.0, 2.0, {HOSTILE: 2.0, "b": 1.0}, {HOSTILE: 2.0}),)},
        samples=(Sample(HOSTILE, HOSTILE, {"student": HOSTILE, HOSTILE: HOSTILE}),),
        stages=(StageCost(HOSTILE, 1.0, None),),
        data=DataFacts(HOSTILE, {HOSTILE: 1}, {}, {}, {HOSTILE: 2}, HOSTILE),
        reliability={HOSTILE: (ReliabilityPoint(0.0, 0.1, 0.05, 0.04, 9),)},
        signals=SignalFacts(
            HOSTILE, HOSTILE, 1, 2, 3, 4.0, 1, 0, HOSTILE, 5.0, 1, True, HOSTILE, ((HOSTILE, HOSTILE, HOSTILE),)
        ),
    )  # fmt: skip


def test_the_page_asks_nothing_of_the_network(story, tmp_path):
    page = page_of(story, tmp_path)
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    loads = [a[key] for _, a in page.tags for key in ("src", "href", "srcset", "data", "action") if key in a]
    assert loads
    assert all(load.startswith("#") for load in loads)
    assert not re.search(r"url\(|@import", (tmp_path / "index.html").read_text(encoding="utf-8"))


def test_text_of_strangers_stays_text(story, tmp_path):
    clean, dirty = page_of(story, tmp_path / "a"), page_of(hostile(story), tmp_path / "b")
    assert [t for t, _ in dirty.tags if t == "img"] == []
    assert all(not name.startswith("on") for _, attributes in dirty.tags for name in attributes)
    assert sum("alert(1)" in script for script in dirty.scripts if not script.lstrip().startswith("{")) == 0
    assert (
        sum(t == "script" and not a for t, a in dirty.tags) == sum(t == "script" and not a for t, a in clean.tags) == 1
    )
    assert "</script><script>alert(1)</script>" in dirty.text
    assert "{{ 7*7 }}" in dirty.text


def test_characters_that_cannot_be_seen_are_shown(story, tmp_path):
    page = page_of(hostile(story), tmp_path)
    assert "␀␛ � �" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", (tmp_path / "index.html").read_text(encoding="utf-8"))


def test_samples_keep_their_spaces_and_lines(story, tmp_path):
    page = page_of(story, tmp_path)
    assert story.samples[1].completions["control"] in page.words
    assert "nothing: it stopped at once" in page.text


def test_an_arm_that_was_not_sampled_is_said(story, tmp_path):
    first, second = story.samples
    partial = replace(second, completions={"student": "x"})
    assert page_of(replace(story, samples=(first, partial)), tmp_path).text.count("not sampled") == 3
    assert (tmp_path / "report.md").read_text(encoding="utf-8").count("not sampled") == 3


def test_every_picture_is_json_with_words_and_numbers_beside_it(story, tmp_path):
    page = page_of(story, tmp_path)
    specs = [json.loads(script) for script in page.scripts if script.startswith("{")]
    plots = [a for t, a in page.tags if t == "div" and a.get("class") == "plot"]
    assert len(specs) == len(plots) == 2 + 3 + 2 + 1 + 1
    assert all(plot["role"] == "img" and len(plot["aria-label"]) > 40 for plot in plots)
    assert [t for t, _ in page.tags].count("details") == len(plots)
    assert packed_plotly() in page.scripts


def test_every_colour_of_a_picture_has_a_dark_twin(story, tmp_path):
    page = page_of(story, tmp_path)
    used = {c for s in page.scripts if s.startswith("{") for c in re.findall("#[0-9a-f]{6}", s)}
    assert used
    assert used <= set(dark_twins())


def test_intervals_stand_in_page_and_markdown(story, tmp_path):
    text = page_of(story, tmp_path).text
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    for interval in ("[44.3, 46.5]", "[1.35, 1.41]", "[7.4, 9.6]", "[−0.251, −0.207]", "[5,260, 5,380]"):
        assert interval in text
        assert interval in markdown


@pytest.mark.parametrize(
    ("hole", "said"),
    [
        ({"has_control": False, "measurements": ()}, "The gain from distillation is unknown: this run has"),
        ({"has_control": False, "measurements": ()}, "Set control.enabled: true and run again"),
        ({"measurements": ()}, "Speed was not measured"),
        ({"measurements": ()}, "No measurement was made."),
        ({"curves": {}}, "No learning curve was recorded."),
        ({"curves": {"student": ()}}, "No learning curve was recorded."),
        ({"samples": ()}, "No samples were drawn."),
        ({"stages": ()}, "Wall time and memory were not recorded."),
        ({"data": None}, "No data facts were recorded."),
        ({"machine": ""}, "not recorded"),
        ({"signals": replace(SIGNALS, fidelity=())}, "How true the stored signals are was not measured."),
        ({"signals": replace(SIGNALS, capture_tokens_per_s=None)}, "nothing was captured"),
    ],
)  # fmt: skip
def test_a_hole_is_said(story, tmp_path, hole, said):
    assert said in page_of(replace(story, **hole), tmp_path).text


def test_what_was_stored_of_the_teacher_is_told_on_page_and_in_markdown(stored, tmp_path):
    page = page_of(stored, tmp_path)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    for words in (
        "What the teacher said",
        "16 sampled tokens a position",
        "30 % at random",
        "runs/signals/smollm2-135m-instruct-sampled-16",
        "3,999 (3,100 captured in this run, 899 found before)",
        "2,538,254",
        "101 MB, 39.9 bytes a position",
        "2,310 tokens/s",
        "2 damaged blocks or files put aside in this store since it was begun; what this run needs",
        "error of the head's gradient",
        "what a step sees",
    ):
        assert words in page.text
        assert words in markdown
    assert ("a", {"href": "#signals"}) in page.tags


def test_without_stored_signals_nothing_is_said_of_them(story, tmp_path):
    text = page_of(story, tmp_path).text + (tmp_path / "report.md").read_text(encoding="utf-8")
    assert not [word for word in ("What the teacher said", "Signals", "captured", "biased") if word in text]


def test_a_store_that_is_whole_says_so(stored, tmp_path):
    whole = replace(stored.signals, quarantined=0, bias="drawn tokens are right on average")
    text = page_of(replace(stored, signals=whole), tmp_path).text
    assert "damage none found" in text
    assert "biased no: drawn tokens are right on average" in text


def test_how_well_calibrated_every_arm_is_stands_in_page_and_markdown(story, tmp_path):
    text = page_of(story, tmp_path).text
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    for words in (
        "Calibration error",
        "6.1 % [5.7, 6.6]",
        "Calibration: right as often as it says?",
        "93.3 to 100.0 %",
    ):
        assert words in text
        assert words in markdown
    without = page_of(replace(story, reliability={}), tmp_path)
    assert "right as often as it says?" not in without.text


def test_a_number_that_one_arm_lacks_is_not_measured(story, tmp_path):
    kept = tuple(m for m in story.measurements if (m.arm, m.name) != ("control", "nll"))
    assert page_of(story, tmp_path / "a").text.count("not measured") + 1 == (
        page_of(replace(story, measurements=kept), tmp_path / "b").text.count("not measured")
    )


def test_numbers_that_are_not_finite_break_no_picture(story, tmp_path):
    broken = tuple(
        replace(m, value=float("nan"), low=float("-inf")) if m.arm == "control" else replace(m, high=float("inf"))
        for m in story.measurements
    )
    points = (CurvePoint(1, 10, 1.0, float("nan")), CurvePoint(2, 20, 2.0, None, {}, {"nll": float("inf")}))
    page = page_of(replace(story, measurements=broken, curves={"student": points}), tmp_path)
    specs = [script for script in page.scripts if script.startswith("{")]
    assert specs
    assert all("NaN" not in spec and "Infinity" not in spec for spec in specs)
    assert "nan%" not in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_a_quantity_outside_the_vocabulary_is_shown_under_its_own_name(story, tmp_path):
    new = Measurement("student", "novelty", "long_documents", 0.5, None, None, 3, "share")
    assert "novelty (long_documents)" in page_of(replace(story, measurements=(*story.measurements, new)), tmp_path).text


def test_the_same_story_gives_the_same_bytes(story, tmp_path):
    first, second = (write_report(story, tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert (tmp_path / "a/report.md").read_bytes() == (tmp_path / "b/report.md").read_bytes()


@pytest.mark.parametrize("spoil", [lambda story: story, hostile], ids=["clean", "hostile"])
def test_every_markdown_table_has_rows_of_one_width(story, tmp_path, spoil):
    write_report(spoil(story), tmp_path)
    prose = re.sub(r"^(`{3,}).*?^\1$", "", (tmp_path / "report.md").read_text("utf-8"), flags=re.S | re.M)
    blocks = [block for block in re.split(r"\n\s*\n", prose) if block.lstrip().startswith("|")]
    assert len(blocks) >= 6
    for block in blocks:
        lines = block.strip().split("\n")
        assert set(lines[1]) <= set("|-:")
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
        assert len(lines) > 2


def test_a_folder_that_cannot_be_written_is_named(story, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RunError, match=r"report: cannot write .*taken/report\.md: .* then run the same command again"):
        write_report(story, tmp_path / "taken")
