from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from potstill.data import add_slips

SHARES = st.floats(0, 1)


@given(st.text(max_size=40), SHARES, st.integers(0, 99))
def test_a_text_never_becomes_empty_and_follows_from_the_seed(text, share, seed):
    slipped = add_slips(text, share=share, random=Random(seed))
    assert bool(slipped.strip()) == bool(text.strip())
    assert slipped == add_slips(text, share=share, random=Random(seed))


def test_slips_befall_the_asked_share_of_words_and_leave_the_others():
    words = [f"word{number}" for number in range(2000)]
    slipped = add_slips(" ".join(words), share=0.1, random=Random(0)).split()
    # A swap touches two words, the other slips one.
    assert 1700 < len(set(words) & set(slipped)) < 1900
    assert 1930 < len(slipped) < 2000


def test_every_kind_of_slip_happens():
    seen = {add_slips("ab cd", share=0.0, random=Random(seed)) for seed in range(400)}
    assert {"cd", "ab", "cd ab", "b cd", "aab cd", "ba cd", "ab d", "ab ccd", "ab dc"} <= seen


def test_one_word_at_least_is_befallen():
    texts = [add_slips("alpha beta gamma delta", share=1e-9, random=Random(seed)) for seed in range(50)]
    assert sum(text != "alpha beta gamma delta" for text in texts) > 40
