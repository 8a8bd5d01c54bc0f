"""Combinations: a planted rule is found again; missing columns and values."""

from __future__ import annotations

import numpy as np
import pytest

from residency.curate.combined import DeitaScore, LinearRule, Necessity


def test_a_planted_rule_is_recovered_whatever_the_units():
    rng = np.random.default_rng(0)
    columns = {"length": rng.uniform(10, 900, 30), "reward": rng.normal(size=30), "tiny": rng.uniform(0, 1e-6, 30)}
    truth = {"length": 8e-4, "reward": -0.15, "tiny": 3e4}
    log_loss = 1.07 + sum(w * columns[name] for name, w in truth.items())
    rule = LinearRule.fit(columns, np.exp(log_loss))
    assert rule.intercept == pytest.approx(1.07)
    assert rule.weights == pytest.approx(truth)
    np.testing.assert_allclose(rule.score(columns), log_loss)


def test_noise_is_averaged_as_scikit_learn_does():
    from sklearn.linear_model import LinearRegression

    rng = np.random.default_rng(1)
    columns = {"a": rng.normal(size=40), "b": rng.normal(size=40)}
    losses = np.exp(rng.normal(size=40))
    rule = LinearRule.fit(columns, losses)
    theirs = LinearRegression().fit(np.column_stack(list(columns.values())), np.log(losses))
    np.testing.assert_allclose([rule.intercept, *rule.weights.values()], [theirs.intercept_, *theirs.coef_])


@pytest.mark.parametrize(
    ("columns", "losses", "match"),
    [
        ({"a": [1.0, 2.0]}, [0.0, 1.0], "positive"),
        ({"a": [1.0, np.nan]}, [1.0, 1.0], "finite"),
        ({"a": [1.0, 2.0], "b": [1.0, 3.0]}, [1.0, 2.0], "do not determine"),
        ({"a": [1.0, 2.0, 3.0], "b": [2.0, 4.0, 6.0]}, [1.0, 2.0, 3.0], "do not determine"),
        ({"a": [5.0, 5.0, 5.0]}, [1.0, 2.0, 3.0], "do not determine"),
    ],
)
def test_a_rule_that_is_not_determined_is_refused(columns, losses, match):
    with pytest.raises(ValueError, match=match):
        LinearRule.fit(columns, losses)


def test_no_coefficients_are_invented():
    with pytest.raises(ValueError, match=r"LinearRule\.fit"):
        LinearRule().score({"reward": np.ones(3)})


@pytest.mark.parametrize("score", [DeitaScore(), Necessity(), LinearRule(weights={"x": 1.0})])
def test_a_missing_column_is_named_with_those_there_are(score):
    with pytest.raises(ValueError, match="no column.*columns: other"):
        score.score({"other": np.ones(2)})


def test_missing_values_stay_missing():
    columns = {
        "complexity": np.array([2.0, np.nan]),
        "quality": np.array([3.0, 1.0]),
        "own-reward": np.array([0.5, np.nan]),
    }
    np.testing.assert_equal(DeitaScore().score(columns), [6, np.nan])
    np.testing.assert_equal(Necessity().score(columns), [-0.5, np.nan])
    np.testing.assert_equal(Necessity(given="quality").score(columns), [2.5, np.nan])


def test_necessity_is_high_where_the_models_own_answer_is_bad():
    columns = {"own-reward": np.array([-3.0, 2.0])}
    assert np.argmax(Necessity().score(columns)) == 0
