"""From YAML to a checked recipe and back: reading, `--set`, defaults filled in, fingerprints, the shipped recipes.

YAML is read as version 1.2: `1e-4` is a number, `yes` and `2024-01-01` are text. Refuses: tags, aliases that unfold to
more than a recipe can need, and any key that the schema does not know.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, StreamMark
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from potstill.errors import RecipeError
from potstill.recipes.problems import describe, nearest, show
from potstill.recipes.schema import Recipe

__all__ = ["dump_recipe", "fingerprint", "load_recipe", "recipe_schema", "shipped_recipe", "shipped_recipes"]

MAX_BYTES = 256 * 1024
MAX_VALUES = 20_000
MAX_DIGITS = 300

_TAG = "tag:yaml.org,2002:"
_KEYS = {f"{_TAG}{name}" for name in ("str", "int", "merge")}
_SCALARS = _KEYS | {f"{_TAG}{name}" for name in ("float", "bool", "null", "timestamp")}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe in a YAML file, or the shipped recipe of that name where there is no such file.

    `overrides` are `KEY=VALUE`, applied in order: `training.steps=50`, `losses[0].weight=2`, `losses.0.weight=2`,
    `training.schedule={kind: constant}`. Relative paths in a recipe (`data.source`, `run_dir`) are relative to the
    current directory, as on a command line, not to the recipe's file. Only `teacher.recipe`, another recipe's file, is
    relative to the recipe that names it, and is made absolute.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or is no recipe; one line a problem.
    """
    data = _anchor(_read(path), _find(path).parent)
    for override in overrides:
        data = _anchor(_override(data, override), Path())
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(describe(error)) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults included, keys in the schema's order; it loads back equal."""
    data = _plain(recipe.model_dump())
    yaml = _yaml()
    yaml.default_flow_style = False
    # ruamel writes U+0085 and its like unquoted and reads them back as line breaks: then all is escaped to ASCII
    yaml.allow_unicode = json.dumps(data, ensure_ascii=False).isprintable()
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 2**31  # folded text may lose its tabs
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "potstill recipe"}


def fingerprint(value: object) -> str:
    """blake2b of a model's or plain data's canonical JSON, 32 hex digits: the same in every process and key order.

    Keys count as JSON has them: `{1: x}` and `{"1": x}` are alike. Raises TypeError or ValueError for what JSON cannot
    hold (NaN, sets, objects).
    """
    text = json.dumps(_canonical(value), sort_keys=True, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with potstill, by name: beside this file in a wheel, else the repository's `recipes/`."""
    here = Path(__file__).resolve()
    folder = here.with_name("shipped")
    if not folder.is_dir():
        folder = here.parents[3] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def shipped_recipe(name: str) -> Path:
    """The file of a shipped recipe. Raises RecipeError naming the nearest one."""
    shipped = shipped_recipes()
    if name not in shipped:
        raise RecipeError(f"recipe: {show(name)} is not shipped. {_offer(name, shipped)}")
    return shipped[name]


def _offer(name: str, shipped: Mapping[str, Path]) -> str:
    guess = nearest(name, shipped)
    return f"Did you mean {guess}?" if guess else f"Shipped are: {', '.join(shipped) or 'none'}."


def _read(path: str | Path) -> dict[Any, Any]:
    file = _find(path)
    data = _parse(_read_text(file), str(file))
    if data is None:
        raise RecipeError(f"{file}: the recipe is empty. Start from one of `potstill recipes list`.")
    if not isinstance(data, dict):
        raise RecipeError(f"{file}: got {show(data)}, needs a mapping of keys such as name, data, teacher, student.")
    return data


def _anchor(data: dict[Any, Any], folder: Path) -> dict[Any, Any]:
    """The recipe with every `teacher.recipe`, of its phases too, made absolute: it is relative to `folder`."""
    phases = data.get("phases")
    if isinstance(phases, list):
        phases = [_anchor_teacher(phase, folder) if isinstance(phase, dict) else phase for phase in phases]
        data = {**data, "phases": phases}
    return _anchor_teacher(data, folder)


def _anchor_teacher(data: dict[Any, Any], folder: Path) -> dict[Any, Any]:
    """A part with `teacher.recipe`, a path relative to `folder` or a shipped recipe's name, made absolute."""
    teacher = data.get("teacher")
    if not isinstance(teacher, dict) or teacher.get("kind") != "run" or not isinstance(teacher.get("recipe"), str):
        return data
    named = teacher["recipe"]
    # Path's own would raise for an unknown ~user, or a name too long for the file system.
    place = os.path.realpath(folder / os.path.expanduser(named))  # noqa: PTH111
    if not os.path.isfile(place):  # noqa: PTH113
        place = os.path.realpath(shipped_recipes().get(named, place))
    return {**data, "teacher": {**teacher, "recipe": place}}


def _find(path: str | Path) -> Path:
    shipped = shipped_recipes()
    bare = str(path) in shipped and not Path(path).is_file()
    return shipped[str(path)] if bare else Path(path)


def _read_text(file: Path) -> str:
    raw = _read_bytes(file)
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{file}: more than {MAX_BYTES} bytes, which no recipe needs. Give a recipe, not data.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{file}:{line}: byte {error.start} is not UTF-8. Save the recipe as UTF-8 text.") from None


def _read_bytes(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{file}: there is no such file. {_offer(file.stem, shipped_recipes())}") from None
    except IsADirectoryError:
        raise RecipeError(f"{file}: is a folder. Give the recipe's file, for example {file / 'recipe.yaml'}.") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"{show(str(file))}: cannot be read ({reason}). Give a readable recipe file.") from None


def _yaml() -> YAML:
    return YAML(typ="safe", pure=True)


def _parse(text: str, name: str) -> Any:
    """Plain data: mappings, lists, text, numbers, true, false, null. `name` stands before line:column in errors."""
    yaml = _yaml()
    try:
        node = yaml.compose(text)
        if node is None:
            return None
        _check_node(node, name, {})
        return _construct(yaml, node, name)
    except MarkedYAMLError as error:
        problem = f"{error.context or ''} {error.problem}" if str(error.problem).startswith("but ") else error.problem
        raise RecipeError(f"{_at(error.problem_mark, name)}: {_one_line(problem)}. Correct the YAML there.") from None
    except ReaderError as error:
        line, column = text.count("\n", 0, error.position), error.position - text.rfind("\n", 0, error.position)
        character = f"U+{ord(text[error.position]):04X}"
        raise RecipeError(f"{name}:{line + 1}:{column}: character {character} is not allowed. Remove it.") from None
    except RecursionError:
        raise RecipeError(f"{name}: nested too deep for a recipe. Remove the surplus brackets.") from None


def _construct(yaml: YAML, node: Node, name: str) -> Any:
    try:
        return yaml.constructor.construct_document(node)
    except (ValueError, KeyError, IndexError):
        raise RecipeError(f"{name}: a tag such as !!int stands before a value that is none. Remove it.") from None


def _at(mark: StreamMark | None, name: str) -> str:
    return name if mark is None else f"{name}:{mark.line + 1}:{mark.column + 1}"


def _one_line(text: object) -> str:
    line = " ".join(str(text).split())[:160]
    return "".join(character if character.isprintable() else "?" for character in line)


def _check_node(node: Node, name: str, sizes: dict[int, int]) -> int:
    """Number of values that `node` unfolds to, aliases followed. `sizes` remembers those of shared nodes."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            _refuse(node, name, "it contains itself through its alias. Write the value out.")
        return sizes[id(node)]
    sizes[id(node)] = 0  # open: met again before it is closed, it contains itself
    total = 1 + sum(_check_node(child, name, sizes) for child in _children(node, name))
    if total > MAX_VALUES:
        _refuse(node, name, f"its aliases unfold to more than {MAX_VALUES} values. Write the recipe out.")
    sizes[id(node)] = total
    return total


def _children(node: Node, name: str) -> list[Node]:
    if isinstance(node, ScalarNode):
        _check_scalar(node, name)
        return []
    if isinstance(node, SequenceNode) and node.tag == f"{_TAG}seq":
        return list(node.value)
    if not isinstance(node, MappingNode) or node.tag != f"{_TAG}map":
        _refuse_tag(node, name)
    _check_keys([key for key, _ in node.value], name)
    return [part for pair in node.value for part in pair]


def _check_keys(keys: Sequence[Node], name: str) -> None:
    seen: set[str] = set()
    for key in keys:
        if not isinstance(key, ScalarNode) or key.tag not in _KEYS:
            _refuse(key, name, "a key must be a word or a whole number. Quote it, or correct it.")
        if key.value in seen:
            _refuse(key, name, f"key {show(key.value)} is there twice. Keep one of them.")
        seen.add(key.value)


def _check_scalar(node: ScalarNode, name: str) -> None:
    if node.tag not in _SCALARS:
        _refuse_tag(node, name)
    if node.tag == f"{_TAG}timestamp":
        node.tag = f"{_TAG}str"  # YAML 1.2 has no dates: `name: 2024-01-01` is text
    if node.tag == f"{_TAG}int" and len(node.value) > MAX_DIGITS:
        _refuse(node, name, f"a whole number of {len(node.value)} digits. Give a smaller one.")
    if "\0" in node.value or any("\ud800" <= character <= "\udfff" for character in node.value):
        _refuse(node, name, "the text holds a character that no file can. Remove the NUL or surrogate escape.")


def _refuse_tag(node: Node, name: str) -> NoReturn:
    tag = str(node.tag).replace(_TAG, "!!")
    _refuse(node, name, f"tag {show(tag)} has no place in a recipe. Remove it.")


def _refuse(node: Node, name: str, why: str) -> NoReturn:
    raise RecipeError(f"{_at(node.start_mark, name)}: {why}")


def _override(data: dict[Any, Any], override: str) -> dict[Any, Any]:
    key, equals, text = override.partition("=")
    parts = re.sub(r"\[(\d+)\]", r".\1", key.strip()).split(".")
    name = f"--set {_one_line(override)}"
    if not equals or not all(re.fullmatch(r"[\w-]+", part) for part in parts):
        raise RecipeError(f"{name}: needs KEY=VALUE, for example training.steps=50 or losses[0].weight=2.")
    path = tuple(int(part) if re.fullmatch(r"[0-9]+", part) else part for part in parts)
    placed: dict[Any, Any] = _put(data, path, _parse_value(text, name), name)
    return placed


def _parse_value(text: str, name: str) -> Any:
    """A scalar or a flow collection. What YAML would drop as a comment, or read as a block, is refused: quote it."""
    value = _parse(text, name)
    node = _yaml().compose(text)
    block = isinstance(node, MappingNode | SequenceNode) and not node.flow_style
    rest = text[node.end_mark.index :].strip() if node is not None else text.strip()
    if block or rest:
        raise RecipeError(f"{name}: the value is not one YAML value. Quote text with ': ' or '#', put lists in [].")
    return value


def _put(node: Any, path: tuple[str | int, ...], value: Any, name: str, *, at: tuple[str | int, ...] = ()) -> Any:
    """A copy of `node` with `value` at `path`. Never in place: an alias may show the same node elsewhere."""
    if len(at) == len(path):
        return value
    part = path[len(at)]
    if node is None:
        node = _fresh(at)
    if isinstance(node, list) and isinstance(part, int) and part < len(node):
        return [*node[:part], _put(node[part], path, value, name, at=(*at, part)), *node[part + 1 :]]
    if isinstance(node, dict):
        key = str(part) if str(part) in node else part  # a JSON recipe quotes the whole numbers of a layer map
        return {**node, key: _put(node.get(key), path, value, name, at=(*at, part))}
    where = ".".join(map(str, at))
    size = (
        f"{where} has entries 0 to {len(node) - 1}" if isinstance(node, list) and node else f"{where} is {show(node)}"
    )
    raise RecipeError(f"{name}: {size}, so it has no {part}. Give the key of a value that the recipe can hold.")


def _fresh(at: tuple[str | int, ...]) -> dict[str, Any]:
    """What an absent mapping starts as: empty, or of the kind that the schema would have put there."""
    model: type[BaseModel] = Recipe
    kind: str | None = None
    for part in at:
        field = model.model_fields.get(str(part))
        if field is None:
            return {}
        if isinstance(field.default, BaseModel):
            model, kind = type(field.default), getattr(field.default, "kind", None)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model, kind = field.annotation, None
        else:
            return {}
    return {} if kind is None else {"kind": kind}


def _plain(value: Any) -> Any:
    """Data of YAML's own types: paths become text, tuples lists; keys stay what they are."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _canonical(value: Any) -> Any:
    """Data of JSON's own types, keys as text."""
    if isinstance(value, BaseModel):
        return _canonical(value.model_dump())
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return str(value) if isinstance(value, Path) else value
