"""Influence under a ridge head: leave-one-out by scikit-learn, limits, outliers, edges."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from residency.curate import ridgeinfluence
from residency.curate.ridgeinfluence import Influence


def data(n=40, d=5, c=2, k=7, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape) for shape in ((n, d), (n, c), (k, d), (k, c)))


@pytest.mark.parametrize("ridge", [1e-6, 0.01, 3.0])
def test_leaving_a_row_out_is_fitting_again(ridge, monkeypatch):
    monkeypatch.setattr(ridgeinfluence, "BLOCK", 11)
    x, y, p, q = data()
    params = Influence(ridge=ridge)

    def error(keep):
        head = Ridge(alpha=params.strength(x), fit_intercept=False).fit(x[keep], y[keep])
        return ((q - head.predict(p)) ** 2).sum(1).mean()

    everyone = np.arange(len(x))
    expected = [error(everyone != i) - error(everyone >= 0) for i in everyone]
    np.testing.assert_allclose(params.effects(x, y, p, q), expected, rtol=1e-6, atol=1e-9)


def test_the_first_order_comes_close_where_no_row_weighs_much_and_not_at_an_outlier():
    x, y, p, q = data(n=2000)
    exact, first = (Influence(exact=e).effects(x, y, p, q) for e in (True, False))
    assert np.corrcoef(exact, first)[0, 1] > 0.999
    x[0] *= 60
    exact, first = (Influence(exact=e, ridge=1e-6).effects(x, y, p, q) for e in (True, False))
    assert exact[0] / first[0] > 1.5
    assert np.median(exact[1:] / first[1:]) == pytest.approx(1, abs=0.01)


def test_wrong_labels_harm():
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    x = rng.standard_normal((60, 4)) + 3 * np.eye(4)[y]
    labels = ["ab"[c ^ (i < 6)] for i, c in enumerate(y)]
    judges = 3 * np.eye(4)[np.arange(20) % 2] + rng.standard_normal((20, 4))
    found = Influence().score(x, labels, judges, ["ab"[i % 2] for i in range(20)])
    assert (found[:6] < 0).sum() >= 5
    assert found[:6].mean() < 4 * min(0, np.quantile(found[6:], 0.1))


def test_edges():
    x, judges, answers = np.eye(3), np.eye(3)[:2], ["a", "b"]
    assert np.isnan(Influence().score(x, [None] * 3, judges, answers)).all()
    one = Influence().score(x[:1], ["a"], judges, answers)
    assert one.shape == (1,)
    assert np.isfinite(one).all()
    assert Influence().score(x[:0], [], judges, answers).shape == (0,)
    assert np.ptp(Influence().score(np.ones((5, 3)), ["a"] * 5, judges, answers)) < 1e-12
    half = Influence().score(x.astype(np.float16), ["a", "b", None], judges, answers)
    assert np.flatnonzero(np.isnan(half)).tolist() == [2]
