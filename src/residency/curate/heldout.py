"""Values held out of training, so that "unseen" means something.

A model is said to do well on unseen values when it is right on test rows whose values no training row is labelled with.
In the usual splits of dialogue state tracking hardly any such value exists (WoZ 2.0: 3 of 488 mentions of food), so a
claim needs a split of its own:

    H = a random share of the distinct values of the training rows
    training rows with a span labelled h ∈ H, or with a synonym of it, are put aside
    a test row is unseen when one of its values is labelled in no training row that is left

A value is what a span's `value` says, or the text that it covers, in lower case, after a table of synonyms
("oriental" → "asian oriental"); a table may be a chain. A held-out value that is merely mentioned, unlabelled, in
a row that is kept stays there: the model reads it, but is never told to copy it.

Paper: the split is ours, after Song et al., 2020 (arXiv 2002.09634), whose question it answers. Official code: none
released. Time and memory: linear in the spans.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from residency.curate.spans import checked, value_of


@dataclass(frozen=True)
class HeldOut:
    """A split by value.

    Args:
        values: What is held out.
        keep: Positions of the rows to train on.
        aside: Positions of the rows with a held-out value.
    """

    values: frozenset[str]
    keep: list[int]
    aside: list[int]


def labels_of(
    row: Mapping[str, Any], slot: str | None = None, synonyms: Mapping[str, str] | None = None, where: str = "the row"
) -> frozenset[str]:
    """The values that a row is labelled with.

    Args:
        row: A row of `spans` (see `residency.curate.spans`).
        slot: Only of this slot.
        synonyms: Surface form → value.
        where: What an error calls the row.

    Raises:
        ValueError: When a span is out of range, or synonyms go in a circle.
    """
    table = {key.lower(): value.lower() for key, value in (synonyms or {}).items()}
    found = set()
    for span in checked(row, where):
        if slot in (None, span["slot"]):
            value = value_of(row, span)
            passed = {value}
            while table.get(value, value) != value:
                value = table[value]
                if value in passed:
                    raise ValueError(f"the synonyms go in a circle at {value!r}: name one of them the value")
                passed.add(value)
            found.add(value)
    return frozenset(found)


def hold_out(
    rows: Sequence[Mapping[str, Any]],
    share: float,
    seed: int = 0,
    synonyms: Mapping[str, str] | None = None,
    slot: str | None = None,
) -> HeldOut:
    """Choose values to hold out of training rows, and put the rows that are labelled with them aside.

    Args:
        rows: Training rows (see `residency.curate.spans`).
        share: Of the distinct values, rounded to the nearest number of them.
        seed: Which ones; the order of the rows does not matter.
        synonyms: Surface form → value.
        slot: Only values of this slot.

    Raises:
        ValueError: When the share is not within 0…1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share {share}: it must be within 0…1")
    labelled = [labels_of(row, slot, synonyms, f"row {i}") for i, row in enumerate(rows)]
    values = sorted(frozenset().union(*labelled))
    chosen = frozenset(random.Random(seed).sample(values, round(share * len(values))))
    aside = [i for i, mine in enumerate(labelled) if mine & chosen]
    return HeldOut(chosen, [i for i, mine in enumerate(labelled) if not mine & chosen], aside)


def unseen(
    train: Sequence[Mapping[str, Any]],
    test: Sequence[Mapping[str, Any]],
    synonyms: Mapping[str, str] | None = None,
    slot: str | None = None,
) -> list[bool]:
    """For every test row, whether one of its values is labelled in no training row."""
    known = frozenset().union(*(labels_of(row, slot, synonyms) for row in train))
    return [bool(labels_of(row, slot, synonyms) - known) for row in test]
