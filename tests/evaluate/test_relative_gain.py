"""Relative Gain and forgetting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from residency.evaluate.relative_gain import forgetting, relative_gain

R = np.array([[0.8, np.nan, np.nan], [0.4, 0.6, np.nan], [0.6, 0.3, 0.9]])


def test_by_hand():
    np.testing.assert_allclose(relative_gain(R, [0.8, 0.6, 0.9]), [50, 100 * (0.6 / 0.8 + 0.3 / 0.6) / 2])
    np.testing.assert_allclose(forgetting(R), [0.4, (0.2 + 0.3) / 2])


def test_nothing_forgotten_is_a_hundred_and_old_tasks_may_change_places():
    u = np.array([0.5, 0.7, 0.9, 0.2])
    full = np.tile(u, (4, 1))
    np.testing.assert_allclose(relative_gain(full, u), 100)
    np.testing.assert_allclose(forgetting(full), 0)
    r = np.random.default_rng(0).random((4, 4))
    order = [1, 0, 2, 3]
    assert relative_gain(r[:, order], u[order])[-1] == pytest.approx(relative_gain(r, u)[-1])


@pytest.mark.parametrize(
    ("r", "u"), [(np.ones((2, 3)), [1, 1]), (np.ones((2, 2)), [1, 0]), (np.full((2, 2), np.nan), [1, 1])]
)
def test_what_is_missing_is_said(r, u):
    with pytest.raises(ValueError, match=r"scores|score"):
        relative_gain(r, u)
