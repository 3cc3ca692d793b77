from __future__ import annotations

import pytest

from potstill.errors import DataError
from potstill.verify import math_verifier, verify_all

pytest.importorskip("math_verify", reason="math-verify is an extra")


@pytest.fixture(scope="module")
def verifier():
    with math_verifier(timeout_s=5.0) as made:
        yield made


EQUAL = [
    ("The answer is 42.", "#### 42"),
    ("so we get \\boxed{\\frac{1}{2}}", "0.5"),
    ("so we get \\boxed{0.5}", "\\frac{1}{2}"),
    ("$\\{1, 2\\}$", "\\{2, 1\\}"),
    ("$[0,1)$", "[0,1)"),
    ("answer: 5 cm", "5 cm"),
    ("\\boxed{1,234}", "1234"),
    ("\\boxed{50\\%}", "0.5"),
    ("\\boxed{(x+1)^2}", "x^2+2x+1"),
    ("a word", "a word"),
    ("It costs $18", "$18"),
    ("Step 1: \\boxed{3}. Wait, that is wrong.\n\nIt is 3 + 1, so the answer is \\boxed{4}.", "Step 1: 3.\n#### 4"),
]
OTHER = [
    ("The answer is 41.", "#### 42"),
    ("$(0,1)$", "[0,1)"),
    ("\\boxed{1}", "x^2+1"),
    ("I do not know", "7"),
    ("", "7"),
    ("\\boxed{}", "7"),
]


@pytest.mark.parametrize(("answer", "gold"), EQUAL)
def test_what_is_equal_is_right(verifier, answer, gold):
    assert verifier(answer, {"answer": gold}).right is True


@pytest.mark.parametrize(("answer", "gold"), OTHER)
def test_what_is_not_is_wrong(verifier, answer, gold):
    assert verifier(answer, {"answer": gold}).right is False


def test_what_explodes_is_unknown_and_the_next_one_is_judged():
    with math_verifier(timeout_s=1.0) as verifier:
        answers = ["\\boxed{10^{10^{10^{10}}}}", "\\boxed{100000000!}", "\\boxed{" + "(" * 3000 + "}", "\\boxed{7}"]
        verdicts = list(verify_all(verifier, ((text, {"answer": "7"}) for text in answers)))
    assert verdicts[-1].right is True
    assert [verdict.right for verdict in verdicts[:2]] == [None, None]
    assert verdicts[2].right is not True


def test_long_answers_are_read_from_their_end(verifier):
    assert verifier("9" * 1_000_000 + " and so the answer is \\boxed{3}", {"answer": "3"}).right is True


def test_a_number_as_gold_and_the_answer_extracted(verifier):
    verdict = verifier("The answer is 42.", {"answer": 42})
    assert (verdict.right, verdict.extracted) == (True, "42")


def test_a_row_without_an_answer_is_named(verifier):
    with pytest.raises(DataError, match=r"verify.answer: row r1 has nothing in the column 'answer'; it has id, gold"):
        verifier("3", {"id": "r1", "gold": "3"})
