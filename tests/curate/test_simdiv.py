"""Sim-Div: what the common suite does not cover (oracles of the paper's algorithm)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residency.curate.simdiv import SimDiv


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.integers(1, 4), st.floats(0.3, 1.0), st.integers(1, 90), st.integers(0, 10**6))
def test_no_two_kept_rows_are_near_duplicates_and_every_drop_has_a_better_twin(n, k, tau, keep, seed):
    rng = np.random.default_rng(seed)
    pool, examples = rng.standard_normal((n, 4)), rng.standard_normal((k, 4))
    chosen = SimDiv(keep=keep, near_duplicates=tau).select(pool, examples)
    assert len(chosen.indices) <= min(keep, n)
    vectors, rank = (
        unit(pool.astype(np.float32)),
        {int(j): i for i, j in enumerate(np.argsort(-chosen.score, kind="stable"))},
    )
    cosines = vectors @ vectors.T
    kept = chosen.indices.tolist()
    assert all(cosines[a, b] <= tau + 1e-5 for i, a in enumerate(kept) for b in kept[:i])
    for row, reason in enumerate(chosen.reasons):
        assert (row in kept) == reason.startswith("kept")
        if "near-duplicate" in reason:
            twin = int(reason.rsplit(" ", 1)[1]) - 1
            assert cosines[row, twin] > tau - 1e-5
            assert rank[twin] < rank[row]
    assert kept == sorted(kept, key=rank.get)


def test_float16_and_memory_maps_choose_like_float32(tmp_path):
    rng = np.random.default_rng(0)
    pool, examples = unit(rng.standard_normal((3000, 16))).astype(np.float16), rng.standard_normal((5, 16))
    mapped = np.memmap(tmp_path / "x", np.float16, "w+", shape=pool.shape)
    mapped[:] = pool
    a = SimDiv(keep=1500, near_duplicates=0.8).select(mapped, examples)
    b = SimDiv(keep=1500, near_duplicates=0.8).select(pool.astype(np.float32), examples, block=100)
    assert a.indices.tolist() == b.indices.tolist()


def test_the_papers_fixed_candidates_do_not_refill():
    pool = np.repeat(np.eye(3), 4, axis=0)[:, :3] + 0.001 * np.arange(12)[:, None]
    found = SimDiv(keep=10, near_duplicates=0.9, candidates=4).select(pool, np.eye(3)[:1])
    assert len(found.indices) == 1
    assert len(SimDiv(keep=10, near_duplicates=0.9).select(pool, np.eye(3)[:1]).indices) == 3


def test_zero_rows_and_one_row():
    found = SimDiv(keep=2).select(np.zeros((3, 4)), np.ones((1, 4)))
    assert len(found.indices) == 2
    assert SimDiv().select(np.ones((1, 4)), np.ones((1, 4))).indices.tolist() == [0]


def test_multimodal_trusted_rows_are_each_served():
    """The official code averages the trusted rows; rows near one mode only must still win over rows near the mean."""
    examples = np.array([[1.0, 0, 0], [0, 1.0, 0]])
    pool = np.array([[1, 0.1, 0], [0.1, 1, 0], [0.7, 0.7, 1.2], [0.5, 0.5, 1]])
    assert set(SimDiv(keep=2).select(pool, examples).indices.tolist()) == {0, 1}


@pytest.mark.parametrize("bad", [{"keep": 0}, {"near_duplicates": 0}, {"near_duplicates": 1.1}, {"candidates": 0}])
def test_values_out_of_range(bad):
    with pytest.raises(ValueError, match="greater|less"):
        SimDiv(**bad)
