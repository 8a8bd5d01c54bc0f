"""Top, sample, random: what the common suite does not cover."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from residency.curate.ranking import Random, Sample, Top, gumbel


def test_missing_qualities_are_never_chosen_and_do_not_count_as_rows():
    quality = np.array([1.0, np.nan, 3.0, 2.0, np.nan])
    found = Top(keep=9).select(quality)
    assert found.indices.tolist() == [2, 3, 0]
    assert found.reasons[1] == "dropped: has no quality"
    assert found.reasons[2] == "kept: quality 3 ranks 1 of 3"
    assert Top(keep=9, percentiles=(50.0, 100.0)).select(quality).indices.tolist() == [2, 3]
    assert set(Sample(keep=9).select(quality).indices.tolist()) == {0, 2, 3}


def test_percentiles_are_those_of_scipy():
    quality = np.random.default_rng(0).integers(0, 8, 50).astype(float)
    found = Top(keep=50, percentiles=(30.0, 70.0)).select(quality).indices
    p = [stats.percentileofscore(quality, q, kind="weak") for q in quality]
    assert sorted(found.tolist()) == [i for i in range(50) if 30 <= p[i] <= 70]


def test_equal_rows_come_in_row_order():
    assert Top(keep=3).select(np.ones(9)).indices.tolist() == [0, 1, 2]
    assert Top(keep=3, best="low").select(np.ones(9)).indices.tolist() == [0, 1, 2]


def test_draws_follow_plackett_luce():
    """Every order of 3 rows, against the product of conditional probabilities."""
    q, t, n = np.array([0.0, 0.7, 1.5]), 0.8, 4000
    drawn = Counter(tuple(Sample(keep=3, temperature=t, seed=s).select(q).indices.tolist()) for s in range(n))
    w = np.exp(q / t)
    orders = list(permutations(range(3)))
    expected = [w[a] / w.sum() * w[b] / (w[b] + w[c]) * n for a, b, c in orders]
    assert stats.chisquare([drawn[o] for o in orders], expected).pvalue > 1e-3


def test_random_is_uniform_and_its_noise_keeps_to_the_row():
    texts = [""] * 10
    counts = Counter(i for s in range(1500) for i in Random(keep=3, seed=s).select(texts).indices.tolist())
    assert stats.chisquare([counts[i] for i in range(10)]).pvalue > 1e-3
    np.testing.assert_array_equal(gumbel(100, 4)[:10], gumbel(10, 4))


def test_cold_draws_are_top():
    q = np.random.default_rng(1).permutation(20) / 20
    cold = Sample(keep=6, temperature=1e-4).select(q).indices
    assert cold.tolist() == Top(keep=6).select(q).indices.tolist()


@pytest.mark.parametrize("each", [Top(), Sample()])
def test_empty_one_and_infinite(each):
    assert each.select(np.empty(0)).indices.tolist() == []
    assert each.select(np.array([np.nan])).indices.tolist() == []
    assert each.select(np.array([2.0], np.float16)).indices.tolist() == [0]
    with pytest.raises(ValueError, match="row 2 has an infinite quality"):
        each.select(np.array([1.0, np.inf]))


@pytest.mark.parametrize("bad", [(50, 20), (-1, 50), (0, 101)])
def test_percentiles_out_of_order(bad):
    with pytest.raises(ValueError, match="percentiles must rise"):
        Top(percentiles=bad)


def test_both_ends_of_the_window_are_in_it():
    found = Top(keep=9, percentiles=(50.0, 75.0)).select(np.array([1.0, 2.0, 3.0, 4.0]))
    assert found.indices.tolist() == [2, 1]
