"""Pearson's r against scipy, its bootstrap, and what is no number."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import pearsonr

from residency.errors import DataError
from residency.evaluate.pearson import Pearson


def metric(pairs):
    made = Pearson()
    for i, (p, t) in enumerate(pairs):
        made.update(f"i{i:03}", str(p), str(t))
    return made


def test_value_and_interval_against_scipy():
    rng = np.random.default_rng(0)
    truth = 1e6 + rng.standard_normal(200)
    said = 0.3 * truth + 0.4 * rng.standard_normal(200)
    score = metric(zip(said, truth, strict=True)).compute()
    assert score.value == pytest.approx(pearsonr(said, truth).statistic, abs=1e-9)
    exact = pearsonr(said, truth).confidence_interval(0.95)
    assert score.low == pytest.approx(exact.low, abs=0.04)
    assert score.high == pytest.approx(exact.high, abs=0.04)


def test_the_paired_difference_is_that_of_the_two_scores():
    rng = np.random.default_rng(1)
    truth = rng.standard_normal(60)
    bad, good = truth + 2 * rng.standard_normal(60), truth + 0.2 * rng.standard_normal(60)
    before, after = (metric(zip(s, truth, strict=True)) for s in (bad, good))
    found = after.difference(before.compute(), after.compute())
    assert found.difference == pytest.approx(pearsonr(good, truth).statistic - pearsonr(bad, truth).statistic)
    assert found.low > 0


@pytest.mark.parametrize(("said", "gold"), [("high", "3"), ("nan", "3"), ("3", "good"), ("inf", "1")])
def test_what_is_no_number_is_refused_by_name(said, gold):
    with pytest.raises(DataError, match="not a number"):
        Pearson().update("x", said, gold)


def test_one_item_and_constant_truths_are_zero():
    assert metric([(1, 2)]).compute().value == 0
    assert metric([(1, 2), (3, 2)]).compute().value == 0
