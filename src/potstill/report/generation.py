"""What a teacher has written, as rows for the page: how much was asked, kept and dropped, and what it cost.

Refuses to add up what was not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["GenerationFacts", "generation_rows"]


@dataclass(frozen=True, slots=True)
class GenerationFacts:
    """What the stage generate has counted.

    prompts, kept   by split: prompts asked, and answers that are learned or tested on
    prompts_dropped, dropped, masked  by reason or kind: rows and prompts not asked, answers not kept, personal data
    effective       clusters of training prompts that are no near duplicates of each other, of how many
    verdicts        right, wrong and unknown answers; empty where nobody verified
    difficulty      prompts by the share of their answers that were right, in bins of equal width
    pass_at         by k, the chance that one of k answers to a prompt was right
    unsolved, leaks prompts never solved; texts removed because a test has them too
    reasoning       answers kept, by how their reasoning was shown: raw, summary, absent
    requests        by what became of them, in words
    tokens, usd     spent in the run's requests; usd None where no price is known
    asked_again     answers that were in the ledger and cost nothing
    """

    prompts: Mapping[str, int]
    kept: Mapping[str, int]
    prompts_dropped: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    masked: Mapping[str, int] = field(default_factory=dict)
    effective: tuple[int, int] | None = None
    verdicts: Mapping[str, int] = field(default_factory=dict)
    difficulty: tuple[int, ...] = ()
    pass_at: Mapping[int, float] = field(default_factory=dict)
    unsolved: int = 0
    leaks: int = 0
    reasoning: Mapping[str, int] = field(default_factory=dict)
    served: Mapping[str, int] = field(default_factory=dict)
    asked: int = 0
    found_before: int = 0
    retried: Mapping[str, int] = field(default_factory=dict)
    unusable: Mapping[str, int] = field(default_factory=dict)
    tokens: int = 0
    usd: float | None = None


def generation_rows(facts: GenerationFacts) -> list[tuple[str, str]]:
    """(what, how much), in the order of the work."""
    rows = [
        ("prompts", _counts(facts.prompts)),
        ("prompts left out", _counts(facts.prompts_dropped) or "none"),
    ]
    if facts.effective:
        clusters, texts = facts.effective
        rows.append(("effective size", f"{clusters:,} of {texts:,} training prompts are no near duplicates"))
    rows += [
        ("answers asked", f"{facts.asked:,}, of which {facts.found_before:,} were in the ledger"),
        ("answered by", _counts(facts.served) or "nobody"),
        ("asked again", _counts(facts.retried) or "none"),
        ("no usable answer", _counts(facts.unusable) or "none"),
        ("spent now", f"{facts.tokens:,} tokens, {'price unknown' if facts.usd is None else f'{facts.usd:,.4f} USD'}"),
    ]
    rows += _verified(facts)
    rows += [
        ("answers left out", _counts(facts.dropped) or "none"),
        (
            "shared with a test",
            f"{facts.leaks:,} texts removed; generate/leaks.json shows them" if facts.leaks else "none",
        ),
        ("answers kept", _counts(facts.kept)),
        ("their reasoning", _counts(facts.reasoning)),
    ]
    if facts.masked:
        rows.append(("personal data masked", _counts(facts.masked)))
    return rows


def _verified(facts: GenerationFacts) -> list[tuple[str, str]]:
    if not facts.verdicts:
        return [("verified", "nobody verified the answers")]
    spread = ", ".join(f"{count:,}" for count in facts.difficulty)
    unsolved = f"{facts.unsolved:,} prompts; generate/unsolved.json names them" if facts.unsolved else "none"
    chances = ", ".join(f"{k}: {share:.1%}" for k, share in facts.pass_at.items())
    return [
        ("verified", _counts(facts.verdicts)),
        ("prompts by share right", f"{spread} (from 0 to 100 % in {len(facts.difficulty)} equal steps)"),
        *([("a right one among", chances)] if chances else []),
        ("never solved", unsolved),
    ]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{what}: {count:,}" for what, count in counts.items() if count)
