"""Forgetting events of hand-written traces."""

from __future__ import annotations

import numpy as np
import pytest

from residency.curate.forgetting import Forgetting, events


def test_hand_written_traces():
    traces = {"1111": 0, "0011": 0, "0101": 1, "1010": 2, "1100": 1, "0001": 0, "0000": 4, "1000": 1}
    record = np.array([[int(c) for c in trace] for trace in traces]).T
    assert events(record).tolist() == list(traces.values())
    assert events(record.astype(bool)).tolist() == list(traces.values())
    assert events(record.astype(np.int8)).dtype == np.float64


def test_none_that_was_learned_has_as_many_as_one_that_never_was():
    rng = np.random.default_rng(0)
    record = rng.integers(0, 2, (9, 500))
    record[:, :20] = 0
    record[::2, 20], record[1::2, 20] = 1, 0  # the most that can be
    found = events(record)
    assert (found[:20] == 9).all()
    assert found[20:].max() == found[20] == 4


def test_a_time_at_which_a_row_was_not_looked_at_is_passed_over():
    nan = np.nan
    record = np.array([[1, nan, 0], [nan, nan, 1], [nan, 0, nan], [0, nan, 0]]).T
    assert events(record).tolist() == [1, 0, 3, 3]
    assert np.isnan(events(np.array([[nan], [nan]]))).all()
    assert events(np.array([[nan], [0]])).tolist() == [2]


def test_edges():
    assert events(np.empty((3, 0))).shape == (0,)
    assert events(np.array([[1], [0]])).tolist() == [1]
    with pytest.raises(ValueError, match=r"\[times, rows\]"):
        events(np.array([[0.5]]))
    with pytest.raises(ValueError, match=r"\[times, rows\]"):
        events(np.array([1, 0]))
    with pytest.raises(ValueError, match="record a training first"):
        Forgetting().score({"right": np.ones(3)})
    assert Forgetting(prefix="r.").score({"r.2": np.zeros(1), "r.1": np.ones(1), "rx3": np.ones(1)}).tolist() == [1]
