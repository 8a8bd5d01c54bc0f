"""Gradient matching: exact recovery, non-negative least squares of scipy, what stops it, missing rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from residency.curate.matching import GradientMatching, nonnegative


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_weights_are_those_of_scipy(rows, width, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((width, rows)), rng.standard_normal(width)
    stacked, target = np.concatenate([a, 0.3 * np.eye(rows)]), np.concatenate([b, np.zeros(rows)])
    start = np.where(rng.random(rows) < 0.5, 0.0, rng.random(rows))
    found = nonnegative(stacked.T @ stacked, stacked.T @ target, start)
    np.testing.assert_allclose(found, nnls(stacked, target)[0], atol=1e-9)


def test_a_planted_combination_is_found_with_its_weights():
    rng = np.random.default_rng(0)
    pool = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    trusted = np.stack([2 * pool[3] + 0.5 * pool[8], pool[5] - 0.5 * pool[8] + 0.75 * pool[8]])
    chosen = GradientMatching(keep=3, ridge=1e-9).select(pool, trusted)
    assert chosen.indices.tolist() == [3, 5, 8]
    assert chosen.weight[[3, 5, 8]] == pytest.approx([1.0, 0.5, 0.375], rel=1e-6)
    assert chosen.rest < 1e-6
    assert chosen.reasons[8].startswith("kept: weight 0.375,")


def test_few_rows_stand_for_the_mean_of_all_better_than_as_many_drawn_by_chance():
    rng = np.random.default_rng(0)
    pool = rng.standard_normal((300, 20)) + rng.standard_normal(20)
    chosen = GradientMatching(keep=15).select(pool, None)
    mean = pool.mean(0)
    by_hand = np.linalg.norm(mean - chosen.weight @ pool) / np.linalg.norm(mean)
    assert chosen.rest == pytest.approx(by_hand)
    drawn = [np.linalg.norm(mean - pool[rng.choice(300, 15)].mean(0)) / np.linalg.norm(mean) for _ in range(200)]
    assert chosen.rest < min(drawn)


def test_a_budget_that_is_more_than_matching_needs_is_filled_by_cosine():
    pool = np.array([[1.0, 0], [0.9, 0.5], [-1, 0], [0.0, 1]])
    chosen = GradientMatching(keep=3, ridge=1e-6).select(pool, np.array([[2.0, 0]]))
    assert chosen.indices.tolist() == [0, 1, 3]
    assert "weight 2" in chosen.reasons[0]
    assert "fills the budget" in chosen.reasons[1]
    assert chosen.reasons[2] == "dropped: cosine -1.00 with the target, not needed to match it"


def test_scale_half_precision_and_missing_rows():
    rng = np.random.default_rng(0)
    pool, trusted = rng.standard_normal((30, 6)), rng.standard_normal((2, 6))
    plain = GradientMatching(keep=8).select(pool, trusted)
    big = GradientMatching(keep=8).select(1e3 * pool, trusted)
    assert big.indices.tolist() == plain.indices.tolist()
    np.testing.assert_allclose(big.weight, plain.weight / 1e3, rtol=1e-6)
    half = GradientMatching(keep=8).select((1e4 * pool).astype(np.float16), trusted)
    assert half.indices.tolist() == plain.indices.tolist()
    gone = pool.copy()
    gone[plain.indices[0]] = np.nan
    chosen = GradientMatching(keep=99).select(gone, trusted)
    assert len(chosen.indices) == 29
    assert plain.indices[0] not in chosen.indices
    assert chosen.reasons[plain.indices[0]] == "dropped: no gradient"
    assert np.isnan(chosen.score[plain.indices[0]])


def test_edges():
    one = GradientMatching(keep=5).select(np.array([[1.0, 2.0]]), None)
    assert one.indices.tolist() == [0]
    same = GradientMatching(keep=2).select(np.ones((4, 3)), None)
    assert same.indices.tolist() == [0, 1]
    assert GradientMatching(keep=2).select(np.zeros((3, 2)), None).indices.tolist() == [0, 1]
    assert GradientMatching(keep=2).select(np.empty((0, 2)), None).indices.tolist() == []
    with pytest.raises(ValueError, match="no trusted row has a gradient"):
        GradientMatching().select(np.ones((4, 3)), np.empty((0, 3)))
    with pytest.raises(ValueError, match=r"must be \[K, 3\]"):
        GradientMatching().select(np.ones((4, 3)), np.ones((2, 2)))
