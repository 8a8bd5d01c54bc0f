"""Facility location and QDIT: the guarantee, four ways to one answer, exact cover, odd input."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

import residency.curate.cover as module
from residency.curate.facility import QDIT, FacilityLocation


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def alike(rows):
    rows = unit(np.asarray(rows, float))
    return np.maximum(rows @ rows.T, 0)


def value(rows, chosen):
    return alike(rows)[:, list(chosen)].max(1).sum()


def clustered(n, seed=0, d=12):
    rng = np.random.default_rng(seed)
    return (3 * rng.standard_normal((n // 20, d)))[rng.integers(0, n // 20, n)] + rng.standard_normal((n, d))


@pytest.mark.parametrize("seed", range(5))
def test_greedy_reaches_its_share_of_the_best_set(seed):
    rows = np.random.default_rng(seed).standard_normal((12, 3))
    best = max(value(rows, s) for s in combinations(range(12), 3))
    for way in ("lazy", "neighbours"):
        found = FacilityLocation(keep=3, greedy=way).select(rows)
        assert (1 - 1 / math.e) * best <= value(rows, found.indices) <= best + 1e-5


def naive(rows, keep):
    similar, cover, chosen, gains = alike(rows), np.zeros(len(rows)), [], []
    for _ in range(keep):
        gain = np.maximum(similar - cover, 0).sum(1)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        gains.append(gain.max())
        cover = np.maximum(cover, similar[chosen[-1]])
    return chosen, gains


@pytest.mark.parametrize("held", [True, False])
def test_lazy_is_naive_index_for_index_and_gains_fall(held, monkeypatch):
    if not held:
        monkeypatch.setattr(module, "EXACT", 10)
    rows = clustered(600)
    chosen, gains = naive(rows, 80)
    found = FacilityLocation(keep=80, greedy="lazy").select(rows)
    assert found.indices.tolist() == chosen
    said = [float(found.reasons[i].split("adds ")[1].split(";")[0]) for i in chosen]
    np.testing.assert_allclose(said, gains, rtol=6e-3)
    assert (np.diff(gains) <= 1e-9).all()


def test_all_neighbours_are_naive():
    rows = clustered(300)
    found = FacilityLocation(keep=40, greedy="neighbours", near=300).select(rows)
    assert found.indices.tolist() == naive(rows, 40)[0]


@pytest.mark.parametrize(("way", "share"), [("neighbours", 0.999), ("stochastic", 0.98)])
def test_the_approximate_ways_come_close_and_say_what_they_reach(way, share):
    rows = clustered(2000)
    exact = value(rows, naive(rows, 100)[0])
    found = FacilityLocation(keep=100, greedy=way, near=60 if way == "neighbours" else None).select(rows)
    reached = value(rows, found.indices)
    assert reached >= share * exact
    np.testing.assert_allclose(found.score.sum(dtype=float), reached, rtol=1e-5)
    similar = alike(rows)
    np.testing.assert_allclose(similar[np.arange(2000), found.nearest], similar[:, found.indices].max(1), atol=1e-5)


def test_smaller_epsilon_looks_at_more_rows():
    rows = clustered(1000)
    reached = {
        e: np.mean(
            [
                value(rows, FacilityLocation(keep=50, greedy="stochastic", epsilon=e, seed=s).select(rows).indices)
                for s in range(4)
            ]
        )
        for e in (0.9, 0.01)
    }
    assert reached[0.9] < reached[0.01] <= value(rows, naive(rows, 50)[0]) * 1.001


def test_stochastic_with_every_row_drawn_is_naive():
    """As ε → 0 the sample (with replacement) holds every row."""
    rows = clustered(60)
    found = FacilityLocation(keep=10, greedy="stochastic", epsilon=1e-100).select(rows)
    assert found.indices.tolist() == naive(rows, 10)[0]


def test_qdit_between_its_ends():
    rows, quality = clustered(300), np.random.default_rng(1).random(300)
    by_quality = QDIT(keep=20, alpha=1.0).select(rows, quality).indices
    assert by_quality.tolist() == np.argsort(-quality)[:20].tolist()
    assert QDIT(keep=20, alpha=0.0).select(rows, quality).indices.tolist() == naive(rows, 20)[0]
    assert (
        QDIT(keep=20).select(rows, 7 * quality - 3).indices.tolist()
        == QDIT(keep=20).select(rows, quality).indices.tolist()
    )


@pytest.mark.parametrize("way", ["lazy", "stochastic", "neighbours"])
def test_rows_without_quality_are_served_and_never_chosen(way):
    rows, quality = clustered(200), np.random.default_rng(1).random(200)
    quality[::2] = np.nan
    found = QDIT(keep=150, greedy=way, alpha=0.1).select(rows, quality)
    assert sorted(found.indices.tolist()) == list(range(1, 200, 2))
    assert found.reasons[0] == "dropped: has no quality"
    assert (found.nearest[::2] % 2 == 1).all()


@pytest.mark.parametrize("way", ["lazy", "stochastic", "neighbours"])
def test_odd_input(way):
    each = FacilityLocation(keep=3, greedy=way)
    assert each.select(np.empty((0, 4))).indices.tolist() == []
    assert each.select(np.ones((1, 4), np.float16)).indices.tolist() == [0]
    assert len(set(each.select(np.ones((7, 4))).indices.tolist())) == 3
    assert len(set(each.select(np.zeros((7, 4))).indices.tolist())) == 3
    opposite = each.select(np.array([[1.0, 0], [-1, 0], [-1, 0.01], [-1, 0.02]]))
    assert 0 in opposite.indices


def test_a_large_pool_goes_by_neighbours_and_keys_without_use_are_refused(monkeypatch):
    monkeypatch.setattr(module, "EXACT", 100)
    rows = clustered(300)
    auto, near = (FacilityLocation(keep=30, **way).select(rows) for way in ({}, {"greedy": "neighbours"}))
    assert auto.indices.tolist() == near.indices.tolist()
    with pytest.raises(ValueError, match="epsilon belongs to greedy: stochastic"):
        FacilityLocation(epsilon=0.2)
    with pytest.raises(ValueError, match="near belongs to greedy: neighbours"):
        FacilityLocation(greedy="lazy", near=5)


def test_pairs_of_neighbours_count_once_in_both_directions():
    near = np.array([[0, 1], [1, 2], [2, 1], [3, -1]], np.int32)
    cosine = np.array([[1, 0.5], [1, 0.7], [1, 0.7], [1, 0]], np.float32)
    start, other, value = module._edges(near, cosine)
    found = {(u, int(other[i])): float(value[i]) for u in range(4) for i in range(start[u], start[u + 1])}
    pairs = {(0, 0): 1, (0, 1): 0.5, (1, 0): 0.5, (1, 1): 1, (1, 2): 0.7, (2, 1): 0.7, (2, 2): 1, (3, 3): 1}
    assert found == pytest.approx(pairs)
    assert len(other) == len(pairs)
