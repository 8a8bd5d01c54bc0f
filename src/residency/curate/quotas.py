"""Quotas: a mixture with given shares, that sums exactly and asks no group for more rows than it has.

`keep` rows are apportioned to groups of sizes n_g by weights w_g (given shares, or equal ones) by the method of largest
remainders: each group gets the whole part of keep · w_g / Σ w, and what is missing goes one by one to the largest
fractions. A group that cannot give its quota gives all it has, and the rest is apportioned again among the others,
until the sum is exact or all rows with a weight are taken. Within a group, rows come by quality, or at random without
one.

Source: the method of largest remainders (Hamilton, 1792; Balinski & Young, "Fair Representation", 1982); as a mixture
of instruction data by task: Longpre et al., "The Flan Collection", ICML 2023, arXiv 2301.13688. No code needed.

Our choices: a row belongs to its first tag (a row without tags to the tag ""); equal fractions go to the group whose
name comes first; a tag without a share gives nothing, and a share for a tag that no row has is an error, as it is
misspelt more often than meant.

Cost: one sort; memory O(N).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from residency.curate.ranking import NO_QUALITY
from residency.curate.scoring import Array, Budgeted, Selection
from residency.curate.vectors import qualities


class Quotas(Budgeted):
    """So many rows of every tag."""

    needs = ("tags", "quality?")

    shares: dict[str, float] | None = None
    """Weight of every tag, of any sum; by default all tags have the same."""
    seed: int = Field(0, ge=0)
    """Where the random order of rows without quality starts."""

    @model_validator(mode="after")
    def _sensible(self) -> Quotas:
        if self.shares is not None and not (self.shares and all(w > 0 for w in self.shares.values())):
            raise ValueError(f"shares must name tags with weights above 0; got {self.shares}")
        return self

    def select(self, tags: Sequence[Sequence[str]], quality: Any = None) -> Selection:
        """Choose.

        Args:
            tags: Tags of the N rows; the first counts.
            quality: [N] or None; NaN where a row has none, which is then not chosen.

        Returns:
            The rows, tag by tag in the order of their names, best first. `score`: the quality, or the random number in
            its place.

        Raises:
            ValueError: When there is not one quality per row, or a share names a tag that no row has.
        """
        first = [row[0] if row else "" for row in tags]
        names = sorted(set(first))
        if unknown := sorted(set(self.shares or ()) - set(names)):
            raise ValueError(
                f"no row has the tag {unknown[0]!r} of `shares`; tags are {', '.join(map(repr, names[:20]))}"
            )
        score, order = ranked(quality, len(first), self.seed)
        rows: dict[str, list[int]] = {name: [] for name in names}
        for i in order.tolist():
            rows[first[i]].append(i)
        weights = np.array([1.0 if self.shares is None else self.shares.get(name, 0.0) for name in names])
        quota = apportion(weights, np.array([len(rows[name]) for name in names], np.int64), self.keep)
        chosen: list[int] = []
        reasons = [NO_QUALITY] * len(first)
        for name, most, weight in zip(names, quota.tolist(), weights.tolist(), strict=True):
            chosen += rows[name][:most]
            for rank, i in enumerate(rows[name], 1):
                what = "kept" if rank <= most else "dropped"
                reasons[i] = f"{what}: {rank:,} of tag {name!r}, which gives {most:,} of {len(rows[name]):,}"
                if not weight:
                    reasons[i] = f"dropped: tag {name!r} has no share"
        return Selection(np.array(chosen, np.int64), score, reasons)


def apportion(weights: Any, sizes: Any, total: int) -> NDArray[np.int64]:
    """Whole numbers in proportion to weights, none above its size, that sum to `total` where sizes allow.

    Args:
        weights: [G], not negative; a group of weight 0 gets nothing.
        sizes: [G] the most each group can give.
        total: What to apportion.

    Returns:
        [G]; equal remainders go to the group that comes first.
    """
    weights, sizes = np.asarray(weights, np.float64), np.asarray(sizes, np.int64)
    quota = np.zeros(len(sizes), np.int64)
    open_ = (weights > 0) & (sizes > 0)
    while (left := total - int(quota.sum())) > 0 and open_.any():
        exact = np.where(open_, weights, 0) / weights[open_].sum() * left
        if (full := open_ & (exact >= sizes)).any():
            # these give all they have, and the others share what is left
            quota[full] = sizes[full]
            open_ &= ~full
            continue
        quota[open_] = np.floor(exact[open_] + 1e-9)
        places = np.flatnonzero(open_ & (quota < sizes))
        rest = total - int(quota.sum())
        quota[places[np.argsort(-(exact - quota)[places].round(9), kind="stable")[:rest]]] += 1
        break
    return quota


def ranked(quality: Any, rows: int, seed: int) -> tuple[Array, NDArray[np.int64]]:
    """[N] a quality, or random numbers where there is none; and the rows that have one, best first."""
    score = np.random.default_rng(seed).random(rows) if quality is None else qualities(quality, rows)
    order = np.flatnonzero(np.isfinite(score))
    return score, order[np.argsort(-score[order], kind="stable")]
