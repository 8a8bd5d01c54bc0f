"""DPP greedy MAP: the volume, when it is used up, and odd input."""

from __future__ import annotations

import numpy as np
import pytest

from residency.curate.dpp import DPP


@pytest.mark.parametrize("bandwidth", [None, 0.4])
def test_gains_sum_to_the_log_determinant(bandwidth):
    rng = np.random.default_rng(0)
    rows, quality = rng.standard_normal((200, 24)), rng.standard_normal(200)
    found = DPP(keep=20, bandwidth=bandwidth, quality_weight=0.5).select(rows, quality)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    alike = unit @ unit.T if bandwidth is None else np.exp(-(2 - 2 * unit @ unit.T) / (2 * bandwidth**2))
    q = np.exp(0.5 * quality)
    kernel = (q[:, None] * alike * q)[np.ix_(found.indices, found.indices)]
    np.testing.assert_allclose(found.score[found.indices].sum(), np.linalg.slogdet(kernel)[1], rtol=1e-5)
    larger = [*found.indices, int(np.setdiff1d(np.arange(200), found.indices)[3])]
    kernel = (q[:, None] * alike * q)[np.ix_(larger, larger)]
    np.testing.assert_allclose(
        found.score[larger].sum(), np.linalg.slogdet(kernel)[1], rtol=1e-5, err_msg="what a dropped row would add"
    )


def test_no_more_rows_than_dimensions():
    rows = np.random.default_rng(1).standard_normal((40, 6))
    found = DPP(keep=30).select(rows)
    assert len(found.indices) == 6
    assert found.reasons.count("dropped: nothing of it is left beside the kept rows") == 34
    assert np.isnan(np.delete(found.score, found.indices)).all()


def test_copies_are_never_chosen_twice_however_good():
    rows = np.repeat(np.eye(4), 3, axis=0).astype(np.float32)
    found = DPP(keep=12).select(rows, np.arange(12.0) * 100)
    assert found.indices.tolist() == [11, 8, 5, 2]
    assert DPP(keep=12, bandwidth=0.3).select(rows).indices.tolist() == [0, 3, 6, 9]


def test_quality_of_any_scale_and_missing():
    rows = np.random.default_rng(2).standard_normal((30, 8))
    quality = np.full(30, -1e4)
    quality[[3, 9]] = 1e4, np.nan
    found = DPP(keep=30).select(rows, quality)
    assert found.indices[0] == 3
    assert 9 not in found.indices
    assert found.reasons[9] == "dropped: has no quality"


def test_odd_input():
    assert DPP().select(np.empty((0, 3))).indices.tolist() == []
    assert DPP().select(np.ones((1, 3), np.float16)).indices.tolist() == [0]
    assert DPP(keep=3).select(np.ones((5, 3))).indices.tolist() == [0]
    assert DPP(keep=3).select(np.zeros((5, 3))).indices.tolist() == []
