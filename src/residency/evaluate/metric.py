"""What every score in this house looks like: update, merge, compute.

A `Metric` keeps one small `Item` per test item (its score, its weight, what was predicted), never logits, so that
its state can be merged across processes, written into run.json and compared item by item with the next step's:

    score = sum_i w_i s_i / sum_i w_i,        w_i = 1 unless the metric is a ratio (bits per byte).

A metric that is not such a mean (macro-F1) overrides `parts` and `statistic`; the interval and the paired
difference follow. The verbs are those of torchmetrics, which we do not depend on; unlike there, merging the padding
of a distributed sampler counts an item once, because items have names.

Empty-set policy: computing a score of no items is an error, not 0 and not nan.
Cost: a few hundred bytes per item; an interval is one matrix product (see `stats`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from residency.errors import DataError
from residency.stats import Array, Difference, bootstrap, flips, interval, paired_difference, ratio


@dataclass(frozen=True)
class Item:
    """The score of one test item.

    Args:
        id: The item's id in the test set.
        score: What it scored; for a ratio metric, its own ratio.
        weight: What it weighs; for a ratio metric, its denominator.
        prediction: What the model said, where a reader would want to see it.
        target: What was right, where the score cannot be recomputed without it.
    """

    id: str
    score: float
    weight: float = 1.0
    prediction: str | None = None
    target: str | None = None


@dataclass(frozen=True)
class Score:
    """A score with its interval.

    Args:
        value: The score of the whole test set.
        low: Lower end of the bootstrap interval.
        high: Upper end of the bootstrap interval.
        n: How many items.
        items: The items, sorted by id.
    """

    value: float
    low: float
    high: float
    n: int
    items: tuple[Item, ...] = ()


class Metric:
    """A streaming score. Subclasses define `update`, and nothing else if they are a (weighted) mean."""

    name: ClassVar[str] = "metric"
    higher_is_better: ClassVar[bool] = True
    threshold: ClassVar[float | None] = 0.5
    """An item scoring at least this is right, for `flips`; None where no such line exists."""

    def __init__(self) -> None:
        self._items: dict[str, Item] = {}

    def add(self, item: Item) -> None:
        """Record one item; `update` of the subclasses ends here.

        Raises:
            DataError: The id was scored before, or the score or the weight is not finite.
        """
        if item.id in self._items:
            raise DataError("this test item was scored twice", where=item.id, hint="give every row its own id")
        if not (np.isfinite(item.score) and np.isfinite(item.weight)):
            raise DataError(
                f"{self.name} of this item is {item.score}",
                where=item.id,
                hint="the model's outputs are not finite: look at the step before this evaluation",
            )
        self._items[item.id] = item

    def merge(self, other: Self) -> Self:
        """Take in another part of the same test set; an item that both have with one result counts once.

        Raises:
            DataError: An item has two different results.
        """
        for key, item in other._items.items():
            if self._items.setdefault(key, item) != item:
                raise DataError("this test item has two different results", where=key, hint="were seeds equal?")
        return self

    def compute(self, n: int = 2000, seed: int = 0, level: float = 0.95) -> Score:
        """The score of all items so far, with a bootstrap interval (n resamples).

        Raises:
            DataError: There are no items.
        """
        items = tuple(sorted(self._items.values(), key=lambda item: item.id))
        if not items:
            raise DataError(f"{self.name} of no items is undefined", hint="is the test set empty?")
        parts = self.parts(items)
        value = float(self.statistic(parts.sum(0, keepdims=True))[0])
        plain = type(self).parts is Metric.parts and all(item.weight == 1 for item in items)
        if plain:
            low, high = interval([item.score for item in items], n=n, seed=seed, level=level)
        else:
            low, high = bootstrap(self.statistic, parts, n, seed, level)
        return Score(value, low, high, len(items), items)

    def parts(self, items: Sequence[Item]) -> Array:
        """Additive parts of the items, [N, S]."""
        return np.array([[item.score * item.weight, item.weight] for item in items])

    def statistic(self, totals: Array) -> Array:
        """Scores [R] of sums of parts [R, S]."""
        return ratio(totals)

    def difference(self, before: Score, after: Score, n: int = 2000, seed: int = 0, level: float = 0.95) -> Difference:
        """After minus before with a paired bootstrap interval, on the items both have."""
        shared = {item.id for item in before.items} & {item.id for item in after.items}
        rows = [[item for item in side.items if item.id in shared] for side in (before, after)]
        both = self.parts([*rows[0], *rows[1]]).tolist() if shared else []
        a, b = (
            {item.id: row for item, row in zip(side, part, strict=True)}
            for side, part in zip(rows, (both[: len(shared)], both[len(shared) :]), strict=True)
        )
        return paired_difference(a, b, n, seed, level, statistic=self.statistic)

    def flips(self, before: Score, after: Score) -> tuple[list[str], list[str]]:
        """Ids of the items that became right, and of those that became wrong."""
        if self.threshold is None:
            return [], []
        return flips(_scores(before.items), _scores(after.items), self.threshold)


def _scores(items: Iterable[Item]) -> dict[str, float]:
    return {item.id: item.score for item in items}
