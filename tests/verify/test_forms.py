"""Labels, patterns, JSON, the user's function, reasoning-gym, code: what each takes for right."""

from __future__ import annotations

import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.errors import DataError, RecipeError, RunError
from potstill.verify import (
    Verdict,
    Verifier,
    code_verifier,
    function_verifier,
    gym_verifier,
    label_verifier,
    pattern_verifier,
    schema_verifier,
    verify_all,
)
from potstill.verify.extract import final_answer, last_block
from potstill.verify.schema import read_json


def test_a_label_counts_without_case_quotes_and_full_stop_and_two_labels_do_not():
    verifier = label_verifier(labels=["Positive", "Very negative"], answer="gold")
    row = {"gold": "positive"}
    said = {"positive.": True, " **Positive**\n": True, "positive, very negative": False, "very negative": False}
    assert {text: verifier(text, row).right for text in said} == said
    assert verifier("", row).right is False


def test_labels_that_look_alike_and_rows_with_other_labels_are_refused():
    with pytest.raises(RecipeError, match=r"'yes\.' cannot be told from 'Yes'"):
        label_verifier(labels=["Yes", "yes."])
    with pytest.raises(DataError, match="'maybe', which is not one of yes, no"):
        label_verifier(labels=["yes", "no"], answer="gold")("yes", {"gold": "maybe"})


def test_a_pattern_must_fit_the_whole_answer_and_one_that_never_ends_is_unknown():
    with pattern_verifier(pattern=r"(a+)+", timeout_s=0.5) as verifier:
        assert [verifier(text, {}).right for text in (" aaa\n", "aab", "")] == [True, False, False]
        assert verifier("a" * 64 + "b", {}).right is None
        assert verifier("a", {}).right is True
    with pytest.raises(RecipeError, match=r"verify.pattern: '\(' is no regular expression"):
        pattern_verifier(pattern="(")


SCHEMA = {
    "type": "object",
    "required": ["n"],
    "properties": {"n": {"$ref": "#/$defs/count"}, "s": {"pattern": "^(a+)+$"}},
    "$defs": {"count": {"type": "integer", "minimum": 0}},
}


def test_json_must_fit_the_schema_and_mean_one_thing():
    pytest.importorskip("jsonschema", reason="jsonschema is an extra")
    texts = {
        '{"n": 1}': True,
        'Here:\n```json\n{"n": 1}\n```\nDone.': True,
        '{"n": -1}': False,
        '{"n": 1, "n": 2}': False,
        '{"n": NaN}': False,
        '{"n": 1e999}': False,
        "{'n': 1}": False,
        "[" * 100_000: False,
        '{"n": 1, "s": "' + "a" * 64 + 'b"}': None,
        '{"n": 2}': True,
    }
    with schema_verifier(schema=SCHEMA, timeout_s=1.0) as verifier:
        assert {text: verifier(text, {}).right for text in texts} == texts


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"$ref": "https://example.org/schema.json"}, "refers to https://example.org/schema.json"),
        ({"$ref": "#/$defs/none"}, "refers to #/.defs/none"),
        ({"type": "text"}, r"\$.type: 'text' is not valid"),
    ],
)
def test_a_schema_that_is_none_or_points_elsewhere_is_refused(schema, words):
    pytest.importorskip("jsonschema", reason="jsonschema is an extra")
    with pytest.raises(RecipeError, match=words):
        schema_verifier(schema=schema)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)
    )
)
def test_json_is_read_as_it_was_written(value):
    import json

    assert read_json(json.dumps(value)) == value


FUNCTION = """
    import sys, time
    def right(answer, row):
        if answer == "raise": raise KeyError("here")
        if answer == "sleep": time.sleep(60)
        if answer == "odd": return "yes"
        if answer == "leave": sys.exit(0)
        return {"yes": True, "no": False}.get(answer)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(FUNCTION), encoding="utf-8")
    return str(path)


def test_the_users_function_says_and_what_it_cannot_is_unknown(file):
    answers = {"yes": True, "no": False, "?": None, "raise": None, "odd": None, "leave": None, "sleep": None}
    with function_verifier(file=file, timeout_s=1.0) as verifier:
        assert {answer: verifier(answer, {}).right for answer in answers} == answers


@pytest.mark.parametrize(("answer", "words"), [("raise", "mine.py:4: KeyError: 'here'"), ("odd", "needs True, False")])
def test_a_function_that_fails_at_the_first_row_is_an_error(file, answer, words):
    with function_verifier(file=file, timeout_s=5.0) as verifier, pytest.raises(RecipeError, match=words):
        verifier(answer, {})


def test_files_without_the_function_are_refused(file, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("x = (\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"verify.name: .* has no function 'wrong'"):
        function_verifier(file=file, name="wrong")
    with pytest.raises(RecipeError, match=r"verify.file: .* is not there"):
        function_verifier(file=str(tmp_path / "none.py"))
    with pytest.raises(RecipeError, match=r"verify.file: .*broken.py:1: SyntaxError"):
        function_verifier(file=str(broken))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("I think \\boxed{4} and \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("The answer is 3. Wait.\nThe answer is **7**.", "7"),
        ("Answer: `x`\nDone", "x"),
        ("The answer is:\n\n12", "12"),
        ("first\n4 + 3: 7\n", "7"),
        ("at 10:30", "at 10:30"),
        ("just\n\nthis.\n", "this"),
        ("", ""),
        ("\\boxed{never closed", "\\boxed{never closed"),
    ],
)
def test_the_final_answer_is_found(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na\n```\n```python\nb\n```", "b\n"),
        ("```\na\n```", "a\n"),
        ("```js\na\n```", "```js\na\n```"),
        ("a", "a"),
        ("```python\nnever closed", "never closed"),
        ("````py\n```\nx\n```\n````", "```\nx\n```\n"),
        ("```\na\n```\n```\nb\n```", "```\na\n```\n```\nb\n```"),
    ],
)
def test_the_last_block_of_the_language_is_the_code(text, code):
    assert last_block(text, ("python", "py")) == code


def test_reasoning_gym_scores_its_own_problems():
    gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym is an extra")
    problem = gym.create_dataset("chain_sum", size=1, seed=1)[0]
    with gym_verifier(task="chain_sum", settings={}) as verifier:
        right = verifier(f"Adding up.\nThe answer is {problem['answer']}.", {"entry": problem})
        assert (right.right, right.score, right.extracted) == (True, 1.0, problem["answer"])
        assert verifier("The answer is 123456.", {"entry": problem}).right is False
        assert verifier("", {"entry": problem}).reason == "no answer found"
        with pytest.raises(DataError, match="no problem of reasoning-gym"):
            verifier("1", {"entry": {"question": "1"}})


def test_unknown_tasks_and_patterns_without_a_group_are_refused():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is an extra")
    with pytest.raises(RecipeError, match="has no task 'sums'"):
        gym_verifier(task="sums", settings={})
    with pytest.raises(RecipeError, match="has no group"):
        gym_verifier(task="chain_sum", settings={}, pattern="a")


def test_code_is_right_when_the_rows_tests_run_to_their_end():
    try:
        verifier = code_verifier(timeout_s=5.0)
    except RunError as error:
        pytest.skip(f"no sandbox for this user on this machine: {error}")
    row = {"tests": "assert double(2) == 4"}
    assert verifier("Like so:\n```python\ndef double(x): return 2 * x\n```", row) == Verdict(
        True, extracted="def double(x): return 2 * x\n"
    )
    wrong = verifier("def double(x): return x", row)
    assert (wrong.right, wrong.reason) == (False, "AssertionError")
    assert verifier("import os; os._exit(0)", row).right is False
    assert verifier("", {"tests": "assert ("}).right is None
    assert verifier("", {"tests": " "}).right is None
    with pytest.raises(DataError, match="'tests'"):
        verifier("", {})


@given(st.lists(st.booleans(), max_size=30), st.integers(1, 4))
def test_verdicts_come_in_the_order_of_the_answers(answers, workers):
    verifier = Verifier(lambda answer, row: Verdict(answer == "True", extracted=answer))
    given_ = [(str(value), {}) for value in answers]
    assert [verdict.right for verdict in verify_all(verifier, iter(given_), workers)] == answers


def test_several_callers_are_served_at_once():
    with pattern_verifier(pattern="[0-9]*[02468]") as verifier, ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda number: verifier(str(number), {}).right, range(60)))
    assert found == [number % 2 == 0 for number in range(60)]
