"""Is it right? Answers judged by values, tests, forms and functions. Refuses to call wrong what it could not judge."""

from potstill.verify.code import code_verifier
from potstill.verify.function import function_verifier
from potstill.verify.gym import gym_verifier
from potstill.verify.label import label_verifier
from potstill.verify.math import math_verifier
from potstill.verify.pattern import pattern_verifier
from potstill.verify.rejection import Difficulty, choose, pass_at_k
from potstill.verify.sandbox import describe_sandbox
from potstill.verify.schema import schema_verifier
from potstill.verify.verdict import Verdict, Verifier, verify_all

__all__ = [
    "Difficulty",
    "Verdict",
    "Verifier",
    "choose",
    "code_verifier",
    "describe_sandbox",
    "function_verifier",
    "gym_verifier",
    "label_verifier",
    "math_verifier",
    "pass_at_k",
    "pattern_verifier",
    "schema_verifier",
    "verify_all",
]
