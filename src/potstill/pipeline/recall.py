"""From what a recipe says about signals to the store that keeps them: what is kept, of whom, where, and how it is read.

Refuses losses that what is kept cannot teach, before any teacher reads.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import platformdirs

from potstill.engines import find_folder, load_tokenizer, shares_of
from potstill.errors import RecipeError, StoreError
from potstill.pipeline import build
from potstill.pipeline.disk import hash_file
from potstill.pipeline.places import resolve_model
from potstill.recipes import Recipe, fingerprint
from potstill.recipes.losses import CosineRamp, ForwardKL, LinearRamp, SoftTerm
from potstill.recipes.schema import MixtureTeacher, StoredSignals
from potstill.recipes.signals import HiddenSignals, TopKSignals, TruncatedSignals
from potstill.signals import Salt, SignalSpec, Stamp, reopen_store

__all__ = [
    "cache_folder",
    "check_signals",
    "place_for",
    "salt_for",
    "spec_for",
    "stamp_for",
    "temperature_of",
]

STRETCHES, STRETCH_BYTES = 16, 2**20
"""Of a file of weights, so many stretches of this size, its beginning and end among them, tell it from others."""


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
    for index, term in terms.items():
        if not isinstance(term, SoftTerm):
            raise RecipeError(
                f"losses[{index}].kind={term.kind} needs hidden layers, which signals.kind={signals.kind} does not "
                "keep. Use signals.kind=online, or remove this loss."
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
    return build.fixed(soft[0].temperature) if truncated else 1.0


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


def place_for(recipe: Recipe, stamp: Stamp) -> str:
    """Where the store is: as the recipe says, or beside the run folder, named after what is in it."""
    signals = recipe.signals
    named = signals.store if isinstance(signals, StoredSignals) else None
    return named or str(
        recipe.folder.parent / "signals" / fingerprint([stamp.teacher, stamp.tokenizer, stamp.spec])[:16]
    )


def explain_store(facts: Mapping[str, Any]) -> str | None:
    """Why the store is not what a capture left, by the facts that it recorded; None where it is, or is larger."""
    try:
        store = reopen_store(facts["store"], cache=cache_folder())
    except StoreError as error:
        return str(error)
    gone = facts["stored_pieces"] - store.num_pieces
    if gone > 0 or asdict(store.quarantined) != facts["quarantined"]:
        return f"{store.place} has lost pieces since ({max(gone, 0)} or more); they will be captured again"
    return None


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
    (first, *_), asked = terms, {index: build.fixed(term.temperature) for index, term in terms.items()}
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
        if isinstance(term.temperature, LinearRamp | CosineRamp) or build.fixed(term.temperature) != 1.0:
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
    """Hash of a file's size and of some stretches of it: a hundred gigabytes are not read to know them again."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        for part in range(STRETCHES):
            file.seek(max(0, size - STRETCH_BYTES) * part // (STRETCHES - 1))
            digest.update(file.read(STRETCH_BYTES))
    return digest.hexdigest()
