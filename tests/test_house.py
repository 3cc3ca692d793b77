"""The rules of the house, held against every source file: doors, sizes, names, inheritance, what is exported."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
NAMES = {path: path.relative_to(ROOT / "src").as_posix() for path in SOURCES}
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))

LOWER_ROOMS = ("data", "verify", "signals", "losses", "students", "evaluation", "report", "export", "samples")
DOORS = {
    "errors": set(),
    "types": {"errors"},
    "recipes": {"errors"},
    **{room: {"types", "errors"} for room in LOWER_ROOMS},
    "engines": {"types", "errors", "data"},
    "serve": {"types", "errors", "data"},
    "training": {"types", "errors", "data", "signals"},
    "cli": {"pipeline", "recipes", "errors"},
    "__main__": {"cli"},
}
"""Who may import whom; `pipeline`, the hallway, may enter every room but `cli`."""

BANNED = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "managers", "handler", "handlers"}
BASES = {"Protocol", "nn.Module", "torch.autograd.Function", "BaseModel", "Enum", "StrEnum", "IntEnum", "Flag"}
EXCEPTIONS = re.compile(r"(Exception|\w+Error|\w+Warning)")

Function = ast.FunctionDef | ast.AsyncFunctionDef
every_source = pytest.mark.parametrize("path", SOURCES, ids=NAMES.values())


def functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def body_lines(function: Function) -> int:
    """Lines from the first statement after the docstring to the end."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def positional(function: Function) -> list[str]:
    names = [argument.arg for argument in function.args.posonlyargs + function.args.args]
    if names[:1] == ["ctx"]:  # an autograd.Function, whose arguments torch can pass by position only
        return []
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported_modules(tree: ast.Module) -> Iterator[str]:
    """Every potstill module imported anywhere in a file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def defined_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        else:
            names.update(target.id for target in ast.walk(node) if isinstance(target, ast.Name))
    return names


def exported(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def identifiers(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
                yield name


def words(identifier: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", identifier)}


@every_source
def test_rooms_are_entered_through_their_doors_only(path):
    own = path.relative_to(ROOT / "src" / "potstill").parts[0].removesuffix(".py")
    entered = {room(module) for module in imported_modules(TREES[path]) if module.startswith("potstill.")}
    allowed = DOORS.get(own, {*DOORS, "pipeline"} - {"cli"})
    assert entered <= allowed | {own}


@every_source
def test_no_import_dodges_the_doors(path):
    calls = [ast.unparse(node.func) for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)]
    assert not {"importlib.import_module", "import_module", "__import__"} & set(calls)
    assert not [node for node in ast.walk(TREES[path]) if isinstance(node, ast.ImportFrom) and node.level]


def test_import_linter_agrees():
    absent = [name for name in re.findall(r"potstill\.(\w+)", (ROOT / ".importlinter").read_text()) if not exists(name)]
    if absent:
        pytest.skip(f"rooms without files yet: {', '.join(sorted(set(absent)))}")
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout


def exists(name: str) -> bool:
    package = ROOT / "src" / "potstill" / name
    return (package / "__init__.py").is_file() or package.with_suffix(".py").is_file()


@pytest.mark.parametrize("module", ["potstill", "potstill.recipes", "potstill.samples", "potstill.cli"])
def test_importing_what_a_user_waits_for_imports_no_torch(module):
    if module != "potstill" and not exists(room(module)):
        pytest.skip(f"{module} has no file yet")
    code = f"import sys, {module}; print({{'torch', 'transformers', 'datasets'}} & set(sys.modules))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (finished.stdout, finished.stderr) == ("set()\n", "")


def test_functions_are_short():
    sizes = {
        f"{NAMES[path]}:{function.lineno} {function.name}": body_lines(function)
        for path, tree in TREES.items()
        for function in functions(tree)
    }
    long = {name: lines for name, lines in sizes.items() if lines > 40}
    assert {name: lines for name, lines in long.items() if lines > 60} == {}
    assert len(long) <= 0.05 * len(sizes), long
    assert statistics.median(sizes.values()) <= 10


@every_source
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@every_source
def test_functions_take_at_most_four_positional_parameters(path):
    many = {function.name: positional(function) for function in functions(TREES[path]) if len(positional(function)) > 4}
    assert many == {}


def test_nothing_is_inherited_but_protocols_modules_models_and_exceptions():
    classes = {
        node.name: (f"{NAMES[path]}:{node.lineno}", [ast.unparse(base).split("[")[0] for base in node.bases])
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }

    def permitted(base: str) -> bool:
        chain = classes.get(base, ("", []))[1]
        return base in BASES or bool(EXCEPTIONS.fullmatch(base)) or bool(chain and all(map(permitted, chain)))

    refused = {name: bases for name, (_, bases) in classes.items() if not all(map(permitted, bases))}
    assert refused == {}


@every_source
def test_dataclasses_are_frozen(path):
    """What owns a resource is written as a plain class, so that `@dataclass` always promises a value."""
    thawed = [
        node.name
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.ClassDef)
        for decorator in map(ast.unparse, node.decorator_list)
        if decorator.startswith("dataclass") and "frozen=True" not in decorator
    ]
    assert thawed == []


@every_source
def test_modules_say_what_they_do_and_what_they_export(path):
    tree = TREES[path]
    names = exported(tree)
    assert ast.get_docstring(tree)
    assert names is not None
    assert set(names) <= defined_names(tree)
    assert len(names) == len(set(names))


@every_source
def test_public_functions_and_classes_have_docstrings(path):
    public = set(exported(TREES[path]) or ())
    nodes = [node for node in TREES[path].body if isinstance(node, Function | ast.ClassDef) and node.name in public]
    assert [node.name for node in nodes if not ast.get_docstring(node)] == []


@every_source
def test_names_are_from_the_field_and_not_from_the_drawer(path):
    banned = {name for name in {path.stem, *identifiers(TREES[path])} if words(name) & BANNED}
    assert banned == set()


@every_source
def test_only_the_front_door_catches_everything(path):
    if path.name == "cli.py":
        return
    caught = [node.type for node in ast.walk(TREES[path]) if isinstance(node, ast.ExceptHandler)]
    kinds = [ast.unparse(kind) if kind else "everything" for kind in caught]
    assert not [kind for kind in kinds if re.search(r"\b(everything|Exception|BaseException)\b", kind)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_validates(path):
    from potstill.recipes import load_recipe

    assert load_recipe(path).name == path.stem
