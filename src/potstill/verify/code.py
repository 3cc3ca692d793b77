"""Python answers, judged by the row's tests. Refuses other languages, and to run anything outside the sandbox.

Right is an answer after which the tests ran to their end. Tests are as strong as what they ask: they share the
interpreter with the answer, and an object of the answer's that claims to equal everything passes `==`.
"""

from __future__ import annotations

from potstill.verify.extract import last_block
from potstill.verify.sandbox import Outcome, sandbox_means, try_code
from potstill.verify.verdict import Row, Verdict, Verifier, cell_of

__all__ = ["code_verifier"]

_MARK = 200


def code_verifier(*, tests: str = "tests", timeout_s: float = 10.0, memory_mb: int = 512) -> Verifier:
    """The answer's code, then the tests in the column `tests`, end without raising (or leaving) in the sandbox.

    `timeout_s` of processor time (rounded up to seconds; more is wrong), twice as much of wall time (more is unknown:
    the machine may have been busy). Raises RunError where this machine cannot shut code in; DataError for a row
    without tests.
    """
    means = sandbox_means()

    def judge(answer: str, row: Row) -> Verdict:
        checks = str(cell_of(row, tests, "generate.verify.tests"))
        code = last_block(answer, ("python", "py", "python3"))
        if not checks.strip():
            return Verdict(None, "the row's tests are empty", extracted=code)
        outcome = try_code(code, checks, cpu_s=timeout_s, wall_s=2 * timeout_s, memory_mb=memory_mb, means=means)
        return _verdict(outcome, code, timeout_s)

    return Verifier(judge)


def _verdict(outcome: Outcome, code: str, timeout_s: float) -> Verdict:
    lines = outcome.output.strip().splitlines()
    said = lines[-1][:_MARK] if lines else "left before the tests ended"
    match outcome.ending:
        case "passed":
            return Verdict(True, extracted=code)
        case "unusable":
            return Verdict(None, f"the row's tests are not Python: {said}", extracted=code)
        case "wall":
            return Verdict(None, f"took longer than {2 * timeout_s:g} s of wall time", extracted=code)
        case "processor":
            return Verdict(False, f"took more than {timeout_s:g} s of processor time", extracted=code)
        case "stopped":
            return Verdict(False, said, extracted=code)
