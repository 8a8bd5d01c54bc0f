"""Length, repetition, characters: what is known by counting."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest

from residency.curate.textstats import Characters, Length, Repetition


def repeated(text, **params):
    return Repetition(**params).score([text])[0]


def test_a_text_written_k_times_repeats_all_but_its_first():
    once = "alpha beta gamma delta epsilon zeta eta"
    for k in (1, 2, 5):
        assert repeated(" ".join([once] * k)) == pytest.approx((k - 1) / k)
        assert repeated("\n".join([once] * k), form="lines") == pytest.approx((k - 1) / k)


def test_overlapping_n_grams_count_each_character_once():
    assert repeated("x x x x x", n=2) == pytest.approx(4 / 5)  # the second pair is the first again
    assert repeated("go go go go", form="top-n-gram", n=2) == 1


def test_the_top_n_gram_is_the_longer_of_equals_and_must_repeat():
    assert repeated("aa b aa b c dd", form="top-n-gram") == pytest.approx(6 / 9)
    assert repeated("one two three four", form="top-n-gram") == 0
    assert repeated("word", form="top-n-gram") == 0
    assert repeated("a a bbb bbb", form="top-n-gram", n=1) == pytest.approx(6 / 8)


def test_few_words_have_no_repeated_n_gram_and_no_words_no_value():
    assert repeated("a b c") == 0
    for form in ("n-grams", "top-n-gram", "lines"):
        assert np.isnan(repeated(" \n ", form=form))


def test_lines_take_no_n():
    with pytest.raises(ValueError, match="leave it out"):
        Repetition(form="lines", n=2)


def test_repetition_stays_a_share():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["a", "bb", "ccc"], rng.integers(1, 60))) for _ in range(200)]
    for form, n in (("n-grams", 1), ("n-grams", 3), ("top-n-gram", 1), ("top-n-gram", 4)):
        values = Repetition(form=form, n=n).score(texts)
        assert ((values >= 0) & (values <= 1)).all()
        assert values.std() > 0


def test_lengths_are_counted_and_empty_is_zero():
    assert Length().score(["q"], ["two  words\n"]).tolist() == [2]
    assert Length(unit="characters", of="both").score(["é"], ["ab"]).tolist() == [3]
    assert Length().score([""], [""]).tolist() == [0]
    assert len(Length().score([], [])) == 0
    with pytest.raises(ValueError, match="shorter"):
        Length(of="both").score(["q"], [])


def test_the_three_kinds_of_characters_sum_to_one_and_know_scripts():
    text = ["हिन्दी में 12 शब्द।", "a1-", "漢字カナ", "ⅷ ② ½"]
    shares = {kind: Characters(kind=kind).score(text) for kind in ("letters", "digits", "symbols")}
    np.testing.assert_allclose(sum(shares.values()), 1)
    marks = sum(unicodedata.category(c) in ("Lo", "Mc", "Mn") for c in text[0])
    assert shares["letters"][0] == pytest.approx(marks / (marks + 3))  # vowel signs are part of a letter
    assert [shares[k][1] for k in shares] == pytest.approx([1 / 3] * 3)
    assert shares["letters"][2] == 1
    assert shares["digits"][3] == 1


def test_white_space_has_no_characters():
    assert np.isnan(Characters().score(["", " \n\t\u200b"])).all()
