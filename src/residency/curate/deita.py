"""DEITA's filter: the best rows that are not too like a better one.

Rows are met by falling quality (in the paper: complexity × quality, each from a trained scorer); a row is accepted when
its most similar *accepted* row has

    cosine ≤ τ = 0.9

until `keep` are accepted. Sim-Div (`k-shot`) compares with every row met before; this compares with accepted ones only,
so of a chain a ~ b ~ c where a and c differ it keeps both ends.

distilabel's `DeitaFiltering` bears the name and keeps an almost disjoint set: it compares with the nearest of *all*
rows of the batch, accepted or not, keeps rows at a cosine *distance* of at least 0.9 by default (that is, a similarity
of at most 0.1), and sees one batch at a time.

Paper: Liu et al., "What Makes Good Data for Alignment? A Comprehensive Study of Automatic Data Selection in Instruction
Tuning", ICLR 2024, arXiv 2312.15685, algorithm 1. Official code: hkust-nlp/deita @405d060 (Apache-2.0), whose filter
drops at similarity > 0.9.

Our choices: any quality column; rows without one (NaN) are not chosen; ties by row order.

Cost: O(walked · accepted · D); memory O(accepted · D) and a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from residency.curate.scoring import Budgeted, Selection
from residency.curate.vectors import blocks, qualities, table, unit


class Deita(Budgeted):
    """Quality first, diversity aware."""

    needs = ("embeddings", "quality")

    near_duplicates: float = Field(0.9, ge=-1, le=1)
    """τ: a row with a cosine above this to an accepted row is dropped; 1 drops none."""

    def select(self, pool: Any, quality: Any) -> Selection:
        """Choose.

        Args:
            pool: [N, D] embeddings; float16 or a memory map is fine.
            quality: [N], higher is better; NaN where a row has none.

        Returns:
            The rows, best first. `score`: largest cosine to an accepted row when met (−1: none before); NaN where the
            budget was spent before. `nearest`: that row, or −1.

        Raises:
            ValueError: When a row is not finite, or there is not one quality per row.
        """
        value = qualities(quality, len(table(pool)))
        for _ in blocks(pool, scaled=False):
            pass  # a bad row is refused wherever it ranks
        order = np.flatnonzero(np.isfinite(value))
        order = order[np.argsort(-value[order], kind="stable")]
        score, nearest = np.full(len(pool), np.nan), np.full(len(pool), -1, np.int64)
        reasons = ["dropped: has no quality"] * len(pool)
        chosen: list[int] = []
        accepted = np.empty((0, pool.shape[1]), np.float32)
        for start in range(0, len(order), 1024):
            rows = order[start : start + 1024]
            if len(chosen) == self.keep:
                break
            vectors = unit(pool[rows])
            best, which = np.full(len(rows), -1.0), np.full(len(rows), -1, np.int64)
            for low in range(0, len(accepted), 16_384):
                _nearer(best, which, vectors @ accepted[low : low + 16_384].T, np.array(chosen[low : low + 16_384]))
            within = vectors @ vectors.T
            new: list[int] = []
            for i, row in enumerate(rows.tolist()):
                if new:
                    _nearer(best[i : i + 1], which[i : i + 1], within[i : i + 1, new], rows[new])
                if len(chosen) == self.keep:
                    break
                score[row], nearest[row] = best[i], which[i]
                if best[i] > self.near_duplicates:
                    reasons[row] = f"dropped: too like accepted row {which[i] + 1} (cosine {best[i]:.2f})"
                    continue
                chosen.append(row)
                new.append(i)
                reasons[row] = f"kept: quality {value[row]:.4g}" + (
                    f", cosine {best[i]:.2f} to the nearest accepted row" if which[i] >= 0 else ""
                )
            accepted = np.concatenate([accepted, vectors[new]])
        for rank, row in enumerate(order.tolist(), 1):
            if np.isnan(score[row]):
                reasons[row] = f"dropped: quality {value[row]:.4g} ranks {rank:,} of {len(order):,}, budget spent"
        return Selection(np.array(chosen, np.int64), score, reasons, nearest)


def _nearer(best: Any, which: Any, cosines: Any, names: Any) -> None:
    """Note in place where a cosine [n, m] is above the best so far."""
    at = cosines.argmax(1)
    top = np.take_along_axis(cosines, at[:, None], 1)[:, 0]
    better = top > best
    best[better], which[better] = top[better], names[at[better]]
