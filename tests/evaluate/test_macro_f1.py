"""Macro-F1 against scikit-learn, its interval against scipy with scikit-learn inside."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residency.errors import DataError
from residency.evaluate.macro_f1 import MacroF1

f1_score = pytest.importorskip("sklearn.metrics").f1_score
pytestmark = pytest.mark.filterwarnings("ignore")


def scored(gold, said, **options):
    metric = MacroF1(**options)
    for i, (g, s) in enumerate(zip(gold, said, strict=True)):
        metric.update(f"{i:03}", s, g)
    return metric


pairs = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcde")), min_size=1, max_size=25)


@given(pairs)
@settings(max_examples=100, deadline=None)
def test_equals_sklearn(rows):
    gold, said = zip(*rows, strict=True)
    expected = f1_score(gold, said, average="macro")
    assert scored(gold, said).compute(n=5).value == pytest.approx(expected)


@given(pairs, st.sampled_from([0.0, 1.0, math.nan]))
@settings(max_examples=100, deadline=None)
def test_equals_sklearn_with_fixed_labels(rows, zero_division):
    gold, said = zip(*rows, strict=True)
    labels = list("abcx")  # "x" never occurs, "d" and "e" are outside
    expected = f1_score(gold, said, labels=labels, average="macro", zero_division=zero_division)
    totals = scored(gold, said, labels=labels, zero_division=zero_division)
    if math.isnan(expected):
        return
    assert totals.compute(n=5).value == pytest.approx(expected)


def test_interval_is_scipys_with_sklearn_inside():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    gold = rng.choice(list("abc"), 120, p=[0.7, 0.2, 0.1])
    said = np.where(rng.random(120) < 0.6, gold, rng.choice(list("abc"), 120))
    index = {c: i for i, c in enumerate("abc")}
    g, s = np.array([index[x] for x in gold]), np.array([index[x] for x in said])
    theirs = stats.bootstrap(
        (g, s),
        lambda x, y: f1_score(x, y, average="macro"),
        n_resamples=600,
        paired=True,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    score = scored(gold, said).compute(n=5000)
    assert score.low == pytest.approx(theirs.low, abs=0.025)
    assert score.high == pytest.approx(theirs.high, abs=0.025)


def test_difference_is_that_of_sklearns_two_scores_even_if_classes_differ():
    gold = list("aabbccabc")
    a, b = list("aaaaaaaaa"), list("aabbccabd")
    metric = MacroF1()
    before, after = scored(gold, a).compute(), scored(gold, b).compute()
    found = metric.difference(before, after)
    expected = f1_score(gold, b, average="macro") - f1_score(gold, a, average="macro")
    assert found.difference == pytest.approx(expected)
    assert found.low <= expected <= found.high
    assert metric.flips(before, after) == (["002", "003", "004", "005", "007"], [])


def test_merge_equals_whole_and_order_does_not_matter():
    gold, said = list("abcabcaab"), list("abccbaaab")
    whole = scored(gold, said).compute()
    parts = MacroF1()
    for i in reversed(range(9)):
        parts.update(f"{i:03}", said[i], gold[i])
    assert parts.compute() == whole
    rest = MacroF1()
    half = MacroF1()
    for i in range(9):
        (half if i % 2 else rest).update(f"{i:03}", said[i], gold[i])
    assert rest.merge(half).compute() == whole


def test_majority_answer_scores_badly():
    gold = ["a"] * 95 + ["b"] * 5
    assert scored(gold, ["a"] * 100).compute().value < 0.5


def test_empty_and_bad_labels_are_refused():
    with pytest.raises(DataError, match="no items"):
        MacroF1().compute()
    with pytest.raises(ValueError, match="distinct"):
        MacroF1(labels=["a", "a"])
    with pytest.raises(ValueError, match="distinct"):
        MacroF1(labels=[])
