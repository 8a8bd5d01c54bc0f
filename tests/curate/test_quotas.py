"""Quotas: exact sums, never more than there is, the least unfair whole numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residency.curate.quotas import Quotas, apportion

groups = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 1.0, 2.5, 7.0]), st.integers(0, 30)), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(groups, st.integers(0, 120))
def test_sums_are_exact_bounded_and_within_one_of_proportion(pairs, total):
    weights, sizes = (np.array(x) for x in zip(*pairs, strict=True))
    quota = apportion(weights, sizes, total)
    able = sizes[weights > 0].sum()
    assert quota.sum() == min(total, able)
    assert (quota >= 0).all()
    assert (quota <= sizes).all()
    assert (quota[weights == 0] == 0).all()
    # water filling: the level at which min(size, level · weight) sums to the total, by bisection
    low, high = 0.0, 1e4
    for _ in range(80):
        level = (low + high) / 2
        low, high = (low, level) if np.minimum(sizes, level * weights).sum() >= min(total, able) else (level, high)
    assert (np.abs(quota - np.minimum(sizes, level * weights)) < 1 + 1e-6).all()


def test_largest_remainders_by_hand():
    assert apportion([47, 16, 15.8, 12, 6.1, 3.1], [99] * 6, 10).tolist() == [5, 2, 1, 1, 1, 0]
    assert apportion([1, 1, 1], [2, 50, 50], 12).tolist() == [2, 5, 5]
    assert apportion([1, 1, 1], [9, 9, 9], 4).tolist() == [2, 1, 1]


def test_first_tag_counts_and_missing_quality_is_never_chosen():
    tags = [("a",), ("b", "a"), ("a", "b"), (), ("b",)]
    found = Quotas(keep=9, shares={"a": 1, "b": 1}).select(tags, np.array([1, 5, np.nan, 4, 6]))
    assert found.indices.tolist() == [0, 4, 1]
    assert found.reasons[2] == "dropped: has no quality"
    assert found.reasons[3] == "dropped: tag '' has no share"
    assert found.reasons[1] == "kept: 2 of tag 'b', which gives 2 of 2"


def test_without_quality_rows_are_drawn():
    tags = [("a",)] * 50 + [("b",)] * 50
    one, other = (set(Quotas(keep=20, seed=s).select(tags).indices.tolist()) for s in (0, 1))
    assert one != other
    assert sum(i < 50 for i in one) == sum(i < 50 for i in other) == 10


def test_misspelt_shares_and_empty_input():
    with pytest.raises(ValueError, match="no row has the tag 'cc' of `shares`; tags are 'a'"):
        Quotas(shares={"a": 1, "cc": 2}).select([("a",)])
    for bad in ({}, {"a": 0}, {"a": -1}):
        with pytest.raises(ValueError, match="weights above 0"):
            Quotas(shares=bad)
    assert Quotas().select([]).indices.tolist() == []
