"""DPP greedy MAP: rows that are good and whose embeddings span as large a volume as can be.

A determinantal point process gives a set S the weight det L_S, with

    L = diag(q) K diag(q),      log det L_S = 2 Σ_{i ∈ S} log q_i + log det K_S,      q_i = exp(w · quality_i)

K the similarities: det K_S is the squared volume that the embeddings of S span, 0 as soon as one follows from the
others. The most likely set is NP-hard to find; the greedy choice takes again and again

    argmax_u  log det L_{S+u} − log det L_S  =  2 w · quality_u + log d²_u

where d²_u is what is left of row u of K after the rows chosen. It is kept up to date by an incremental Cholesky
factorisation: for each new row j, with c the columns so far and v their product,

    e_u = (K_ju − c_j · c_u) / d_j,       c_u ← [c_u, e_u],       d²_u ← d²_u − e²_u

Kernels: the cosine, K = UUᵀ of unit rows, of rank D at most, so that no more than D rows can be chosen; or with a
bandwidth h the rbf kernel exp(−‖x − y‖² / 2h²) of unit rows, of full rank. Rows of which less than `LEAST` is left are
never chosen: the choice stops before the budget is spent, and the reasons say so.

Papers: Kulesza & Taskar, "Determinantal Point Processes for Machine Learning", 2012, arXiv 1207.6083; Chen, Zhang &
Zhou, "Fast Greedy MAP Inference for Determinantal Point Process to Improve Recommendation Diversity", NeurIPS 2018,
arXiv 1709.05135 (the algorithm; q = exp(w · relevance) too). Official code: laming-chen/fast-map-dpp @6ab745c,
which takes a whole kernel matrix and stops at d² < 1e-10.

Our choices: quality stays outside the factorisation (the same sets, and no overflow whatever its scale); stopping by d²
instead of at a negative gain, so that the budget decides. Ties by row order.

Cost: O(N · (D + keep)) per row chosen, O(N · keep²) in all; memory O(N · (D + keep)).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from residency.curate.scoring import Budgeted, Selection
from residency.curate.vectors import qualities, whole

LEAST = 1e-6
"""Share of a row's squared length that must be left: what float32 embeddings still resolve."""


class DPP(Budgeted):
    """Quality times volume."""

    needs = ("embeddings", "quality?")

    bandwidth: float | None = Field(None, gt=0)
    """h of the rbf kernel, in distances of unit rows (0 to 2); by default the kernel is the cosine."""
    quality_weight: float = Field(1.0, ge=0)
    """w: how much quality counts; 0 looks at volume only."""

    def select(self, pool: Any, quality: Any = None) -> Selection:
        """Choose.

        Args:
            pool: [N, D] embeddings.
            quality: [N] or None; NaN where a row has none, which is then not chosen.

        Returns:
            The rows as chosen. `score`: gain in log det L of a kept row, and what a dropped row would have added at the
            end; NaN where nothing of it was left.

        Raises:
            ValueError: When a row is not finite, or there is not one quality per row.
        """
        rows = whole(pool).astype(np.float64)
        value = np.zeros(len(rows)) if quality is None else qualities(quality, len(rows))
        merit = 2 * self.quality_weight * value
        left = self._similarity(rows, None)
        columns = np.empty((0, len(rows)))
        score, taken = np.full(len(rows), np.nan), np.zeros(len(rows), bool)
        chosen: list[int] = []
        while True:
            open_ = ~taken & (left >= LEAST) & np.isfinite(merit)
            gain = np.full(len(rows), -np.inf)
            gain[open_] = np.log(left[open_]) + merit[open_]
            score[~taken] = np.where(open_, gain, np.nan)[~taken]
            if len(chosen) == self.keep or not open_.any():
                break
            row = int(gain.argmax())
            chosen.append(row)
            taken[row] = True
            n = len(chosen)
            if n > len(columns):
                columns = np.concatenate([columns, np.empty((max(16, len(columns)), len(rows)))])
            new = (self._similarity(rows, row) - columns[: n - 1, row] @ columns[: n - 1]) / left[row] ** 0.5
            columns[n - 1] = new
            left = left - new * new
        reasons = [
            "dropped: has no quality"
            if np.isnan(m)
            else "dropped: nothing of it is left beside the kept rows"
            if np.isnan(s)
            else f"dropped: would add {s:.3g} to log det, budget spent"
            for m, s in zip(merit.tolist(), score.tolist(), strict=True)
        ]
        for place, row in enumerate(chosen, 1):
            reasons[row] = f"kept: number {place:,}, adds {score[row]:.3g} to log det"
        return Selection(np.array(chosen, np.int64), score, reasons)

    def _similarity(self, rows: Any, row: int | None) -> Any:
        """[N] row of K, or its diagonal."""
        if row is None:
            return rows.any(1).astype(np.float64)  # exactly 1: without quality, all first gains are equal
        product = rows @ rows[row]
        return product if self.bandwidth is None else np.exp((product - 1) / self.bandwidth**2)
