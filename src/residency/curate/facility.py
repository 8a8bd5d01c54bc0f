"""Facility location and QDIT: chosen rows that stand for all rows, and are good.

A chosen set S serves every row by its most similar member:

    F(S) = Σ_x max_{s ∈ S} sim(x, s)                sim = max(0, cosine)

and the greedy choice takes again and again the row with the largest gain. F is monotone and submodular: gains only fall
as S grows, and the greedy F is at least (1 − 1/e) ≈ 0.63 of the best. QDIT adds the quality q of the row itself:

    gain(u) = (1 − a) [F(S + u) − F(S)] + a q(u)

Four ways to the greedy choice, none of which holds N × N similarities of a large pool:

- `lazy` (Minoux): an old gain bounds the new one from above, so only rows whose bound is largest are computed again, 16
  in one product. The same rows as the plain greedy algorithm, in the same order (up to rounding of float32).
- `stochastic` ("lazier than lazy"): each pick looks at N / keep · ln(1/ε) random rows only; (1 − 1/e − ε) in
  expectation.
- `neighbours`: lazy, on the K nearest rows of every row (found by way of clusters, mostly exact), so that a gain sums
  over some dozen rows instead of N. What is exact: after 1, 2, 4, … 256 and then every 256 picks, `cover`, the
  similarity of every row to its nearest chosen row, is brought up to date over all N rows. What is approximate: a gain
  counts the rows that have u among their K nearest, or that u has among its own. Each kept row serves N / keep rows on
  average: where that is far above K (128 at most by default), `stochastic` is slower and better.
- by default, `lazy` up to 16,384 rows (whose similarities fit 1 GiB and are held), and `neighbours` above.

`score` and `nearest` are exact over all rows in every case: Σ score of a selection is its true F.

Papers: Lin & Bilmes, "A Class of Submodular Functions for Document Summarization", ACL 2011; Minoux, "Accelerated
greedy algorithms for maximizing submodular set functions", 1978; Mirzasoleiman et al., "Lazier Than Lazy Greedy", AAAI
2015, arXiv 1409.7938; Bukharin et al., "Data Diversity Matters for Robust Instruction Tuning" (QDIT), Findings of EMNLP
2024, arXiv 2311.14736 (F as a plain sum of cosines; a from 0.5 to 0.9 worked best). Official code: none found.

Our choices: negative cosines count as 0 (F must be monotone); the paper does not say how F and q are put on one scale:
q is scaled to 0 … 1 over the rows that have one, about what a row adds to F by serving itself; `neighbours`. Ties by
row order. (apricot-select's metric "cosine" is the squared cosine, another F.)

Cost: `lazy` O(N² · D) and some passes more per pick; `stochastic` O(N² · D · ln(1/ε)) whatever `keep`; `neighbours`
O(N · 3,200 · D) for the neighbours and O(N · keep · D) for what is exact. Memory O(N · D) in float32, and O(N · K).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from residency.curate import cover
from residency.curate.scoring import Array, Budgeted, Selection
from residency.curate.vectors import qualities, whole


class FacilityLocation(Budgeted):
    """Rows that stand for all rows."""

    greedy: Literal["auto", "lazy", "stochastic", "neighbours"] = "auto"
    """How gains are computed; `auto` is `lazy` up to 16,384 rows and `neighbours` above."""
    epsilon: float | None = Field(None, gt=0, lt=1)
    """ε of `stochastic`, 0.1 by default: smaller looks at more rows."""
    near: int | None = Field(None, ge=1)
    """K of `neighbours`; by default 2 N / keep, from 32 to 128."""
    seed: int = Field(0, ge=0)
    """Where the random rows of `stochastic` and the clusters of `neighbours` start."""

    @model_validator(mode="after")
    def _used(self) -> FacilityLocation:
        if self.epsilon is not None and self.greedy != "stochastic":
            raise ValueError(f"epsilon belongs to greedy: stochastic; greedy is {self.greedy}")
        if self.near is not None and self.greedy != "neighbours":
            raise ValueError(f"near belongs to greedy: neighbours; greedy is {self.greedy}")
        return self

    def select(self, pool: Any) -> Selection:
        """Choose.

        Args:
            pool: [N, D] embeddings.

        Returns:
            The rows as chosen. `score`: similarity of every row to `nearest`, the kept row that serves it.

        Raises:
            ValueError: When a row is not finite.
        """
        return self._greedy(pool, np.zeros(len(pool)), 1.0)

    def _greedy(self, pool: Any, bonus: Array, weight: float) -> Selection:
        """Greedy by weight · gain + bonus; a row whose bonus is NaN is not chosen, but served."""
        problem = cover.Cover(whole(pool), bonus, weight)
        keep = min(self.keep, int(np.isfinite(bonus).sum()))
        way = self.greedy if self.greedy != "auto" else "lazy" if len(pool) <= cover.EXACT else "neighbours"
        if way == "lazy":
            problem.lazy(keep)
        elif way == "stochastic":
            problem.stochastic(keep, self.epsilon or 0.1, self.seed)
        else:
            count = self.near or min(128, max(32, 2 * len(pool) // max(1, keep)))
            problem.neighbours(keep, count, self.seed)
        problem.flush()
        reasons = [
            f"dropped: served by kept row {near + 1} (similarity {value:.2f})"
            if near >= 0
            else "dropped: like no kept row"
            for value, near in zip(problem.cover.tolist(), problem.nearest.tolist(), strict=True)
        ]
        for i in np.flatnonzero(np.isnan(bonus)):
            reasons[i] = "dropped: has no quality"
        serves = np.bincount(problem.nearest[problem.nearest >= 0], minlength=len(bonus))
        for place, (row, gain) in enumerate(zip(problem.chosen, problem.gains, strict=True), 1):
            reasons[row] = f"kept: number {place:,}, adds {gain:.3g}; serves {serves[row]:,} rows"
        return Selection(np.array(problem.chosen, np.int64), problem.cover, reasons, problem.nearest)


class QDIT(FacilityLocation):
    """Rows that stand for all rows and are good themselves."""

    needs = ("embeddings", "quality")

    alpha: float = Field(0.7, ge=0, le=1)
    """a: the weight of the row's quality; 0 is facility location, 1 the best rows."""

    def select(self, pool: Any, quality: Any) -> Selection:  # type: ignore[override]
        """Choose.

        Args:
            pool: [N, D] embeddings.
            quality: [N], higher is better, any scale; a row without one (NaN) is not chosen.

        Returns:
            As of facility location.

        Raises:
            ValueError: When a row is not finite, or there is not one quality per row.
        """
        values = qualities(quality, len(pool))
        known = values[np.isfinite(values)]
        low, high = (known.min(), known.max()) if len(known) else (0.0, 0.0)
        return self._greedy(pool, self.alpha * (values - low) / ((high - low) or 1.0), 1 - self.alpha)
