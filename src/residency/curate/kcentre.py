"""k-centre greedy: every row of the pool has a chosen row near it.

Starting from some rows S, take again and again the row farthest from all chosen ones:

    next = argmax_u  min_{s ∈ S} d(u, s)

The largest distance of any row to the chosen ones is at most twice the least that so many rows can reach, for every
metric d (Gonzalez), and no polynomial method does better unless P = NP. It likes outliers: use it after a quality
filter. d is the Euclidean distance, of the rows themselves or (cosine) of their unit rows, √(2 − 2 cos), which orders
pairs as 1 − cos does and unlike it is a metric.

Done plainly, each pick is a pass over all rows. Here a pass serves many picks, and the answer is the same: distances to
S only fall as S grows, so after a pass the M farthest rows are held in memory, and picks are made among them for as
long as the farthest of them is farther than every row outside was at the pass. All picks since the last pass then meet
the whole pool in one matrix product.

Papers: Gonzalez, "Clustering to Minimize the Maximum Intercluster Distance", Theoretical Computer Science 1985; Sener &
Savarese, "Active Learning for Convolutional Neural Networks: A Core-Set Approach", ICLR 2018, arXiv 1708.00489.
Official code: ozansener/active_learning_coreset @76921f7 (needs the whole distance matrix; then a mixed-integer
program, left out here, improves on the greedy choice).

Our choices: with trusted rows the pool is chosen beside them, as in active learning; without, the first pick is the row
nearest the mean, which depends on no order. Ties by row order. Rows at distance 0 fill the budget last.

Cost: O(N · D · keep) multiplications in few passes; memory O(N + M · D), M = N / 64 rows or 4,096.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from residency.curate.scoring import Budgeted, Selection
from residency.curate.vectors import BLOCK, Floats, blocks, table, unit


class KCentre(Budgeted):
    """Farthest-first traversal."""

    needs = ("embeddings", "example_embeddings?")

    metric: Literal["cosine", "euclid"] = "cosine"
    """Distance of unit rows, or of the rows as they are."""
    start: Literal["examples", "mean"] = "examples"
    """Count the trusted rows as chosen (where there are any), or begin at the row nearest the mean."""

    def select(self, pool: Any, examples: Any = None, block: int = BLOCK) -> Selection:
        """Choose.

        Args:
            pool: [N, D] embeddings; float16 or a memory map is fine.
            examples: [K, D] embeddings of the trusted rows, or None.
            block: Pool rows per matrix product.

        Returns:
            The rows, farthest first. `score`: of a kept row its distance to those kept before it (NaN for a first row
            without trusted rows), of a dropped one to the kept. `nearest`: that kept row; −1 where it is a trusted row.

        Raises:
            ValueError: When widths differ or a row is not finite.
        """
        rows = _Rows(table(pool), self.metric == "cosine", block)
        n, keep = len(pool), min(self.keep, len(pool))
        square, nearest = np.full(n, np.inf, np.float32), np.full(n, -1, np.int64)
        chosen: list[int] = []
        score, closest = np.full(n, np.nan, np.float32), np.full(n, -1, np.int64)
        waiting: list[int] = []
        if self.start == "examples" and examples is not None and len(examples):
            if table(examples, "example_embeddings").shape[1] != pool.shape[1]:
                raise ValueError(f"pool rows have width {pool.shape[1]}, trusted rows {examples.shape[1]}")
            _, trusted = next(blocks(examples, rows.scaled, len(examples)))
            rows.meet(trusted - rows.shift, np.full(len(trusted), -1), square, nearest)
        elif keep:
            waiting = [int(rows.to_mean().argmin())]
            chosen, square[waiting[0]] = [*waiting], -1
        while len(chosen) < keep:
            rows.meet(rows.at(waiting), np.array(waiting, np.int64), square, nearest)
            waiting = []
            best = int(square.argmax())
            if square[best] == 0:  # copies of chosen rows only
                rest = np.flatnonzero(square == 0)[: keep - len(chosen)]
                score[rest], closest[rest] = 0, nearest[rest]
                square[rest] = -1
                chosen += rest.tolist()
                break
            held, beyond = _farthest(square, max(4096, n // 64))
            if square[best] <= beyond:
                held = np.array([best])
            vectors, far, near = rows.at(held), square[held], nearest[held]
            while len(chosen) < keep:
                i = int(far.argmax())
                if far[i] <= 0 or (waiting and far[i] <= beyond):
                    break
                row = int(held[i])
                chosen.append(row)
                waiting.append(row)
                score[row], closest[row] = far[i] ** 0.5, near[i]
                new = _squares(vectors, vectors[i : i + 1])[:, 0]
                near[new < far] = row
                far = np.minimum(far, new)
                far[i] = square[row] = -1
        rows.meet(rows.at(waiting), np.array(waiting, np.int64), square, nearest)
        out = square >= 0
        score[out], closest[out] = np.sqrt(square[out]), nearest[out]
        return Selection(np.array(chosen, np.int64), score, _reasons(chosen, score, closest), closest)


class _Rows:
    """The pool in blocks: unit rows, or rows less their mean (so that small distances survive float32)."""

    def __init__(self, pool: Any, scaled: bool, block: int) -> None:
        self.pool, self.scaled, self.block = pool, scaled, block
        total = np.zeros(pool.shape[1])
        for _, part in blocks(pool, scaled, block):
            total += part.sum(0, dtype=np.float64)
        self.mean = (total / max(1, len(pool))).astype(np.float32)
        self.shift = np.zeros_like(self.mean) if scaled else self.mean

    def at(self, rows: Any) -> Floats:
        """[n, D] rows."""
        some = np.asarray(self.pool[np.asarray(rows, np.int64)], np.float32)
        return unit(some) if self.scaled else some - self.shift

    def to_mean(self) -> Floats:
        """[N] squared distances to the mean."""
        centre = (self.mean - self.shift)[None]
        parts = [_squares(part - self.shift, centre)[:, 0] for _, part in blocks(self.pool, self.scaled, self.block)]
        return np.concatenate(parts)

    def meet(self, new: Floats, names: NDArray[np.int64], square: Floats, nearest: NDArray[np.int64]) -> None:
        """Lower every row's squared distance to the chosen ones by [m, D] new ones; chosen rows stay at −1."""
        for start in range(0, len(new), 256):
            some = new[start : start + 256]
            for place, part in blocks(self.pool, self.scaled, self.block):
                found = _squares(part if self.scaled else part - self.shift, some)
                which = found.argmin(1)
                least = np.take_along_axis(found, which[:, None], 1)[:, 0]
                closer = least < square[place]
                nearest[place][closer] = names[start + which[closer]]
                square[place][closer] = least[closer]


def _squares(a: Floats, b: Floats) -> Floats:
    """[n, m] squared distances, not below 0."""
    found = a @ b.T
    found *= -2
    found += np.einsum("nd,nd->n", a, a)[:, None]
    found += np.einsum("nd,nd->n", b, b)
    return np.maximum(found, 0, out=found)


def _farthest(square: Floats, most: int) -> tuple[NDArray[np.int64], float]:
    """The `most` farthest rows in row order, and the largest value among the others (−1: there are none)."""
    if most >= len(square):
        return np.arange(len(square)), -1.0
    order = np.argpartition(-square, most)
    return np.sort(order[:most]), float(square[order[most]])


def _reasons(chosen: list[int], score: Floats, nearest: NDArray[np.int64]) -> list[str]:
    reasons = [
        f"dropped: {f'kept row {near + 1}' if near >= 0 else 'a trusted row'} is at {far:.2f}"
        for far, near in zip(score.tolist(), nearest.tolist(), strict=True)
    ]
    for place, row in enumerate(chosen, 1):
        far = "nearest the mean" if np.isnan(score[row]) else f"farthest from all kept ({score[row]:.2f})"
        reasons[row] = f"kept: number {place:,}, {far}"
    return reasons
