"""Where a text names a person's address, number or key, and the text without them.

Refuses to guess: numbers are checked by their checksums and forms, and what stands in a formula is left alone.
Every pattern takes linear time, whatever the text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Any, Literal, get_args

from potstill.errors import MissingExtra

__all__ = ["Kind", "Span", "find_pii", "mask_pii"]

Kind = Literal["key", "email", "iban", "card", "ssn", "ip", "phone"]
Finder = Callable[[str], Iterator[tuple[int, int]]]

_LOOKED_BACK = 40


@dataclass(frozen=True, slots=True)
class Span:
    """`text[start:stop]` is personal or secret, of this kind: a `Kind`, or an entity as presidio names it."""

    kind: str
    start: int
    stop: int


def find_pii(text: str) -> list[Span]:
    """What is personal or secret in `text`, in order and apart from each other.

    key    PEM private keys, JSON web tokens, and keys with the prefixes of well-known services
    email  addresses, but for git@HOST
    iban   of a known country, with its length and checksum (ISO 13616)
    card   13 to 19 digits of a known brand with their check digit (ISO/IEC 7812)
    ssn    US social security numbers with hyphens
    ip     public IPv4 and IPv6 addresses; not version numbers
    phone  international numbers (E.164: 8 to 15 digits), those written as in North America, with a trunk 0 as in
           Europe, or after a word such as "phone"
    """
    taken = bytearray(len(text))
    spans = []
    for kind in get_args(Kind):
        for start, stop in _FINDERS[kind](text):
            if not any(taken[start:stop]):
                taken[start:stop] = b"\x01" * (stop - start)
                spans.append(Span(kind, start, stop))
    return sorted(spans, key=lambda span: span.start)


def mask_pii(text: str, *, engine: Literal["patterns", "presidio"] = "patterns") -> tuple[str, Counter[str]]:
    """`text` with each span of `find_pii` replaced by its kind, as in [EMAIL], and how many there were of each kind.

    With `engine="presidio"` spans are those of presidio's analyzer for English, and kinds its entities.

    Raises:
        MissingExtra: presidio is not installed.
    """
    spans = find_pii(text) if engine == "patterns" else _find_by_presidio(text)
    parts, end = [], 0
    for span in spans:
        parts += [text[end : span.start], f"[{span.kind.upper()}]"]
        end = span.stop
    return "".join([*parts, text[end:]]), Counter(span.kind for span in spans)


def _matches(*patterns: str, check: Callable[[re.Match[str]], bool] = lambda _: True) -> Finder:
    """Where any of the patterns matches and the check agrees."""
    compiled = [re.compile(pattern) for pattern in patterns]

    def find(text: str) -> Iterator[tuple[int, int]]:
        return (match.span() for pattern in compiled for match in pattern.finditer(text) if check(match))

    return find


def _digits(match: re.Match[str]) -> str:
    return "".join(filter(str.isdigit, match[0]))


def _in_formula(match: re.Match[str]) -> bool:
    """Whether a sign of arithmetic stands beside it, or an equals sign after it."""
    before = match.string[max(0, match.start() - _LOOKED_BACK) : match.start()].rstrip()
    after = match.string[match.end() : match.end() + _LOOKED_BACK].lstrip()
    return before[-1:] in _ARITHMETIC or after[:1] in _ARITHMETIC | {"="}


_ARITHMETIC = {*"+*/^%\u00d7\u00f7\u2212", "\u221a"}


_PEM = "-----BEGIN (?:[A-Z0-9]{1,20} ){0,4}PRIVATE KEY(?: BLOCK)?-----"
_PREFIXED = (
    r"sk_(?:live|test)_[A-Za-z0-9]{16,}|rk_live_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|github_pat_[A-Za-z0-9_]{22,}|glpat-[A-Za-z0-9_-]{20,}|xox[abeprs]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{35}"
    r"|hf_[A-Za-z0-9]{30,}|npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_-]{50,}|SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}"
)
_KEY_START, _KEY_END = r"(?<![A-Za-z0-9_-])", r"(?![A-Za-z0-9_-])"
_find_prefixed_keys = _matches(
    # To its end; without one, as in an answer that was cut off, as far as lines look like one.
    rf"{_PEM}(?>(?:[^-]|-(?!----))*+-----END (?:[A-Z0-9]{{1,20}} ){{0,4}}PRIVATE KEY(?: BLOCK)?-----"
    r"|(?:\s++[A-Za-z0-9+/=]{32,}+)*+)",
    rf"{_KEY_START}eyJ[A-Za-z0-9_-]{{10,}}+\.eyJ[A-Za-z0-9_-]{{5,}}+\.[A-Za-z0-9_-]{{10,}}+",
    rf"{_KEY_START}(?>{_PREFIXED}){_KEY_END}",
)
# "sk-" begins names of styles, too: a key has a digit, and many letters without a hyphen.
_find_openai_keys = _matches(
    rf"{_KEY_START}sk-[A-Za-z0-9_-]{{20,}}+",
    check=lambda match: bool(re.search(r"[A-Za-z0-9_]{16}", match[0]) and re.search(r"\d", match[0])),
)


def _find_keys(text: str) -> Iterator[tuple[int, int]]:
    yield from _find_prefixed_keys(text)
    yield from _find_openai_keys(text)


_find_emails = _matches(
    # Not a product of matrices, X@layer.weight(x), and not the user of a repository.
    r"(?<![\w.%+-])(?!git@)[\w.%+-]{1,64}+@(?:(?!-)[\w-]{1,63}+\.){1,8}(?!\d)[^\W\d_]{2,24}+(?![\w(\[@-])(?!\.\w)"
)

_IBAN_LENGTHS = dict(
    re.findall(
        r"([A-Z]{2})(\d{2})",
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24 FI18 "
        "FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 "
        "LU20 LV21 LY25 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SE24 "
        "SI19 SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20",
    )
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]){11,30}")


def _find_ibans(text: str) -> Iterator[tuple[int, int]]:
    for match in _IBAN.finditer(text):
        places = [place for place in range(*match.span()) if text[place].isalnum()]
        length = int(_IBAN_LENGTHS.get(match[0][:2], 0))
        if not length or len(places) < length:
            continue
        stop = places[length - 1] + 1
        letters = "".join(text[place] for place in places[:length])
        number = int("".join(str(int(letter, 36)) for letter in letters[4:] + letters[:4]))
        if number % 97 == 1 and not text[stop : stop + 1].isalnum():
            yield match.start(), stop


def _is_card(match: re.Match[str]) -> bool:
    digits = _digits(match)
    brand = re.fullmatch(
        r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d*|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}"
        r"|(?:6011|65\d\d|64[4-9]\d|35\d\d)\d{12}|62\d{14,17}",
        digits,
    )
    if not brand or (digits[0] in "25" and len(digits) != 16) or len(set(digits)) == 1 or _in_formula(match):
        return False
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


_NUMBER_START, _NUMBER_END = r"(?<![\w.,-])", r"(?![\w-]|[.,]\d)"
_find_cards = _matches(
    rf"{_NUMBER_START}\d{{13,19}}+{_NUMBER_END}",
    rf"{_NUMBER_START}\d{{4}}([ -])\d{{4}}\1\d{{4}}\1\d{{4}}(?:\1\d{{3}})?{_NUMBER_END}",
    rf"{_NUMBER_START}\d{{4}}([ -])\d{{6}}\1\d{{4,5}}{_NUMBER_END}",
    check=_is_card,
)
_find_ssns = _matches(
    rf"{_NUMBER_START}(?!000|666|9)\d{{3}}-(?!00)\d{{2}}-(?!0000)\d{{4}}{_NUMBER_END}",
    check=lambda match: not _in_formula(match),
)

_VERSION = re.compile(
    r"(?:\b(?:version|ver|v|release|build|firmware|section|chapter|figure|clause)[.:= ]*|\w/|[<>=~^]=? ?)$", re.I
)


def _is_public_ip4(match: re.Match[str]) -> bool:
    parts = match[0].split(".")
    # 1.2.3.4 numbers a version or a section; 8.8.8.8 does not.
    if max(map(len, parts)) == 1 and len(set(parts)) > 1:
        return False
    try:
        public = IPv4Address(match[0]).is_global
    except AddressValueError:
        return False
    return public and not _VERSION.search(match.string[max(0, match.start() - _LOOKED_BACK) : match.start()])


def _is_public_ip6(match: re.Match[str]) -> bool:
    try:
        return IPv6Address(match[0]).is_global
    except AddressValueError:
        return False


_find_ip4 = _matches(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d|-\w)", check=_is_public_ip4)
# All that are given out begin with 2 or 3: anything else with colons is a time, a scope or a hash.
_find_ip6 = _matches(
    r"(?<![\w:.])[23][0-9A-Fa-f]{3}(?=:)(?::{1,2}[0-9A-Fa-f]{1,4}){0,7}(?:::)?(?![\w:])", check=_is_public_ip6
)


def _find_ips(text: str) -> Iterator[tuple[int, int]]:
    yield from _find_ip4(text)
    yield from _find_ip6(text)


_PHONE_WORD = re.compile(
    r"\b(?:tel|telephone|phone|mobile|cell|fax|whatsapp|sms|call)\b"
    r"(?:\s*\b(?:number|no|nr|is|at|on|me|us|him|her|them)\b)*[\s.:#=(]*$",
    re.I,
)


def _is_international(match: re.Match[str]) -> bool:
    digits = _digits(match).removeprefix("00")
    before = match.string[max(0, match.start() - _LOOKED_BACK) : match.start()].rstrip()
    # "7 +4930123456" and "x + 4930123456" are sums.
    summand = bool(re.search(r"(?:[\d)\]=]|\b\w)$", before)) or _in_formula(match)
    american = digits[0] != "1" or (len(digits) == 11 and digits[1] in "23456789")
    return 8 <= len(digits) <= 15 and american and not summand


def _is_national(match: re.Match[str]) -> bool:
    return 9 <= len(_digits(match)) <= 12 and not _in_formula(match)


def _is_called(match: re.Match[str]) -> bool:
    """Whether it stands after a word for a telephone, and is no date."""
    before = match.string[max(0, match.start() - _LOOKED_BACK) : match.start()]
    date = re.fullmatch(r"(?:19|20)\d\d([-/.])\d{1,2}\1\d{1,2}|\d{1,2}([-/.])\d{1,2}\2(?:19|20)\d\d", match[0])
    return 7 <= len(_digits(match)) <= 15 and not date and not _in_formula(match) and bool(_PHONE_WORD.search(before))


_GAP = r"[ .\u00a0/-]"
_find_international = _matches(
    rf"(?<![\w+.])\+[1-9](?:\)?{_GAP}?\(?\d){{7,15}}(?![\w-]|[.,]\d)",
    rf"(?<![\w+.,-])00[1-9]\d{{0,2}}{_GAP}(?:{_GAP}?\d){{6,13}}(?![\w-]|[.,]\d)",
    check=_is_international,
)
_find_national = _matches(
    rf"(?<![\w.,+-])(?:1[ .-])?(?:\([2-9]\d\d\) ?[2-9]\d\d[-. ]|[2-9]\d\d([-.])[2-9]\d\d\1)\d{{4}}{_NUMBER_END}",
    rf"{_NUMBER_START}0[1-9]([ .-])\d\d\1\d\d\1\d\d\1\d\d{_NUMBER_END}",
    rf"{_NUMBER_START}(?:0[1-9]\d{{0,3}}|\(0[1-9]\d{{0,3}}\))[ /-]\d{{3,4}}[ -]\d{{3,5}}{_NUMBER_END}",
    rf"{_NUMBER_START}(?:0[1-9]\d{{1,3}}|\(0[1-9]\d{{1,3}}\))[ /-]\d{{5,8}}{_NUMBER_END}",
    check=_is_national,
)
_find_called = _matches(rf"(?<![\w.,+])\d(?:\)?{_GAP}?\(?\d){{6,14}}(?![\w-]|[.,]\d)", check=_is_called)


def _find_phones(text: str) -> Iterator[tuple[int, int]]:
    yield from _find_international(text)
    yield from _find_national(text)
    yield from _find_called(text)


_FINDERS: dict[Kind, Finder] = {
    "key": _find_keys,
    "email": _find_emails,
    "iban": _find_ibans,
    "card": _find_cards,
    "ssn": _find_ssns,
    "ip": _find_ips,
    "phone": _find_phones,
}


def _find_by_presidio(text: str) -> list[Span]:
    results: Iterable[Any] = _analyzer().analyze(text=text, language="en")
    spans: list[Span] = []
    for result in sorted(results, key=lambda result: (result.start, -result.end)):
        if not spans or result.start >= spans[-1].stop:
            spans.append(Span(str(result.entity_type).lower(), result.start, result.end))
    return spans


@cache
def _analyzer() -> Any:
    if find_spec("presidio_analyzer") is None:
        raise MissingExtra(
            "generate.cleaning.pii_engine=presidio needs presidio-analyzer. Run "
            '`pip install "potstill[presidio]"`, or use pii_engine: patterns.'
        )
    from presidio_analyzer import AnalyzerEngine

    return AnalyzerEngine()
