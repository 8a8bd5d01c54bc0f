"""Lexical diversity against plain loops, scipy, and values of `lexicalrichness` 0.5.1."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from residency.curate import lexical, lexicaltokens
from residency.curate.lexical import (
    HDD,
    MATTR,
    MTLD,
    Distinct,
    Form,
    Tokens,
    TypeToken,
    VocD,
    expected_ttr,
    fit_d,
    profile,
    words,
)

GETTYSBURG = """Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in
Liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war,
testing whether that nation, or any nation so conceived and so dedicated, can long endure. We are met on a great
battle-field of that war. We have come to dedicate a portion of that field, as a final resting place for those who here
gave their lives that that nation might live. It is altogether fitting and proper that we should do this. But, in a
larger sense, we can not dedicate -- we can not consecrate -- we can not hallow -- this ground. The brave men, living
and dead, who struggled here, have consecrated it, far above our poor power to add or detract. (1863)"""
GOLDEN = {
    "ttr": 0.6267605633802817,
    "rttr": 7.4687140888405334,
    "cttr": 5.281178378962647,
    "herdan": 0.9057290170865542,
    "summer": 0.9381373618083139,
    "dugast": 52.57001576138665,
    "maas": 0.019022250336369746,
    "mtld": 71.0,
    "mtld-66": 135.8474870017331,
    "hdd": 0.8277966336706883,
    "mattr-50": 0.7716129032258063,
    "vocd": 82.77594932643491,
}
ROW = st.lists(st.lists(st.integers(0, 12), max_size=90), max_size=8)


def zipf(n, seed=0, size=400):
    return (np.random.default_rng(seed).zipf(1.3, n) % size).tolist()


def mtld_loop(tokens, threshold=0.72):
    def one(sequence):
        factors, seen, n = 0.0, set(), 0
        for token in sequence:
            n += 1
            seen.add(token)
            if len(seen) / n <= threshold:
                factors, seen, n = factors + 1, set(), 0
        if n:
            factors += (1 - len(seen) / n) / (1 - threshold)
        return len(sequence) / (factors or 1)

    return (one(tokens) + one(tokens[::-1])) / 2 if tokens else float("nan")


@settings(max_examples=80, deadline=None)
@given(
    ROW,
    st.sampled_from([0, 2, 64]),
    st.sampled_from([7, 1 << 14]),
    st.sampled_from([0.5, 0.6, 0.75]) | st.floats(0.05, 0.95),
)
def test_everything_that_has_a_plain_loop_equals_it(rows, lanes, block, threshold):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lexical, "LANES", lanes)
        patch.setattr(lexicaltokens, "BLOCK", block)
        tokens = Tokens.of(rows)
        assert tokens.types.tolist() == [len(set(row)) for row in rows]
        np.testing.assert_array_equal(MTLD().of(tokens), [mtld_loop(row) for row in rows])
        mine = MTLD(threshold=threshold).of(tokens)
        np.testing.assert_array_equal(mine, [mtld_loop(row, threshold) for row in rows])
        for w in (1, 5, 50):
            windows = [[len(set(row[i : i + w])) / w for i in range(len(row) - w + 1)] for row in rows]
            loop = [np.mean(each) if each else np.nan for each in windows]
            np.testing.assert_allclose(MATTR(window=w).of(tokens), loop, rtol=1e-12)
        for n in (1, 2, 3, 5):
            grams = [list(zip(*(row[i:] for i in range(n)), strict=False)) for row in rows]
            loop = [len(set(g)) / len(row) if g else np.nan for g, row in zip(grams, rows, strict=True)]
            np.testing.assert_array_equal(Distinct(n=n).of(tokens), loop)
            loop = [len(set(g)) / len(g) if g else np.nan for g in grams]
            np.testing.assert_array_equal(Distinct(n=n, per="ngram").of(tokens), loop)
            everything, total = set().union(*grams) if rows else set(), sum(map(len, rows))
            found = Distinct(n=n).corpus(rows)
            assert found == len(everything) / total if everything else np.isnan(found)
        text, frequency, times = tokens.spectrum
        assert Counter(dict(zip(zip(text.tolist(), frequency.tolist(), strict=True), times.tolist(), strict=True))) == {
            (i, f): n for i, row in enumerate(rows) for f, n in Counter(Counter(row).values()).items()
        }


@settings(max_examples=40, deadline=None)
@given(ROW, st.integers(1, 60))
def test_hdd_equals_scipys_hypergeometric_tail(rows, draws):
    hypergeom = pytest.importorskip("scipy.stats").hypergeom
    loop = [
        sum(hypergeom.sf(0, len(row), f, draws) for f in Counter(row).values()) / draws if len(row) >= draws else np.nan
        for row in rows
    ]
    np.testing.assert_allclose(HDD(draws=draws).of(Tokens.of(rows)), loop, rtol=1e-10)


def test_values_of_lexicalrichness():
    tokens = Tokens.of([GETTYSBURG])
    for form in get_args(Form):
        assert TypeToken(form=form).of(tokens)[0] == pytest.approx(GOLDEN[form], rel=1e-15)
    assert MTLD().of(tokens)[0] == GOLDEN["mtld"]
    assert MTLD(threshold=0.66).of(tokens)[0] == GOLDEN["mtld-66"]
    assert HDD().of(tokens)[0] == pytest.approx(GOLDEN["hdd"], rel=1e-12)
    assert MATTR(window=50).of(tokens)[0] == pytest.approx(GOLDEN["mattr-50"], rel=1e-12)
    # theirs is an average over random samples; twenty seeds of theirs spread by 0.5
    assert VocD().of(tokens)[0] == pytest.approx(GOLDEN["vocd"], rel=0.02)


def test_equal_to_lexicalrichness_where_it_is_installed():
    richness = pytest.importorskip("lexicalrichness").LexicalRichness
    texts = [" ".join(f"w{chr(97 + t % 26)}{chr(97 + t // 26)}" for t in zipf(n, n)) for n in (60, 100, 333)]
    for text, mine, hdd in zip(texts, MTLD().score(texts), HDD().score(texts), strict=True):
        assert richness(text).mtld() == mine
        assert richness(text).hdd() == pytest.approx(hdd, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "It's 3 o'clock — a well-known, RE-read line…",
            ["it", "s", "o", "clock", "a", "wellknown", "reread", "line…"],
        ),
        ("Große Ähren: 12–14 Fuß\u00a0hoch\n", ["große", "ähren", "fuß", "hoch"]),
        ("漢字 🎉x٣ \udc80", ["漢字", "🎉x٣", "\udc80"]),
        ("12 -- .,;", []),
    ],
)
def test_words_are_those_of_lexicalrichness(text, expected):
    assert words(text) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab Σσ-.3\n\0é–\u2003"), max_size=12), max_size=7), st.sampled_from([1, 3, 64]))
def test_texts_split_together_are_texts_split_alone(texts, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lexicaltokens, "CHUNK", chunk)
        tokens = Tokens.of(texts)
    rows = [words(text) for text in texts]
    assert tokens.sizes.tolist() == [len(row) for row in rows]
    ids = dict(zip([w for row in rows for w in row], tokens.ids.tolist(), strict=True))
    assert [ids[w] for row in rows for w in row] == tokens.ids.tolist()
    assert len(set(ids.values())) == len(ids)


def test_vocd_recovers_the_parameter_of_its_own_curve():
    k = np.arange(35, 51)
    d = np.array([1.5, 10.0, 60.0, 120.0, 3000.0])
    ratios = d[:, None] / k * (np.sqrt(1 + 2 * k / d[:, None]) - 1)
    np.testing.assert_allclose(fit_d(ratios, k), d, rtol=1e-9)
    assert fit_d(np.ones((1, 16)), k)[0] == np.inf


def test_vocd_is_the_least_squares_fit_and_the_limit_of_sampling():
    optimize = pytest.importorskip("scipy.optimize")
    tokens = Tokens.of([zipf(200, 1), zipf(90, 2, 60), zipf(51, 3), zipf(50, 4), zipf(49, 5), list(range(80))])
    k = np.arange(35, 51)
    exact, ratios = VocD().of(tokens), expected_ttr(tokens, k.tolist())
    for i in range(4):
        curve = optimize.curve_fit(lambda n, d: d / n * (np.sqrt(1 + 2 * n / d) - 1), k, ratios[i], p0=[20.0])
        assert exact[i] == pytest.approx(curve[0][0], rel=1e-5)
    assert np.isnan(exact[4])
    assert exact[5] == np.inf
    sampled = VocD(samples=800, seed=3).of(tokens)
    np.testing.assert_allclose(sampled, exact, rtol=0.03)
    assert (sampled[:4] != exact[:4]).sum() >= 3
    alone = VocD(samples=20, runs=1, seed=3).of(Tokens.of([zipf(90, 2, 60)]))
    assert alone[0] == VocD(samples=20, runs=1, seed=3).of(tokens)[1]
    assert alone[0] != VocD(samples=20, runs=1, seed=4).of(tokens)[1]


def test_texts_without_a_value():
    found = profile(["", "a", "a a", "a b"])
    assert np.isnan([column[0] for column in found.values()]).all()
    assert found["ttr"][1:].tolist() == [1, 0.5, 1]
    assert np.isnan(found["herdan"][1])
    assert np.isnan(found["dugast"][1])
    assert np.isnan(found["maas"][1])
    assert np.isnan(found["summer"][1:3]).all()
    assert found["dugast"][3] == np.inf
    assert found["mtld"][1:].tolist() == [1, 2, 2]
    assert all(len(column) == 0 for column in profile([]).values())
    assert np.isnan(MTLD().corpus([]))


def test_stuttering_lowers_every_length_free_measure_and_neighbours_change_nothing():
    once = zipf(120, 7)
    tokens = Tokens.of([np.repeat(once, r).tolist() for r in (1, 2, 3, 4)])
    for measure in (MTLD(), HDD(), VocD(), MATTR()):
        values = measure.of(tokens)
        assert (values[1:] < values[0]).all()
    alone = profile([GETTYSBURG])
    among = profile(["x " * 300, GETTYSBURG, "", GETTYSBURG + " more"])
    assert all(np.array_equal(alone[name], among[name][1:2]) for name in alone)


def test_a_corpus_is_its_texts_in_a_row_but_no_bigram_crosses():
    texts = ["a b c a", "c d"]
    assert TypeToken().corpus(texts) == 4 / 6
    assert Distinct(n=2).corpus(texts) == 4 / 6  # ab bc ca | cd, and not ac
    assert Distinct(n=2, per="ngram").corpus(texts) == 1


def test_wide_ids_take_the_slower_sort():
    rows = [[2**61, 5, 2**61, 0], [5, 5]]
    tokens = Tokens(np.array([2**61, 5, 2**61, 0, 5, 5]), np.array([0, 4, 6]), 1)
    assert tokens.previous.tolist() == Tokens.of(rows).previous.tolist() == [-1, -1, 0, -1, -1, 4]


@pytest.mark.parametrize(
    "call",
    [
        lambda: Tokens.of("one text"),
        lambda: Tokens(np.arange(3), np.array([0, 2])),
        lambda: Tokens(np.arange(3), np.array([0, 4, 3])),
        lambda: Tokens(np.array([-1]), np.array([0, 1])),
        lambda: VocD(smallest=50, largest=35),
        lambda: VocD(seed=1),
        lambda: MTLD(threshold=1.0),
        lambda: MTLD(draws=3),
    ],
)
def test_nonsense_is_refused(call):
    with pytest.raises((ValueError, ValidationError)):
        call()
