"""Words that are asked and words that come back: templates, requests for new tasks, and the tasks in an answer.

Refuses to guess: a column that is missing is named, and an answer without a list holds no task.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from string import Formatter

from potstill.data.clean import mend
from potstill.errors import DataError

__all__ = [
    "OPERATIONS",
    "columns_of",
    "evolve_prompt",
    "fault_of",
    "fill",
    "instruct_prompt",
    "read_instructions",
    "read_task",
]

KEY = "generate.prompts.template"
LONGEST_TASK = 4000
"""Characters of a task that a teacher writes; what is longer is no task but an answer, or a model that runs away."""

LONGEST_ANSWER = 1_000_000
"""Characters of an answer that are looked at."""

OPERATIONS: Mapping[str, str] = {
    "constrain": "It asks for the same, under one more condition that an answer can be checked against.",
    "deepen": "It asks about the same subject, and a good answer has to go deeper into causes, limits and exceptions.",
    "make concrete": "It replaces what is general by a particular case, with names, numbers or circumstances.",
    "add steps": "It cannot be solved at once: an answer needs several steps of reasoning that build on each other.",
    "broaden": "It is of the same field and as difficult, but about another subject that is asked about less often.",
}
"""What a task is turned into (Xu et al. (2023), arXiv:2304.12244, sec. 3.2): four ways deeper and one wider."""

_INSTRUCT = """\
These are {count} tasks that people have given to an assistant:

{examples}

Write {wanted} further tasks for the same assistant, in the language of those above. Vary the subject, the form of the
question and how difficult it is, and repeat none of them. Every task must be complete in itself: no pictures, no
links, no files, nothing that stands elsewhere. Answer with a numbered list of {wanted} tasks, without their solutions
and without any other text."""

_EVOLVE = """\
Between the marks stands a task that somebody gives to an assistant:

<task>
{task}
</task>

Write another task in its place. {change} It must be understandable without the one above, answerable in words, in the
same language, and not much longer. Do not solve it. Answer with that task alone, between <task> and </task>."""

_OWN_WORDS = ("<task>", "</task>", "between the marks", "in its place", "the one above", "task above")
_REFUSAL = re.compile(
    r"\W*(?:i(?:['’]m| am) (?:very )?(?:sorry|afraid|unable|not able)|sorry|i apologi[sz]e|my apologies|"
    r"i (?:can(?:['’]t|not)|won['’]t|am not able)|as an ai\b|unfortunately,? i)",
    re.IGNORECASE,
)
_LABEL = re.compile(r"\A(?:\*\*)?(?:(?:the|a|new|other|another|rewritten) )*task:(?:\*\*)?\s*", re.IGNORECASE)
_FENCE = re.compile(r"```[a-zA-Z]*[ \t]*\n(.*?)```", re.DOTALL)
_OPENING = re.compile(r"^[ \t]*[\[{]", re.MULTILINE)
_MARK = re.compile(
    r"(?P<indent>[ \t]{0,40})(?:\*\*|__|#{1,6}[ \t])?"
    r"(?:(?:(?:task|instruction|prompt|question)[ \t]{1,4})?\(?(?P<number>\d{1,4})[.):]|[-*•‣–])"
    r"(?:\*\*|__)?(?:[ \t]+(?P<rest>.*)|$)",
    re.IGNORECASE,
)
_RULER = re.compile(r"[ \t]*(?:[-*_][ \t]*){3,}")
_FIELDS = ("instruction", "task", "prompt", "question", "text")


def columns_of(template: str) -> tuple[str, ...]:
    """Names of the columns in braces, in order, each once. Raises DataError as `fill` for a template that is none."""
    return tuple(dict.fromkeys(name for _, name in _pieces(template) if name is not None))


def fill(template: str, row: Mapping[str, object]) -> str:
    """The template with every {column} replaced by the row's cell.

    `{{` and `}}` are braces; those within a cell are left alone. Text stands as it is, anything else as JSON.

    Raises:
        DataError: a brace stands alone, braces hold no plain name, or the row has no such column or nothing in it.
    """
    parts = []
    for literal, name in _pieces(template):
        parts.append(literal)
        if name is not None:
            parts.append(_cell(name, row))
    return "".join(parts)


def instruct_prompt(examples: Sequence[str], wanted: int) -> str:
    """What a teacher is asked, to write `wanted` tasks after the manner of the examples.

    Wang et al. (2022), arXiv:2212.10560, sec. 2.2; the words are our own.
    """
    listed = "\n".join(f"{number}. {text.strip()}" for number, text in enumerate(examples, 1))
    return _INSTRUCT.format(count=len(examples), examples=listed, wanted=wanted)


def read_instructions(answer: str) -> list[str]:
    """The tasks in an answer, each once: of a JSON list, of a numbered list, or of one with bullets; [] where none is.

    What stands before the list and after it is left out. An entry goes on over lines that begin no entry of its own
    level, and ends where an empty line is followed by text that is not indented.
    """
    text = mend(answer[:LONGEST_ANSWER])
    listed = _from_json(text)
    found = _from_lines(text) if listed is None else listed
    tasks = (_tidy(entry) for entry in found)
    return list(dict.fromkeys(task for task in tasks if 0 < len(task) <= LONGEST_TASK))


def evolve_prompt(task: str, operation: str) -> str:
    """What a teacher is asked, to turn a task into another by one of `OPERATIONS`."""
    return _EVOLVE.format(task=task, change=OPERATIONS[operation])


def read_task(answer: str) -> str:
    """The task in an answer to `evolve_prompt`: what stands between the marks, or all of it where there are none."""
    text = mend(answer[:LONGEST_ANSWER]).strip()
    opened, mark, rest = text.partition("<task>")
    return _tidy((rest if mark else _LABEL.sub("", opened, count=1)).partition("</task>")[0])


def fault_of(task: str, original: str) -> str:
    """Why a rewritten task is no use, in words; empty where nothing speaks against it (arXiv:2304.12244, sec. 3.3)."""
    if not task:
        return "nothing was written"
    if " ".join(task.casefold().split()) == " ".join(original.casefold().split()):
        return "it equals the original"
    if _REFUSAL.match(task) and not _REFUSAL.match(original):
        return "the teacher refuses"
    if any(words in task.casefold() and words not in original.casefold() for words in _OWN_WORDS):
        return "it holds the words of the request"
    if len(task) > max(LONGEST_TASK, 3 * len(original)):
        return "it is too long"
    return ""


def _pieces(template: str) -> Iterator[tuple[str, str | None]]:
    """Literal text, and the name that follows it in braces or None."""
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise DataError(
            f"{KEY}: {_short(template)} cannot be read ({error}). Write a column in braces, and {{{{ for a brace."
        ) from None
    for literal, name, form, conversion in parsed:
        if name == "" or form or conversion:
            raise DataError(
                f"{KEY}: {_short(template)} has braces that hold no plain column name. Write {{name}}, without "
                "formats, and {{ for a brace."
            )
        yield literal, name


def _cell(name: str, row: Mapping[str, object]) -> str:
    if name not in row:
        listing = ", ".join(list(row)[:20]) + (", ..." if len(row) > 20 else "")
        raise DataError(
            f"{KEY}: the row has no column {name!r}; its columns are: {listing or 'none'}. Name one of them, or write "
            "{{ for a brace."
        )
    cell = row[name]
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        raise DataError(f"{KEY}: the row has nothing in column {name!r}. Fill it, or leave the row out.")
    return cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False, default=str)


def _short(template: str) -> str:
    return repr(template if len(template) <= 60 else f"{template[:60]}...")


def _from_json(text: str) -> list[str] | None:
    """The texts of a JSON list, bare or fenced, also within an object; None where the answer is no such list."""
    fenced = _FENCE.search(text)
    body = fenced[1] if fenced and _OPENING.match(fenced[1]) else text
    opening = _OPENING.search(body)
    if opening is None or any(_MARK.fullmatch(line) for line in body[: opening.start()].splitlines()):
        return None
    try:
        value, _ = json.JSONDecoder().raw_decode(body, opening.end() - 1)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        value = next((part for part in value.values() if isinstance(part, list)), None)
    entries = [entry for entry in map(_entry, value) if entry] if isinstance(value, list) else []
    return entries or None


def _entry(value: object) -> str:
    if isinstance(value, dict):
        value = next((value[name] for name in _FIELDS if isinstance(value.get(name), str)), None)
    return value if isinstance(value, str) else ""


def _from_lines(text: str) -> list[str]:
    """Entries of the first list; one of another kind, or further in, belongs to the entry in which it stands."""
    entries: list[list[str]] = []
    numbered, depth, open_, blank = False, 0, False, False
    for line in text.splitlines():
        if _RULER.fullmatch(line):
            blank = True
            continue
        mark = _MARK.fullmatch(line)
        if mark and not entries:
            numbered, depth = mark["number"] is not None, len(mark["indent"])
        if mark and (mark["number"] is not None) == numbered and len(mark["indent"]) <= depth + 1:
            entries.append([mark["rest"] or ""])
            open_ = True
        elif open_ and blank and line[:1].strip() and not mark and any(map(str.strip, entries[-1])):
            open_ = False
        elif open_:
            entries[-1].append(line.strip() if not mark else line)
        blank = not line.strip()
    return ["\n".join(lines) for lines in entries]


def _tidy(entry: str) -> str:
    """Without fences, quotes and emphasis around all of it."""
    text = entry.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text.partition("\n")[2][:-3].strip()
    if text.count("**") % 2:
        text = text.replace("**", "", 1).strip()
    for opened, closed in (("**", "**"), ('"', '"'), ("“", "”")):
        inner = text[len(opened) : len(text) - len(closed)]
        if len(text) > 2 * len(opened) and text.startswith(opened) and text.endswith(closed) and opened not in inner:
            text = inner.strip()
    return text
