"""Held-out values: no training row is labelled with one, synonyms included."""

from __future__ import annotations

from typing import Any

import pytest

from residency.curate.heldout import hold_out, labels_of, unseen

SYNONYMS = {"Oriental": "asian", "inexpensive": "cheap", "low": "inexpensive"}


def row(*values: str, slot: str = "food", **canonical: str) -> dict[str, Any]:
    """A row of words, each labelled."""
    spans = [{"slot": slot, "start": i, "end": i + 1} for i in range(len(values))]
    for span, value in zip(spans, values, strict=True):
        span |= {"value": canonical[value]} if value in canonical else {}
    return {"tokens": list(values), "spans": spans}


ROWS = [row("thai"), row("Thai"), row("asian"), row("oriental", "greek"), row("greek"), row("low"), row(), row("swiss")]


@pytest.mark.parametrize("seed", range(8))
def test_training_and_held_out_values_do_not_meet(seed: int) -> None:
    split = hold_out(ROWS, 0.4, seed, SYNONYMS)
    assert len(split.values) == 2
    left = [labels_of(ROWS[i], None, SYNONYMS) for i in split.keep]
    assert not frozenset().union(*left) & split.values
    assert all(labels_of(ROWS[i], None, SYNONYMS) & split.values for i in split.aside)
    assert sorted(split.keep + split.aside) == list(range(len(ROWS)))
    kept = [ROWS[i] for i in split.keep]
    assert all(unseen(kept, [row(value)], SYNONYMS) == [True] for value in split.values)
    if "asian" in split.values:
        assert {2, 3} <= set(split.aside)
        assert unseen(kept, [row("ORIENTAL")], SYNONYMS) == [True]
    if "cheap" in split.values:
        assert 5 in split.aside


def test_values_follow_the_table_and_the_label() -> None:
    assert labels_of(ROWS[5], None, SYNONYMS) == {"cheap"}
    assert labels_of(ROWS[3], None, SYNONYMS) == {"asian", "greek"}
    assert labels_of(row("thailand", thailand="Thai")) == {"thai"}
    assert labels_of(row("thai", slot="area"), "food") == frozenset()
    with pytest.raises(ValueError, match="circle"):
        labels_of(row("a"), None, {"a": "b", "b": "a"})


def test_the_seed_decides_and_the_order_of_rows_does_not() -> None:
    assert hold_out(ROWS, 0.4, 3) == hold_out(ROWS, 0.4, 3)
    for seed in range(10):
        assert hold_out(ROWS[::-1], 0.4, seed).values == hold_out(ROWS, 0.4, seed).values
    assert len({hold_out(ROWS, 0.4, seed).values for seed in range(20)}) > 5


def test_none_all_and_empty() -> None:
    assert hold_out(ROWS, 0).aside == []
    everything = hold_out(ROWS, 1, synonyms=SYNONYMS)
    assert everything.keep == [6]
    assert everything.values == {"thai", "asian", "greek", "cheap", "swiss"}
    assert hold_out([], 0.5).keep == []
    assert unseen([], ROWS[:1]) == [True]
    assert unseen([], [row()]) == [False]
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share"):
            hold_out(ROWS, share)


def test_only_one_slot() -> None:
    rows = [row("thai"), row("north", slot="area")]
    assert hold_out(rows, 1, slot="area").aside == [1]


def test_a_bad_row_is_named() -> None:
    with pytest.raises(ValueError, match="row 1: .*outside"):
        hold_out([row("a"), {"tokens": [], "spans": [{"slot": "s", "start": 0, "end": 1}]}], 0.5)
