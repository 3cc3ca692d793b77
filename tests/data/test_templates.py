"""Laws of templates, and of reading tasks out of what a teacher wrote."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.data.templates import (
    OPERATIONS,
    columns_of,
    evolve_prompt,
    fault_of,
    fill,
    instruct_prompt,
    read_instructions,
    read_task,
)
from potstill.errors import DataError

words = st.text(min_size=1).filter(str.strip)
plain = st.from_regex(r"[A-Za-z]{2,8}( [a-z]{2,8}){1,5}", fullmatch=True)


@given(cell=words, before=words, after=words)
def test_a_cell_stands_in_the_prompt_as_it_is_whatever_it_holds(cell, before, after):
    def literal(text):
        return text.replace("{", "{{").replace("}", "}}")

    filled = fill(f"{literal(before)}{{cell}}{literal(after)}", {"cell": cell})
    assert filled == before + cell + after


def test_what_is_not_text_stands_as_json():
    row = {"n": 3, "yes": True, "list": ["a", 1], "deep": {"k": "ü"}}
    assert fill("{n} {yes} {list} {deep}", row) == '3 true ["a", 1] {"k": "ü"}'


def test_columns_are_named_in_order_and_once():
    assert columns_of("{b} {{no}} {a} {b} {two words}") == ("b", "a", "two words")


@pytest.mark.parametrize(
    ("template", "row", "says"),
    [
        ("{question}", {"text": "x", "answer": "y"}, r"no column 'question'; its columns are: text, answer\. Name one"),
        ("{question}", {}, "its columns are: none"),
        ("{question}", {"question": None}, "nothing in column 'question'"),
        ("{question}", {"question": float("nan")}, "nothing in column"),
        ("{question", {"question": "x"}, "cannot be read"),
        ("question}", {"question": "x"}, "cannot be read"),
        ("{}", {"": "x"}, "hold no plain column name"),
        ("{n:>10}", {"n": 1}, "hold no plain column name"),
        ("{n!r}", {"n": 1}, "hold no plain column name"),
        ("{row.__class__}", {"row": 1}, "no column 'row.__class__'"),
        ("{row[0]}", {"row": [1]}, r"no column 'row\[0\]'"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused_in_one_line(template, row, says):
    with pytest.raises(DataError, match=says) as caught:
        fill(template, row)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("generate.prompts.template: ")


def test_a_request_for_tasks_shows_every_example_and_says_how_many():
    asked = instruct_prompt(["Add 2 {and} 3.", "Name a bird."], 7)
    assert "1. Add 2 {and} 3.\n2. Name a bird." in asked
    assert "7 further tasks" in asked


@given(
    st.lists(plain, min_size=1, max_size=9, unique=True),
    st.sampled_from(["{}. ", "{}) ", "({}) ", "**{}.** ", "Task {}: "]),
)
@settings(max_examples=40)
def test_a_numbered_list_is_read_back_whatever_its_marks(tasks, mark):
    listed = "\n".join(mark.format(number) + task for number, task in enumerate(tasks, 1))
    for answer in (listed, f"Sure! Here they are:\n\n{listed}\n\nShall I write more?"):
        assert read_instructions(answer) == tasks


@given(st.lists(plain, min_size=1, max_size=9, unique=True))
@settings(max_examples=40)
def test_bullets_and_json_are_read_back(tasks):
    for mark in "-*•":
        assert read_instructions("\n".join(f"{mark} {task}" for task in tasks)) == tasks
    bare = json.dumps(tasks, indent=1)
    objects = json.dumps([{"instruction": task, "input": ""} for task in tasks])
    for answer in (bare, f"```json\n{bare}\n```", f"Here:\n{objects}\nDone.", json.dumps({"tasks": tasks})):
        assert read_instructions(answer) == tasks


@pytest.mark.parametrize(
    ("answer", "tasks"),
    [
        ("", []),
        ("I cannot help with that.", []),
        ("1. Same.\n2. Same.", ["Same."]),
        ("1. Sort:\n   - apples\n   - pears\n2. Name a bird.", ["Sort:\n   - apples\n   - pears", "Name a bird."]),
        ("1. Read this.\n\n   Then sum it up.\n2. Next one.", ["Read this.\n\nThen sum it up.", "Next one."]),
        ("Task 1:\nWrite a poem.\n\nTask 2:\nAdd two.", ["Write a poem.", "Add two."]),
        ('1. Sort ["b", "a"].\n2. Name a bird.', ['Sort ["b", "a"].', "Name a bird."]),
        ('1. "Name a bird."', ["Name a bird."]),
        ("**1. Poem**\nWrite one.", ["Poem\nWrite one."]),
        ("- - -\n---\n***\n" + "-" * 100_000, []),
        ("1. Name a bird.\n\n---\n\n2. Name a fish.\n***\nDone.", ["Name a bird.", "Name a fish."]),
        ("3.14 is pi\n2.72 is e", []),
        ("[" * 100_000, []),
        ("[1, 2, 3]", []),
        ('{"instruction": 3}', []),
        ("1. a\x00b\ud800c", ["ab\ufffdc"]),
        ("1. " + "x" * 5000 + "\n2. Name a bird.", ["Name a bird."]),
        ("1. One.\r\n2. Two.\r\n", ["One.", "Two."]),
    ],
)  # fmt: skip
def test_hostile_answers_give_their_tasks_and_nothing_else(answer, tasks):
    assert read_instructions(answer) == tasks


@given(st.text())
def test_no_answer_breaks_the_reader(answer):
    for task in read_instructions(answer):
        assert task == task.strip() != ""
    assert read_task(answer) == read_task(answer).strip()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_request_to_rewrite_holds_the_task_and_an_echo_of_it_is_no_task(operation):
    asked = evolve_prompt("Name {a} bird.", operation)
    assert "<task>\nName {a} bird.\n</task>" in asked
    assert OPERATIONS[operation] in asked
    assert fault_of(asked, "Name {a} bird.") == "it holds the words of the request"


@pytest.mark.parametrize(
    ("answer", "task"),
    [
        ("<task>\nName two birds.\n</task>", "Name two birds."),
        ("Sure.\n<task>Name two birds.</task>\nGlad to help!", "Name two birds."),
        ("<task>Name two birds.", "Name two birds."),
        ("Name two birds.</task>", "Name two birds."),
        ("New task: Name two birds.", "Name two birds."),
        ('"Name two birds."', "Name two birds."),
        ("```text\nName two birds.\n```", "Name two birds."),
        ("Name two birds.", "Name two birds."),
        ("", ""),
    ],
)
def test_the_task_is_found_in_the_answer(answer, task):
    assert read_task(answer) == task


@pytest.mark.parametrize(
    ("task", "fault"),
    [
        ("Name two birds that swim.", ""),
        ("", "nothing was written"),
        ("name  A bird.", "it equals the original"),
        ("I'm sorry, but I cannot do that.", "the teacher refuses"),
        ("I’m unable to rewrite this.", "the teacher refuses"),
        ("As an AI model I have no birds.", "the teacher refuses"),
        ("Name a bird. <task>", "it holds the words of the request"),
        ("Name a bird " * 500, "it is too long"),
    ],
)
def test_a_rewritten_task_that_is_no_use_is_told_why(task, fault):
    assert fault_of(task, "Name a bird.") == fault


def test_what_the_original_says_too_is_no_fault():
    assert fault_of("Sorry is hard to say: write that, twice.", "Sorry is hard to say: write that.") == ""
    assert fault_of("What does <task> mean in XML, and why?", "What does <task> mean in XML?") == ""
    assert re.match("it is too long", fault_of("x" * 4001, "y"))
    assert fault_of("x" * 9000, "y" * 3500) == ""


@pytest.mark.parametrize(
    "answer",
    ["1. " + "x\n" * 300_000 + "\n\ny" * 100_000, "```\n" * 200_000, "* " * 400_000, "[" + "{" * 400_000,
     "<task>" * 150_000],
    ids=["paragraphs", "fences", "bullets", "braces", "marks"],
)  # fmt: skip
def test_a_long_answer_is_read_in_linear_time(answer):
    begun = time.process_time()
    read_instructions(answer)
    fault_of(read_task(answer), "Name a bird.")
    assert time.process_time() - begun < 5.0
