"""Laws of the scripted author."""

from __future__ import annotations

from potstill.engines.scripted import ScriptedAuthor
from potstill.types import Author, Completion, Request


def ask(author: Author, *texts: str, sample: int = 0) -> list[Completion | None]:
    return list(author.ask([Request(messages=({"role": "user", "content": text},), sample=sample) for text in texts]))


def test_answers_come_in_the_order_of_the_questions():
    author = ScriptedAuthor({"one?": "1", "two?": "2"})
    answers = ask(author, "two?", "one?", "three?")
    assert [answer and answer.text for answer in answers] == ["2", "1", None]
    assert len(author.asked) == 3


def test_samples_go_round_the_answers():
    author = ScriptedAuthor({"one?": ["a", "b"], "none?": []})
    assert [ask(author, "one?", sample=number)[0].text for number in range(5)] == ["a", "b", "a", "b", "a"]
    assert ask(author, "none?") == [None]


def test_a_function_is_asked_once_for_the_same_request():
    asked = []
    author = ScriptedAuthor(lambda request: asked.append(request) or Completion(f"answer {len(asked)}", model="me"))
    first, again = ask(author, "x", "x")
    assert (first, again) == (Completion("answer 1", model="me"),) * 2
    assert ask(author, "x", sample=1)[0].text == "answer 2"


def test_a_prompt_is_known_by_its_text():
    assert ScriptedAuthor({"Once": " upon"}).ask([Request(prompt="Once")])[0].text == " upon"
