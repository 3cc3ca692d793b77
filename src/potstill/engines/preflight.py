"""Before anything is paid: is there an endpoint, does it take the key, does it serve the model? And why a run stops.

Refuses to send a request that an endpoint could answer. Every complaint is one line and names the key of the recipe.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Protocol

from potstill.engines.completions import same_model
from potstill.engines.replies import LONGEST_WAIT_S, Reply, error_of, judge, reason_of
from potstill.engines.transport import is_azure
from potstill.errors import TeacherError

__all__ = ["Served", "explain_stop", "look_around"]

_SHOWN = 8
_NO_PATH = frozenset({404, 405, 501})
_NO_LIST = _NO_PATH | {401, 403}
"""Keys may be good for asking, and not for the list of models."""
_UNKNOWN_MODEL = re.compile(
    r"model_not_found|(invalid|unknown|no such|unable to access|not a valid) model|"
    r"model.{0,200}?(not found|not exist|not (a )?valid|n't exist|not available|not supported)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Served:
    """Names of the models that an endpoint lists; empty where it lists none. `is_vllm`: it says that vLLM serves."""

    models: tuple[str, ...] = ()
    is_vllm: bool = False


class Asked(Protocol):
    """What is asked of an endpoint here."""

    model: str
    base_url: str
    has_key: bool

    @property
    def path(self) -> str:
        """Where requests go."""
        ...

    async def get(self, path: str) -> Reply:
        """What stands there."""
        ...

    async def send(self, body: dict[str, Any]) -> Reply:
        """What is answered to `body`."""
        ...


async def look_around(endpoint: Asked) -> Served:
    """The models that are served. Raises TeacherError where the endpoint cannot be used."""
    reply = await endpoint.get("/models")
    served = _served(reply)
    is_listed = is_azure(endpoint.base_url) or any(_is_called(endpoint.model, name) for name in served.models)
    if served.models and is_listed:
        return served
    if served.is_vllm:  # it looks at a model's name last, and lists all that it has
        raise TeacherError(_not_served(endpoint, served.models))
    if reply.status in _NO_LIST or not reply.problem:
        # No question is in it, so that nothing is answered or paid; but a wrong address or key shows itself.
        reply = await endpoint.send({"model": endpoint.model})
        if served.models and _is_unknown_model(reply):
            raise TeacherError(_not_served(endpoint, served.models))
        if reply.status in _NO_PATH or not reply.problem:
            raise TeacherError(explain_stop(endpoint, reply))
    if reply.status == 0 or (reply.status in (502, 503, 504) and judge(reply) == "retry"):
        raise TeacherError(
            f"teacher.base_url: nothing answers at {endpoint.base_url} ({reason_of(reply)}). Start the server and wait "
            "until it is up, or mend the address."
        )
    if judge(reply) == "stop":
        raise TeacherError(explain_stop(endpoint, reply))
    return served


def explain_stop(endpoint: Asked, reply: Reply) -> str:
    """Why no request can succeed, and what to do: one line."""
    got, where = reason_of(reply), endpoint.base_url
    if reply.status in (401, 403):
        if not endpoint.has_key:
            return f"teacher.api_key: {where} asks for a key, and none is given ({got}). Name the variable that has it."
        return f"teacher.api_key: {where} refuses the key in this environment variable ({got}). Put a valid one there."
    if reply.status == 402 or (reply.status == 429 and (reply.headers.retry_after_s or 0.0) <= LONGEST_WAIT_S):
        return f"teacher.base_url: the account at {where} has no credit left ({got}). Top it up, and go on."
    if reply.status == 429 or reply.status >= 500:
        hours = (reply.headers.retry_after_s or 0.0) / 3600.0
        return f"teacher.base_url: {where} asks to wait {hours:.1f} hours ({got}). The same command continues then."
    error = error_of(reply.raw)
    if reply.status == 404 and "model" in f"{error['code']} {error['message']}".lower():
        return f"teacher.model: {endpoint.model!r} is not served at {where} ({got}). Name a model that is."
    what = got or "HTTP 200, but no answer of the protocol"
    hint = "Leave its last part out" if where.endswith("/completions") else "It usually ends in /v1"
    return f"teacher.base_url: {where} has no {endpoint.path} ({what}). {hint}; mend the address, or set teacher.api."


def _served(reply: Reply) -> Served:
    if reply.problem:
        return Served()
    try:
        listed = json.loads(reply.raw)["data"]
        names = tuple(str(each["id"]) for each in listed)
    except (ValueError, KeyError, TypeError, RecursionError):
        return Served()
    return Served(names, bool(names) and all(each.get("owned_by") == "vllm" for each in listed))


def _is_called(model: str, name: str) -> bool:
    """Gateways list patterns (`openai/*`), others put a folder before (`models/`) or a tag behind (`:latest`).

    Routers take a way of serving behind a listed name (`:free`, `:nitro`).
    """
    if any(fnmatchcase(asked, name) or name.endswith("/" + asked) for asked in (model, model.partition(":")[0])):
        return True
    return ":" in name and same_model(model, name)


def _is_unknown_model(reply: Reply) -> bool:
    """Whether a request was refused because of its model's name."""
    error = error_of(reply.raw)
    said = f"{error['code']} {error['message']}".lower()
    return reply.status in (400, 404, 422) and bool(_UNKNOWN_MODEL.search(said))


def _not_served(endpoint: Asked, names: Sequence[str]) -> str:
    near = get_close_matches(endpoint.model, names, n=_SHOWN, cutoff=0.4)
    shown = [*near, *sorted(set(names) - set(near))][:_SHOWN]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return (
        f"teacher.model: {endpoint.model!r} is not served at {endpoint.base_url}, which serves "
        f"{', '.join(shown)}{more}. Name one of these."
    )
