"""Herding: chosen rows whose mean stays as close as can be to the mean of all rows.

With μ the mean of the N rows and s the sum of the m rows chosen so far, the next row is

    argmin_x ‖ (s + x) / (m + 1) − μ ‖  =  argmin_x ‖ x − w ‖,          w = (m + 1) μ − s

so what one pick had too much of, the next makes up for. Where the greedy choice moves against w, the distance of the
means falls like 1 / m, and that of m random rows like 1 / √m. Welling's form is argmax x · w, which is the same for
rows of one length.

Papers: Welling, "Herding Dynamical Weights to Learn", ICML 2009; for choosing rows: Chen, Welling & Smola,
"Super-Samples from Kernel Herding", UAI 2010, arXiv 1203.3472. Official code: none released.

Our choices: each row once; the norm of a row counts (above), so that the criterion is the distance of the means also
for rows that are not unit rows. Ties by row order.

Cost: O(N · D) per pick; memory O(N · D) in float32.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from residency.curate.scoring import Budgeted, Selection
from residency.curate.vectors import whole


class Herding(Budgeted):
    """The mean of the chosen follows the mean of all."""

    metric: Literal["cosine", "euclid"] = "cosine"
    """Unit rows, or rows as they are."""

    def select(self, pool: Any) -> Selection:
        """Choose.

        Args:
            pool: [N, D] embeddings.

        Returns:
            The rows as chosen. `score`: of a kept row the distance of the means after it; of a dropped one, what it
            would have been with this row in place of the last.

        Raises:
            ValueError: When a row is not finite.
        """
        rows = whole(pool, self.metric == "cosine")
        mean = rows.mean(0, dtype=np.float64) if len(rows) else np.zeros(pool.shape[1])
        rows = rows - mean.astype(np.float32)
        # the mean is now 0, up to what float32 leaves: −w is the sum of the chosen
        squares = np.einsum("nd,nd->n", rows, rows, dtype=np.float64)
        total = np.zeros(rows.shape[1])
        score, taken = np.full(len(rows), np.nan), np.zeros(len(rows), bool)
        chosen: list[int] = []
        for m in range(min(self.keep, len(rows))):
            gap = squares + 2.0 * (rows @ total.astype(np.float32)) + total @ total
            gap[taken] = np.inf
            row = int(gap.argmin())
            left = ~taken
            score[left] = np.sqrt(np.maximum(gap[left], 0)) / (m + 1)
            taken[row] = True
            chosen.append(row)
            total += rows[row]
        reasons = [f"dropped: would have left the mean {gap:.3g} away" for gap in score.tolist()]
        for place, row in enumerate(chosen, 1):
            reasons[row] = f"kept: number {place:,}, leaves the mean {score[row]:.3g} away"
        return Selection(np.array(chosen, np.int64), score, reasons)
