"""What the schema has against a recipe, said in the recipe's words: one line a problem.

Refuses: pydantic's vocabulary. Places are written as in `--set` (`losses[1].kind`), types as a YAML author knows them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from potstill.recipes.schema import Recipe

__all__ = ["describe", "nearest", "show"]

SHOWN_PROBLEMS = 20
SHOWN_CHARACTERS = 60
SHOWN_KINDS = 8
"""Of a part with more kinds than these, half as many are named: a line of two dozen is not read."""

_UNKNOWN = {"extra_forbidden", "invalid_key"}
_BEGUN = {"union_tag_invalid", "union_tag_not_found", "value_error"}
_SHAPES = {"list_type", "tuple_type", "dict_type", "model_type", "model_attributes_type"}
_NATURES = {dict: "a mapping", str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_NEEDS = {
    "string_type": "text",
    "path_type": "a path",
    "finite_number": "a finite number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of less than 4300 digits",
    "int_type": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
}


@dataclass(frozen=True, slots=True)
class _Place:
    """A place in the recipe: its key, the types that the schema allows there, and the field they belong to."""

    key: str = ""
    options: tuple[Any, ...] = (Recipe,)
    field: FieldInfo | None = None
    union: str | None = None
    """Key of the first `X | Y` without a kind on the way here: pydantic reports each member's refusal."""


@dataclass(frozen=True, slots=True)
class _Problem:
    place: _Place
    error: ErrorDetails


def describe(error: ValidationError) -> str:
    """All problems of a recipe, a line each: key, what was got, what is needed, what to do."""
    problems = _without_echoes([_Problem(_place(found["loc"]), found) for found in error.errors(include_url=False)])
    lines = list(dict.fromkeys(_line(group) for group in problems))
    if len(lines) > SHOWN_PROBLEMS:
        lines[SHOWN_PROBLEMS:] = [f"... and {len(lines) - SHOWN_PROBLEMS} more problems of this recipe."]
    return "\n".join(lines)


def nearest(word: object, known: Iterable[str]) -> str | None:
    """The known name that a slip of the finger would turn into `word`, or None."""
    matches = difflib.get_close_matches(str(word).lower(), list(known), n=1) if isinstance(word, str) else []
    return matches[0] if matches else None


def show(value: object) -> str:
    """A value as a YAML author would name it, short and on one line whatever it holds."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _place(loc: Sequence[int | str]) -> _Place:
    """Follows pydantic's path through the schema. The members of unions that it names there are no keys."""
    place = _Place()
    for part in loc:
        if part == "[key]":
            continue
        place = _enter(place, part) if len(place.options) > 1 else _step(place, part)
    return place


def _enter(place: _Place, label: int | str) -> _Place:
    if _tagged(place.options):
        return replace(place, options=tuple(model for model in place.options if label in _kinds([model])))
    shape = str(label).partition("[")[0]
    chosen = tuple(option for option in place.options if _shape(option) == shape)
    return replace(place, options=chosen, union=place.union or place.key)


def _shape(option: Any) -> str:
    """How pydantic begins the label of a union's member: `list[...]`, `literal[...]`, `tagged-union[...]`, `int`."""
    if _tagged([option]):
        return "tagged-union"
    origin = get_origin(option) or option
    return "literal" if origin is Literal else str(getattr(origin, "__name__", ""))


def _step(place: _Place, part: int | str) -> _Place:
    option = place.options[0] if place.options else None
    if _is_model(option):
        field = option.model_fields.get(str(part))
        options = _options(field.annotation) if field else ()
        return replace(place, key=_join(place.key, part), options=options, field=field)
    if get_origin(option) in (list, tuple):
        return replace(place, key=f"{place.key}[{part}]", options=_options(get_args(option)[0]), field=None)
    options = _options(get_args(option)[1]) if get_origin(option) is dict else ()
    return replace(place, key=_join(place.key, part), options=options, field=None)


def _join(key: str, part: int | str) -> str:
    word = str(part) if re.fullmatch(r"[\w-]{1,60}", str(part)) else show(part)
    return f"{key}.{word}" if key else word


def _options(annotation: Any) -> tuple[Any, ...]:
    """Members of a union other than None; a single type is a union of one."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(option for member in get_args(annotation) for option in _options(member))
    return () if annotation is NoneType else (annotation,)


def _is_model(option: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(option, type) and issubclass(option, BaseModel)


def _tagged(options: Sequence[Any]) -> bool:
    return bool(options) and all(_is_model(option) and "kind" in option.model_fields for option in options)


def _kinds(options: Sequence[Any]) -> list[str]:
    return [kind for model in options for kind in get_args(model.model_fields["kind"].annotation)]


def _nature(options: Sequence[Any]) -> str:
    """What a value of these types looks like in YAML."""
    kinds = _kinds([option for option in options if _tagged([option])])
    plain = [_nature_of(option) for option in options if not _tagged([option])]
    return _either([*plain, f"a mapping with kind: {_choice(kinds)}"] if kinds else plain)


def _nature_of(option: Any) -> str:
    if get_origin(option) is Literal:
        return _either([str(choice) for choice in get_args(option)])
    if get_origin(option) is list:
        items = _options(get_args(option)[0])
        return f"a list of mappings, each with kind: {_choice(_kinds(items))}" if _tagged(items) else "a list"
    if get_origin(option) is tuple:
        return f"a list of {len(get_args(option))}"
    if _is_model(option):
        return f"a mapping with kind: {_choice(_kinds([option]))}" if _tagged([option]) else "a mapping"
    return _NATURES.get(get_origin(option) or option, "another value")


def _either(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _choice(kinds: Sequence[str]) -> str:
    if len(kinds) <= SHOWN_KINDS:
        return _either(kinds)
    return f"{', '.join(kinds[: SHOWN_KINDS // 2])}, ... ({len(kinds)} kinds; docs/recipes.md lists them)"


def _without_echoes(problems: Sequence[_Problem]) -> list[list[_Problem]]:
    """Groups what pydantic says several times: each member of a union refuses, a misspelt key is also a missing one."""
    meant = {_join(_parent(found), guess) for found in problems if (guess := _guess(found))}
    entered = {found.place.union for found in problems if found.place.union != found.place.key}
    groups: dict[str, list[_Problem]] = {}
    for found in problems:
        key = found.place.key
        if found.error["type"] == "missing" and key in meant:
            continue
        if found.place.union != key:
            groups[str(found.error["loc"])] = [found]
        elif key not in entered:
            groups.setdefault(key, []).append(found)
    return list(groups.values())


def _line(group: Sequence[_Problem]) -> str:
    # Of a number or a mapping with a kind, the refusal by the number says nothing once a mapping was begun.
    problem = next((found for found in group if found.error["type"] in _BEGUN), group[0])
    match problem.error["type"]:
        case unknown if unknown in _UNKNOWN:
            return _unknown(problem)
        case "missing":
            return _missing(problem.place)
        case "union_tag_invalid" | "union_tag_not_found":
            return _wrong_kind(problem)
        case "value_error":
            return _rule(problem)
        case _:
            return _wrong_value(group)


def _unknown(problem: _Problem) -> str:
    if guess := _guess(problem):
        return f"{problem.place.key}: unknown key. Did you mean {guess}?"
    return f"{problem.place.key}: unknown key. Known here: {', '.join(_siblings(problem))}."


def _missing(place: _Place) -> str:
    if place.field is not None and place.field.description:
        return f"{place.key}: missing. {_sentence(place.field.description)}"
    model = place.options[0] if len(place.options) == 1 and _is_model(place.options[0]) else None
    purpose = f" {_sentence(model.__doc__)}" if model and model.__doc__ else ""
    return f"{place.key}: missing. Give {_nature(place.options)}.{purpose}"


def _wrong_kind(problem: _Problem) -> str:
    kinds = _kinds(problem.place.options)
    value = problem.error["input"]
    key = _join(problem.place.key, "kind")
    if not isinstance(value, dict) or "kind" not in value:
        return f"{key}: missing. Give {_choice(kinds)}."
    return f"{key}: got {show(value['kind'])}, needs {_choice(kinds)}.{_did_you_mean(value['kind'], kinds)}"


def _rule(problem: _Problem) -> str:
    """A rule of the schema's own, already in the house's words; it may begin with a key relative to its model."""
    text = str(problem.error["ctx"]["error"]) if "ctx" in problem.error else problem.error["msg"]
    key = problem.place.key
    names = problem.place.options[0].model_fields if problem.place.options else {}
    relative = re.match(r"(\w+)[^ ]*: ", text)
    if relative and relative[1] in names:
        return f"{key}.{text}." if key else f"{text}."
    return f"{key}: {text}." if key else f"{text}."


def _wrong_value(group: Sequence[_Problem]) -> str:
    place, error = group[0].place, group[0].error
    got = show(error["input"]) + (" as a key" if error["loc"][-1] == "[key]" else "")
    if error["type"] == "string_pattern_mismatch" and place.field and place.field.description:
        return f"{place.key}: got {got}, which does not fit. {_sentence(place.field.description)}"
    needs = list(dict.fromkeys(_need(found) for found in group))
    choices = [word for found in group if found.error["type"] == "literal_error" for word in _literals(found.place)]
    return f"{place.key}: got {got}, needs {' or '.join(needs)}.{_did_you_mean(error['input'], choices)}{_hint(place)}"


def _need(problem: _Problem) -> str:
    kind, message, context = problem.error["type"], problem.error["msg"], problem.error.get("ctx", {})
    if kind in _SHAPES:
        return _nature(problem.place.options)
    if kind == "literal_error":
        return _either(_literals(problem.place))
    if kind == "too_short":
        return f"{context['min_length']} or more of them"
    if kind == "too_long":
        return f"{context['max_length']} or fewer of them"
    bound = message.removeprefix("Input should be ")
    return _NEEDS.get(kind) or (f"a number {bound}" if bound.startswith(("greater", "less")) else bound)


def _literals(place: _Place) -> list[str]:
    return [str(choice) for option in place.options for choice in get_args(option)]


def _siblings(problem: _Problem) -> list[str]:
    options = _place(problem.error["loc"][:-1]).options
    return list(options[0].model_fields) if options and _is_model(options[0]) else []


def _guess(problem: _Problem) -> str | None:
    unknown = problem.error["type"] in _UNKNOWN
    return nearest(problem.error["loc"][-1], _siblings(problem)) if unknown else None


def _parent(problem: _Problem) -> str:
    return _place(problem.error["loc"][:-1]).key


def _did_you_mean(word: object, known: Iterable[str]) -> str:
    guess = nearest(word, known)
    return f" Did you mean {guess}?" if guess else ""


def _hint(place: _Place) -> str:
    """The field's own words, and its default where that is a plain value."""
    if place.field is None:
        return ""
    detail = f" {_sentence(place.field.description)}" if place.field.description else ""
    default = place.field.default
    if place.field.is_required() or default == "" or not isinstance(default, str | int | float | NoneType):
        return detail
    return f"{detail} Change it or leave it out" + ("." if default is None else f" for the default, {show(default)}.")


def _sentence(text: str) -> str:
    line = " ".join(text.split())
    return line if line.endswith((".", "?", "!")) else f"{line}."
