"""A greedy choice of facility location under way: who is chosen, how well every row is served, what one more would add.

`residency.curate.facility` says what is maximised and what the three ways cost; this is how. With cover(x) the
similarity of x to its nearest chosen row, the gain of u is

    weight · Σ_x max(0, x · u − cover(x)) + bonus(u)

and falls as cover rises, so that an old gain bounds the new one (Minoux, 1978; Mirzasoleiman et al., AAAI 2015, arXiv
1409.7938).

Our choices: gains are summed in float64 over float32 products; an exact gain is never let above the one before, as
rounding would have a row overtake another of equal gain; chosen rows wait, and serve all rows some dozens at a time.

Cost: a gain O(N · D), or O(N) where similarities are held; memory O(N · D).
"""

from __future__ import annotations

import heapq
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from residency.curate.clusters import neighbours
from residency.curate.scoring import Array
from residency.curate.vectors import Floats

EXACT = 16_384
"""Rows up to which the default is exact, and similarities are held: 1 GiB of float32. No more is ever held."""
BATCH = 16
"""Rows whose gains are computed in one product."""


class Cover:
    """A greedy choice under way: unit rows, who is chosen, and how well every row is served."""

    def __init__(self, rows: Floats, bonus: Array, weight: float) -> None:
        self.rows, self.bonus, self.weight = rows, bonus, weight
        self.cover, self.nearest = np.zeros(len(rows), np.float32), np.full(len(rows), -1, np.int64)
        self.chosen: list[int] = []
        self.gains: list[float] = []
        self.waiting: list[int] = []
        self.held: Floats | None = None

    def hold(self) -> None:
        """Keep all similarities, where they are few."""
        if len(self.rows) <= EXACT:
            self.held = self.rows @ self.rows.T

    def take(self, row: int, gain: float) -> None:
        """Choose a row; `flush` lets it serve."""
        self.chosen.append(row)
        self.gains.append(gain)
        self.waiting.append(row)

    def flush(self) -> None:
        """Let the rows chosen since the last time serve all rows: exact cover."""
        if not self.waiting:
            return
        names = np.array(self.waiting)
        for place, found in self._similar(names, 1 << 24):
            which = found.argmax(1)
            best = np.take_along_axis(found, which[:, None], 1)[:, 0]
            better = best > self.cover[place]
            self.nearest[place][better] = names[which[better]]
            self.cover[place][better] = best[better]
        self.waiting = []

    def _similar(self, names: NDArray[np.int64], most: int) -> Any:
        """Blocks [n, m] of cosines of all rows to some."""
        others = np.ascontiguousarray(self.rows[names].T)
        step = max(1, most // max(1, len(names)))
        for start in range(0, len(self.rows), step):
            yield slice(start, start + step), self.rows[start : start + step] @ others

    def exact(self, names: NDArray[np.int64]) -> Array:
        """[m] gains over all rows."""
        total = np.zeros(len(names))
        if self.held is not None:
            for i, name in enumerate(names):
                total[i] = np.maximum(self.held[name] - self.cover, 0).sum(dtype=np.float64)
            return self.weight * total + self.bonus[names]
        for place, found in self._similar(names, 1 << 22):
            found -= self.cover[place, None]
            np.maximum(found, 0, out=found)
            total += found.sum(0, dtype=np.float64)
        return self.weight * total + self.bonus[names]

    def lazy(self, keep: int) -> None:
        """The plain greedy choice, computing only what may win."""
        self.hold()
        bound = np.full(len(self.rows), -np.inf)
        able = np.flatnonzero(np.isfinite(self.bonus))
        for start in range(0, len(able), 1024):
            some = able[start : start + 1024]
            bound[some] = self.exact(some)
        fresh = np.isfinite(bound)
        while len(self.chosen) < keep:
            while not fresh[best := int(bound.argmax())]:
                stale = np.where(fresh, -np.inf, bound)
                most = np.argpartition(-stale, BATCH - 1)[:BATCH] if len(stale) > BATCH else np.arange(len(stale))
                most = most[np.isfinite(stale[most])]
                # a gain cannot grow: what rounding adds would let a row of equal gain overtake
                bound[most] = np.minimum(bound[most], self.exact(most))
                fresh[most] = True
            self.take(best, float(bound[best]))
            self.flush()
            bound[best] = -np.inf
            fresh[:] = False

    def stochastic(self, keep: int, epsilon: float, seed: int) -> None:
        """The best of a few random rows, each time."""
        self.hold()
        rng = np.random.default_rng(seed)
        left = np.flatnonzero(np.isfinite(self.bonus))
        size = max(1, math.ceil(len(left) / max(1, keep) * math.log(1 / epsilon)))
        while len(self.chosen) < keep:
            drawn = np.unique(rng.integers(len(left), size=size))
            rows = np.sort(left[drawn])
            gains = self.exact(rows)
            best = int(gains.argmax())
            self.take(int(rows[best]), float(gains[best]))
            self.flush()
            place = int(drawn[left[drawn] == rows[best]][0])
            left[place] = left[-1]  # the last row takes the empty place
            left = left[:-1]

    def neighbours(self, keep: int, count: int, seed: int) -> None:
        """Lazy greedy over the nearest rows only, with the cover kept exact."""
        start, other, cosine = _edges(*neighbours(self.rows, count, seed))
        summed = np.concatenate([[0], cosine.cumsum(dtype=np.float64)])

        def gain(u: int) -> float:
            part = slice(start[u], start[u + 1])
            more = cosine[part] - self.cover[other[part]]
            return self.weight * float(more[more > 0].sum()) + float(self.bonus[u])

        first = self.weight * np.diff(summed[start]) + self.bonus
        heap = [(-bound, u, 0) for u, bound in enumerate(first.tolist()) if bound == bound]
        heapq.heapify(heap)
        while len(self.chosen) < keep:
            bound, u, when = heapq.heappop(heap)
            if when < len(self.chosen):
                again = -gain(u)
                if heap and again > heap[0][0]:
                    heapq.heappush(heap, (again, u, len(self.chosen)))
                    continue
                bound = again
            self.take(u, -bound)
            part = slice(start[u], start[u + 1])
            better = cosine[part] > self.cover[other[part]]
            served = other[part][better]
            self.cover[served], self.nearest[served] = cosine[part][better], u
            if len(self.waiting) == 256 or (len(self.chosen) < 256 and not len(self.chosen) & (len(self.chosen) - 1)):
                self.flush()


def _edges(near: NDArray[np.int32], cosine: Floats) -> tuple[list[int], NDArray[np.int32], Floats]:
    """Pairs of neighbours in both directions, once each: where each row's begin, the other rows, their similarity."""
    n = len(near)
    some = (near >= 0) & (cosine > 0)
    a = np.repeat(np.arange(n, dtype=np.int64), some.sum(1))
    b, value = near[some].astype(np.int64), cosine[some]
    key = np.concatenate([a * n + b, b * n + a])
    key, first = np.unique(key, return_index=True)
    value = value[first % len(a)] if len(a) else value
    start = np.searchsorted(key, np.arange(n + 1) * n).tolist()
    return start, (key % max(1, n)).astype(np.int32), value
