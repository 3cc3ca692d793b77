"""A run's folder: one process at a time, stages that are finished or not, and files that are whole or absent.

    runs/NAME/recipe.yaml              the resolved recipe
    runs/NAME/.lock, .owner.json       the lock (dies with its process) and who holds it
    runs/NAME/STAGE/started.json       whose work lies here: the fingerprint it was begun with
    runs/NAME/STAGE/manifest.json      written last: the stage is finished, with these outputs

Every change is a rename of something already on disk, so `kill -9` at any instant leaves a folder from which the same
command continues. Refuses: to take a stage for finished whose manifest or outputs are not whole, and to clear or to
write over what it did not begin.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from filelock import BaseFileLock, FileLock, Timeout
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, field_validator

from potstill.errors import RunError
from potstill.pipeline.disk import (
    PARTIAL,
    hash_file,
    read_json,
    remove,
    sync_tree,
    working,
    write_json_atomic,
    write_text_atomic,
    writing,
)
from potstill.pipeline.memory import peak_memory_bytes, reset_peak_memory

__all__ = [
    "Manifest",
    "Output",
    "RunDir",
    "Stage",
    "StageStatus",
    "State",
    "check_unlocked",
    "open_run",
]

HASHED_BYTES = 64 * 2**20
"""Outputs up to this size are verified by content, larger ones by size: models are too big to hash at every start."""

RECIPE_MARK = "# Written by potstill when a run begins. Edit a copy of it, elsewhere.\n"
"""First line of a run folder's recipe.yaml, by which it is known not to be the user's own."""

RECIPE, MANIFEST, STARTED, OWNER, LOCK = "recipe.yaml", "manifest.json", "started.json", ".owner.json", ".lock"
PACKAGES = ("potstill", "torch", "transformers", "accelerate", "datasets", "safetensors", "numpy")

State = Literal["done", "stale", "missing", "partial", "damaged"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Output(_Record):
    """One file of a finished stage. `blake2b` is None above HASHED_BYTES."""

    size: int
    blake2b: str | None


class Manifest(_Record):
    """What a finished stage says about itself. Its presence is what makes the stage finished."""

    stage: str
    fingerprint: str
    inputs: dict[str, str]
    outputs: dict[str, Output]
    versions: dict[str, str]
    seed: int
    attempts: int
    timed_attempts: int = 1
    """Attempts that `wall_s` sums up and `peak_rss_bytes` is the most of: one that was killed left no numbers."""
    wall_s: float
    peak_rss_bytes: int
    finished_at: str
    facts: dict[str, JsonValue]

    @field_validator("outputs")
    @classmethod
    def _outputs_are_inside(cls, outputs: dict[str, Output]) -> dict[str, Output]:
        if any(name.startswith("/") or ".." in Path(name).parts for name in outputs):
            raise ValueError("an output lies outside of the stage's folder")
        return outputs


class _Started(_Record):
    fingerprint: str
    attempts: int
    timed_attempts: int = 0
    wall_s: float = 0.0
    peak_rss_bytes: int = 0


class _Owner(_Record):
    pid: int
    host: str


@dataclass(frozen=True, slots=True)
class StageStatus:
    """Where a stage stands, and why in words for the user. `broken` names outputs that are not what they were."""

    stage: str
    state: State
    why: str
    broken: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RunDir:
    """A run's folder. Reading needs no lock; `stage` writes, so the run must be opened with `open_run`."""

    folder: Path

    def state(self, stage: str, fingerprint: str) -> State:
        """Where the stage stands with respect to what is asked now.

        done: finished with this fingerprint, outputs verified. stale: begun or finished with another fingerprint.
        missing: nothing usable. partial: begun with this fingerprint. damaged: the manifest or an output is not whole.
        """
        return self.status(stage, fingerprint).state

    def explain(self, stages: Sequence[tuple[str, str]]) -> list[StageStatus]:
        """The status of every (stage, fingerprint), in order, for the user to read before anything is touched."""
        return [self.status(stage, fingerprint) for stage, fingerprint in stages]

    def status(self, stage: str, fingerprint: str) -> StageStatus:
        """The stage's state with its reason."""
        if not (self.folder / stage / MANIFEST).exists():
            return self._unfinished(stage, fingerprint)
        try:
            manifest = self.manifest(stage)
        except RunError as error:
            return StageStatus(stage, "damaged", str(error))
        if manifest.fingerprint != fingerprint:
            why = f"finished {manifest.finished_at} with another recipe, input or earlier stage; will run again"
            return StageStatus(stage, "stale", why)
        if broken := _broken(self.folder / stage, manifest):
            why = f"{', '.join(broken[:3])} changed or vanished since {manifest.finished_at}; will run again"
            return StageStatus(stage, "damaged", why, broken)
        return StageStatus(stage, "done", f"finished {manifest.finished_at} in {manifest.wall_s:.1f} s")

    def manifest(self, stage: str) -> Manifest:
        """What a finished stage recorded. Raises RunError if it is missing or damaged."""
        path = self.folder / stage / MANIFEST
        data = read_json(path)
        try:
            return Manifest.model_validate(data)
        except ValidationError as error:
            field = ".".join(map(str, error.errors()[0]["loc"])) or "its content"
            raise RunError(f"{path}: is damaged ({field}). Run again: the stage will be done anew.") from None

    def write_recipe(self, recipe_yaml: str) -> None:
        """Keeps the resolved recipe with the run. Raises RunError if it cannot be written."""
        write_text_atomic(self.folder / RECIPE, RECIPE_MARK + recipe_yaml)

    @contextmanager
    def stage(
        self, name: str, fingerprint: str, *, inputs: Mapping[str, str] | None = None, seed: int = 0
    ) -> Iterator[Stage]:
        """The stage's folder to work in; call `finish` on the result as the last thing.

        Work begun with the same fingerprint is kept, for the caller to continue. All else that is there (stale or done
        work, work with an unreadable manifest) is cleared now, not before. `inputs` maps what the stage reads to
        hashes. Raises RunError for what the system refuses, and if the folder holds what no run of potstill put there.
        """
        started = self._begin(name, fingerprint)
        reset_peak_memory()
        stage = Stage(self.folder / name, started, inputs=dict(inputs or {}), seed=seed)
        try:
            with working(stage.folder):
                yield stage
        finally:
            if not stage.finished:
                stage.interrupt()
        if not stage.finished:
            raise RunError(f"{stage.folder}: the stage ended without finishing. This is a bug in potstill; report it.")

    def _unfinished(self, stage: str, fingerprint: str) -> StageStatus:
        started = _read_started(self.folder / stage)
        if started is None:
            return StageStatus(stage, "missing", "not begun")
        if started.fingerprint != fingerprint:
            return StageStatus(stage, "stale", "begun with another recipe, input or earlier stage; will start anew")
        return StageStatus(stage, "partial", "interrupted; will continue")

    def _begin(self, stage: str, fingerprint: str) -> _Started:
        """Clears what cannot be continued and records whose work begins. Returns that record."""
        folder, aside = self.folder / stage, self.folder / f".{stage}.old"
        status = self.status(stage, fingerprint)
        with writing(folder):
            remove(aside)
            if status.state == "partial" or status.broken:
                _drop(folder, [*status.broken, MANIFEST])
            elif os.path.lexists(folder):
                _check_own(folder)
                folder.rename(aside)
            folder.mkdir(parents=True, exist_ok=True)
            before = _read_started(folder) or _Started(fingerprint=fingerprint, attempts=0)
            started = before.model_copy(update={"attempts": before.attempts + 1})
            write_json_atomic(folder / STARTED, started.model_dump())
            remove(aside)
        return started


class Stage:
    """A stage at work: where its files go, what lies there already, and how it ends."""

    def __init__(self, folder: Path, started: _Started, *, inputs: dict[str, str], seed: int) -> None:
        self.folder = folder
        self.resumed = started.attempts > 1
        self.finished = False
        self._record = {"stage": folder.name, "inputs": inputs, "seed": seed}
        self._started = started
        self._began_s = time.monotonic()
        self._peak_bytes = started.peak_rss_bytes

    def keep_peak(self) -> None:
        """Counts the peak memory so far: call it before measuring some part's peak anew."""
        self._peak_bytes = max(self._peak_bytes, peak_memory_bytes())

    def interrupt(self) -> None:
        """Records what the attempt has cost, for the next one to count it in."""
        with suppress(RunError):  # whatever ended the attempt is what the user must hear of
            write_json_atomic(self.folder / STARTED, self._spent().model_dump())

    def _spent(self) -> _Started:
        """All timed attempts so far, this one included."""
        self.keep_peak()
        spent_s = self._started.wall_s + time.monotonic() - self._began_s
        numbers = {"wall_s": spent_s, "peak_rss_bytes": self._peak_bytes}
        return self._started.model_copy(update={"timed_attempts": self._started.timed_attempts + 1, **numbers})

    def finish(self, *outputs: str, **facts: JsonValue) -> Manifest:
        """Writes the manifest: from now on the stage is done.

        `outputs` are the files and folders, by name, that make up the result and must stay as they are; none named
        means everything in the folder. Leave out what only a resume needs, such as checkpoints. `facts` are the
        stage's numbers (JSON; no NaN). Raises RunError if an output is not there or the manifest cannot be written.
        """
        with writing(self.folder):
            sync_tree(self.folder)  # else a power cut could keep the manifest and lose what it vouches for
            files = {name: _measure(self.folder / name) for name in _files(self.folder, outputs)}
            manifest = Manifest(
                **self._record,
                **self._spent().model_dump(),
                outputs=files,
                versions=_versions(),
                finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
                facts=facts,
            )
            write_json_atomic(self.folder / MANIFEST, manifest.model_dump())
        self.finished = True
        return manifest


@contextmanager
def open_run(folder: str | Path) -> Iterator[RunDir]:
    """The run folder, created and locked for this process.

    The lock is the operating system's: it ends with the block or the process, however that ends. Raises RunError at
    once if another process holds it, if the folder cannot be written, or if it holds a recipe.yaml of the user's.
    """
    run = RunDir(Path(folder))
    _check_recipe(run.folder)
    with writing(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
    with _locked(run.folder):
        yield run


def check_unlocked(folder: Path) -> None:
    """Raises RunError if another process works in this run folder now; makes no file."""
    if (folder / LOCK).exists():
        _lock(folder).release()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    owner = folder / OWNER
    lock = _lock(folder)
    try:
        write_json_atomic(owner, _Owner(pid=os.getpid(), host=socket.gethostname()).model_dump())
        yield
    finally:
        with suppress(OSError):
            owner.unlink()
        lock.release()


def _lock(folder: Path) -> BaseFileLock:
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(
            f"run_dir: {folder} is in use by {_holder(folder / OWNER)}. "
            "Wait until it ends or stop it, or choose another run_dir."
        ) from None
    except (OSError, NotImplementedError) as error:
        raise RunError(f"run_dir: {folder} cannot be locked ({error}). Choose another run_dir.") from error
    return lock


def _holder(owner: Path) -> str:
    try:
        who = _Owner.model_validate(read_json(owner))
    except (RunError, ValidationError):  # it holds the lock and has not said yet who it is
        return "another process"
    return f"process {who.pid} on {who.host}"


def _read_started(folder: Path) -> _Started | None:
    """Whose work lies here; None if nobody can tell, and then the work is of no use."""
    try:
        return _Started.model_validate(read_json(folder / STARTED))
    except (RunError, ValidationError):
        return None


def _check_own(folder: Path) -> None:
    """Refuses to clear what was not begun here: somebody may have named a folder of theirs as run_dir."""
    unborn = {f".{STARTED}{PARTIAL}"}
    if not (folder / STARTED).exists() and {path.name for path in folder.iterdir()} - unborn:
        raise RunError(
            f"run_dir: {folder} holds files that potstill did not write. Move them, or choose another run_dir."
        )


def _check_recipe(folder: Path) -> None:
    """Refuses a folder with a recipe.yaml that is not marked as written here."""
    path, mark = folder / RECIPE, RECIPE_MARK.encode()
    with writing(path):
        if path.is_file() and not path.read_bytes().startswith(mark):
            raise RunError(f"run_dir: {path} was not written by potstill. Choose another run_dir, or move that file.")


def _drop(folder: Path, names: Sequence[str]) -> None:
    """Removes broken outputs, and only then the manifest that knows them to be broken."""
    for name in names:
        remove(folder / name)


def _broken(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    return tuple(name for name, output in manifest.outputs.items() if not _intact(folder / name, output))


def _intact(path: Path, output: Output) -> bool:
    try:
        if path.stat().st_size != output.size:
            return False
        return output.blake2b is None or hash_file(path) == output.blake2b
    except OSError:
        return False


def _files(folder: Path, names: Sequence[str]) -> list[str]:
    """Names, relative to `folder`, of all files below `names` (or all there is), without potstill's own."""
    roots = [folder / name for name in names] or [folder]
    for root in roots:
        root.stat()
    found = {path for root in roots for path in (root, *root.rglob("*")) if path.is_file()}
    own = {folder / MANIFEST, folder / STARTED}
    return sorted(path.relative_to(folder).as_posix() for path in found - own if path.suffix != PARTIAL)


def _measure(path: Path) -> Output:
    size = path.stat().st_size
    return Output(size=size, blake2b=hash_file(path) if size <= HASHED_BYTES else None)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
