"""Datamodels: planted effects, many targets at once, the number of subsets."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Lasso, Ridge

from residency.curate.datamodels import Datamodels, margins
from residency.curate.shapley import Game


def planted(subsets, rows=60, noise=0.1, targets=1):
    rng = np.random.default_rng(0)
    effects = np.zeros((rows, targets))
    effects[:4] = rng.uniform(0.5, 1.0, (4, targets)) * [[1], [-1], [1], [-1]]
    masks = Datamodels(subsets=subsets).masks(rows)
    return masks, masks @ effects + 0.7 + noise * rng.standard_normal((subsets, targets)), effects


def test_planted_effects_come_back():
    masks, outputs, effects = planted(800)
    for model, slack in ((Datamodels(strength=1.0), 0.05), (Datamodels(penalty="lasso", strength=0.005), 0.08)):
        weights, intercept = model.fit(masks, outputs[:, 0])
        np.testing.assert_allclose(weights, effects[:, 0], atol=slack)
        # every subset has 30 rows, so what all rows share cannot be told from the intercept
        assert intercept + 30 * weights[4:].mean() == pytest.approx(0.7, abs=0.2)
    assert (Datamodels(penalty="lasso", strength=0.02).fit(masks, outputs[:, 0])[0] != 0).sum() == 4


@pytest.mark.parametrize("subsets", [30, 200])
@pytest.mark.parametrize(("penalty", "peer"), [("ridge", Ridge), ("lasso", Lasso)])
def test_regressions_are_those_of_scikit_learn_with_few_and_many_subsets(penalty, peer, subsets):
    masks, outputs, _ = planted(subsets, targets=3)
    weights, intercepts = Datamodels(penalty=penalty, strength=0.03).fit(masks, outputs)
    assert weights.shape == (60, 3)
    settings = {"tol": 1e-12, "max_iter": 200_000} if penalty == "lasso" else {}
    for k in range(3):
        model = peer(alpha=0.03, **settings).fit(masks.astype(float), outputs[:, k])
        np.testing.assert_allclose(weights[:, k], model.coef_, atol=1e-5)
        assert intercepts[k] == pytest.approx(model.intercept_, abs=1e-4)


def test_margins_of_a_row_without_rivals_and_without_its_class():
    x = np.array([[1.0, 0], [0, 1.0]])
    game = Game.of(x, ["a", "b"], np.array([[1.0, 0]]), ["a"])
    found = margins(game, np.array([[1, 1], [1, 0], [0, 1], [0, 0]], bool))
    assert found[:, 0].tolist() == pytest.approx([1.0, 2.0, -1.0, 0.0])


def test_wrong_labels_have_the_lowest_weights():
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    x = rng.standard_normal((40, 4)) + 3 * np.eye(4)[y]
    labels = ["ab"[c ^ (i < 5)] for i, c in enumerate(y)]
    judges = 3 * np.eye(4)[np.arange(10) % 2] + rng.standard_normal((10, 4))
    found = Datamodels(subsets=400).score(x, labels, judges, ["ab"[i % 2] for i in range(10)])
    assert set(np.argsort(found)[:5].tolist()) == set(range(5))


def test_subsets_have_one_size_and_differ():
    masks = Datamodels(subsets=50, share=0.3).masks(20)
    assert (masks.sum(1) == 6).all()
    assert len({tuple(row) for row in masks.tolist()}) > 45
    assert Datamodels(subsets=3, share=0.1).masks(2).sum(1).tolist() == [1, 1, 1]
    assert Datamodels(subsets=3).masks(0).shape == (3, 0)


def test_edges():
    x, judges = np.eye(3), np.eye(3)[:2]
    assert np.isnan(Datamodels(subsets=5).score(x, [None] * 3, judges, ["a", "b"])).all()
    one = Datamodels(subsets=5).score(x[:1], ["a"], judges, ["a", "b"])
    assert one.tolist() == [0.0]
    with pytest.raises(ValueError, match="finite numbers"):
        Datamodels().fit(np.ones((3, 2)), [1.0, np.nan, 0])
    with pytest.raises(ValueError, match="finite numbers"):
        Datamodels().fit(np.ones((3, 2)), [1.0, 2.0])
