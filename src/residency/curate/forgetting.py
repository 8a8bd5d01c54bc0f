"""Forgetting: how often a row that the model had right is wrong again later in training.

A record says of every row, at several times of a training, whether it is right: r_1, …, r_E. A forgetting event is r_t
right and r_{t+1} wrong,

    f = Σ_t [ r_t and not r_{t+1} ]

Rows with f = 0 that were once right are unforgettable: the paper leaves out a third of CIFAR-10 that way at no loss.
Rows with large f are the hard ones, or wrongly labelled. A row that is never right has infinite f in the paper; here
it is E, more than any other can have (at most E / 2), so that the column stays finite and the order is the same.

The score reads the record from columns: one per time, in the order of the numbers at the end of their names (`right-1`,
`right-2`, …), 1 for right and 0 for wrong, NaN for a time at which a row was not looked at. `record.py` makes
such a record while the project's training loop trains.

Paper: Toneva, Sordoni, Tachet des Combes, Trischler, Bengio & Gordon, "An Empirical Study of Example Forgetting during
Deep Neural Network Learning", ICLR 2019, arXiv 1812.05159. Official code: mtoneva/example_forgetting.

Cost: E · N operations; the record costs a forward pass over all rows per epoch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from residency.curate.scoring import Array, Score


class Forgetting(Score):
    """How often a row is forgotten; the number of looks for one that is never learned."""

    needs = ("columns",)

    prefix: str = Field("right-", min_length=1)
    """How the names of the record's columns begin; a number follows."""

    def score(self, columns: Mapping[str, NDArray[Any]]) -> Array:
        """Count forgetting events.

        Args:
            columns: Name → [N]; those of the record are read.

        Returns:
            [N]; NaN for a row that was never looked at.

        Raises:
            ValueError: When no column is named like that, or one holds anything but 0, 1 and NaN.
        """
        named = {int(m[1]): name for name in columns if (m := re.fullmatch(re.escape(self.prefix) + r"(\d+)", name))}
        if not named:
            raise ValueError(f"no column is called `{self.prefix}1` and so on: record a training first")
        return events(np.stack([np.asarray(columns[named[i]], float) for i in sorted(named)]))


def events(record: NDArray[Any]) -> Array:
    """Forgetting events of every row.

    Args:
        record: [E, N] 1 or True for right, 0 for wrong, NaN where a row was not looked at (that time is passed over).

    Returns:
        [N]; E for a row that is never right, NaN for one that was never looked at.

    Raises:
        ValueError: When the record holds anything else.
    """
    seen = np.asarray(record, float)
    if seen.ndim != 2 or not (np.isnan(seen) | (seen == 0) | (seen == 1)).all():
        raise ValueError("a record is [times, rows] of 0 and 1, with NaN for a row that was not looked at")
    count, last = np.zeros(seen.shape[1]), np.zeros(seen.shape[1], bool)
    for now in seen:
        looked = ~np.isnan(now)
        count += looked & last & (now == 0)
        last = np.where(looked, now == 1, last)
    count[~(seen == 1).any(0)] = len(seen)
    count[np.isnan(seen).all(0)] = np.nan
    return count
