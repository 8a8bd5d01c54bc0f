"""Macro-F1 and AUC of label sets against scikit-learn; thresholds against every threshold there is."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residency import multilabel
from residency.errors import DataError
from residency.evaluate.multilabel_f1 import MultilabelF1

metrics = pytest.importorskip("sklearn.metrics")
pytestmark = pytest.mark.filterwarnings("ignore")
sets = st.sets(st.sampled_from("abcde"), max_size=4)
pairs = st.lists(st.tuples(sets, sets), min_size=1, max_size=20)


def scored(gold, said, **options):
    metric = MultilabelF1(**options)
    for i, (g, s) in enumerate(zip(gold, said, strict=True)):
        metric.update(f"{i:03}", multilabel.join(s), multilabel.join(g))
    return metric


@given(pairs)
@settings(max_examples=100, deadline=None)
def test_equals_sklearn(rows):
    gold, said = zip(*rows, strict=True)
    for labels in (None, list("abcdex")):
        classes = labels or sorted(set().union(*gold, *said))
        value = scored(gold, said, labels=labels).compute(n=5).value
        if not classes:
            assert value == 1
            continue
        y, p = multilabel.multi_hot(gold, classes), multilabel.multi_hot(said, classes)
        # scikit-learn takes a single column for a binary problem, and averages over yes and no
        average = "macro" if len(classes) > 1 else "binary"
        expected = metrics.f1_score(y, p, average=average, zero_division=0)
        assert value == pytest.approx(expected)
        assert multilabel.macro_f1(p, y) == pytest.approx(expected)


def test_items_differences_and_flips():
    gold = [{"a", "b"}, {"a"}, {"c"}, set()]
    before = scored(gold, [{"a"}, {"a"}, {"b"}, {"a"}]).compute()
    after = scored(gold, [{"a", "b"}, {"a", "c"}, {"c"}, set()]).compute()
    assert [round(i.score, 4) for i in before.items] == [0.6667, 1, 0, 0]
    assert MultilabelF1().flips(before, after) == (["000", "002", "003"], ["001"])
    found = MultilabelF1().difference(before, after)
    classes = list("abc")
    hot = [multilabel.multi_hot(x, classes) for x in (gold, [{"a"}, {"a"}, {"b"}, {"a"}])]
    better = multilabel.multi_hot([{"a", "b"}, {"a", "c"}, {"c"}, set()], classes)
    expected = metrics.f1_score(hot[0], better, average="macro") - metrics.f1_score(hot[0], hot[1], average="macro")
    assert found.difference == pytest.approx(expected)


def test_nothing_to_say_and_nothing_said():
    score = scored([set(), set()], [set(), set()]).compute(n=50)
    assert (score.value, score.low, score.high) == (1, 1, 1)
    with pytest.raises(DataError, match="no items"):
        MultilabelF1().compute()


def test_the_order_of_labels_and_spaces_do_not_matter():
    metric = MultilabelF1()
    metric.update("x", "b | a|c", "c | b | a")
    assert metric.compute(n=5).value == 1
    assert multilabel.split(multilabel.join(["b", "a", "a"])) == {"a", "b"}
    assert multilabel.join(["b", "a", "a"]) == "a | b"
    assert multilabel.split("") == frozenset()


def test_merge_equals_whole():
    gold, said = [{"a"}, {"b", "c"}, {"c"}], [{"a", "b"}, {"b"}, {"c"}]
    whole = scored(gold, said).compute(n=20)
    parts = [MultilabelF1() for _ in range(2)]
    for i in (2, 0, 1):
        parts[i % 2].update(f"{i:03}", multilabel.join(said[i]), multilabel.join(gold[i]))
    assert parts[1].merge(parts[0]).compute(n=20) == whole


@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_auc_equals_sklearn(seed, n, classes):
    rng = np.random.default_rng(seed)
    gold = rng.random((n, classes)) < 0.4
    scores = rng.integers(0, 6, (n, classes)) / 5  # many ties
    both = (gold.any(0)) & (~gold.all(0))
    found = multilabel.macro_auc(scores, gold)
    if not both.any():
        assert np.isnan(found)
    else:
        assert found == pytest.approx(metrics.roc_auc_score(gold[:, both], scores[:, both], average="macro"))


def test_thresholds():
    rng = np.random.default_rng(0)
    gold = rng.random((40, 4)) < 0.4
    scores = np.clip(gold * 0.3 + rng.random((40, 4)) * 0.7, 0, 1)
    parts = [(scores[:20], gold[:20]), (scores[20:], gold[20:])]
    best = multilabel.best_threshold(parts)
    found = np.mean([multilabel.macro_f1(s >= best, y) for s, y in parts])
    every = max(np.mean([multilabel.macro_f1(s >= t, y) for s, y in parts]) for t in np.unique(scores))
    assert found == pytest.approx(every)
    tried, f1 = multilabel.threshold_curve(parts, most=10)
    assert len(tried) == len(f1) == 10
    counts = [multilabel.decide(scores, t).sum() for t in tried]
    assert counts == sorted(counts, reverse=True)  # a higher threshold never gives more labels
    with pytest.raises(ValueError, match="at least one"):
        multilabel.threshold_curve([])


def test_at_least_one_label():
    scores = np.array([[0.1, 0.2], [0.9, 0.8]])
    assert multilabel.decide(scores, 0.5).tolist() == [[False, False], [True, True]]
    assert multilabel.decide(scores, 0.5, least_one=True).tolist() == [[False, True], [True, True]]
    assert multilabel.decide(np.zeros((0, 3)), 0.5, least_one=True).shape == (0, 3)
    # of one label per row, the best score is top-1
    rng = np.random.default_rng(1)
    scores, truth = rng.random((50, 5)), rng.integers(0, 5, 50)
    said = multilabel.decide(scores, 2.0, least_one=True)
    assert said[np.arange(50), truth].mean() == (scores.argmax(1) == truth).mean()


def test_an_entry_of_the_record_is_json_and_compares():
    from residency.evaluate import scoring

    rows = ["a | b", "", "c"]
    figure = scoring.confusion_of_sets(rows, ["a", "", "a | c"])
    assert figure["x"] == ["a", "b", "c"]
    assert figure["z"] == [[1, 0, 0], [1, 0, 0], [1, 0, 1]]
    json.dumps(figure)
