from __future__ import annotations

import sys
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.data import privacy
from potstill.data.privacy import find_pii, mask_pii
from potstill.errors import MissingExtra

# Built from parts, so that no scanner for secrets takes this file for one.
KEYS = [
    "sk-" + "proj-" + "abcDEF1234567890abcdef1234567890",
    "sk-" + "ant-api03-" + "A1b2C3d4E5f6G7h8I9j0K1l2M3n4",
    "AK" + "IAIOSFODNN7EXAMPLE",
    "gh" + "p_" + "0123456789abcdefghijABCDEFGHIJ012345",
    "github" + "_pat_" + "11ABCDEFG0123456789_abcdefghij",
    "xo" + "xb-" + "123456789012-abcdefGHIJKL",
    "AI" + "za" + "SyA-1234567890abcdefghijklmnopqrstu",
    "hf" + "_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH",
    "ey" + "JhbGciOiJIUzI1NiJ9.ey" + "JzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
]
PEM = "-----BEGIN RSA " + "PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nMIIEpAIBAAKCAQEA7\n-----END RSA PRIVATE KEY-----"
CUT_OFF = (
    "-----BEGIN "
    + "PRIVATE KEY-----\n"
    + "MIIEpAIBAAKCAQEA7bq1Hs8Wk2nV4tYxZc5d"
    + "\n"
    + "q1Hs8Wk2nV4tYxZc5dMIIEpAIBAAKCAQEA7b"
)


@pytest.mark.parametrize(
    ("kind", "secret"),
    [
        *(("key", key) for key in [*KEYS, PEM, CUT_OFF]),
        ("email", "ann.smith+news@mail.example.co.uk"),
        ("email", "j\u00f6rg_m@m\u00fcller.de"),
        ("email", "x@y.museum"),
        ("iban", "DE89 3704 0044 0532 0130 00"),
        ("iban", "GB82WEST12345698765432"),
        ("iban", "NL91-ABNA-0417-1643-00"),
        ("card", "4111 1111 1111 1111"),
        ("card", "5555555555554444"),
        ("card", "2223-0031-2200-3222"),
        ("card", "3782 822463 10005"),
        ("ssn", "123-45-6789"),
        ("ip", "142.250.74.46"),
        ("ip", "8.8.8.8"),
        ("ip", "2a00:1450:4001:81b::200e"),
        ("ip", "2606:4700:4700:0:0:0:0:1111"),
        ("phone", "+49 30 123456-78"),
        ("phone", "+442079460958"),
        ("phone", "+1 (415) 555-2671"),
        ("phone", "+44 (0)20 7946 0958"),
        ("phone", "0049 30 1234567"),
        ("phone", "(415) 555-2671"),
        ("phone", "415-555-2671"),
        ("phone", "1-415-555-2671"),
        ("phone", "415.555.2671"),
        ("phone", "020 7946 0958"),
        ("phone", "01 23 45 67 89"),
        ("phone", "030/1234567"),
        ("phone", "090-1234-5678"),
    ],
)
def test_what_is_personal_is_found_in_the_midst_of_a_sentence(kind, secret):
    for before, after in [
        ("", ""),
        ("It is ", ", she said."),
        ("(", ")"),
        ("\u00e9t\u00e9:\n", "\nand more"),
        ('"', '".'),
    ]:
        text = f"{before}{secret}{after}"
        assert [(span.kind, text[span.start : span.stop]) for span in find_pii(text)] == [(kind, secret)]


@pytest.mark.parametrize(
    "text",
    [
        "pi is 3.1415926535 or 3.14159265358979323846",
        "0.4111111111111111 and 1,415,555,267.1",
        "on 2023-11-22, 22/11/2023, 22.11.2023 or 11-22-2023 at 12:30:45",
        "2023-11-22T12:30:45+01:00, from 2021-2022 to 2023",
        "ISBN 978-3-16-148410-0, 0-306-40615-2, 9783161484100",
        "123e4567-e89b-12d3-a456-426614174000",
        "415 + 555 + 2671 = 3641",
        "12345678901 * 2 = 24691357802 and 4111111111111111 * 3",
        "100-50-2500 = -2450 and 300-20-1000=",
        "7 +4930123456 and x = 5 + 12345678901 and y +4930123456",
        "4111111111111112 has another check digit, 1111111111111111 none",
        "20! = 2432902008176640000, 2^64 = 18446744073709551616",
        "2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43",
        "212 555 1234 and 415 555 2671 are numbers",
        "1700000000 and 1700000000000 are times",
        "version 10.14.33.22, v142.250.74.46, 1.2.3.4, Chrome/120.0.6099.109, pkg==142.250.74.46",
        "192.168.1.1, 10.0.0.7, 127.0.0.1, 0.0.0.0, 999.1.2.3, 142.250.74.46.9",
        "std::abs, a::b, fe80::1, ::1, 2001:db8::1, 12:34:56, 20:30:40:50",
        "X@W.T, q@k.transpose(-2, -1), @property, git@github.com:owner/name, user@localhost",
        "sk-loading-spinner-component-12, sk-learn, task-1234567890123456789012345678",
        "XX89 3704 0044 0532 0130 00, DE88 3704 0044 0532 0130 00",
        "arXiv:2005.14165, doi 10.1038/nature14539, 0x7ffdeadbeef12345, 000-12-3456, 666-12-3456",
        "-----BEGIN PUBLIC KEY-----",
        "call f(x) 5 times, phone 2023-11-22, the phone costs 1234567 less",
        "for i in range(1000000000): print(i % 1000000007)",
    ],
)
def test_numbers_of_mathematics_and_code_are_left_alone(text):
    assert [text[span.start : span.stop] for span in find_pii(text)] == []


@pytest.mark.parametrize("before", ["Phone: ", "call me at ", "Tel. ", "his mobile number is ", "WhatsApp "])
def test_a_number_after_a_word_for_telephones_is_one(before):
    assert mask_pii(f"{before}5551234567.") == (f"{before}[PHONE].", {"phone": 1})


def test_what_is_masked_is_named_and_counted_and_the_rest_stays():
    text = f"Write to a@b.com or c@d.org, key {KEYS[0]}\nfrom 142.250.74.46."
    assert mask_pii(text) == ("Write to [EMAIL] or [EMAIL], key [KEY]\nfrom [IP].", {"email": 2, "key": 1, "ip": 1})
    assert mask_pii("nothing") == ("nothing", {})


PARTS = st.sampled_from(
    ["a@b.com", "4111111111111111", "+49 30 123456", "8.8.8.8", "123-45-6789", " ", "-", ".", "x", "\u00e9", "1", *KEYS]
)


@given(st.lists(PARTS, max_size=12))
def test_spans_stand_apart_and_what_is_masked_holds_no_more(parts):
    text = "".join(parts)
    spans = find_pii(text)
    assert all(span.start < span.stop <= len(text) for span in spans)
    assert all(before.stop <= after.start for before, after in pairwise(spans))
    assert mask_pii(text)[1].total() == len(spans)


HOSTILE = [
    *("a", "a.", "a@", "a@a.", "a@a.aa@", "1", "1 ", "1-", "1.1.1.1.", "+1", "+1(", "(0", "0 ", "0049 ", "4111 1111 "),
    *("eyJ", "eyJaaaaaaaaaa.", "sk-", "-----BEGIN PRIVATE KEY-----", "-", "DE22", "A1B2 ", "2000:", "2:", "call ", " "),
]


@pytest.mark.parametrize("part", HOSTILE)
def test_hostile_texts_take_time_in_proportion_to_their_length(part):
    text = part * (100_000 // len(part))
    started = time.process_time()
    find_pii(text)
    assert time.process_time() - started < 1.5  # quadratic, any of the patterns would take a minute


@pytest.mark.parametrize("start", ["-----BEGIN PRIVATE KEY-----\n", "DE22", "a@", "call ", "+1", "eyJhbGciOiJ"])
def test_what_begins_like_a_secret_and_never_ends_takes_no_longer(start):
    started = time.process_time()
    for rest in ("a ", "A1", "1 ", "1.", "  ", "a"):
        find_pii(start + rest * 30_000)
    assert time.process_time() - started < 3.0


def test_presidio_is_asked_where_it_is_wanted(monkeypatch):
    found = [SimpleNamespace(entity_type="PERSON", start=0, end=3), SimpleNamespace(entity_type="URL", start=2, end=3)]
    engine = SimpleNamespace(analyze=lambda text, language: found)
    monkeypatch.setitem(sys.modules, "presidio_analyzer", SimpleNamespace(AnalyzerEngine=lambda: engine))
    monkeypatch.setattr(privacy, "find_spec", lambda name: name)
    privacy._analyzer.cache_clear()
    assert mask_pii("Ann is here", engine="presidio") == ("[PERSON] is here", {"person": 1})
    privacy._analyzer.cache_clear()


def test_without_presidio_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(privacy, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'pip install "potstill\[presidio\]"'):
        mask_pii("Ann", engine="presidio")
