"""The front door: commands, exit codes, and errors as people read them.

Refuses to show a traceback for a mistake in a recipe: one line, exit code 2. Nothing heavy is imported before a command
needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import potstill
from potstill.errors import Interrupted, PotstillError, RecipeError
from potstill.pipeline.stopping import stoppable

if TYPE_CHECKING:
    from potstill.recipes import Recipe

__all__ = ["app", "main"]

app = typer.Typer(
    name="potstill",
    help="Distil a large model into a small one that you own, and prove what it kept.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
samples_app = typer.Typer(no_args_is_help=True, help="Real models and data to try things on.")
signals_app = typer.Typer(no_args_is_help=True, help="Stores of what teachers said.")
ledger_app = typer.Typer(no_args_is_help=True, help="Ledgers of what was asked of teachers behind an API.")
recipes_app = typer.Typer(no_args_is_help=True, help="Recipes that come with potstill.")
app.add_typer(samples_app, name="samples")
app.add_typer(recipes_app, name="recipes")
app.add_typer(signals_app, name="signals")
app.add_typer(ledger_app, name="ledger")

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")]
StorePlace = Annotated[str, typer.Argument(metavar="STORE", help="A folder, or s3://, gs:// or az:// place.")]
LedgerFile = Annotated[Path, typer.Argument(metavar="LEDGER", help="The file of teacher.ledger: ledger.sqlite.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, for example training.steps=50.")
]


def main() -> None:
    """Run the command line; every expected error becomes one line on stderr and exit code 2 (130 when interrupted)."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("potstill").setLevel(logging.INFO)
    try:
        app()
    except Interrupted as error:
        _say(f"interrupted: {error}", 130)
    except PotstillError as error:
        _say(f"error: {error}", 2)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(potstill.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and all log lines.")] = False,
) -> None:
    if debug:
        logging.getLogger().setLevel(logging.DEBUG)


@app.command()
def check(
    recipe: RecipeFile,
    set: Overrides = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time a short step of every training on this machine.")
    ] = False,
) -> None:
    """Check a recipe and print the plan: what will run, with estimated tokens, memory, disk and time."""
    with stoppable():
        loaded = _load(recipe, set)
        _quiet_libraries()
        from potstill.pipeline.plan import print_plan

        print_plan(loaded, measure=measure)


@app.command()
def run(recipe: RecipeFile, set: Overrides = None) -> None:
    """Run the whole recipe, from words to report. The same command continues after any interruption."""
    _walk(recipe, set, None)


def _stage_command(name: str, about: str) -> Callable[..., None]:
    def command(recipe: RecipeFile, set: Overrides = None) -> None:
        _walk(recipe, set, name)

    command.__doc__ = about
    return command


for _name, _about in {
    "generate": "Let the teacher write what the student will learn, where the recipe says so.",
    "prepare": "Turn the data into rows to learn from, and rows that are held out (and nothing more).",
    "finetune": "Train the teacher first, where the recipe says so (and all before it).",
    "initialise": "Make the student's first weights (and all before it).",
    "train": "Train the student (and all before it).",
    "control": "Train the control arm (and all before it).",
    "static": "Train the static classifier, where the recipe has one (and all before it).",
    "evaluate": "Measure all arms (and all before it).",
    "report": "Write the report (and all before it).",
}.items():
    app.command(name=_name)(_stage_command(_name, _about))


@app.command()
def capture(
    recipe: RecipeFile,
    set: Overrides = None,
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="I/N", help="Only part I of N (1/4 to 4/4): N processes can share the work."),
    ] = None,
) -> None:
    """Have the teacher read, once, what the training needs (and all before it)."""
    if part is None:
        _walk(recipe, set, "capture")
        return
    with stoppable() as stopping:
        loaded = _load(recipe, set)
        _quiet_libraries()
        from potstill.pipeline.run import run_part

        typer.echo(run_part(loaded, part, stopping))


@signals_app.command("verify")
def signals_verify(store: StorePlace) -> None:
    """Check every byte of a store of signals; exit code 1 where something is damaged."""
    from potstill.pipeline.stores import verify_store

    found = verify_store(store)
    for line in found.lines:
        typer.echo(line)
    if not found.whole:
        raise typer.Exit(1)


@signals_app.command("stats")
def signals_stats(store: StorePlace) -> None:
    """Say whose words a store keeps, how many, and at how many bytes."""
    from potstill.pipeline.stores import describe_store

    for line in describe_store(store):
        typer.echo(line)


@signals_app.command("export")
def signals_export(
    store: StorePlace, path: Annotated[Path, typer.Argument(metavar="FILE", help="A .parquet file to write.")]
) -> None:
    """Write a store as Parquet, for pandas or DuckDB: one row a position."""
    from potstill.pipeline.stores import export_store

    typer.echo(export_store(store, path))


@ledger_app.command("stats")
def ledger_stats(ledger: LedgerFile) -> None:
    """Say what every run asked of which model, what became of it, and what it cost."""
    from potstill.pipeline.ledgers import describe_ledger

    for line in describe_ledger(ledger):
        typer.echo(line)


@ledger_app.command("export")
def ledger_export(
    ledger: LedgerFile,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A .jsonl or .parquet file to write.")],
) -> None:
    """Write all requests with their answers, one a row."""
    from potstill.pipeline.ledgers import export_ledger

    typer.echo(export_ledger(ledger, path))


@ledger_app.command("forget")
def ledger_forget(
    ledger: LedgerFile,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Requests, as `export` names them.")
    ] = None,
    user: Annotated[str | None, typer.Option("--user", help="All requests with data of this user.")] = None,
    unusable: Annotated[
        bool, typer.Option("--unusable", help="All requests whose answers could not be used, to ask them again.")
    ] = False,
) -> None:
    """Delete requests with their answers for good, and name the runs that have used them."""
    from potstill.pipeline.ledgers import forget_in_ledger

    for line in forget_in_ledger(ledger, ids or (), user, unusable=unusable):
        typer.echo(line)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from potstill.recipes import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


@samples_app.command("list")
def samples_list() -> None:
    """List the samples: download size, licence, what they are."""
    from potstill.pipeline.catalogue import describe_samples

    for line in describe_samples():
        typer.echo(line)


@samples_app.command("fetch")
def samples_fetch(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Default: all.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check the hash of every file.")] = False,
) -> None:
    """Download samples into the user's cache folder and print where they are."""
    with stoppable():
        from potstill.pipeline.catalogue import fetch_samples

        for path in fetch_samples(names or (), verify=verify):
            typer.echo(path)


@recipes_app.command("list")
def recipes_list() -> None:
    """List the shipped recipes."""
    from potstill.recipes import load_recipe, shipped_recipes

    for name, path in shipped_recipes().items():
        typer.echo(f"{name:<24}{load_recipe(path).description}")


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print a shipped recipe."""
    from potstill.recipes import shipped_recipe

    typer.echo(shipped_recipe(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("new")
def recipes_new(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it; must not exist.")],
    start: Annotated[str, typer.Option("--from", metavar="NAME", help="Shipped recipe to start from.")] = "quickstart",
) -> None:
    """Write a copy of a shipped recipe to change, named after the file: a run lives in the folder of its name."""
    from potstill.recipes import shipped_recipe

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "mine"
    text = re.sub(r"(?m)^name: .*$", f"name: {name}", shipped_recipe(start).read_text(encoding="utf-8"), count=1)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise RecipeError(f"FILE: {path} cannot be written ({error.strerror}). Choose another path.") from None
    typer.echo(f"wrote {path}; next: potstill check {path}")


def _walk(recipe: str, overrides: list[str] | None, until: str | None) -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RecipeError(
            "WORLD_SIZE is set, so several processes were started: a run is one process for now. Start potstill "
            "without a launcher; choose its GPU with training.device."
        )
    with stoppable() as stopping:
        loaded = _load(recipe, overrides)
        _quiet_libraries()
        from potstill.pipeline.run import run_recipe

        folder = run_recipe(loaded, until=until, stopping=stopping)
    if until in (None, "report"):
        typer.echo(f"report at {folder / 'report' / 'index.html'}")
        typer.echo(f"student at {folder / 'train' / 'student'}")
    else:
        typer.echo(f"{until}: finished in {folder / str(until)}")


def _load(recipe: str, overrides: list[str] | None) -> Recipe:
    from potstill.recipes import load_recipe

    return load_recipe(recipe, overrides or ())


def _quiet_libraries() -> None:
    """Other libraries' progress bars and advice would bury ours; errors still come through. Read when imported."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("skeletoken").setLevel(logging.ERROR)


def _say(text: str, code: int) -> None:
    if logging.getLogger().level == logging.DEBUG:
        logging.getLogger("potstill").exception(text)
    print(text, file=sys.stderr)  # noqa: T201
    sys.exit(code)
