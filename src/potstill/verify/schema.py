"""Answers that must be JSON of a form. Refuses what JSON's readers disagree on, and schemas that point elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from potstill.errors import MissingExtra, RecipeError
from potstill.verify.extract import last_block
from potstill.verify.verdict import Row, Verdict, Verifier
from potstill.verify.worker import Workers

__all__ = ["make_validation", "read_json", "schema_verifier"]

TIMEOUT_S = 5.0
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


def schema_verifier(*, schema: Mapping[str, Any], timeout_s: float = TIMEOUT_S) -> Verifier:
    """The answer, or the JSON block in it, is JSON that fits a JSON Schema (2020-12, or what its $schema names).

    A key that comes twice, NaN and numbers beyond float64 make it wrong; a schema that takes longer is unknown. Raises
    RecipeError for a schema that is none or refers to anything but itself, MissingExtra without jsonschema.
    """
    workers = Workers(make_validation, {"schema": dict(schema)}, timeout_s=timeout_s)

    def judge(answer: str, row: Row) -> Verdict:  # noqa: ARG001
        text = last_block(answer, ("json",)).strip()
        reply = workers.ask(text)
        if reply.failure:
            return Verdict(None, reply.failure, extracted=text)
        return Verdict(not reply.value, reply.value, extracted=text)

    return Verifier(judge, workers.close)


def make_validation(schema: Mapping[str, Any]) -> Callable[[str], str]:
    """A function that says why a text does not fit, empty where it does. Raises RecipeError, MissingExtra."""
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import Draft202012Validator, validator_for
        from referencing import Registry, Resource
        from referencing.exceptions import Unresolvable
        from referencing.jsonschema import DRAFT202012
    except ImportError:
        raise MissingExtra('generate.verify.kind=json_schema needs jsonschema: pip install "potstill"') from None
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise RecipeError(f"generate.verify.file: {error.json_path}: {error.message}. Mend it.") from None
    resolver = Registry().with_resource("", Resource.from_contents(schema, DRAFT202012)).resolver()
    for reference in _references(schema):
        try:
            resolver.lookup(reference)
        except Unresolvable:
            raise RecipeError(
                f"generate.verify.file: refers to {reference}, which is not in it. Put it under $defs; "
                "nothing is fetched."
            ) from None
    validator = kind(schema, registry=Registry())

    def explain(text: str) -> str:
        try:
            value = read_json(text)
        except (ValueError, RecursionError) as error:
            return f"no JSON: {error}"
        fault = next(iter(validator.iter_errors(value)), None)
        return "" if fault is None else f"{fault.json_path}: {fault.message}"[:300]

    return explain


def read_json(text: str) -> Any:
    """The value that a text is. Raises ValueError for what is no JSON, a key that comes twice, and infinite numbers."""
    return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse, parse_float=_number)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond float64")
    return value


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        for name, value in schema.items():
            if name in _REFERENCES and isinstance(value, str):
                yield value
            else:
                yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)
