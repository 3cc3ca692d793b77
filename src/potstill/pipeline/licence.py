"""What the terms of its teachers say about a recipe, before anything is spent. Not legal advice.

Refuses an API whose terms forbid training on its answers, or are unknown, unless the recipe states the permission.
Models that run here are never refused: what their licences ask for is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from potstill.errors import RecipeError
from potstill.pipeline.chain import load_chain, phases_of
from potstill.recipes import Recipe
from potstill.recipes.endpoints import OpenAITeacher
from potstill.recipes.schema import FinetuneTeacher, LocalTeacher, MixtureTeacher
from potstill.recipes.terms import UNKNOWN, Obligation, Rule, Use, find_terms, host_of
from potstill.report.terms import TermsFacts

__all__ = ["Finding", "Verdict", "check_terms", "describe_terms", "tell_terms"]

HERE = "weights that run here"
_WORDS: dict[Use, str] = {
    "allowed": "training on its answers is allowed",
    "conditional": "training on its answers is allowed, under obligations",
    "ask": "whether its answers may train a model has to be asked",
    "forbidden": "its answers may not train a model",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one teacher's terms say about one training.

    key         of the model in the recipe
    access      host of its API, or `weights that run here`
    use, clause, obligations  of the rule, or of its exception for this task
    permission  as the recipe states it, word for word; None where it states none
    """

    key: str
    model: str
    access: str
    rule: Rule
    use: Use
    clause: str
    obligations: tuple[Obligation, ...]
    permission: str | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """What is known of the terms of all teachers of a recipe, of its phases and of its assistants; each once."""

    verdicts: tuple[Verdict, ...]


def check_terms(recipe: Recipe) -> Finding:
    """What the terms of the recipe's teachers say.

    Raises:
        RecipeError: an API's terms forbid training on its answers, or are unknown, and no permission is stated.
    """
    found: dict[tuple[str, str, str], Verdict] = {}
    for verdict in _verdicts(recipe):
        if verdict.access != HERE and verdict.use in ("forbidden", "ask") and verdict.permission is None:
            raise RecipeError(_refusal(verdict))
        found.setdefault((verdict.model, verdict.access, verdict.use), verdict)
    return Finding(tuple(found.values()))


def describe_terms(finding: Finding) -> list[str]:
    """Lines for a reader: each teacher's terms, what they oblige to, and what the recipe states."""
    lines = []
    for verdict in finding.verdicts:
        lines.append(
            f"terms of {verdict.model} ({verdict.access}): {_WORDS[verdict.use]}: {verdict.clause} "
            f"({_origin(verdict.rule)})"
        )
        lines += [f"  - {obligation.text}" for obligation in verdict.obligations]
        if verdict.permission is not None:
            lines.append(f"  - permission that the recipe states: {' '.join(verdict.permission.split())}")
    return [*lines, "  (not legal advice)"] if lines else []


def tell_terms(finding: Finding) -> tuple[TermsFacts, ...]:
    """The same for the model card."""
    return tuple(
        TermsFacts(
            model=verdict.model,
            access=verdict.access,
            rule=verdict.rule.id,
            who=verdict.rule.who,
            use=_WORDS[verdict.use],
            clause=verdict.clause,
            source=verdict.rule.source,
            effective=verdict.rule.effective.isoformat() if verdict.rule.effective else None,
            checked=verdict.rule.checked.isoformat(),
            obligations=tuple(obligation.text for obligation in verdict.obligations),
            permission=verdict.permission,
        )
        for verdict in finding.verdicts
    )


def _verdicts(recipe: Recipe) -> Iterator[Verdict]:
    for number, phase in enumerate(phases_of(recipe)):
        yield from _of_training(phase, f"phases[{number}].")
    for place, assistant in enumerate((recipe, *load_chain(recipe))):
        where = f"{assistant.name}: " if place else ""
        yield from _of_training(assistant, where)


def _of_training(recipe: Recipe, where: str) -> Iterator[Verdict]:
    """Of an API that teaches, in any case; of models that run here, where their licence is known."""
    teacher = recipe.teacher
    if isinstance(teacher, OpenAITeacher):
        rule = find_terms(teacher.model, teacher.base_url)
        stated = teacher.permission if (teacher.permission or "").strip() else None
        access = host_of(teacher.base_url) or teacher.base_url
        found = Verdict(f"{where}teacher.model", teacher.model, access, rule, rule.use, rule.clause, (), stated)
        yield _apply(found, recipe.task.kind)
        return
    for key, model in _models_here(recipe):
        rule = find_terms(model, None)
        if rule.id != UNKNOWN:
            found = Verdict(f"{where}{key}", model, HERE, rule, rule.use, rule.clause, ())
            yield _apply(found, recipe.task.kind)


def _models_here(recipe: Recipe) -> Iterator[tuple[str, str]]:
    match recipe.teacher:
        case LocalTeacher(model=model) | FinetuneTeacher(model=model):
            yield "teacher.model", model
        case MixtureTeacher(members=members):
            for number, member in enumerate(members):
                yield f"teacher.members[{number}].model", member.model


def _apply(verdict: Verdict, task: str) -> Verdict:
    """The verdict with the rule's obligations; or those of its exception for this task, under which it is allowed."""
    rule = verdict.rule
    for exemption in rule.exceptions:
        if task in exemption.tasks:
            extra = (*exemption.obligations, *rule.obligations)
            use: Use = "conditional" if extra else "allowed"
            return replace(verdict, use=use, clause=exemption.clause, obligations=extra)
    return replace(verdict, obligations=tuple(rule.obligations))


def _refusal(verdict: Verdict) -> str:
    reason = "do not allow to train a model on its answers" if verdict.use == "forbidden" else "are not clear"
    return (
        f"{verdict.key}: the terms of {verdict.model!r} at {verdict.access} {reason}: {verdict.clause} "
        f"({_origin(verdict.rule)}). Use another teacher, or state in {verdict.key.removesuffix('model')}permission on "
        "what ground its answers may be used."
    )


def _origin(rule: Rule) -> str:
    """Whose terms, where they stand, and when they were looked at."""
    dates = [f"effective {rule.effective}"] if rule.effective else []
    return ", ".join([rule.who, *([rule.source] if rule.source else []), *dates, f"checked {rule.checked}"])
