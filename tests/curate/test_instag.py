"""InsTag's choice: cover first, rows without tags, ties."""

from __future__ import annotations

import numpy as np

from residency.curate.instag import InsTag


def test_the_first_walk_covers_every_tag_and_each_row_brings_one():
    rng = np.random.default_rng(0)
    tags = [tuple(rng.choice(30, rng.integers(1, 6), replace=False).astype(str)) for _ in range(300)]
    found = InsTag(keep=300).select(tags)
    first = [i for i in found.indices.tolist() if "(walk 1)" in found.reasons[i]]
    assert set().union(*(tags[i] for i in first)) == set().union(*tags)
    assert found.indices[: len(first)].tolist() == first
    for place, i in enumerate(first):
        assert set(tags[i]) - set().union(*(tags[j] for j in first[:place]))
    assert (np.diff([len(tags[i]) for i in first]) <= 0).all()


def test_by_hand():
    tags = [("a",), ("a", "b"), (), ("c", "b", "a"), ("d", "d", "a"), ("d",)]
    found = InsTag(keep=9).select(tags)
    assert found.indices.tolist() == [3, 4, 1, 5, 0]
    assert found.reasons[2] == "dropped: has no tag"
    assert found.reasons[4] == "kept: 1 of its 2 tags were not covered (walk 1)"
    assert found.reasons[5] == "kept: 1 of its 1 tags were not covered (walk 2)"
    assert InsTag(keep=2).select(tags).reasons[1] == "dropped: its 2 tags were covered, budget spent"


def test_ties_by_quality_and_missing_quality():
    tags = [("a", "b"), ("a", "b"), ("a", "b")]
    assert InsTag(keep=1).select(tags).indices.tolist() == [0]
    found = InsTag(keep=3).select(tags, np.array([np.nan, 1.0, 2.0]))
    assert found.indices.tolist() == [2, 1]
    assert found.reasons[0] == "dropped: has no quality"
    assert InsTag().select([]).indices.tolist() == []
    assert InsTag().select([()]).indices.tolist() == []
