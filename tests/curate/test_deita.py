"""DEITA's filter: what kept rows have in common, chunks, and how the other library differs."""

from __future__ import annotations

import numpy as np
import pytest

from residency.curate.deita import Deita
from residency.curate.simdiv import SimDiv


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(("n", "keep"), [(3000, 10_000), (3000, 1500), (40, 7)])
def test_over_many_chunks_no_two_kept_rows_are_alike_and_every_dropped_one_is(n, keep):
    rng = np.random.default_rng(n)
    rows, quality = rng.standard_normal((n, 5)), rng.integers(0, 50, n).astype(float)
    found = Deita(keep=keep, near_duplicates=0.95).select(rows, quality)
    similar = unit(rows) @ unit(rows).T
    kept = found.indices
    assert len(kept) <= keep
    assert (np.triu(similar[np.ix_(kept, kept)], 1) <= 0.95 + 1e-5).all()
    assert (np.diff(quality[kept]) <= 0).all()
    place = {int(i): p for p, i in enumerate(np.argsort(-quality, kind="stable"))}
    for i, reason in enumerate(found.reasons):
        if "too like" in reason:
            near = int(found.nearest[i])
            assert near in kept
            assert place[near] < place[i]
            np.testing.assert_allclose(found.score[i], similar[i, near], atol=1e-5)
            assert similar[i, near] > 0.95 - 1e-5
        elif "budget spent" in reason:
            assert place[i] > place[int(kept[-1])]


def test_a_chain_keeps_both_ends():
    angles = np.deg2rad([0, 20, 40])
    rows = np.stack([np.cos(angles), np.sin(angles)], 1)
    quality = np.array([3.0, 2.0, 1.0])
    assert Deita(keep=3).select(rows, quality).indices.tolist() == [0, 2]
    assert SimDiv(keep=3, near_duplicates=0.9).select(rows, rows[:1]).indices.tolist() == [0]


def test_missing_quality_budget_and_odd_input():
    rows = np.eye(4)
    found = Deita(keep=2).select(rows, np.array([1, np.nan, 3, 2]))
    assert found.indices.tolist() == [2, 3]
    assert [r.split(":")[0] for r in found.reasons] == ["dropped", "dropped", "kept", "kept"]
    assert found.reasons[1] == "dropped: has no quality"
    assert found.reasons[0].endswith("budget spent")
    assert Deita().select(np.empty((0, 3)), np.empty(0)).indices.tolist() == []
    assert Deita().select(np.ones((5, 3), np.float16), np.ones(5)).indices.tolist() == [0]
    assert Deita(near_duplicates=1).select(np.eye(3)[[0, 1, 2, 0]], np.ones(4)).indices.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="row 4 has an embedding that is not finite"):
        Deita(keep=1).select(np.array([[1, 0], [0, 1], [1, 1], [np.inf, 1]]), np.array([4, 3, 2, np.nan]))
