"""SemDeDup, D4, ClusterClip: planted copies, blocks, balance, odd input."""

from __future__ import annotations

import numpy as np
import pytest

from residency.curate.semdedup import D4, ClusterClip, SemDeDup


def test_one_of_planted_copies_survives():
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.standard_normal((300, 16)), 4, axis=0) + 1e-3 * rng.standard_normal((1200, 16))
    for clusters in (1, 10, None):
        found = SemDeDup(clusters=clusters, eps=0.01)
        kept = found.select(rows).indices
        assert sorted(set((kept // 4).tolist())) == list(range(300))
        assert len(kept) == 300
        chosen = found.select(rows)
        for i in np.setdiff1d(np.arange(1200), kept)[:20]:
            assert chosen.nearest[i] // 4 == i // 4
            assert chosen.reasons[i] == f"dropped: means the same as row {chosen.nearest[i] + 1} (cosine 1.00)"


def test_a_cluster_of_several_blocks_is_the_official_rule():
    """max over j < i of the sorted cosine matrix, as `triu` and a column maximum, in one cluster of 2,500 rows."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((2500, 3)) + 1
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    centre = unit.mean(0) / np.linalg.norm(unit.mean(0))
    for which, sign in (("hard", 1), ("easy", -1)):
        order = np.argsort(sign * (unit @ centre))
        similar = np.triu(unit[order] @ unit[order].T, 1)
        removed = order[similar.max(0) > 1 - 1e-4]
        kept = SemDeDup(clusters=1, eps=1e-4, keep_which=which).select(rows).indices
        assert set(kept.tolist()) ^ set(np.setdiff1d(np.arange(2500), removed).tolist()) <= set()


def test_d4_drops_the_ordinary():
    rng = np.random.default_rng(2)
    rows = np.eye(8)[rng.integers(0, 4, 400)] + 0.15 * rng.standard_normal((400, 8))
    found = D4(clusters=4, eps=0.0, prototypes=0.25).select(rows)
    assert len(found.indices) == 300
    out = np.setdiff1d(np.arange(400), found.indices)
    assert found.score[out].min() >= found.score[found.indices].max()
    assert len(D4(clusters=4, eps=0.02, prototypes=0.25).select(rows).indices) < 300


def test_cluster_clip_balances_what_is_unbalanced():
    rng = np.random.default_rng(3)
    sizes = (200, 60, 12, 3)
    rows = np.repeat(np.eye(8)[:4], sizes, axis=0) + 0.05 * rng.standard_normal((275, 8))
    subject = np.repeat(np.arange(4), sizes)
    counts = np.bincount(subject[ClusterClip(keep=45, clusters=4).select(rows).indices])
    assert counts.tolist() == [15, 15, 12, 3]
    capped = ClusterClip(keep=45, clusters=4, cap=10).select(rows)
    assert np.bincount(subject[capped.indices]).tolist() == [10, 10, 10, 3]
    assert np.bincount(subject[ClusterClip(keep=8, clusters=4).select(rows).indices]).tolist() == [2, 2, 2, 2]
    other = ClusterClip(keep=45, clusters=4, seed=1).select(rows).indices
    assert set(other.tolist()) != set(ClusterClip(keep=45, clusters=4).select(rows).indices.tolist())


def test_cluster_clip_by_quality_and_without():
    rows = np.repeat(np.eye(4)[:2], 10, axis=0)
    quality = np.r_[np.arange(10.0), np.full(10, np.nan)]
    found = ClusterClip(keep=20, clusters=2).select(rows, quality)
    assert found.indices.tolist() == list(range(9, -1, -1))
    assert found.reasons[12] == "dropped: has no quality"


@pytest.mark.parametrize("each", [SemDeDup(), D4(), ClusterClip()])
def test_odd_input(each):
    assert each.select(np.empty((0, 3))).indices.tolist() == []
    assert each.select(np.ones((1, 3), np.float16)).indices.tolist() == [0]
    assert each.select(np.ones((6, 3))).indices.size == (6 if isinstance(each, ClusterClip) else 1)
    assert len(each.select(np.zeros((3, 3))).indices) >= 1
