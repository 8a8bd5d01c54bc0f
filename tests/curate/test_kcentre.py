"""k-centre greedy: the guarantee, the exactness of many picks per pass, and odd input."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from residency.curate.kcentre import KCentre


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def distances(rows):
    return np.linalg.norm(rows[:, None] - rows[None], axis=2)


@pytest.mark.parametrize("metric", ["cosine", "euclid"])
@pytest.mark.parametrize("seed", range(6))
def test_radius_is_at_most_twice_the_best(metric, seed):
    rows = np.random.default_rng(seed).standard_normal((12, 3))
    between = distances(unit(rows) if metric == "cosine" else rows)
    found = KCentre(keep=4, metric=metric).select(rows)
    best = min(between[:, list(s)].min(1).max() for s in combinations(range(12), 4))
    radius = between[:, found.indices].min(1).max()
    assert best <= radius + 1e-6 <= 2 * best + 2e-6
    np.testing.assert_allclose(np.nanmax(np.delete(found.score, found.indices)), radius, rtol=1e-4)


def plain(rows, keep, first):
    chosen = [first]
    least = np.linalg.norm(rows - rows[first], axis=1)
    while len(chosen) < keep:
        chosen.append(int(least.argmax()))
        least = np.minimum(least, np.linalg.norm(rows - rows[chosen[-1]], axis=1))
    return chosen, least


@pytest.mark.parametrize("metric", ["cosine", "euclid"])
def test_many_picks_of_one_pass_are_those_of_one_pass_each(metric):
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((60, 8))[rng.integers(0, 60, 9000)] + 0.3 * rng.standard_normal((9000, 8))
    rows = np.round(rows * 256) / 256 + 20 * (metric == "euclid")
    meant = unit(rows) if metric == "cosine" else rows
    found = KCentre(keep=400, metric=metric).select(rows, block=1000)
    first = int(np.linalg.norm(meant - meant.mean(0), axis=1).argmin())
    chosen, least = plain(meant, 400, first)
    assert found.indices.tolist() == chosen
    out = np.setdiff1d(np.arange(9000), chosen)
    np.testing.assert_allclose(found.score[out], least[out], atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(meant[out] - meant[found.nearest[out]], axis=1), least[out], atol=2e-3)
    for i in (5, 399):
        before = np.linalg.norm(meant[chosen[:i]] - meant[chosen[i]], axis=1)
        assert found.nearest[chosen[i]] == chosen[int(before.argmin())]
        np.testing.assert_allclose(found.score[chosen[i]], before.min(), atol=2e-3)


def test_trusted_rows_count_as_chosen():
    axes = np.eye(4)
    found = KCentre(keep=1).select(axes, axes[:3])
    assert found.indices.tolist() == [3]
    assert found.reasons[0] == "dropped: a trusted row is at 0.00"
    assert found.nearest.tolist() == [-1, -1, -1, -1]
    assert KCentre(keep=2, start="mean").select(axes, axes[:3]).nearest[1] in (-1, 0)
    with pytest.raises(ValueError, match="width"):
        KCentre().select(axes, axes[:, :2])


def test_copies_fill_the_budget_last():
    rows = np.repeat(np.eye(3), 4, axis=0)
    found = KCentre(keep=5).select(rows)
    assert {int(i) // 4 for i in found.indices[:3]} == {0, 1, 2}
    assert len(set(found.indices.tolist())) == 5
    assert KCentre(keep=9).select(np.ones((6, 2))).indices.tolist() == [0, 1, 2, 3, 4, 5]


def test_float16_memory_maps(tmp_path):
    rows = np.random.default_rng(0).standard_normal((500, 16)).astype(np.float16)
    mapped = np.memmap(tmp_path / "x", np.float16, "w+", shape=rows.shape)
    mapped[:] = rows
    assert (
        KCentre(keep=40).select(mapped).indices.tolist() == KCentre(keep=40).select(rows.astype(float)).indices.tolist()
    )


def test_no_row_one_row_zero_rows():
    assert KCentre().select(np.empty((0, 3))).indices.tolist() == []
    assert KCentre().select(np.ones((1, 3))).indices.tolist() == [0]
    assert len(KCentre(keep=2).select(np.zeros((3, 2))).indices) == 2


def test_hundreds_of_picks_met_at_once_are_told_apart():
    rows = unit(np.random.default_rng(5).standard_normal((1000, 6)))
    found = KCentre(keep=600).select(rows)
    between = distances(rows)
    for i in np.setdiff1d(np.arange(1000), found.indices):
        np.testing.assert_allclose(between[i, found.nearest[i]], between[i, found.indices].min(), atol=2e-3)
