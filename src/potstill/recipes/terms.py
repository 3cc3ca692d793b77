"""What the terms of a teacher say about training on its answers: rules by access path, kept as data in terms.yaml.

Not legal advice. Refuses to take silence for consent: a path without a rule has the rule `unknown`, whose use is `ask`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from fnmatch import fnmatchcase
from functools import cache
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator
from ruamel.yaml import YAML

from potstill.recipes.part import Part

__all__ = ["UNKNOWN", "Exemption", "Obligation", "Rule", "Use", "find_terms", "host_of", "list_terms"]

Use = Literal["allowed", "conditional", "ask", "forbidden"]

UNKNOWN = "unknown"
"""Id of the rule for what no other is for."""

_SHARED = ip_network("100.64.0.0/10")
_PRIVATE_NAMES = ("localhost", "internal", "intranet", "lan", "local", "home.arpa")
_PATH = re.compile(r"[/~.]|[a-z]:[\\/]")
_DASHES = re.compile(r"[\s_:@]+|--+")


def _compiles(pattern: str) -> str:
    re.compile(pattern)
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]


class Obligation(Part):
    """What whoever trains on the answers takes upon themselves; it stands in the student's card."""

    kind: Literal["name_prefix", "notice", "users", "terms_propagate", "not_distributed", "non_commercial", "upstream"]
    """What sort of obligation it is."""
    text: str
    """In a sentence."""
    value: str | None = None
    """The prefix, the notice, the number of users, the terms."""


class Exemption(Part):
    """Tasks for which the rule does not hold."""

    tasks: Annotated[list[str], Field(min_length=1)]
    """`task.kind` of a recipe."""
    clause: str
    """What the terms say of these."""
    obligations: list[Obligation] = Field([])
    """On which conditions."""


class Rule(Part):
    """What the terms of one access path say, in short."""

    id: str
    """Its name."""
    who: str
    """Whose terms they are."""
    served: Literal["api", "weights"]
    """Whether they are the terms of a service, or the licence of weights."""
    hosts: list[str] = Field([])
    """Hosts of the service."""
    models: list[Pattern] = Field([])
    """What names of models look like, where the host does not decide."""
    use: Use
    """Whether a model may be trained on the answers."""
    clause: str
    """What the terms say, in our words."""
    source: Annotated[str, Field(pattern=r"^https://")] | None
    """Where they stand; null where nothing is known."""
    effective: date | None
    """Since when, where that is known."""
    checked: date
    """When the rule was last held against them."""
    obligations: list[Obligation] = Field([])
    """What follows from the use."""
    exceptions: list[Exemption] = Field([])
    """Tasks that are judged otherwise."""


class _Terms(Part):
    relays: list[str]
    rules: list[Rule]

    @model_validator(mode="after")
    def _each_is_found(self) -> _Terms:
        names = [rule.id for rule in self.rules]
        if len(set(names)) < len(names) or UNKNOWN not in names:
            raise ValueError(f"rules: ids must differ, and one be {UNKNOWN!r}")
        return self


def list_terms() -> tuple[Rule, ...]:
    """All rules, in the order of terms.yaml."""
    return tuple(_terms().rules)


def find_terms(model: str, base_url: str | None) -> Rule:
    """The rule for a model at a base URL, or, with None, for weights that run in this process.

    Whose API it is decides first. At an address of one's own, or at a relay, the model's name decides. At any other
    host a model that only its provider serves keeps its provider's terms; weights there come under terms of that host,
    which are unknown, and keep their licence's obligations besides.
    """
    named = _rule_of_model(model, weights_only=base_url is None)
    if base_url is None:
        return named
    host = host_of(base_url)
    if found := _rule_of_host(host):
        return _with_licence(found, named)
    if _fits(host, _terms().relays):
        return named.model_copy(update={"obligations": [*named.obligations, _upstream(host)]})
    if _is_private(host) or named.served == "api" or named.use == "forbidden":
        return named
    clause = f"whoever serves weights sets terms of their own, and potstill does not know those of {host or base_url!r}"
    return _with_licence(_unknown().model_copy(update={"clause": clause}), named)


def host_of(base_url: str) -> str:
    """The host of a URL, in lower case, without user, port and final dot; empty where there is none."""
    try:
        host = urlsplit(base_url).hostname or ""
    except ValueError:
        return ""
    return host.rstrip(".").lower()


@cache
def _terms() -> _Terms:
    text = Path(__file__).with_name("terms.yaml").read_text(encoding="utf-8")
    return _Terms.model_validate(YAML(typ="safe", pure=True).load(text))


def _unknown() -> Rule:
    return next(rule for rule in _terms().rules if rule.id == UNKNOWN)


def _rule_of_host(host: str) -> Rule | None:
    return next((rule for rule in _terms().rules if _fits(host, rule.hosts)), None)


def _fits(host: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(host, pattern) for pattern in patterns)


def _rule_of_model(model: str, *, weights_only: bool) -> Rule:
    """The rule whose pattern matches most of the last part of the name that any pattern matches."""
    rules = [rule for rule in _terms().rules if rule.served == "weights" or not weights_only]
    for part in _parts(model):
        lengths = [max((_length(pattern, part) for pattern in rule.models), default=0) for rule in rules]
        if longest := max(lengths):
            return rules[lengths.index(longest)]
    return _unknown()


def _length(pattern: str, part: str) -> int:
    # Whole words only: "tinyllama" is no Llama, and "claudia" no Claude.
    found = re.finditer(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", part)
    return max((len(match[0]) for match in found), default=0)


def _parts(model: str) -> Iterator[str]:
    """What may name the model, most exact first: of an id all parts, of a path not the folders around it."""
    lowered = model.strip().lower()
    parts = [part for part in re.split(r"[/\\]+", lowered) if part]
    if _PATH.match(lowered):
        # A cache of the hub keeps models--OWNER--NAME/snapshots/HASH; other folders may be named after anything.
        parts = [part for part in parts[:-1] if part.startswith("models--")] + parts[-1:]
    for part in reversed(parts):
        yield _DASHES.sub("-", part)


def _is_private(host: str) -> bool:
    """Whether the host is a machine of one's own: this one, or one without a public address or name."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        # A number without dots is an address, too, and may be a public one.
        alone = "." not in host and host[:1].isalpha()
        return alone or host.endswith(tuple(f".{name}" for name in _PRIVATE_NAMES))
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_private or address.is_loopback or address.is_link_local or address in _SHARED


def _with_licence(rule: Rule, named: Rule) -> Rule:
    """The rule of a host, with what the licence of the weights that it serves asks for besides."""
    if named.served == "api" or not named.obligations:
        return rule
    return rule.model_copy(update={"obligations": [*rule.obligations, *named.obligations]})


def _upstream(host: str) -> Obligation:
    text = f"The terms of {host}, and of whoever serves the model behind it, apply as well."
    return Obligation(kind="upstream", value=host, text=text)
