"""Sim-Div: a few trusted rows choose, from a large pool, the rows that are like them and unlike each other.

Unit embeddings u of the K trusted rows and v of the N pool rows give

    s_j = max_i  u_i · v_j                        similarity of pool row j to its nearest trusted row
    walk the pool by falling s; row j is dropped when some row met before it has  v · v_j > τ

which is the paper's rule "of every pair with cosine above τ, drop the one less similar to the trusted rows",
applied to exactly as many candidates as are needed until `keep` rows remain.

Paper: Yang, Qin, Wu et al., "Leveraging Open Knowledge for Advancing Task Expertise in Large Language Models"
(Rocket), 2024, arXiv 2408.15915, eq. 10-14 and algorithm 2. Official code: Yaphabates/Rocket @3e682c0, which
averages the trusted rows into one centroid, meets candidates in no order, and never refills the budget; this
follows the paper instead. Our choices: refilling (the paper fixes C = 1,000 candidates and keeps what is left;
`candidates` brings that back), ties by pool order, and "met before" counts dropped rows too, as the paper's
pairwise rule does.

The paper keeps about 90 % of its candidates at τ = 0.9 and 10 % at 0.8, and finds both 0.8 and 1 (no dropping)
worse than 0.9.

Cost: one matrix product N × K, then C walked rows × N-blocks; memory O(N + C · D), never N × N.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from residency.curate.scoring import Array, Budgeted, Score, Selection


class Similarity(Score):
    """Cosine of a row with its nearest trusted row (s_j above)."""

    needs = ("embeddings", "example_embeddings")

    def score(self, pool: np.ndarray, examples: np.ndarray, block: int = 65_536) -> Array:
        """See `similarity`; [N]."""
        return similarity(pool, examples, block)[0].astype(float)


class SimDiv(Budgeted):
    """Similarity first, diversity aware."""

    needs = ("embeddings", "example_embeddings")

    keep: int = Field(1000, ge=1)
    """Rows to choose from the pool (the paper's C; the trusted rows come on top)."""
    near_duplicates: float = Field(0.9, gt=0, le=1)
    """τ: a row with a cosine above this to a more similar row is dropped; 1 drops none."""
    candidates: int | None = Field(None, ge=1)
    """Look at only so many most similar rows, as the paper does; by default, at as many as it takes to keep `keep`."""

    def select(self, pool: np.ndarray, examples: np.ndarray, block: int = 65_536) -> Selection:
        """Choose rows.

        Args:
            pool: [N, D] embeddings, any scale (rows are normalised); float16 or a memory map is fine.
            examples: [K, D] embeddings of the trusted rows.
            block: Pool rows per matrix product.

        Returns:
            The selection; deterministic.

        Raises:
            ValueError: When there are no trusted rows, or widths differ, or a row is not finite.
        """
        score, nearest = similarity(pool, examples, block)
        order = np.argsort(-score, kind="stable")
        limit = len(pool) if self.candidates is None else min(self.candidates, len(pool))
        reasons = [""] * len(pool)
        chosen: list[int] = []
        met = np.empty((0, pool.shape[1]), np.float32)
        walked = 0
        while walked < limit and len(chosen) < self.keep:
            # a chunk at a time: against everything met before, then within the chunk
            rows = order[walked : min(limit, walked + 1024)]
            vectors = _unit(np.asarray(pool[rows], np.float32))
            before = vectors @ met.T if len(met) else np.full((len(rows), 1), -2.0, np.float32)
            within = np.tril(vectors @ vectors.T + 2.0, -1) - 2.0
            for i, row in enumerate(rows):
                if len(chosen) == self.keep:
                    break
                walked += 1
                outer, inner = int(before[i].argmax()), int(within[i].argmax())
                cosine = max(float(before[i, outer]), float(within[i, inner]))
                if cosine > self.near_duplicates:
                    twin = order[outer] if before[i, outer] >= within[i, inner] else rows[inner]
                    reasons[row] = f"dropped: near-duplicate (cosine {cosine:.2f}) of pool row {int(twin) + 1}"
                else:
                    chosen.append(int(row))
                    reasons[row] = f"kept: similarity {score[row]:.2f} to trusted row {int(nearest[row]) + 1}"
            met = np.concatenate([met, vectors])
        for rank, row in enumerate(order[walked:], walked + 1):
            reasons[row] = f"dropped: similarity {score[row]:.2f} ranks {rank:,} of {len(pool):,}, budget spent"
        return Selection(np.array(chosen, np.int64), score, reasons, nearest)


def similarity(pool: np.ndarray, examples: np.ndarray, block: int = 65_536) -> tuple[np.ndarray, np.ndarray]:
    """Cosine of every pool row with its nearest trusted row.

    Args:
        pool: [N, D] embeddings, any scale.
        examples: [K, D] embeddings of the trusted rows.
        block: Pool rows per matrix product.

    Returns:
        [N] cosines and [N] which trusted row it is.

    Raises:
        ValueError: When there are no trusted rows, or widths differ, or a row is not finite.
    """
    if examples.ndim != 2 or pool.ndim != 2 or not len(examples):
        raise ValueError("Sim-Div needs [N, D] pool embeddings and at least one trusted row [K, D]")
    if pool.shape[1] != examples.shape[1]:
        raise ValueError(f"pool rows have width {pool.shape[1]}, trusted rows {examples.shape[1]}")
    trusted = _unit(np.asarray(examples, np.float32))
    score = np.empty(len(pool), np.float32)
    nearest = np.empty(len(pool), np.int64)
    for start in range(0, len(pool), block):
        part = _unit(np.asarray(pool[start : start + block], np.float32)) @ trusted.T
        nearest[start : start + block] = part.argmax(1)
        score[start : start + block] = part.max(1)
    if not np.isfinite(score).all():
        raise ValueError(f"pool row {int(np.flatnonzero(~np.isfinite(score))[0])} has an embedding that is not finite")
    return score, nearest


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a zero row stays zero."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length == 0, 1, length)
