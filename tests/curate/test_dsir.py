"""DSIR: smoothing, streams, lengths, and the distribution that a draw by these weights has."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residency.curate import dsir
from residency.curate.dsir import DSIR, Ratio, hashed_words

POOL = [
    "ein Fall von Husten",
    "das Wetter ist gut",
    "Husten, Fieber!",
    "Fieber und Husten und Fieber",
    "",
    "gut gut",
] * 3
TRUSTED = ["Husten und Fieber", "ein Husten"]


def test_parts_give_what_the_whole_gives(monkeypatch):
    whole = DSIR().score(POOL, TRUSTED)
    monkeypatch.setattr(dsir, "BLOCK", 4)
    ratio = Ratio(DSIR())
    ratio.update_raw(POOL[:7])
    ratio.update_target(TRUSTED[:1])
    ratio.update_raw(iter(POOL[7:]))
    ratio.update_target(TRUSTED[1:])
    np.testing.assert_array_equal(np.concatenate([ratio.weigh(POOL[:5]), ratio.weigh(POOL[5:])]), whole)


def test_what_is_like_the_trusted_rows_weighs_most_and_an_empty_row_nothing():
    found = DSIR(prior=100).score(POOL, TRUSTED)[:6]
    assert np.isnan(found[4])
    assert found[1] == np.nanmin(found)
    assert found[3] == np.nanmax(found) > 0 > found[5]


def test_runs_do_not_reach_over_the_end_of_a_row():
    # with runs, "a b" and "b c" would meet in "a b" + "b c" too; alone they never do
    one, two = DSIR(ngram=2), DSIR(ngram=1)
    assert sum(part.buckets.size for part in Ratio(one).hashed(["a b", "c", "", "d e f"])) == 6 + 3
    assert sum(part.buckets.size for part in Ratio(two).hashed(["a b", "c", "", "d e f"])) == 6
    assert sum(part.buckets.size for part in Ratio(DSIR(ngram=8)).hashed(["a b c"])) == 6


def test_words_are_those_of_the_papers_code():
    part = next(Ratio(DSIR(ngram=1, buckets=1 << 30)).hashed(["Don't  stop,\tplease... (ÄÖ_3)"]))
    same = next(Ratio(DSIR(ngram=1, buckets=1 << 30)).hashed(["don ' t stop , please ... ( äö_3 )"]))
    assert part.buckets.tolist() == same.buckets.tolist()
    assert len(part.buckets) == 10


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("aAß9_ .,-\n\x1f\u00a0İΣ漢🙂\ud800", max_size=12), max_size=40))
def test_words_of_any_text_are_those_of_the_regular_expression(texts):
    words = [(i, word) for i, text in enumerate(texts) for word in re.findall(r"\w+|[^\w\s]+", text.lower())]
    hashes, rows = hashed_words(texts)
    assert rows.tolist() == [i for i, _ in words]
    # equal words, and no others, have equal hashes
    assert len(set(zip(hashes.tolist(), (word for _, word in words), strict=True))) == len({w for _, w in words})
    assert len(set(hashes.tolist())) == len({w for _, w in words})


def test_one_ngram_that_no_trusted_row_has_costs_about_the_same_whatever_the_buckets():
    pool = ["x y z", *(f"w{i} w{i + 1}" for i in range(300))]
    costs = [DSIR(buckets=b, per="n-gram", prior=50).score(pool, ["x y z"])[7] for b in (10_000, 1_000_000)]
    # log λ with T = 5 n-grams, less what the common bag adds
    assert costs == pytest.approx([np.log(50 / 55)] * 2, rel=0.1)


def test_a_draw_by_gumbel_noise_has_the_probabilities_of_drawing_without_replacement():
    # the largest of log w + Gumbel noise: Plackett and Luce, so inclusion in a draw of two is a sum over first draws
    log_w = DSIR(prior=20).score(["a b", "a c d", "d d"], ["a b", "a c"])
    p = np.exp(log_w) / np.exp(log_w).sum()
    expected = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(3) if j != i) for i in range(3)]
    keys = log_w + np.random.default_rng(0).gumbel(size=(40_000, 3))
    found = [(np.argsort(-keys, 1)[:, :2] == i).any(1).mean() for i in range(3)]
    assert found == pytest.approx(expected, abs=4 * 0.5 / 200)
    assert max(expected) - min(expected) > 0.05


@pytest.mark.parametrize("texts", [[], ["", " "]])
def test_nothing_to_compare_is_refused(texts):
    with pytest.raises(ValueError, match="trusted rows have no word"):
        DSIR().score(POOL, texts)
    assert np.isnan(DSIR().score(["..", ""], TRUSTED)).tolist() == [False, True]
    ratio = Ratio(DSIR())
    ratio.update_target(TRUSTED)
    with pytest.raises(ValueError, match="pool has no word"):
        ratio.weigh(["a"])
    with pytest.raises(ValueError, match=r"write \[text\]"):
        DSIR().score("Husten", TRUSTED)
