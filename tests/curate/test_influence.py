"""Scores from gradients: checkpoints, tasks, missing rows."""

from __future__ import annotations

import numpy as np
import pytest

from residency.curate import influence
from residency.curate.influence import LESS, GraNd, TracIn


def arrays(seed=0, checkpoints=3):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((checkpoints, 20, 5)), rng.standard_normal((checkpoints, 4, 5))


def test_checkpoints_are_summed_with_their_weights(monkeypatch):
    monkeypatch.setattr(influence, "BLOCK", 7)
    pool, trusted = arrays()
    eta = (0.5, 2.0, 1.0)
    apart = sum(e * TracIn().score(g, t) for e, g, t in zip(eta, pool, trusted, strict=True))
    np.testing.assert_allclose(TracIn(weights=eta).score(pool, trusted), apart)
    apart = sum(e * LESS().score(g, t) for e, g, t in zip(eta, pool, trusted, strict=True))
    np.testing.assert_allclose(LESS(weights=eta).score(pool, trusted), apart)
    np.testing.assert_allclose(GraNd().score(pool), np.mean([np.linalg.norm(g, axis=1) for g in pool], 0))
    for score in (LESS(weights=(1.0,)), TracIn(weights=(1.0,))):
        with pytest.raises(ValueError, match="1 weights for 3 checkpoints"):
            score.score(pool, trusted)


def test_the_best_task_counts_over_all_checkpoints_and_not_the_best_of_each():
    # two tasks whose gradients swap places between checkpoints: no task gains more than the other
    pool = np.array([[[1.0, 0.0]], [[1.0, 0.0]]])
    trusted = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    assert LESS().score(pool, trusted, ["a", "b"]) == pytest.approx([1.0])
    assert LESS().score(pool[0], trusted[0], ["a", "b"]) == pytest.approx([1.0])
    assert LESS().score(pool[0], trusted[0]) == pytest.approx([0.5])


def test_length_of_gradients_counts_for_tracin_only():
    pool, trusted = (a[0] for a in arrays())
    np.testing.assert_allclose(LESS().score(7 * pool, 3 * trusted), LESS().score(pool, trusted))
    np.testing.assert_allclose(TracIn().score(7 * pool, 3 * trusted), 21 * TracIn().score(pool, trusted))
    assert np.abs(LESS().score(pool, trusted)).max() <= 1


def test_half_precision_missing_rows_and_zero_rows():
    pool, trusted = (a[0].astype(np.float16) for a in arrays())
    pool[3], trusted[1], pool[5] = np.nan, np.nan, 0
    for score in (LESS(), TracIn()):
        found = score.score(pool, trusted)
        assert np.flatnonzero(np.isnan(found)).tolist() == [3]
        assert found[5] == 0
        np.testing.assert_allclose(found, score.score(pool.astype(float), trusted[[0, 2, 3]].astype(float)))
    # a task of which nothing is left does not count
    assert not np.isnan(LESS().score(pool, trusted, ["a", "b", "a", "a"])[0])
    huge = np.full((2, 3), 60_000, np.float16)
    assert np.isfinite(GraNd().score(huge)).all()


def test_wrong_shapes_are_refused():
    pool, trusted = (a[0] for a in arrays())
    with pytest.raises(ValueError, match="no trusted row has a gradient"):
        LESS().score(pool, np.full((2, 5), np.nan))
    with pytest.raises(ValueError, match="no trusted row has a gradient"):
        TracIn().score(pool, trusted[:0])
    with pytest.raises(ValueError, match="differ in checkpoints or width"):
        TracIn().score(pool, trusted[:, :3])
    with pytest.raises(ValueError, match="3 labels for 4 trusted rows"):
        LESS().score(pool, trusted, ["a"] * 3)
    with pytest.raises(ValueError, match="must be"):
        GraNd().score(pool[0])
