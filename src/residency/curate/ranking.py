"""The plainest choices: the best rows, rows at random, and what lies between.

`top` keeps the `keep` rows with the highest (or lowest) quality q. Before that it can cut to a window of percentiles of
the empirical distribution, ECDF(q) = share of the rows whose quality is at most q: perplexity, for one, is best kept in
its middle.

`sample` draws `keep` rows without replacement, each next row i of those left with probability

    exp(q_i / T) / Σ_{j left} exp(q_j / T)          (Plackett-Luce; T the temperature)

in one step: the `keep` largest of q_i / T + g_i, with g_i = −log(−log u_i) Gumbel noise. T → 0 is `top`, T → ∞ is
`random`, which is the arm that no comparison of selections may lack: at the scale of millions of rows few methods beat
it. The noise of row i depends on the seed and on i alone.

Papers: top and percentile as in Qin et al., "Unleashing the Power of Data Tsunami", TMLR 2024, arXiv 2408.02085 (a
survey); Kool, van Hoof & Welling, "Stochastic Beams and Where to Find Them", ICML 2019, arXiv 1903.06059 (the Gumbel
trick); Xia et al., "Rethinking Data Selection at Scale: Random Selection is Almost All You Need", 2024, arXiv
2410.09335. No official code needed.

Our choices: rows without a quality (NaN) are outside the distribution and never chosen; ties by row order.

Cost: one sort, O(N log N); memory O(N).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from residency.curate.scoring import Array, Budgeted, Selection
from residency.curate.vectors import qualities

NO_QUALITY = "dropped: has no quality"


class Top(Budgeted):
    """The best rows by their quality."""

    needs = ("quality",)

    best: Literal["high", "low"] = "high"
    """Which end of the quality is good."""
    percentiles: tuple[float, float] = (0.0, 100.0)
    """Look only at rows from the first to the second percentile of the quality, both included."""

    @model_validator(mode="after")
    def _window(self) -> Top:
        low, high = self.percentiles
        if not 0 <= low <= high <= 100:
            raise ValueError(f"percentiles must rise within 0 to 100; got {low} and {high}")
        return self

    def select(self, quality: Any) -> Selection:
        """Choose.

        Args:
            quality: [N]; NaN where a row has none.

        Returns:
            The rows, best first; score is the quality.

        Raises:
            ValueError: When a quality is infinite.
        """
        score = qualities(quality, len(quality))
        known = np.sort(score[np.isfinite(score)])
        percentile = 100 * np.searchsorted(known, score, side="right") / max(1, len(known))
        low, high = self.percentiles
        fits = np.isfinite(score) & (percentile >= low) & (percentile <= high)
        order = np.flatnonzero(fits)
        order = order[np.argsort(score[order] if self.best == "low" else -score[order], kind="stable")]
        reasons = [
            NO_QUALITY if np.isnan(q) else f"dropped: quality {q:.4g} is at percentile {p:.1f}, outside the window"
            for q, p in zip(score.tolist(), percentile.tolist(), strict=True)
        ]
        for rank, i in enumerate(order.tolist(), 1):
            if rank <= self.keep:
                reasons[i] = f"kept: quality {score[i]:.4g} ranks {rank:,} of {len(order):,}"
            else:
                reasons[i] = f"dropped: quality {score[i]:.4g} ranks {rank:,} of {len(order):,}, budget spent"
        return Selection(order[: self.keep], score, reasons)


class Random(Budgeted):
    """Rows drawn uniformly."""

    needs = ("texts",)

    seed: int = Field(0, ge=0)
    """Where the random numbers start."""

    def select(self, texts: Sequence[Any]) -> Selection:
        """Choose.

        Args:
            texts: N of anything; only their number is looked at.

        Returns:
            The rows as drawn; score is the noise that drew them.
        """
        return _largest(np.zeros(len(texts)), self.seed, self.keep)


class Sample(Random):
    """Rows drawn at random, good ones more often."""

    needs = ("quality",)

    temperature: float = Field(1.0, gt=0)
    """T: a row better by T is e times as likely as another to be drawn next."""

    def select(self, quality: Any) -> Selection:
        """Choose.

        Args:
            quality: [N], the logarithm of a weight when T is 1; NaN where a row has none.

        Returns:
            The rows as drawn; score is q / T plus noise.

        Raises:
            ValueError: When a quality is infinite.
        """
        return _largest(qualities(quality, len(quality)) / self.temperature, self.seed, self.keep)


def gumbel(rows: int, seed: int) -> Array:
    """[N] Gumbel noise; that of row i is the same whatever N is."""
    drawn = np.random.default_rng(seed).random(rows)
    return -np.log(-np.log(np.maximum(drawn, 1e-300)))


def _largest(weights: Array, seed: int, keep: int) -> Selection:
    """The rows with the largest log-weight plus noise."""
    score = weights + gumbel(len(weights), seed)
    order = np.flatnonzero(np.isfinite(score))
    order = order[np.argsort(-score[order], kind="stable")]
    reasons = [NO_QUALITY] * len(score)
    for rank, i in enumerate(order.tolist(), 1):
        reasons[i] = f"{'kept' if rank <= keep else 'dropped'}: drawn {rank:,} of {len(order):,}"
    return Selection(order[:keep], score, reasons)
