"""Vendi score against its N × N definition and closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from residency.curate import vendi
from residency.curate.vendi import Vendi, hill

ORDERS = (0.1, 0.5, 1.0, 1.5, 2.0, 3.0, 25.0, "inf")


def primal(rows, order, kernel=lambda a, b: a @ b / np.sqrt((a @ a) * (b @ b))):
    """By the definition: every entry of K by itself, eigenvalues of a general matrix."""
    k = np.array([[kernel(a, b) for b in rows] for a in rows])
    values = np.linalg.eigvals(k / len(rows)).real
    values = values[values > 1e-12]
    if order == "inf":
        return 1 / values.max()
    if order == 1:
        return np.exp(-np.sum(values * np.log(values)))
    return np.sum(values**order) ** (1 / (1 - order))


def gauss(h):
    return lambda a, b: np.exp(-np.sum((a - b) ** 2) / (2 * h * h))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 25), st.integers(1, 12), st.sampled_from(ORDERS), st.integers(0, 10**6))
def test_the_dual_equals_the_primal_at_every_order(n, width, order, seed):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, width)) * rng.uniform(0.01, 100, (n, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vendi, "BLOCK", 7)
        score = Vendi(order=order).of(rows)
    assert score == pytest.approx(primal(rows, order), rel=1e-6)
    assert 1 - 1e-9 <= score <= min(n, width) + 1e-9
    if order == "inf" or order >= 1:  # below, eigenvalues of the size of rounding errors count
        far = Vendi(order=order, kernel="rbf", bandwidth=2.0).of(rows[:, :3] / 50 + 1e7)
        assert far == pytest.approx(primal(rows[:, :3] / 50, order, gauss(2.0)), rel=1e-5)


@pytest.mark.parametrize("order", [0, *ORDERS])
def test_closed_forms(order):
    same, apart = np.tile([[3.0, -1.0, 2.0]], (9, 1)), 5 * np.eye(6)
    assert Vendi(order=order).of(same) == pytest.approx(1)
    assert Vendi(order=order).of(apart) == pytest.approx(6)
    assert Vendi(order=order).of(np.repeat(apart, 4, 0)) == pytest.approx(6)
    assert Vendi(order=order, kernel="rbf").of(same) == pytest.approx(1)
    assert Vendi(order=order, kernel="rbf", bandwidth=0.01).of(apart) == pytest.approx(6)
    # two directions at an angle: eigenvalues (1 ± cos)/2
    cosine = 0.6
    pair = np.array([[1.0, 0.0], [cosine, 0.8]])
    expected = hill(np.array([(1 + cosine) / 2, (1 - cosine) / 2]), float(order))
    assert Vendi(order=order).of(pair) == pytest.approx(expected)


def test_turning_scaling_and_order_of_rows_change_nothing_and_larger_orders_never_rise():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((200, 20)) @ np.diag(np.arange(1, 21.0))
    turn = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    scores = [Vendi(order=order).of(rows) for order in (0, *ORDERS)]
    assert all(a >= b for a, b in itertools.pairwise(scores))
    again = [Vendi(order=order).of(7 * rows[::-1] @ turn) for order in (0, *ORDERS)]
    np.testing.assert_allclose(again, scores)
    assert Vendi().of(rows * 1e200) == pytest.approx(scores[3])
    assert Vendi().of(rows.astype(np.float16)) == pytest.approx(scores[3], rel=1e-3)
    # the published defect: order 2 is another number than order 1
    assert scores[3] - scores[5] > 0.1


def test_random_features_converge_to_the_exact_kernel():
    rows = np.random.default_rng(1).standard_normal((300, 5)) * 0.5
    exact = Vendi(kernel="rbf", order=2.0).of(rows)
    errors = [
        np.mean([abs(Vendi(kernel="rbf", order=2.0, features=f, seed=s).of(rows) - exact) for s in range(8)]) / exact
        for f in (64, 1024)
    ]
    assert errors[1] < errors[0] / 2
    assert errors[1] < 0.02
    many, few = Vendi(kernel="rbf", features=8).of(rows), Vendi(kernel="rbf", features=600).of(rows)
    assert 1 < many <= 8 < few
    assert Vendi(kernel="rbf", features=64, seed=1).of(rows) != Vendi(kernel="rbf", features=64, seed=2).of(rows)


@pytest.mark.parametrize(
    "params",
    [{}, {"kernel": "rbf"}, {"kernel": "rbf", "features": 10}, {"kernel": "rbf", "features": 80}],
)
@pytest.mark.parametrize("n", [5, 60])
def test_what_the_rows_add_is_the_whole(params, n):
    rows = np.random.default_rng(2).standard_normal((n, 12))
    rows[: n // 2] = rows[0] + 0.01 * rows[: n // 2]
    added = Vendi(**params).surprise(rows)
    assert added.shape == (n,)
    assert added.min() >= 0
    assert added.mean() == pytest.approx(np.log(Vendi(**params).of(rows)))
    if params.get("features") != 10:
        assert added[: n // 2].max() < added[n // 2 :].min()


def test_hill_numbers_of_shares():
    p = np.array([0.5, 0.25, 0.25, 0.0])
    assert hill(p, 0) == pytest.approx(3)
    assert hill(p, 1) == pytest.approx(np.exp(1.5 * np.log(2)))
    assert hill(p, 2) == pytest.approx(1 / 0.375)
    assert hill(p, np.inf) == 2
    assert hill(p, 1 + 1e-7) == pytest.approx(hill(p, 1), rel=1e-5)
    assert hill(np.full(1000, 1e-3), 400.0) == pytest.approx(1000)  # 1e-1200 underflows


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (np.array([[1.0, 0], [0, 0]]), "row 1 is all zeros"),
        (np.array([[1.0, 0], [np.nan, 0]]), "row 1 has an embedding that is not finite"),
        (np.ones((0, 3)), "shape"),
        (np.ones(3), "shape"),
    ],
)
def test_bad_rows_are_named(rows, words):
    for order in (1.0, 2.0):
        with pytest.raises(ValueError, match=words):
            Vendi(order=order).of(rows)


def test_keys_that_would_do_nothing_are_refused(monkeypatch):
    for bad in (
        {"bandwidth": 1.0},
        {"features": 64},
        {"kernel": "rbf", "seed": 1},
        {"kernel": "rbf", "features": 7},
        {"order": -1.0},
        {"order": float("inf")},
    ):
        with pytest.raises(ValidationError):
            Vendi(**bad)
    assert Vendi.model_validate_json(Vendi(order="inf").model_dump_json()).order == "inf"
    with pytest.raises(ValueError, match="order 1"):
        Vendi(order=2.0).surprise(np.eye(3))
    monkeypatch.setattr(vendi, "EXACT", 4)
    with pytest.raises(ValueError, match="features"):
        Vendi(kernel="rbf").of(np.eye(5))
