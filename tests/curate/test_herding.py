"""Herding: the mean of the chosen."""

from __future__ import annotations

import numpy as np

from residency.curate.herding import Herding


def gap(rows, chosen):
    return float(np.linalg.norm(rows[chosen].mean(0) - rows.mean(0)))


def test_score_is_the_distance_of_the_means_and_much_below_that_of_chance():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((800, 6)) + 3
    found = Herding(keep=60, metric="euclid").select(rows)
    kept = found.indices
    for m in (1, 10, 60):
        np.testing.assert_allclose(found.score[kept[m - 1]], gap(rows, kept[:m]), rtol=1e-3, atol=1e-6)
    chance = np.median([gap(rows, rng.choice(800, 60, replace=False)) for _ in range(50)])
    assert gap(rows, kept) < chance / 10
    dropped = np.setdiff1d(np.arange(800), kept)[7]
    np.testing.assert_allclose(found.score[dropped], gap(rows, [*kept[:-1], dropped]), rtol=1e-3)


def test_all_rows_equal_one_row_none():
    assert Herding(keep=3).select(np.ones((5, 2))).indices.tolist() == [0, 1, 2]
    assert Herding(keep=3).select(np.ones((1, 2))).indices.tolist() == [0]
    assert Herding(keep=3).select(np.empty((0, 2))).indices.tolist() == []


def test_float16():
    rows = np.random.default_rng(1).standard_normal((300, 8)).astype(np.float16)
    assert (
        Herding(keep=20).select(rows).indices.tolist() == Herding(keep=20).select(rows.astype(float)).indices.tolist()
    )
