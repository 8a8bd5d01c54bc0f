"""How evenly rows spread over clusters, tags or space: entropies of categories, and the distance to a neighbour.

With shares p_c of S categories (clusters, labels, tags; a row may have several tags), natural logarithms:

    entropy    H = −Σ p log p
    Rényi      H_a = log Σ p^a / (1 − a);   H_0 = log S, H_1 = H, H_∞ = −log max p;   exp(H_a) is the effective number
    Simpson    1 − Σ p²: the probability that two rows drawn with replacement differ;
               without replacement 1 − Σ n_c (n_c − 1) / (n (n − 1)), unbiased for the population
    evenness   H / log S (Pielou): 1 when all categories are equally frequent

High = diverse. Per row, −log p of its category (mean over its tags) says how rare it is; for one category per row its
mean over rows is H. The survey prints Simpson's other half, the probability of a match.

    kNN_j      distance of a row to its j-th nearest other row; high where the data are thin, 0 for a copy (j = 1).
               Its mean for j = 1 is the diversity D_kNN of the set.

Papers: Shannon 1948; Rényi 1961; Simpson 1949; Pielou 1966; as data scores: survey 2408.02085, eq. 30, 32, 36-38; kNN_j
of InstructionMining (Cao et al. 2023, arXiv 2307.06290). Official code: none for these.

Cost: categories are linear. kNN_j is exact: N² D / 2 multiply-adds in float32 blocks, memory block² + N j, never
N × N; the distances returned are computed anew from the rows, so copies have distance 0. (Which of two rows is nearer
is decided in float32: where both lie within about 3e-4 of the rows' length, the other may be taken.) 20,000 rows of
384 take 6 s on one core.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from residency.curate.scoring import Array, Score
from residency.curate.vendi import hill


def shares(categories: Sequence[Hashable] | Sequence[Sequence[Hashable]]) -> dict[Hashable, float]:
    """Share of every category.

    Args:
        categories: Of each row its category, or a tuple, list or set of tags; rows without a tag count for nothing.

    Returns:
        Category → share, in the order first seen; sums to 1, empty when no row has any.
    """
    times = Counter(tag for row in categories for tag in _tags(row))
    total = sum(times.values())
    return {tag: n / total for tag, n in times.items()}


def entropy(categories: Sequence[Any]) -> float:
    """Shannon entropy in nats; 0 for a single category; see `shares` for the argument."""
    return renyi(categories, 1.0)


def renyi(categories: Sequence[Any], order: float = 2.0) -> float:
    """Rényi entropy.

    Args:
        categories: See `shares`.
        order: a ≥ 0, `inf` included.

    Returns:
        Between 0 and log S.
    """
    return math.log(hill(_values(categories), order)) + 0.0


def simpson(categories: Sequence[Any], replacement: bool = True) -> float:
    """Probability that two drawn rows (tags) are of different categories.

    Args:
        categories: See `shares`.
        replacement: Whether the first is put back before the second is drawn.

    Returns:
        0 for a single category; NaN for a single row drawn without replacement.
    """
    times = Counter(tag for row in categories for tag in _tags(row))
    n = sum(times.values())
    if not n:
        raise ValueError("no row has a category")
    if replacement:
        return 1 - sum(c * c for c in times.values()) / (n * n)
    return 1 - sum(c * (c - 1) for c in times.values()) / (n * (n - 1)) if n > 1 else math.nan


def evenness(categories: Sequence[Any], possible: int | None = None) -> float:
    """Entropy relative to its largest value.

    Args:
        categories: See `shares`.
        possible: Number of categories there could be; by default those seen.

    Returns:
        Between 0 and 1; NaN when there is only one category to be in.
    """
    p = _values(categories)
    if possible is not None and possible < len(p):
        raise ValueError(f"{len(p)} categories were seen, and possible is {possible}")
    most = len(p) if possible is None else possible
    return entropy(categories) / math.log(most) if most > 1 else math.nan


class Rarity(Score):
    """How rare a row's category is, or its tags are on average."""

    needs = ("tags",)
    alone = False

    def score(self, categories: Sequence[Any]) -> Array:
        """−log share of every row.

        Args:
            categories: See `shares`.

        Returns:
            [N]; NaN for a row without a tag.
        """
        bits = {tag: -math.log(p) for tag, p in shares(categories).items()}
        rows = ([bits[tag] for tag in _tags(row)] for row in categories)
        return np.array([sum(row) / len(row) if row else math.nan for row in rows])


class KNN(Score):
    """Distance of a row to its j-th nearest other row."""

    needs = ("embeddings",)
    alone = False

    neighbour: int = Field(1, ge=1)
    """j: 1 finds copies, about 6 measures how thin the data are around a row."""
    metric: Literal["cos", "euclid"] = "cos"
    """1 − cosine, or the Euclidean distance."""

    def score(self, rows: NDArray[Any], block: int = 2_048) -> Array:
        """The distance of every row.

        Args:
            rows: [N, D] embeddings of any scale; float16 or a memory map is fine.
            block: Rows on each side of a matrix product; memory is its square.

        Returns:
            [N] distances.

        Raises:
            ValueError: See `neighbours`.
        """
        return self.neighbours(rows, block)[0]

    def neighbours(self, rows: NDArray[Any], block: int = 2_048) -> tuple[Array, NDArray[np.int64]]:
        """Distance to the j-th nearest other row, and which row that is.

        Args:
            rows: [N, D] embeddings.
            block: As in `score`.

        Returns:
            [N] distances and [N] row numbers.

        Raises:
            ValueError: When there are not more than j rows, one is not finite, or (cos) one is all zeros.
        """
        j, n = self.neighbour, len(rows)
        if rows.ndim != 2 or n <= j:
            raise ValueError(f"neighbour {j} needs more than {j} rows [N, D], and the array has shape {rows.shape}")
        centre = np.mean([np.asarray(rows[s : s + block], np.float64).mean(0) for s in range(0, n, block)], 0)
        near = np.full((n, j), -np.inf, np.float32)
        who = np.zeros((n, j), np.int64)
        for start in range(0, n, block):
            left = self._rows(rows, start, block, centre)
            # every pair of blocks once: its similarities serve the rows on both sides
            for other in range(start, n, block):
                right = left if other == start else self._rows(rows, other, block, centre)
                alike = left @ right.T
                if self.metric == "euclid":  # −½‖x − y‖²
                    alike -= np.square(left).sum(1)[:, None] / 2
                    alike -= np.square(right).sum(1) / 2
                if other == start:
                    np.fill_diagonal(alike, -np.inf)
                    _merge(near, who, start, alike, other)
                else:
                    _merge(near, who, start, alike, other)
                    _merge(near, who, other, alike.T, start)
        worst = near.argmin(1)
        nearest = who[np.arange(n), worst]
        return self._exact(rows, nearest, block), nearest

    def _rows(self, rows: NDArray[Any], start: int, block: int, centre: Array) -> NDArray[np.float32]:
        """A block, ready for inner products."""
        part = np.asarray(rows[start : start + block], np.float64)
        if not np.isfinite(part).all():
            raise ValueError(f"row {start + int(np.flatnonzero(~np.isfinite(part).all(1))[0])} is not finite")
        if self.metric == "euclid":
            return (part - centre).astype(np.float32)
        return _unit(part, start).astype(np.float32)

    def _exact(self, rows: NDArray[Any], nearest: NDArray[np.int64], block: int) -> Array:
        """Distances to the rows found, in float64."""
        found = np.empty(len(rows))
        for start in range(0, len(rows), block):
            a = np.asarray(rows[start : start + block], np.float64)
            b = np.asarray(rows[nearest[start : start + block]], np.float64)
            if self.metric == "cos":  # 1 − uv = ‖u − v‖² / 2 keeps the digits of small distances
                found[start : start + block] = np.square(_unit(a, start) - _unit(b, start)).sum(1) / 2
            else:
                found[start : start + block] = np.linalg.norm(a - b, axis=1)
        return found


def _merge(near: Any, who: Any, start: int, alike: Any, other: int) -> None:
    """Keep of every row the j most similar met so far."""
    j, stop = near.shape[1], start + len(alike)
    if j == 1:
        best = alike.argmax(1)
        value = alike[np.arange(len(alike)), best]
        better = np.flatnonzero(value > near[start:stop, 0])
        near[start + better, 0], who[start + better, 0] = value[better], other + best[better]
        return
    # only rows with something better than their worst need sorting
    better = np.flatnonzero(alike.max(1) > near[start:stop].min(1))
    part = alike[better]
    top = (
        np.argpartition(-part, j - 1, axis=1)[:, :j]
        if part.shape[1] > j
        else np.tile(np.arange(part.shape[1]), (len(part), 1))
    )
    values = np.concatenate([near[start + better], np.take_along_axis(part, top, 1)], 1)
    names = np.concatenate([who[start + better], top + other], 1)
    keep = np.argpartition(-values, j - 1, axis=1)[:, :j]
    near[start + better] = np.take_along_axis(values, keep, 1)
    who[start + better] = np.take_along_axis(names, keep, 1)


def _unit(part: Array, start: int) -> Array:
    """Rows scaled to length 1."""
    length = np.linalg.norm(part, axis=1, keepdims=True)
    if not length.all():
        raise ValueError(
            f"row {start + int(np.flatnonzero(length == 0)[0])} is all zeros and has no cosine: drop it first"
        )
    return part / length


def _values(categories: Sequence[Any]) -> Array:
    found = np.array(list(shares(categories).values()))
    if not len(found):
        raise ValueError("no row has a category")
    return found


def _tags(row: Any) -> Sequence[Hashable]:
    """A row's tags: a tuple, list or set of them; anything else is the one category itself."""
    return tuple(row) if isinstance(row, tuple | list | set | frozenset) else (row,)
