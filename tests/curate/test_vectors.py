"""Blocks, checks and units that the selectors share."""

from __future__ import annotations

import numpy as np
import pytest

from residency.curate.vectors import blocks, qualities, table, unit, whole


def test_blocks_cover_all_rows_in_order_and_do_not_touch_them():
    rows = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float16)
    rows[4] = 0
    before = rows.copy()
    places, parts = zip(*blocks(rows, block=4), strict=True)
    assert [(p.start, p.stop) for p in places] == [(0, 4), (4, 8), (8, 10)]
    joined = np.concatenate(parts)
    wide = rows.astype(float)
    np.testing.assert_allclose(joined, wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-9), atol=1e-6)
    np.testing.assert_array_equal(whole(rows), joined)
    np.testing.assert_array_equal(whole(rows, scaled=False), rows.astype(np.float32))
    np.testing.assert_array_equal(rows, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_bad_row_is_named(bad):
    rows = np.ones((9, 3), np.float32)
    rows[[6, 8], 1] = bad
    with pytest.raises(ValueError, match="row 7 has an embedding that is not finite"):
        list(blocks(rows, block=4))


def test_opposite_infinities_do_not_hide_each_other_and_large_numbers_are_fine():
    with pytest.raises(ValueError, match="row 1 "):
        list(blocks(np.array([[np.inf, -np.inf]], np.float32)))
    assert np.isfinite(whole(np.full((4, 2), 3e38, np.float32), scaled=False)).all()


def test_shapes_and_qualities():
    with pytest.raises(ValueError, match=r"\[N, D\]; got \(3,\)"):
        table(np.ones(3))
    with pytest.raises(ValueError, match="one number per row"):
        qualities([1.0, 2.0], 3)
    with pytest.raises(ValueError, match="row 2 has an infinite quality"):
        qualities([1.0, -np.inf], 2)
    assert qualities([1, np.nan], 2).tolist()[0] == 1.0
    assert unit(np.empty((0, 4))).shape == (0, 4)
