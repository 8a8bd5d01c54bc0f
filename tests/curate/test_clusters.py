"""Spherical k-means and neighbours by clusters, against scikit-learn and all pairs."""

from __future__ import annotations

import numpy as np
import pytest

import residency.curate.clusters as module
from residency.curate.clusters import kmeans, neighbours


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def blobs(n, k, seed=0, d=16, spread=0.15):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, k, n)
    return unit(unit(rng.standard_normal((k, d)))[label] + spread * rng.standard_normal((n, d))), label


def test_planted_clusters_are_found_as_scikit_learn_finds_them():
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score

    rows, planted = blobs(1500, 12)
    mine, theirs = [], []
    for seed in range(15):
        found = kmeans(rows, 12, seed)
        peer = KMeans(12, n_init=1, random_state=seed).fit(rows)
        mine.append((adjusted_rand_score(planted, found.label), found.cosine.mean()))
        theirs.append(
            (
                adjusted_rand_score(planted, peer.labels_),
                (rows * unit(peer.cluster_centers_)[peer.labels_]).sum(1).mean(),
            )
        )
    assert max(mine)[0] > 0.99
    assert (np.mean(mine, 0) >= np.mean(theirs, 0) - 0.04).all()


@pytest.mark.parametrize("plus", [True, False])
def test_it_stops_where_lloyds_steps_move_nothing(plus):
    rows, _ = blobs(900, 9, spread=0.4)
    found = kmeans(rows, 15, seed=3, steps=200, plus=plus)
    similar = rows.astype(float) @ found.centres.T.astype(float)
    assert (similar[np.arange(900), found.label] >= similar.max(1) - 1e-6).all()
    np.testing.assert_allclose(found.cosine, similar.max(1), atol=1e-5)
    for c in range(15):
        mean = rows[found.label == c].mean(0)
        np.testing.assert_allclose(found.centres[c], mean / np.linalg.norm(mean), atol=1e-5)


def test_a_good_start_is_better_than_chance():
    """Rows of 30 small far clusters and one huge one: uniform draws miss most of the small ones."""
    rng = np.random.default_rng(0)
    centres = unit(rng.standard_normal((31, 32)))
    rows = unit(np.repeat(centres, [3000, *[20] * 30], axis=0) + 0.05 * rng.standard_normal((3600, 32)))
    plus, chance = (np.mean([kmeans(rows, 31, s, plus=p).cosine.min() for s in range(3)]) for p in (True, False))
    assert plus > chance + 0.1


def test_a_sample_trains_it(monkeypatch):
    rows, _ = blobs(4000, 5)
    monkeypatch.setattr(module, "SMALL", 100)
    monkeypatch.setattr(module, "SAMPLE", 20)
    some = kmeans(rows, 10)
    monkeypatch.setattr(module, "SAMPLE", 4000)
    assert 0.98 * kmeans(rows, 10).cosine.mean() < some.cosine.mean()
    assert len(some.label) == 4000


def test_more_clusters_than_rows_copies_and_none():
    assert kmeans(np.empty((0, 3), np.float32), 4).label.tolist() == []
    assert sorted(kmeans(np.eye(3, dtype=np.float32), 9).label.tolist()) == [0, 1, 2]
    assert kmeans(unit(np.ones((6, 3))), 4).label.tolist() == [0] * 6


def test_few_rows_have_their_exact_neighbours():
    rows, _ = blobs(700, 5)
    near, cosine = neighbours(rows, 9)
    similar = rows @ rows.T
    np.testing.assert_allclose(cosine, -np.sort(-similar, axis=1)[:, :9], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(similar, near.astype(int), 1), cosine, atol=1e-5)


def test_many_rows_have_most_of_them():
    rows, _ = blobs(8_000, 160, d=24)
    near, cosine = neighbours(rows, 10, probes=6)
    similar = rows @ rows.T
    np.testing.assert_allclose(np.take_along_axis(similar, near.astype(int), 1), cosine, atol=1e-5)
    best = np.argpartition(-similar, 10, axis=1)[:, :10]
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(near, best, strict=True)])
    assert recall > 0.88
    assert (near[:, 0] == np.arange(8_000)).mean() > 0.999
