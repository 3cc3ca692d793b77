"""What a store loses: captures that are killed at random instants, and files of which a random byte is another.

Refuses to call a store whole by its own word alone: every piece that was there is read again and compared, bit by bit.

    python bench/_harm.py RUN STORE     the capture that is killed: the stage of that run, into that store
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from _table import Row

from potstill.errors import StoreError
from potstill.signals import Store, reopen_store
from potstill.signals.shard import BLOCK_BYTES, HEADER_BYTES, Damage, Shard, open_shard
from potstill.signals.stamp import parse_manifest

__all__ = ["flip_rows", "kill_rows"]

WINDOW_ROWS = 4
"""Rows after which the capture commits; with the stage's 2,048 a job as small as this would commit once, at its end."""

CAPTURING = "capturing"
"""The line that a capture prints when the teacher begins to read."""

Pieces = Mapping[bytes, bytes]
"""The records of every piece, as bytes."""


def kill_rows(run: Path, folder: Path, kills: int) -> tuple[list[Row], dict[str, str]]:
    """Pieces that were lost or changed by `kills` kills, all at random instants while the capture ran.

    Leaves the store of an undisturbed capture in `folder / "whole"`.
    """
    whole, hurt = folder / "whole", folder / "hurt"
    seconds = finish(start(run, whole))
    span = 2 * seconds / kills  # on average the killed captures together have the time that the job takes
    chance, held, lost, done, restarts = random.Random(0), dict[bytes, bytes](), 0, 0, 0
    while done < kills:
        shards = kill_at(start(run, hurt), hurt, chance.uniform(0, span))
        if shards is None:  # it had ended by itself: begin again
            held, restarts = {}, restarts + 1
            shutil.rmtree(hurt)
        else:
            done += 1
            lost += count_lost(held, hurt) + sum(not shard.exists() for shard in shards)
    finish(start(run, hurt))
    lost += count_lost(held, hurt) + count_lost(read_all(reopen_store(whole)), hurt)
    lost += max(0, len(held) - reopen_store(whole).num_pieces)  # nor anything that the undisturbed store has not
    words = (
        f"{kills} kills, each 0 to {span:.2f} s after the teacher began to read, of a job that takes {seconds:.1f} s; "
        f"commits every {WINDOW_ROWS} rows; begun again {restarts} times; real teacher"
    )
    return [Row("store.kill_lost", float(lost), "pieces", n=kills)], {"kills": words}


def start(run: Path, place: Path) -> subprocess.Popen[str]:
    """Begin the capture, and wait until the teacher begins to read, or has nothing to. Exits where it fails before."""
    command = [sys.executable, str(Path(__file__).resolve()), str(run), str(place)]
    log = place.parent / "capture.log"
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    if (process.stdout is None or process.stdout.readline().strip() != CAPTURING) and process.wait():
        raise SystemExit(f"{log.read_text(encoding='utf-8')[-4000:]}\nthe capture failed; its last words are above")
    return process


def finish(process: subprocess.Popen[str]) -> float:
    """Wait for the end; seconds. Exits where it fails."""
    began = time.perf_counter()
    process.communicate()
    if process.returncode:
        raise SystemExit(f"the capture ended with {process.returncode}: the same command must end after any kill")
    return time.perf_counter() - began


def kill_at(process: subprocess.Popen[str], place: Path, delay: float) -> list[Path] | None:
    """Kill after so many seconds. The shards that were there just before, None where the capture was over by then."""
    time.sleep(delay)
    shards = list((place / "shards").glob("*.shard"))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return shards if process.returncode == -signal.SIGKILL else None


def count_lost(held: dict[bytes, bytes], place: Path) -> int:
    """Pieces of `held` that are gone or have other bytes, and damages; what is new in the store is held from now on."""
    if not (place / "store.json").exists():
        return len(held)
    store = reopen_store(place)
    now = read_all(store)
    lost = len(store.verify()) + sum(now.get(key) != records for key, records in held.items())
    held.update(now)
    return lost


def read_all(store: Store) -> dict[bytes, bytes]:
    """Every piece, read by itself."""
    return {key: store.read([key]).records_NS.tobytes() for key in store}


@dataclass(frozen=True, slots=True)
class Flip:
    """One byte of a store that will be another: in which file, where, and what part of it that is.

    block is that of a shard's data; None everywhere else.
    """

    file: str
    part: str
    offset: int
    block: int | None


def flip_rows(whole: Path, folder: Path, flips: int) -> tuple[list[Row], dict[str, str]]:
    """Flips that `verify` does not name by file and block, and pieces that reached a reader with other bytes.

    A flip is drawn by file, then by part (header, index, data of a shard), then by byte: evenly over bytes, nearly all
    would lie in data. Each is done to a fresh copy.
    """
    kept = reopen_store(whole)
    with contextlib.suppress(StoreError):  # done already
        kept.put_file("beside.txt", Path(__file__))
    pieces, chance = read_all(kept), random.Random(0)
    missed = reached = 0
    drawn = [draw_flip(whole, chance) for _ in range(flips)]
    for flip in drawn:
        copy = folder / "flipped"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        store = reopen_store(copy)
        flip_byte(copy / flip.file, flip.offset, chance.randrange(1, 256))
        missed += not is_named(flip, store.verify())
        reached += count_changed(copy, pieces)
    parts = ", ".join(f"{count} in {part}" for part, count in sorted(Counter(flip.part for flip in drawn).items()))
    rows = [
        Row("store.flips_missed", float(missed + reached), "flips", n=flips),
        Row("store.flips_read", float(reached), "pieces", n=flips),
    ]
    return rows, {"flips": f"{parts}; files of the store: {len(files_of(whole))}, pieces: {len(pieces)}"}


def files_of(place: Path) -> list[Path]:
    """All files of a store, in the order of their names."""
    return sorted(path for path in place.rglob("*") if path.is_file())


def draw_flip(place: Path, chance: random.Random) -> Flip:
    """A file, a part of it and a byte of that, each evenly."""
    path = chance.choice(files_of(place))
    file = path.relative_to(place).as_posix()
    size = path.stat().st_size
    if not file.startswith("shards/"):
        return Flip(file, file.partition("/")[0], chance.randrange(size), None)
    manifest = parse_manifest((place / "store.json").read_bytes(), str(place))
    shard = open_shard(path, file, stride=manifest.stride, mark=manifest.mark)
    if not isinstance(shard, Shard):
        raise SystemExit(f"the undisturbed store is damaged: {shard}")
    data = size - shard.data.size
    part, first, stop = chance.choice(
        (("header", 0, HEADER_BYTES), ("index", HEADER_BYTES, data), ("data", data, size))
    )
    offset = chance.randrange(first, stop)
    return Flip(file, part, offset, (offset - data) // BLOCK_BYTES if part == "data" else None)


def flip_byte(path: Path, offset: int, mask: int) -> None:
    """Change the bits of one byte that the mask has."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def is_named(flip: Flip, damages: Sequence[Damage]) -> bool:
    """Whether it is named, by its file and, in a shard's data, by its block; and nothing else is."""
    if [damage.file for damage in damages] != [flip.file] or damages[0].block != flip.block:
        return False
    span = damages[0].span
    return span is None or span[0] <= flip.offset < span[1]


def count_changed(place: Path, pieces: Pieces) -> int:
    """Pieces that a reader gets with other bytes than were written; what it refuses does not count."""
    changed = 0
    try:
        store = reopen_store(place)
    except StoreError:
        return 0
    for key, records in pieces.items():
        with contextlib.suppress(StoreError):
            changed += store.read([key]).records_NS.tobytes() != records
    return changed


def run_capture(run: Path, place: Path) -> None:
    """The stage capture of a prepared run, with small windows; says when the teacher begins to read."""
    from potstill.pipeline import capture as stage
    from potstill.pipeline import transcribe
    from potstill.pipeline.run import run_recipe
    from potstill.recipes import load_recipe

    def announced(*args: Any, **kwargs: Any) -> transcribe.Captured:
        os.write(1, f"{CAPTURING}\n".encode())
        return plain(*args, **kwargs)

    plain = transcribe.capture_rows
    recipe = load_recipe(run / "recipe.yaml", [f"signals.store={json.dumps(str(place))}"])
    with (
        mock.patch.object(transcribe, "WINDOW_ROWS", WINDOW_ROWS),
        mock.patch.object(stage, "capture_rows", announced),
        contextlib.redirect_stdout(sys.stderr),
    ):
        run_recipe(recipe, until="capture")


if __name__ == "__main__":
    run_capture(Path(sys.argv[1]), Path(sys.argv[2]))
