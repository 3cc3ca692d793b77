"""From what a recipe says about signals to the store that keeps them: what is kept, of whom, where, and how it is read.

Refuses losses that what is kept cannot teach, before any teacher reads.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from zipfile import BadZipFile

import numpy as np
import platformdirs
from numpy.typing import NDArray

from potstill.engines import find_folder, load_tokenizer, shares_of
from potstill.errors import RecipeError, StoreError
from potstill.pipeline import build
from potstill.pipeline.chain import runs_folder
from potstill.pipeline.disk import hash_file
from potstill.pipeline.objective import fixed, need_of
from potstill.pipeline.places import resolve_model
from potstill.recipes import Recipe, fingerprint
from potstill.recipes.losses import CosineRamp, ForwardKL, LinearRamp, SoftTerm
from potstill.recipes.schema import MixtureTeacher, OpenAITeacher, RunTeacher, StoredSignals
from potstill.recipes.signals import DenseSignals, HiddenSignals, TopKSignals, TruncatedSignals
from potstill.signals import (
    Salt,
    SignalSpec,
    Stamp,
    Store,
    encoding_of,
    has_store,
    is_remote,
    open_store,
    reopen_store,
)
from potstill.signals.pieces import KEY_BYTES
from potstill.types import Offer

__all__ = [
    "FEATURES",
    "HEAD",
    "PLAN",
    "cache_folder",
    "check_signals",
    "check_store",
    "explain_store",
    "has_head",
    "load_plan",
    "place_for",
    "salt_for",
    "spec_for",
    "stamp_for",
    "temperature_of",
]

STRETCH_BYTES, STEP_BYTES, WHOLE_BYTES = 2**14, 2**18, 2**26
"""Of a large file of weights, a stretch in every step tells it from others: a change over more than a step shows."""

HEAD = "head.safetensors"
"""Name of the teacher's head among the files of a store of hidden states."""

FEATURES = "features.npz"
"""Keys of the texts behind whose answers something is kept."""

BEHIND = {
    "hidden": "hidden layers",
    "attention": "attention maps",
    "vectors": "queries, keys and values",
    "pooled": "vectors of whole texts",
}
"""What losses compare behind the answers, in words."""

PLAN = "plan.npz"
"""What a capture is about, and what of it was missing when it began."""


def check_signals(recipe: Recipe) -> None:
    """Raises RecipeError where the losses ask for what is not kept, or would be misled by it."""
    signals = recipe.signals
    if not isinstance(signals, StoredSignals):
        return
    terms = {index: term for index, term in enumerate(recipe.losses) if term.needs}
    if not terms:
        raise RecipeError(
            f"signals.kind: {signals.kind} keeps what the teacher says, but no loss compares with it. Leave signals "
            "out, or add a loss such as forward_kl."
        )
    over_vectors = recipe.task.kind == "embedding"
    for index, term in terms.items():
        if over_vectors and need_of(term) is Offer.POOLED:
            continue
        if isinstance(signals, DenseSignals) and signals.features and term.needs != "attention":
            continue
        if not isinstance(term, SoftTerm):
            raise RecipeError(
                f"losses[{index}].kind={term.kind} needs {BEHIND[str(term.needs)]}, which "
                f"signals.kind={signals.kind} does not keep. Use signals.kind=online, or remove this loss."
            )
    soft = {index: term for index, term in terms.items() if isinstance(term, SoftTerm)}
    if isinstance(signals, HiddenSignals) and isinstance(recipe.teacher, MixtureTeacher):
        raise RecipeError(
            "signals.kind: hidden keeps the states of one model, but teacher.kind=mixture has several. Use sampled or "
            "topk, or ask the teachers online."
        )
    if isinstance(recipe.teacher, MixtureTeacher):
        _check_mixture(soft)
    if isinstance(signals, TruncatedSignals):
        _check_temperatures(signals, soft)
        for index, term in soft.items():
            _check_form(signals, term, f"losses[{index}]")


def temperature_of(recipe: Recipe) -> float:
    """The temperature at which a truncated list is read: that of the losses. 1 where what is kept is good for all."""
    soft = [term for term in recipe.losses if isinstance(term, SoftTerm)]
    truncated = isinstance(recipe.signals, TruncatedSignals) and soft
    return fixed(soft[0].temperature) if truncated else 1.0


def spec_for(recipe: Recipe, vocabulary: int, teacher: Any) -> SignalSpec:
    """What is kept of each position. `teacher` is its config. Raises RecipeError where k exceeds the vocabulary."""
    signals = recipe.signals
    if not isinstance(signals, StoredSignals):
        raise ValueError("signals.kind=online keeps nothing: there is no spec")
    spec = functools.partial(
        SignalSpec, signals.kind, vocabulary, positions=signals.positions.kind, share=signals.share
    )
    if isinstance(signals, TruncatedSignals):
        return spec(k=signals.k, temperatures=tuple(sorted(signals.temperatures or [temperature_of(recipe)])))
    if isinstance(signals, HiddenSignals):
        return spec(width=teacher.get_text_config().hidden_size, dtype=recipe.teacher.dtype)
    return spec()


def salt_for(recipe: Recipe) -> Salt | None:
    """What besides its tokens decides what is said of a document: the members' weights, of a mixture."""
    teacher = recipe.teacher
    if not isinstance(teacher, MixtureTeacher):
        return None
    return lambda source: repr(shares_of([one.weight_for(source) for one in teacher.members], source)).encode()


def stamp_for(recipe: Recipe, spec: SignalSpec) -> Stamp:
    """Who spoke, in which tokens, and what is kept of it: by content, so that a copy elsewhere is the same teacher.

    For a recipe whose assistant is settled, and whose models are on this machine.
    """
    if isinstance(recipe.teacher, OpenAITeacher):
        return _stamp_of_api(recipe.teacher, spec)
    members = build.teachers_of(recipe)
    folders = [find_folder(resolve_model(member.model, key)) for key, member in members.items()]
    if None in folders:
        raise ValueError("the stamp of a teacher needs its files: load it first")
    tokenizer = load_tokenizer(str(folders[0]), "teacher")
    return Stamp(
        teacher=fingerprint([recipe.teacher.dtype, *(_content(folder) for folder in folders if folder)]),
        tokenizer=fingerprint(sorted(tokenizer.get_vocab().items())),
        spec=spec.fingerprint,
        template=fingerprint(tokenizer.chat_template),
        spec_json=spec.to_json(),
        words={"teacher": " and ".join(member.model for member in members.values()), "dtype": recipe.teacher.dtype},
    )


def _stamp_of_api(teacher: OpenAITeacher, spec: SignalSpec) -> Stamp:
    """Who answers; what is asked stands in the keys of the answers, how hard and at what cost nowhere."""
    host = urlsplit(teacher.base_url).hostname or ""
    return Stamp(
        teacher=fingerprint([teacher.kind, host, teacher.model, teacher.api]),
        tokenizer=fingerprint(_numbers_of(teacher) if spec.lists else None),
        spec=spec.fingerprint,
        spec_json=spec.to_json(),
        words={"teacher": f"{teacher.model} at {host}"},
    )


def _numbers_of(teacher: OpenAITeacher) -> list[tuple[str, int]] | None:
    """Which token has which number; None where the recipe names no tokenizer."""
    if teacher.tokenizer is None:
        return None
    tokenizer = load_tokenizer(resolve_model(teacher.tokenizer, "teacher.tokenizer"), "teacher.tokenizer")
    return sorted(tokenizer.get_vocab().items())


def place_for(recipe: Recipe, stamp: Stamp) -> str:
    """Where the store is: as the recipe says, or beside the run folder, named after what is in it. Absolute."""
    signals = recipe.signals
    named = signals.store if isinstance(signals, StoredSignals) else None
    if named and is_remote(named):
        return named
    name = fingerprint([stamp.teacher, stamp.tokenizer, stamp.spec])[:16]
    place = Path(named).expanduser() if named else runs_folder(recipe) / "signals" / name
    return str(place.absolute())


def check_store(recipe: Recipe, spec: SignalSpec) -> None:
    """Refuse a store that is there and of another teacher, tokenizer or spec, where the teacher's files are here.

    Raises StoreError, with both fingerprints.
    """
    named = recipe.signals.store if isinstance(recipe.signals, StoredSignals) else None
    if named is None or isinstance(recipe.teacher, RunTeacher) or not has_store(named, cache_folder()):
        return
    places = [resolve_model(member.model, key) for key, member in build.teachers_of(recipe).items()]
    if all(map(find_folder, places)):
        open_store(named, stamp_for(recipe, spec), encoding_of(spec).stride, create=False, cache=cache_folder())


def explain_store(recipe: Recipe, captured: Path, facts: Mapping[str, Any]) -> str | None:
    """Why the store lacks what a finished capture in this folder left there for the training; None where it does not.

    Raises StoreError where the store is there and cannot be read: to fill another one would be worse than to wait.
    """
    place, named = facts["store"], recipe.signals.store if isinstance(recipe.signals, StoredSignals) else None
    if named and place != (named if is_remote(named) else str(Path(named).expanduser().absolute())):
        return f"filled {place}, and signals.store is another place now; will look there"
    if not has_store(place, cache_folder()):
        return f"{place} is gone; will be captured again"
    store = reopen_store(place, cache_folder())
    keys_P16 = load_plan(captured)[0]
    gone = len(store.missing([key.tobytes() for key in keys_P16]))
    if behind := facts.get("features"):
        if not has_store(behind, cache_folder()):
            return f"{behind} is gone; will be captured again"
        with np.load(captured / FEATURES) as kept:
            gone += len(reopen_store(behind, cache_folder()).missing([key.tobytes() for key in kept["keys"]]))
    if gone:
        return f"{place} has lost {gone} of the pieces since; they will be captured again"
    headless = facts["spec"]["kind"] == "hidden" and not has_head(store)
    return f"{place} has lost the teacher's head since; it will be written again" if headless else None


def has_head(store: Store) -> bool:
    """Whether the head that turns stored hidden states into logits is there, and whole."""
    try:
        return store.get_file(HEAD).is_file()
    except StoreError:
        return False


def load_plan(captured: Path) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Keys uint8 [pieces, 16] of what a capture is about, and which of these were missing when it began, bool [pieces].

    Both empty where there is no whole plan in that folder.
    """
    try:
        with (captured / PLAN).open("rb") as file, np.load(file) as plan:
            keys_P16, planned_P = plan["keys"], plan["planned"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return np.empty((0, KEY_BYTES), np.uint8), np.empty(0, np.bool_)
    return keys_P16, planned_P


def cache_folder() -> Path:
    """Where shards of remote stores lie on this machine."""
    return Path(os.environ.get("POTSTILL_CACHE") or platformdirs.user_cache_dir("potstill")).expanduser() / "signals"


def _check_temperatures(signals: TruncatedSignals, terms: Mapping[int, SoftTerm]) -> None:
    for index, term in terms.items():
        if isinstance(term.temperature, LinearRamp | CosineRamp):
            raise RecipeError(
                f"losses[{index}].temperature: moves over the training, but signals.kind={signals.kind} keeps lists of "
                "tokens, which hold at the temperatures they were captured at. Fix it, or use signals.kind=hidden."
            )
    (first, *_), asked = terms, {index: fixed(term.temperature) for index, term in terms.items()}
    for index, temperature in asked.items():
        if temperature != asked[first]:
            raise RecipeError(
                f"losses[{index}].temperature: {temperature:g}, but losses[{first}] is at {asked[first]:g}, and a list "
                f"of tokens is read at one. Use the same, or signals.kind=hidden."
            )
    if signals.temperatures and asked[first] not in signals.temperatures:
        raise RecipeError(
            f"losses[{first}].temperature: {asked[first]:g}, but signals.temperatures is {signals.temperatures}: the "
            "log-sum-exp at that temperature is not kept, and a truncated list cannot be softened without it. Add it."
        )


def _check_mixture(terms: Mapping[int, SoftTerm]) -> None:
    """Online, every member is softened before the mean is taken; what is stored is the mean of what they say."""
    for index, term in terms.items():
        if isinstance(term.temperature, LinearRamp | CosineRamp) or fixed(term.temperature) != 1.0:
            raise RecipeError(
                f"losses[{index}].temperature: the mean of several teachers is stored at temperature 1, and softened "
                "after that it would be another mean. Use 1, or signals.kind=online."
            )


def _check_form(signals: TruncatedSignals, term: SoftTerm, key: str) -> None:
    if isinstance(term, ForwardKL):
        return
    if not isinstance(signals, TopKSignals):
        raise RecipeError(
            f"{key}.kind={term.kind} has no unbiased form for signals.kind={signals.kind}. Use forward_kl, or "
            "signals.kind=hidden (exact), or signals.kind=topk with biased: true on this loss."
        )
    if not term.biased:
        raise RecipeError(
            f"{key}.kind={term.kind} has no unbiased form for the {signals.k} likeliest tokens. Use forward_kl, or "
            f"signals.kind=hidden (exact), or say {key}.biased: true to compare these and one class for the rest."
        )


def _content(folder: Path) -> list[str]:
    """What tells one model from another, wherever it lies: its config, and a look into its files of weights."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".gguf"))
    return [hash_file(path) for path in (folder / "config.json",) if path.is_file()] + [_look_into(p) for p in files]


def _look_into(path: Path) -> str:
    """Hash of a file's size and of some of every part of it: a hundred gigabytes are not read to know them again."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        for start in range(0, size, STEP_BYTES if size > WHOLE_BYTES else STRETCH_BYTES):
            file.seek(min(start, max(0, size - STRETCH_BYTES)))
            digest.update(file.read(STRETCH_BYTES))
    return digest.hexdigest()
