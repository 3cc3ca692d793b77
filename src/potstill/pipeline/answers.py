"""The stage capture of tasks over texts: the teacher answers every text once; and its answers, read back.

Answers are kept in a store under a key of the text's content and of what else an answer depends on, not of its tokens:
teacher and student may have different tokenizers. A model is asked about training and validation texts; an API also
about the test texts, first of all, so that a budget is not spent without them. Refuses to ask again what the store
knows.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue

from potstill.data import LabelledText, Split
from potstill.engines import EnsembleEngine
from potstill.engines.local import load_config
from potstill.errors import Interrupted, StoreError
from potstill.pipeline import build
from potstill.pipeline.cast import Cast, cast_of
from potstill.pipeline.features import FeatureReader, Features, capture_features, features_of
from potstill.pipeline.labelling import ask_labels, question_of
from potstill.pipeline.lessons import Inputs
from potstill.pipeline.memory import release_memory
from potstill.pipeline.objective import Answers, build_objective, wants_of
from potstill.pipeline.places import STUDENT
from potstill.pipeline.progress import Meter, metered
from potstill.pipeline.recall import FEATURES, PLAN, cache_folder, place_for, stamp_for
from potstill.pipeline.rows import batches_by_length
from potstill.pipeline.rundir import RunDir, Stage
from potstill.pipeline.stopping import Stopping
from potstill.pipeline.texts import open_texts
from potstill.recipes import Recipe
from potstill.recipes.schema import MixtureTeacher, OpenAITeacher, StoredSignals
from potstill.recipes.signals import DenseSignals
from potstill.signals import Encoding, SignalSpec, Store, encoding_of, open_store, reopen_store
from potstill.types import Batch, Logits, Reader, Role, Signal, Wants

__all__ = ["AnswerReader", "capture_answers", "draw_test_texts", "open_answers", "read_answers"]

SPLITS: tuple[Split, ...] = ("train", "validation")
"""Whose texts the teacher is asked about: the test texts it answers in the evaluation, where it is also timed."""

COMMITTED_TEXTS = 2048
"""Texts whose answers are committed together."""

UNANSWERED = "unanswered.npy"
"""Keys of the texts to which an API gave no answer: uint8 [texts, 16]."""


class AnswerReader:
    """What a store knows of texts, as a teacher: a `Reader` that runs no model."""

    def __init__(
        self,
        store: Store,
        encoding: Encoding,
        salt: bytes,
        *,
        vectors: bool = False,
        unanswered: frozenset[bytes] = frozenset(),
    ) -> None:
        """`salt` as when the answers were kept; `vectors` says that an answer is a vector, not scores of classes.

        `unanswered` are the keys of answers that the teacher was asked for in vain.
        """
        self._store, self._encoding, self._salt, self._vectors = store, encoding, salt, vectors
        self._unanswered = unanswered

    @property
    def has_gaps(self) -> bool:
        """Whether the teacher gave no answer to some texts: batches are to be marked before they are read."""
        return bool(self._unanswered)

    def mark(self, batch: Batch) -> Batch:
        """The batch in which the teacher does not speak of texts to which it gave no answer."""
        if batch.taught_BT is None:
            return batch
        silent = [salted(key, self._salt) in self._unanswered for key in batch.keys]
        silent_B1 = torch.tensor(silent, device=batch.taught_BT.device)[:, None]
        return replace(batch, taught_BT=batch.taught_BT & ~silent_B1)

    def read(self, batch: Batch, wants: Wants) -> Signal:
        """What the teacher answered, at the positions where it speaks, in batch order.

        Raises StoreError where an answer is not there or is damaged, or was given to fewer words than the batch has,
        ValueError for what lies behind answers, which is not kept.
        """
        if wants.layers or wants.attentions or wants.vectors:
            raise ValueError("hidden states and attention are not in a store of answers: ask the teacher itself.")
        taught_BT = batch.supervised_BT if batch.taught_BT is None else batch.taught_BT
        asked = [(row, count) for row, count in enumerate(taught_BT.sum(1).tolist()) if count]
        keys = [salted(batch.keys[row], self._salt) for row, _ in asked]
        absent = self._store.missing(keys)
        if absent:
            raise StoreError(
                f"signals.store: {self._store.place} lacks the answers to {len(absent)} of {len(keys)} texts of a "
                "batch. Run the same command again: what is missing is captured first."
            )
        found = self._store.read(keys)
        rows, start = [np.arange(0)], 0
        for (number, count), there in zip(asked, found.counts, strict=True):
            if there < count:
                raise StoreError(
                    f"signals.store: the teacher answered {there} of the {count} words of {batch.examples[number][0]}: "
                    "its tokenizer cuts the text earlier. Raise data.sequence_length."
                )
            rows.append(np.arange(start, start + count))
            start += int(there)
        said = self._encoding.unpack(found.records_NS[np.concatenate(rows)])
        if not isinstance(said, Logits):
            raise ValueError("answers are kept as numbers, one record each")
        here = said.to(batch.ids_BT.device)
        return Signal(pooled_BD=here.logits_NV) if self._vectors else Signal(here if wants.final else None)


def salted(key: bytes, salt: bytes) -> bytes:
    """The key of an answer, 16 bytes: of a text's content and of what else decides the answer."""
    return hashlib.blake2b(salt + key, digest_size=16).digest()


def read_answers(
    teacher: Any, cast: Cast, texts: Sequence[LabelledText], *, batch_tokens: int = 4096
) -> Iterator[tuple[list[int], list[NDArray[np.float32]]]]:
    """(numbers of some texts, their answers float32 [answers of the text, C]), the longest texts first.

    An answer is a row of scores of classes, or a vector. Texts too long for a model are cut, whatever the recipe says
    of the student's. Members of an ensemble read with their own tokenizers.
    """
    members = teacher.members if isinstance(teacher, EnsembleEngine) else (teacher,)
    uncut = replace(cast, overlong="truncate")
    tables = [uncut.tokenise(texts, member.tokenizer) for member in members]
    wants = Wants(pooled=True) if cast.role is Role.ENCODER else Wants(final=True)
    for numbers in batches_by_length(tables[0].lengths, batch_tokens):
        batches = [table.batch(numbers) for table in tables]
        said = teacher.read_many(batches, wants) if len(members) > 1 else teacher.read(batches[0], wants)
        rows = said.pooled_BD if cast.role is Role.ENCODER else said.logits.logits_NV
        counts = batches[0].spoken_BT.sum(1).tolist()
        yield numbers, [part.numpy() for part in rows.float().cpu().split(counts)]


def capture_answers(recipe: Recipe, stage: Stage, inputs: Inputs, stopping: Stopping) -> None:
    """Complete the store of what the teacher answers to the training and validation texts.

    Raises Interrupted, after all answers so far are stored, when somebody asks to stop.
    """
    book = _open(recipe, inputs)
    texts = _asked(inputs.prepared, book.salt)
    missing = book.store.missing(list(texts))
    began, tokens = time.monotonic(), 0
    told: dict[str, JsonValue] = {}
    if isinstance(recipe.teacher, OpenAITeacher):
        with stopping.held():
            told = _ask_api(recipe, inputs, book, missing, stage=stage, stopping=stopping)
    elif missing:
        teacher = build.build_teacher(recipe, inputs.prepared)
        with metered("capture", len(missing), "texts") as meter, stopping.held():
            tokens = _take_down(book, teacher, [(key, texts[key]) for key in missing], meter=meter, stopping=stopping)
        del teacher
        release_memory()
    behind = _capture_behind(recipe, inputs, book, stage.folder, stopping=stopping)
    left = frozenset(book.store.missing(list(texts)))
    if left and stopping.asked():
        stored = len(missing) - len(left)
        raise Interrupted(f"stopped after {stored} of {len(missing)} texts; the same command continues.")
    _keep_plan(stage.folder / PLAN, [key for key in texts if key not in left], set(missing))
    if told:
        np.save(stage.folder / UNANSWERED, np.frombuffer(b"".join(sorted(left)), np.uint8).reshape(-1, 16))
    facts = _facts(
        book, len(texts) - len(left), len(missing) - len(left), tokens=tokens, seconds=time.monotonic() - began
    )
    stage.finish(PLAN, *([FEATURES] if behind else []), *([UNANSWERED] if told else []), **facts, **behind, **told)


def open_answers(recipe: Recipe, inputs: Inputs) -> Reader:
    """The stores that a finished capture filled, as a teacher. Raises StoreError where one is gone or of another."""
    captured = cast(Path, inputs.captured)
    facts: Any = RunDir(captured.parent).manifest(captured.name).facts
    store, spec = reopen_store(facts["store"], cache=cache_folder()), SignalSpec.from_json(facts["spec"])
    vectors, salt = Role(recipe.task.kind) is Role.ENCODER, bytes.fromhex(facts["salt"])
    unanswered = frozenset[bytes]()
    if isinstance(recipe.teacher, OpenAITeacher):
        unanswered = frozenset(key.tobytes() for key in np.load(captured / UNANSWERED))
    answers = AnswerReader(store, encoding_of(spec), salt, vectors=vectors, unanswered=unanswered)
    features = _features(recipe, inputs) if "features" in facts else None
    if features is None:
        return answers
    behind = reopen_store(facts["features"], cache=cache_folder())
    return FeatureReader(answers, behind, features, salt=bytes.fromhex(facts["feature_salt"]), pools=not vectors)


def _features(recipe: Recipe, inputs: Inputs) -> Features | None:
    """What behind the answers the student's losses compare with; None where that is not kept, or nothing."""
    if not (isinstance(recipe.signals, DenseSignals) and recipe.signals.features):
        return None
    student, teacher = load_config(str(inputs.initial / STUDENT), "student"), build.teacher_config(recipe)
    objective = build_objective(recipe.losses, Answers.of(recipe, inputs.vocabulary), student, teacher)
    wants = wants_of(objective)
    return features_of(teacher, replace(wants, pooled=wants.pooled and Role(recipe.task.kind) is not Role.ENCODER))


def _capture_behind(
    recipe: Recipe, inputs: Inputs, book: _Book, folder: Path, *, stopping: Stopping
) -> dict[str, JsonValue]:
    """Complete the store of what lies behind the answers, where that is to be kept; returns what is to be told."""
    features = _features(recipe, inputs)
    if features is None or stopping.asked():
        return {}
    spec = SignalSpec("hidden", inputs.vocabulary, width=features.numbers, dtype="bf16")
    stamp = stamp_for(recipe, spec)
    store = open_store(place_for(recipe, stamp), stamp, 2 * features.numbers, cache=cache_folder())
    salt = hashlib.blake2b(book.salt + repr(features).encode(), digest_size=16).digest()
    teacher = build.build_teacher(recipe, inputs.prepared)
    keys: list[bytes] = []
    for split in SPLITS:
        rows = book.cast.rows(inputs.prepared, split, teacher.tokenizer)
        with metered(f"capture features ({split})", len(rows), "texts") as meter, stopping.held():
            keys += capture_features(
                features,
                store,
                teacher,
                rows,
                salt=salt,
                batch_tokens=book.batch_tokens,
                meter=meter,
                stopping=stopping,
            )
    release_memory()
    left = len(store.missing(keys))
    if left:
        raise Interrupted(f"stopped with {left} texts to go; the same command continues.")
    with (folder / FEATURES).open("wb") as file:
        np.savez(file, keys=np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16))
    return {"features": store.place, "feature_bytes": store.num_bytes, "feature_salt": salt.hex()}


@dataclass(frozen=True, slots=True)
class _Book:
    """Where answers are written, in which form, and what goes into their keys."""

    store: Store
    encoding: Encoding
    cast: Cast
    salt: bytes
    batch_tokens: int


def _open(recipe: Recipe, inputs: Inputs) -> _Book:
    signals, cast = recipe.signals, cast_of(recipe, inputs.prepared)
    if not isinstance(signals, StoredSignals):
        raise ValueError("signals.kind=online keeps nothing: there is no store")
    spec = SignalSpec("dense", inputs.vocabulary)
    stamp = stamp_for(recipe, spec)
    said = repr(_question(recipe, cast))
    store = open_store(place_for(recipe, stamp), stamp, 4 * inputs.vocabulary, cache=cache_folder())
    salt = hashlib.blake2b(said.encode(), digest_size=16).digest()
    return _Book(store, encoding_of(spec), cast, salt, signals.batch_tokens)


def _question(recipe: Recipe, cast: Cast) -> object:
    """What besides the text decides an answer of this teacher."""
    if isinstance(recipe.teacher, OpenAITeacher):
        question = question_of(recipe, cast)
        return question, question.request(LabelledText("", ""))  # with its wording
    weights = [member.weight for member in recipe.teacher.members] if isinstance(recipe.teacher, MixtureTeacher) else []
    return cast.role, cast.labels, cast.multi_label, cast.pooling, cast.normalise, cast.length, weights


def draw_test_texts(recipe: Recipe, prepared: Path) -> tuple[list[LabelledText], int]:
    """The test texts that the evaluation asks about, drawn by the seed where it is limited; how many there are."""
    texts, most = open_texts(prepared, "test"), recipe.evaluation.max_documents
    chosen = sorted(np.random.default_rng(recipe.seed).permutation(len(texts))[:most].tolist())
    return [texts[place] for place in chosen], len(texts)


def _ask_api(
    recipe: Recipe, inputs: Inputs, book: _Book, missing: Sequence[bytes], *, stage: Stage, stopping: Stopping
) -> dict[str, JsonValue]:
    """Ask an API about what the store lacks, and about the test texts; returns what is to be told of it."""
    test, lacking = draw_test_texts(recipe, inputs.prepared)[0], frozenset(missing)
    split_texts = {split: _asked(inputs.prepared, book.salt, (split,)) for split in SPLITS}
    found = {split: [key for key in texts if key in lacking] for split, texts in split_texts.items()}
    asked: Mapping[Split, Sequence[LabelledText]] = {
        "test": test,
        "validation": [split_texts["validation"][key] for key in found["validation"]],
        # By their keys, which say nothing of them: files are often sorted by class, and a budget may end midway.
        "train": [split_texts["train"][key] for key in sorted(found["train"])],
    }
    totals: Mapping[Split, int] = {"test": len(test), **{split: len(texts) for split, texts in split_texts.items()}}
    with book.store.writer() as writer:

        def keep(text: LabelledText, scores_C: NDArray[np.float32]) -> None:
            if (key := salted(text.key, book.salt)) in lacking:
                writer.append(key, _records(book, scores_C[None]))

        told = ask_labels(recipe, book.cast, asked, totals, keep=keep, stage=stage.folder.name, stopping=stopping)
        writer.commit()
    book.store.refresh()
    return told


def _records(book: _Book, answer_NC: NDArray[np.float32]) -> NDArray[np.uint8]:
    selected = book.encoding.select(torch.from_numpy(answer_NC), torch.zeros(len(answer_NC), 0))
    return book.encoding.pack(selected)


def _asked(prepared: Path, salt: bytes, splits: Sequence[Split] = SPLITS) -> dict[bytes, LabelledText]:
    """The texts that training and validation will ask about, each once, by the key of its answer."""
    texts = [text for split in splits for text in open_texts(prepared, split)]
    return {salted(text.key, salt): text for text in texts if text.origin is None}


def _take_down(
    book: _Book, teacher: Any, texts: Sequence[tuple[bytes, LabelledText]], *, meter: Meter, stopping: Stopping
) -> int:
    """Ask the teacher about these texts and keep what it answers; returns how many it read."""
    tokens = 0
    with book.store.writer() as writer:
        for start in range(0, len(texts), COMMITTED_TEXTS):
            window = texts[start : start + COMMITTED_TEXTS]
            told = read_answers(teacher, book.cast, [text for _, text in window], batch_tokens=book.batch_tokens)
            for numbers, answers in told:
                for number, answer_NC in zip(numbers, answers, strict=True):
                    writer.append(window[number][0], _records(book, answer_NC))
                meter.advance(len(numbers))
                tokens += len(numbers)
            writer.commit()
            if stopping.asked():
                break
    book.store.refresh()
    return tokens


def _keep_plan(path: Path, keys: Sequence[bytes], missing: set[bytes]) -> None:
    """What the capture was about, so that a store that lost some of it is noticed."""
    with path.open("wb") as file:
        keys_P16 = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
        np.savez(file, keys=keys_P16, planned=np.array([key in missing for key in keys], np.bool_))


def _facts(book: _Book, pieces: int, captured: int, *, tokens: int, seconds: float) -> dict[str, JsonValue]:
    """What the report tells of the store, and what it takes to open it again."""
    return {
        "store": book.store.place,
        "pieces": pieces,
        "captured": captured,
        "positions": pieces,
        "stored_positions": book.store.num_records,
        "stored_bytes": book.store.num_bytes,
        "read_tokens": tokens,
        "capture_seconds": round(seconds, 3),
        "quarantined": asdict(book.store.quarantined),
        "stride": book.encoding.stride,
        "spec": book.encoding.spec.to_json(),
        "fidelity": None,
        "salt": book.salt.hex(),
    }
