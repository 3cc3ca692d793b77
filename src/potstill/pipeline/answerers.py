"""Who answers texts in the evaluation: every arm, from a raw text to its answer, as its user would have it answer.

Refuses to answer for a teacher that is not here: what was recorded is looked up, and an API asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from potstill.data import LabelledText
from potstill.engines import RecordedReader, models_of, pick_device
from potstill.errors import NonFiniteError
from potstill.pipeline import build
from potstill.pipeline.answers import read_answers
from potstill.pipeline.cast import Cast, cast_of
from potstill.pipeline.examine import Answerer
from potstill.pipeline.inspection import count_parameters
from potstill.pipeline.labelling import opened_labeller
from potstill.pipeline.memory import release_memory
from potstill.pipeline.places import resolve_model
from potstill.pipeline.progress import Meter
from potstill.pipeline.stopping import Stopping
from potstill.recipes import Recipe
from potstill.recipes.schema import OpenAITeacher, RecordedTeacher
from potstill.students import StaticAnswers, load_static
from potstill.types import IGNORE, Batch, Logits, Wants

__all__ = ["answering"]


def answering(
    recipe: Recipe, prepared: Path, arms: Mapping[str, Path]
) -> Callable[[str], AbstractContextManager[Answerer]]:
    """Opens the arm of a name: the teacher, or one of `arms`, model folders by arm."""

    @contextmanager
    def open_arm(arm: str) -> Iterator[Answerer]:
        task = cast_of(recipe, prepared)
        if arm == "static":
            yield _Static(arm, load_static(arms[arm]), [str(arms[arm])])
        elif arm == "teacher" and isinstance(recipe.teacher, RecordedTeacher):
            yield _Recorded(arm, build.open_recorded(recipe.teacher, task))
        elif arm == "teacher" and isinstance(recipe.teacher, OpenAITeacher):
            yield _Api(arm, recipe, task)
        else:
            yield _open_model(recipe, prepared, arm, arms.get(arm))
        release_memory()  # the next arm must not find it in memory

    return open_arm


def _open_model(recipe: Recipe, prepared: Path, arm: str, folder: Path | None) -> Answerer:
    """Every arm in the teacher's precision and on its device: speeds compare."""
    task = cast_of(recipe, prepared)
    if folder is None:
        places = [resolve_model(member.model, key) for key, member in build.teachers_of(recipe).items()]
        return _Model(arm, build.build_teacher(recipe, prepared), task, places)
    device = pick_device(recipe.teacher.device, "teacher.device")
    key = f"evaluate ({arm})"
    engine = build.build_engine(str(folder), recipe.teacher.dtype, device, key, cast=task)
    return _Model(arm, engine, task, [str(folder)])


@dataclass(frozen=True, slots=True)
class _Model:
    """One model, or an ensemble of several."""

    name: str
    engine: Any
    task: Cast
    places: Sequence[str]

    @property
    def parameters(self) -> int:
        """Weights of all its models, tied ones once."""
        return sum(map(count_parameters, models_of(self.engine)))

    def scores(self, texts: Sequence[LabelledText], meter: Meter | None = None) -> NDArray[np.float32]:
        """Scores of classes or vectors, one row an answer, in the order of the texts; NaN for words that were cut.

        Raises NonFiniteError where the model itself says NaN of a word, which would pass for one that was cut.
        """
        found: list[NDArray[np.float32]] = [np.empty((0, 0), np.float32)] * len(texts)
        for numbers, answers in read_answers(self.engine, self.task, texts):
            for number, answer_NC in zip(numbers, answers, strict=True):
                words = texts[number].text
                lost = len(words) - len(answer_NC) if isinstance(words, tuple) else 0
                if isinstance(words, tuple) and not np.isfinite(answer_NC).all():
                    raise NonFiniteError(
                        f"evaluation: the scores that {self.name} gives the words of {texts[number].id} are not "
                        "finite. Look at this text, or read the model in fp32."
                    )
                found[number] = np.pad(answer_NC, ((0, lost), (0, 0)), constant_values=np.nan)
            if meter:
                meter.advance(len(numbers))
        return np.concatenate(found)

    def cut(self, texts: Sequence[LabelledText]) -> int:
        """How many of these texts are longer than it reads, by the tokenizer that cuts most of them."""
        uncut = replace(self.task, overlong="truncate")
        return max(uncut.tokenise(texts, member.tokenizer).overlong_count for member in self._members)

    @property
    def _members(self) -> Sequence[Any]:
        members: Sequence[Any] = getattr(self.engine, "members", (self.engine,))
        return members

    @property
    def query(self) -> Callable[[Sequence[str]], object]:
        """From raw texts to answers, as with transformers alone: tokenise, pad, run."""
        return lambda texts: [_run(member, texts, self.task.length) for member in self._members]


@torch.inference_mode()
def _run(engine: Any, texts: Sequence[str], length: int) -> Any:
    model, tokenizer = engine.model, engine.tokenizer
    inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
    output = model(**inputs.to(model.device))
    answers = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return answers.cpu()


@dataclass(frozen=True, slots=True)
class _Static:
    """The static classifier."""

    name: str
    answers: StaticAnswers
    places: Sequence[str]

    @property
    def parameters(self) -> int:
        """Embeddings and the layer over them."""
        return count_parameters(self.answers.model)

    def scores(self, texts: Sequence[LabelledText], meter: Meter | None = None) -> NDArray[np.float32]:
        """Scores of classes [N, C]."""
        found: NDArray[np.float32] = self.answers.query([str(text.text) for text in texts]).numpy()
        if meter:
            meter.advance(len(texts))
        return found

    def cut(self, texts: Sequence[LabelledText]) -> int:  # noqa: ARG002
        """None: it reads texts whole, however long."""
        return 0

    @property
    def query(self) -> Callable[[Sequence[str]], object]:
        """From raw texts to scores."""
        return self.answers.query


@dataclass(frozen=True, slots=True)
class _Recorded:
    """Answers that were given elsewhere: nothing runs, so that there is no speed."""

    name: str
    reader: RecordedReader
    parameters: int = 0
    places: Sequence[str] = ()
    query: None = None

    def cut(self, texts: Sequence[LabelledText]) -> int:  # noqa: ARG002
        """None that is known of."""
        return 0

    def scores(self, texts: Sequence[LabelledText], meter: Meter | None = None) -> NDArray[np.float32]:
        """Log-probabilities of classes, one row an answer."""
        taught_B1 = torch.ones(len(texts), 1, dtype=torch.bool)
        batch = Batch(
            torch.zeros_like(taught_B1, dtype=torch.long),
            torch.full((len(texts), 1), IGNORE),
            taught_B1.long(),
            tuple((text.id,) for text in texts),
            taught_BT=taught_B1,
            keys=tuple(text.key for text in texts),
        )
        said = cast(Logits, self.reader.read(batch, Wants(final=True)).logits)
        found: NDArray[np.float32] = said.logits_NV.numpy()
        if meter:
            meter.advance(len(texts))
        return found


@dataclass(frozen=True, slots=True)
class _Api:
    """A teacher behind an API: it is asked what its ledger does not know, and not timed."""

    name: str
    recipe: Recipe
    task: Cast
    parameters: int = 0
    places: Sequence[str] = ()
    query: None = None

    def cut(self, texts: Sequence[LabelledText]) -> int:  # noqa: ARG002
        """None: it is sent texts whole."""
        return 0

    def scores(self, texts: Sequence[LabelledText], meter: Meter | None = None) -> NDArray[np.float32]:
        """Log-probabilities of classes, one row a text; NaN where it has no answer that can be used."""
        silent_C = np.full(len(self.task.labels), np.nan, np.float32)
        with opened_labeller(self.recipe, self.task, lambda _: None, Stopping()) as (labeller, _):
            answers = [silent_C if one is None else one.scores_C for one in labeller.label(texts)]
        if meter:
            meter.advance(len(texts))
        return np.stack(answers)
