"""Laws of reports on other tasks than the next token: their own words, their own numbers, nothing that does not fit."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
from ruamel.yaml import YAML

from potstill.report import (
    ClassFacts,
    ClassRow,
    Confusion,
    CurvePoint,
    DataFacts,
    PhaseFacts,
    ReliabilityPoint,
    Sample,
    SliceRow,
    StageCost,
    Story,
    TaskFacts,
    TeacherTraining,
    write_card,
    write_report,
)
from potstill.report.classes import class_figure, confusion_rows, worst_classes
from potstill.report.facts import arm_rows, gain_rows
from potstill.report.headline import write_caveat, write_headline, write_static_headline
from potstill.report.metrics import gains_of, metric_of, metrics_of
from potstill.report.tiles import tiles
from potstill.report.tradeoff import speed_figures
from potstill.types import Measurement

KINDS = ("classification", "multi_label", "token_classification", "embedding", "masked_lm")
LABELS = tuple(f"{verb}_{thing}" for verb in ("show", "change", "cancel", "pay") for thing in (
    "card", "order", "address", "bill", "flight", "account", "alarm_for_the_next_morning"))  # fmt: skip

_SPEED = {  # parameters, folder, texts/s, p50, p95, peak, USD per 1,000
    "teacher": (22_713_216, 91.2e6, 312.0, 6.1, 9.8, 241e6, 0.000089),
    "untrained": (9_541_376, 38.4e6, 905.0, 2.2, 3.6, 120e6, 0.000031),
    "control": (9_541_376, 38.4e6, 911.0, 2.2, 3.5, 120e6, 0.000031),
    "student": (9_541_376, 38.4e6, 908.0, 2.2, 3.6, 120e6, 0.000031),
    "static": (7_854_998, 31.6e6, 41_200.0, 0.06, 0.11, 38e6, 0.0000007),
}
_ACCURACY = {"teacher": 0.958, "untrained": 0.011, "control": 0.929, "student": 0.941, "static": 0.902}


def _row(arm, name, value, half=None, n=4500, where="test"):
    bounds = (None, None) if half is None else (value - half, value + half)
    return Measurement(arm, name, where, value, *bounds, n, "")


def _costs(arms):
    rows = []
    for arm in arms:
        parameters, folder, rate, p50, p95, peak, usd = _SPEED[arm]
        rows += [
            _row(arm, "throughput_per_s", rate, 0.02 * rate, 5), _row(arm, "latency_p50_ms", p50, 0.04 * p50, 200),
            _row(arm, "latency_p95_ms", p95, 0.1 * p95, 200), _row(arm, "cost_usd_per_1000", usd, None, 1),
            _row(arm, "parameters", parameters, None, 1), _row(arm, "folder_bytes", folder, None, 1),
            _row(arm, "peak_memory_bytes", peak, None, 1),
        ]  # fmt: skip
        if arm != "teacher":
            rows.append(_row(arm, "throughput_vs_teacher", rate / 312.0, 0.05 * rate / 312.0, 5))
            rows.append(_row(arm, "latency_vs_teacher", p50 / 6.1, 0.02, 200))
    return rows


def _quality(arms, more):
    rows = []
    for arm in arms:
        right = _ACCURACY[arm]
        rows += [_row(arm, "accuracy", right, 0.007), _row(arm, "macro_f1", right - 0.004, 0.009)]
        rows += [_row(arm, name, right - less, 0.011) for name, less in more.items()]
        rows += [
            _row(arm, "nll", 4.6 * (1 - right) + 0.05, 0.02),
            _row(arm, "ece", 0.03),
            _row(arm, "temperature", 1.2),
        ]
        rows.append(_row(arm, "ece_calibrated", 0.011))
        if arm != "teacher":
            rows += [_row(arm, "agreement", right + 0.01, 0.007), _row(arm, "kl_to_teacher", 1.0 - right, 0.01)]
            rows.append(_row(arm, "retention", right / 0.958, 0.006))
    for over, gain in (("control", 0.012), ("untrained", 0.93)):
        rows += [_row("student", f"{name}_gain_over_{over}", gain, 0.005) for name in ("accuracy", "macro_f1")]
        rows.append(_row("student", f"agreement_gain_over_{over}", gain + 0.01, 0.005))
        rows.append(_row("student", f"kl_gain_over_{over}", gain / 2, 0.02))
    return rows


def _scope(arms):
    found = {"oos_auroc": 0.96, "oos_recall": 0.71, "oos_precision": 0.88, "oos_threshold": 0.62}
    halves = {"oos_auroc": 0.006, "oos_recall": 0.03, "oos_precision": 0.02, "oos_threshold": None}
    return [_row(arm, name, value, halves[name], 1000) for arm in arms for name, value in found.items()]


def _classes(arms):
    luck, counts = random.Random(7), dict.fromkeys(LABELS, 30)
    rows = {
        arm: tuple(
            ClassRow(label, luck.uniform(0.7, 1.0), luck.uniform(0.7, 1.0), luck.uniform(0.6, 1.0), counts[label])
            for label in LABELS
        )
        for arm in arms
    }
    return ClassFacts(LABELS, rows)


def _slices(arms):
    return tuple(
        SliceRow(value, tuple(_row(arm, "accuracy", _ACCURACY[arm] - less, 0.02, n, f"slice:{value}") for arm in arms))
        for value, n, less in (("web", 900, 0.04), ("app", 3600, 0.0))
    )


def _vectors(arms):
    ranks = {"untrained": 0.61, "student": 0.931}
    rows = []
    for arm in arms:
        if arm in ranks:
            rows += [
                _row(arm, "spearman_to_teacher", ranks[arm], 0.006, 900),
                _row(arm, "neighbours_kept", ranks[arm] - 0.15, 0.01, 900),
                _row(arm, "cosine_to_teacher", ranks[arm] - 0.02, 0.01, 900),
            ]
        rows.append(_row(arm, "sts_spearman", ranks.get(arm, 0.95) - 0.12, 0.02, 900))
    return rows


def _masked(arms):
    rows = []
    for arm in arms:
        nll = {"teacher": 2.1, "untrained": 5.2, "control": 3.4, "student": 3.0}[arm]
        rows += [_row(arm, "nll", nll, 0.06, 300), _row(arm, "ece", 0.03, None, 300)]
        rows.append(_row(arm, "prefill_tokens_per_s", 9000.0 if arm == "teacher" else 17000.0, 300.0, 5))
        rows.append(_row(arm, "parameters", _SPEED[arm][0], None, 1))
        if arm != "teacher":
            rows += [_row(arm, "agreement", 1.2 / nll, 0.01, 300), _row(arm, "kl_to_teacher", nll - 2.1, 0.03, 300)]
            rows.append(_row(arm, "recovered_kl", 0.4, 0.02, 300))
    rows += [_row("student", f"{name}_gain_over_control", 0.06, 0.02, 300) for name in ("agreement", "kl", "nll")]
    return rows


_ARMS = {
    "classification": ("teacher", "untrained", "control", "student", "static"),
    "embedding": ("teacher", "untrained", "student"),
}
_TASKS = {
    "classification": TaskFacts(
        "classification", LABELS, pooling="cls", out_of_scope="oos", precision=0.9, length=64,
        price="0.1 USD an hour for a machine such as this one, kept busy",
    ),
    "multi_label": TaskFacts("classification", LABELS[:5], multi_label=True, pooling="cls", length=64),
    "token_classification": TaskFacts("token_classification", ("O", "B-PER", "I-PER"), length=128),
    "embedding": TaskFacts("embedding", pooling="mean", normalise=True, length=64),
    "masked_lm": TaskFacts("masked_lm"),
}  # fmt: skip


def _measurements(kind, arms):
    match kind:
        case "embedding":
            return _vectors(arms) + _costs(arms)
        case "masked_lm":
            return _masked(arms)
        case "multi_label":
            return _quality(arms, {"micro_f1": 0.002}) + _costs(arms)
        case "token_classification":
            return _quality(arms, {"entity_f1": 0.06}) + _costs(arms)
    return _quality(arms, {}) + _scope(arms) + _costs(arms)


PHASE = PhaseFacts(
    "general", "saying masked tokens", "sample:minilm-l6, fine-tuned here",
    "5 forward_kl (T = 2, times T^2) + 2 cross_entropy + hidden_cosine (layers: last)", "phases/general",
    tuple(_masked(("teacher", "untrained", "control", "student"))), _TASKS["masked_lm"],
)  # fmt: skip


def planted(kind: str) -> Story:
    """A run of this task, with invented numbers."""
    arms = _ARMS.get(kind, ("teacher", "untrained", "control", "student"))
    many = kind == "classification"
    points = tuple(
        CurvePoint(i, i * 900, i * 0.4, 2.0 / i, {"forward_kl": 1.5 / i, "cross_entropy": 2.4 / i},
                   {"nll": 1.9 / i, "kl_to_teacher": 1.2 / i} if i % 5 == 0 else {})
        for i in range(1, 61)
    )  # fmt: skip
    bins = tuple(ReliabilityPoint(m / 15, (m + 1) / 15, (m + 0.5) / 15, m / 15, 9 + 40 * m) for m in range(15))
    return Story(
        title=kind.replace("_", "-"),
        description="MiniLM, 6 layers, into 2, on questions to a chatbot.",
        teacher="sample:minilm-l6, fine-tuned here",
        student="2-layer student",
        student_origin="Cut from the teacher: layers 0, 5 (listed choice), with its embeddings and head.",
        objective="0.7 forward_kl (T = 2, times T^2) + 0.3 cross_entropy",
        recipe="name: planted\n",
        has_control=kind != "embedding",
        measurements=tuple(_measurements(kind, arms)),
        curves={"student": points} if kind == "embedding" else {"student": points, "control": points},
        samples=(
            Sample("what's my balance & when is <b>it</b> due", "pay_bill", {
                "teacher": "pay_bill (0.98)", "untrained": "show_alarm (0.04)", "control": "show_account (0.51)",
                "student": "pay_bill (0.83)",
            }),
        ) if kind != "masked_lm" else (),
        stages=(StageCost("prepare", 1.1, 0.4), StageCost("finetune", 188.0, 1.9), StageCost("train", 61.0, 1.2)),
        data=DataFacts(
            "sample:trec-questions",
            documents={"train": 15000, "validation": 3000, "test": 4500},
            cleaning={"repeated text in train": 12},
            fingerprint="0a1b2c",
            labelled={} if kind in ("embedding", "masked_lm") else {"train": 15000, "validation": 3000, "test": 4500},
        ),
        versions={"potstill": "0.1.0"},
        machine="x86-64, 2 cores, no GPU",
        notes=("texts with more than 64 tokens were cut: 3 of train",),
        reliability={} if kind == "embedding" else {arm: bins for arm in arms if arm != "untrained"},
        task=_TASKS[kind],
        classes=_classes([arm for arm in arms if arm != "untrained"]) if many else None,
        confusions=(Confusion("pay_bill", "show_bill", 9, 2), Confusion("show_card", "pay_bill", 3, 3)) if many else (),
        slices=_slices(arms) if many else (),
        phases=(PHASE,) if many else (),
        teacher_training=TeacherTraining("sample:minilm-l6", "all", 1880, 180.0) if many else None,
    )  # fmt: skip


@pytest.fixture(params=KINDS)
def story(request) -> Story:
    return planted(request.param)


def without(story: Story, *names: str) -> Story:
    return replace(story, measurements=tuple(m for m in story.measurements if m.name not in names))


def texts_of(story: Story, folder) -> list[str]:
    page = write_report(story, folder).read_text("utf-8")
    shown = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.S)
    return [re.sub(r"<[^>]+>", " ", shown), (folder / "report.md").read_text("utf-8"),
            write_card(story, folder).read_text("utf-8")]  # fmt: skip


def test_no_report_speaks_of_what_its_task_does_not_do(story, tmp_path):
    foreign = ["next token", "next-token", "Downstream tasks", "Prefill", "Decode", "how the document goes on"]
    for text in texts_of(story, tmp_path):
        assert [word for word in foreign if word.lower() in text.lower()] == []


def test_every_measured_quantity_is_defined_in_the_words_of_its_task(story):
    known = {metric.name for metric in (*metrics_of(story.task), *gains_of(story.task))}
    assert {m.name for m in story.measurements if m.slice == "test"} <= known


def test_one_name_is_written_alike_in_every_task():
    kinds: dict[str, set[str]] = {}
    for kind in (*KINDS, "language_model"):
        task = _TASKS.get(kind)
        for metric in (*metrics_of(task), *gains_of(task)):
            kinds.setdefault(metric.name, set()).add(metric.kind)
    assert [name for name, found in kinds.items() if len(found) > 1] == []


def test_what_has_one_name_is_defined_anew_in_each_task():
    agreement = _row("student", "agreement", 0.9)
    meanings = {metric_of(agreement, _TASKS.get(kind)).meaning for kind in (*KINDS, "language_model")}
    assert len(meanings) == 6
    assert "next token" in metric_of(agreement).meaning
    assert "class" in metric_of(agreement, _TASKS["classification"]).meaning


def test_the_headline_of_a_classifier():
    assert write_headline(planted("classification")) == (
        "The 2-layer student (9.54M, 42.0 % of the teacher's parameters) is right on 94.1 % [93.4, 94.8] of in-scope "
        "held-out texts, 98.2 % [97.6, 98.8] of its teacher's accuracy, at 2.91 times the throughput; distillation "
        "added +1.2 points [0.7, 1.7] over the same student trained on hard labels with the same texts."
    )


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("multi_label", "reaches a macro F1 of 93.7 % [92.8, 94.6] on held-out texts (its teacher: 95.4 %)"),
        ("token_classification", "of held-out words, 98.2 % [97.6, 98.8] of its teacher's accuracy, finds entities"),
        ("embedding", "rank correlation of 0.931 [0.925, 0.937], keeps 78.1 % [77.1, 79.1] of its nearest neighbours"),
        ("masked_lm", "agrees with its teacher on 40.0 % of masked tokens [39.0, 41.0]; distillation added"),
    ],
)
def test_the_headlines_of_other_tasks(kind, words):
    assert words in write_headline(planted(kind))


def test_retention_of_accuracy_is_never_said_of_another_measure():
    assert "of its teacher's accuracy" not in write_headline(without(planted("classification"), "accuracy"))
    assert "of its teacher's accuracy" not in write_headline(planted("multi_label"))


def test_a_classifier_s_gain_whose_interval_holds_zero_is_none():
    story = without(planted("classification"), "accuracy_gain_over_control")
    level = replace(story, measurements=(*story.measurements, _row("student", "accuracy_gain_over_control", 0.0, 0.01)))
    assert "no gain from distillation is shown" in write_headline(level)
    assert "added" not in write_headline(level)
    assert "is not told apart from the control arm by KL to the teacher" in write_caveat(level)


def test_the_headline_and_the_tile_have_one_ratio_of_speeds():
    story = without(planted("classification"), "throughput_vs_teacher")
    paired = replace(story, measurements=(*story.measurements, _row("student", "throughput_vs_teacher", 2.22, 0.1)))
    assert "at 2.22 times the throughput" in write_headline(paired)
    assert [tile.note for tile in tiles(paired) if "2.22 times the teacher's" in tile.note]


@pytest.mark.parametrize(
    ("learns", "words"),
    [("all", "all weights trained"), ("body", "all weights but the token embeddings"), ("head", "a new head alone")],
)
def test_what_of_the_teacher_was_trained_is_said(tmp_path, learns, words):
    story = replace(planted("classification"), teacher_training=TeacherTraining("org/base", learns, 100))
    assert all(words in text for text in texts_of(story, tmp_path)[:2])


def test_vectors_have_no_control_arm_and_the_first_words_say_so(tmp_path):
    story = planted("embedding")
    assert write_headline(story).startswith("The gain from distillation over hard labels is unknown: vectors have none")
    page, _, _ = texts_of(story, tmp_path)
    assert "control.enabled" not in page


def test_a_control_arm_on_fewer_texts_is_not_called_one_on_the_same():
    story = planted("classification")
    partly = replace(story.data, labelled={**story.data.labelled, "train": 1500})
    headline = write_headline(replace(story, data=partly))
    assert "the same student trained as many steps on the labelled texts alone" in headline
    assert "same texts" not in headline


def test_classes_come_in_the_order_of_what_the_student_lost_and_none_is_left_out():
    def rows(*f1):
        return tuple(ClassRow(label, 1.0, 1.0, value, 4) for label, value in zip("abc", f1, strict=True))

    classes = ClassFacts(("a", "b", "c"), {"teacher": rows(0.9, 0.5, None), "student": rows(0.8, 0.1, 0.7)})
    assert worst_classes(classes) == ["b", "a", "c"]
    figure = class_figure(replace(planted("classification"), classes=classes))
    assert [row[:4] for row in figure.rows] == [
        ("b", "4", "50.0 %", "10.0 %"), ("a", "4", "90.0 %", "80.0 %"), ("c", "4", "none", "70.0 %"),
    ]  # fmt: skip


def test_all_classes_stand_behind_the_picture_of_the_worst():
    figure = class_figure(planted("classification"))
    assert sorted(row[0] for row in figure.rows) == sorted(LABELS)
    assert figure.title == "The 15 classes on which the student lost most"


def test_only_confusions_that_the_student_adds_are_told_the_most_added_first():
    found = confusion_rows([Confusion("a", "b", 3, 3), Confusion("b", "a", 4, 2), Confusion("c", "a", 9, 0)])
    assert found == [("c", "a", "9", "0", "+9"), ("b", "a", "4", "2", "+2")]


def test_out_of_scope_numbers_and_slices_have_tables_of_their_own():
    story = planted("classification")
    story = replace(story, measurements=(*story.measurements, *(m for row in story.slices for m in row.measurements)))
    assert {row.metric.name for row in arm_rows(story, scope=True)} == {
        "oos_auroc", "oos_recall", "oos_precision", "oos_threshold",
    }  # fmt: skip
    assert not [row for row in arm_rows(story) if row.metric.name.startswith("oos_") or "slice" in row.metric.label]


def test_gains_of_a_classifier_come_in_its_own_order():
    names = [gain.metric.name for gain in gain_rows(planted("classification"), "control")]
    assert names == [f"{name}_gain_over_control" for name in ("accuracy", "macro_f1", "agreement", "kl")]


def test_an_untrained_student_does_not_press_the_picture_of_speed_together():
    story = planted("classification")
    (figure,) = speed_figures(story)
    assert '"untrained"' not in figure.spec
    assert "Far below the picture: untrained, at 1.1 %." in figure.caption
    assert [row[0] for row in figure.rows] == ["teacher", "untrained", "control", "student", "static"]
    near = (_row("untrained", "accuracy", 0.9), _row("untrained", "throughput_per_s", 900.0))
    others = (m for m in story.measurements if m.arm != "untrained")
    (figure,) = speed_figures(replace(story, measurements=(*near, *others)))
    assert "Far below" not in figure.caption


def test_what_nobody_verified_is_not_asked_for_verdicts(tmp_path):
    named = {("untrained", "nll"): 12.4, ("student", "nll"): 3.8, ("student", "decode_tokens_per_s"): 80.0}
    own = tuple(_row(arm, name, value) for (arm, name), value in named.items())
    samples = (Sample("What is a map?", "", {"student": "A picture of a place."}),)
    story = replace(planted("classification"), measurements=own, samples=samples, has_control=False, curves={})
    story = replace(
        story, task=TaskFacts("unverified"), classes=None, confusions=(), slices=(), phases=(), reliability={}
    )
    page, markdown, card = texts_of(story, tmp_path)
    for text in (page, markdown, card):
        assert "nothing verifies them" in text
        assert "pass@1" not in text
        assert "control.enabled" not in text
        assert "the answer that its row holds" not in text.lower()
    assert [figure.title for figure in speed_figures(story)] == ["NLL of the teacher's answers against decode speed"]


def test_page_markdown_and_card_tell_the_same(tmp_path):
    page, markdown, card = texts_of(planted("classification"), tmp_path)
    for words in (
        "sample:minilm-l6, fine-tuned here",
        "1,880 steps",
        "saying masked tokens",
        "132 times",
        "40.0 % [39",
    ):
        for text in (page, markdown, card):
            assert words in text
    for words in ("Class by class" if len(LABELS) < 16 else "15 classes", "show_bill", "0.1 USD an hour", "3,600"):
        assert words in page
        assert words in markdown
    assert '<a href="../phases/general/report/index.html">' in (tmp_path / "index.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("kind", "tag", "library", "loads"),
    [
        ("classification", "text-classification", "transformers", "AutoModelForSequenceClassification"),
        ("multi_label", "text-classification", "transformers", "AutoModelForSequenceClassification"),
        ("token_classification", "token-classification", "transformers", "AutoModelForTokenClassification"),
        ("embedding", "sentence-similarity", "sentence-transformers", "SentenceTransformer(folder)"),
        ("masked_lm", "fill-mask", "transformers", "AutoModelForMaskedLM"),
    ],
)
def test_the_card_says_how_a_model_of_its_task_is_loaded(tmp_path, kind, tag, library, loads):
    _, matter, body = write_card(planted(kind), tmp_path).read_text("utf-8").split("---\n", 2)
    read = YAML(typ="safe").load(matter)
    assert (read["pipeline_tag"], read["library_name"]) == (tag, library)
    code = body.split("```python\n")[1].split("```")[0]
    assert loads in code
    compile(code, "card", "exec")


def test_the_static_classifier_has_a_card_of_its_own(tmp_path):
    text = write_card(planted("classification"), tmp_path, "static").read_text("utf-8")
    assert "library_name: model2vec" in text
    assert "StaticModelPipeline.from_pretrained(folder)" in text
    assert write_static_headline(planted("classification")) in text
    assert "is right on 90.2 % [89.5, 90.9] of in-scope held-out texts, 94.2 %" in text
    assert "distillation added" not in text.split("## Measured")[0]


@pytest.mark.parametrize(
    "hole", [{"measurements": ()}, {"classes": None, "confusions": (), "slices": (), "phases": ()}]
)
def test_what_is_absent_leaves_no_empty_section(tmp_path, hole):
    story = replace(planted("classification"), **hole)
    page, markdown, _ = texts_of(story, tmp_path)
    if "classes" in hole:
        for words in ("Where it differs", "Phases"):
            assert words not in page
            assert words not in markdown
    else:
        assert "Speed was not measured in this run." in page


def test_every_markdown_table_has_rows_of_one_width(story, tmp_path):
    _, markdown, _ = texts_of(story, tmp_path)
    blocks = [block for block in re.split(r"\n\s*\n", markdown) if block.lstrip().startswith("|")]
    assert len(blocks) >= 5
    for block in blocks:
        lines = block.strip().split("\n")
        assert set(lines[1]) <= set("|-:")
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_labels_of_strangers_stay_text(tmp_path):
    hostile = "</script><img src=x onerror=alert(2)>|`a` \x00 {{ 7*7 }} %{y}"
    story = planted("classification")
    rows = (ClassRow(hostile, 0.5, 0.5, 0.5, 3),)
    story = replace(
        story,
        classes=ClassFacts((hostile,), {"teacher": rows, "student": rows}),
        confusions=(Confusion(hostile, hostile, 2, 1),),
        slices=(SliceRow(hostile, (_row("student", "accuracy", 0.5),)),),
        phases=(replace(PHASE, name=hostile, task=hostile, teacher=hostile, objective=hostile, folder=hostile),),
        task=replace(story.task, labels=(hostile,), out_of_scope=hostile),
    )
    write_report(story, tmp_path)
    assert "<img" not in (tmp_path / "index.html").read_text("utf-8")
