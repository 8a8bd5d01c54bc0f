"""Shapley values of rows: what each adds to a classifier that is judged on the trusted rows.

With v(S) the quality of what is learned from rows S, a row's value is its mean marginal gain over all orders:

    φ_i = E_orders [ v(those before i, and i) − v(those before i) ],          Σ φ_i = v(all) − v(none)

Rows that do harm (wrong labels) have negative values, and rows that are alike share what they bring.

`knn-shapley`: v is the chance that the k nearest rows of a trusted row vote for its class. Then φ has a closed form:
with the N rows sorted by falling similarity to a trusted row, and a_i = 1 where row i has its class,

    φ_N = a_N min(k, N) / (k N),        φ_i = φ_{i+1} + (a_i − a_{i+1}) min(k, i) / (k i)

and the mean over trusted rows is the value; exact.

`tmc-shapley`: v is the accuracy of the nearest class centre (cosine), v(none) chance. Gains along random orders are
averaged; an order is cut off once v is within `tolerance` of v(all), the rest of its gains being 0. Adding a row moves
one centre, so a step costs O(K (D + C)), not a training. With at most `permutations` orders in all, each is taken once
and nothing is cut off: exact. Random orders are drawn over rows sorted by content, so a row's value does not depend on
its place.

Rows without a label or an embedding are not in the game: NaN. Similarity is the cosine (our choice; the papers use the
Euclidean distance, which for unit rows orders the same).

Papers: Jia, Dao, Wang et al., "Efficient Task-Specific Data Valuation for Nearest Neighbor Algorithms", PVLDB 2019,
arXiv 1908.08619; Ghorbani & Zou, "Data Shapley: Equitable Valuation of Data for Machine Learning", ICML 2019, arXiv
1904.02868. Official code: AI-secure/Data-Valuation, amiratag/DataShapley; the usual library is pyDVL.

Cost: knn K N (D + log N); tmc permutations · N · K (D + C) at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations as all_orders
from math import factorial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from residency.curate.scoring import Array, Score


@dataclass(frozen=True)
class Game:
    """Rows that are played with, sorted by content, and the trusted rows that judge.

    Args:
        total: N, rows of the pool.
        rows: [M] those with a label and an embedding.
        x, y: [M, D] unit embeddings and [M] classes of those.
        trusted_x, trusted_y: [K, D] and [K] of the trusted rows.
        classes: C names.
    """

    total: int
    rows: NDArray[np.int64]
    x: Array
    y: NDArray[np.int64]
    trusted_x: Array
    trusted_y: NDArray[np.int64]
    classes: list[str]

    @classmethod
    def of(
        cls,
        embeddings: NDArray[Any],
        labels: Sequence[str | None],
        trusted: NDArray[Any],
        trusted_labels: Sequence[str | None],
    ) -> Game:
        """Check the inputs.

        Raises:
            ValueError: When lengths or widths disagree, or no trusted row has a label.
        """
        x, rows = _sound(embeddings, labels, "")
        trusted_x, judges = _sound(trusted, trusted_labels, "example_")
        if x.shape[1] != trusted_x.shape[1]:
            raise ValueError(f"embeddings have width {x.shape[1]}, those of the trusted rows {trusted_x.shape[1]}")
        if not len(judges):
            raise ValueError("no trusted row has a label: the value of a row is what it adds to predicting them")
        names = sorted({str(labels[i]) for i in rows} | {str(trusted_labels[i]) for i in judges})
        number = {name: i for i, name in enumerate(names)}
        rows = np.array(sorted(rows.tolist(), key=lambda i: (str(labels[i]), x[i].tobytes())), np.int64)
        y = np.array([number[str(labels[i])] for i in rows], np.int64)
        trusted_y = np.array([number[str(trusted_labels[i])] for i in judges], np.int64)
        return cls(len(x), rows, x[rows], y, trusted_x[judges], trusted_y, names)

    def column(self, values: Array) -> Array:
        """[N] with NaN for rows that do not play, from [M]."""
        result = np.full(self.total, np.nan)
        result[self.rows] = values
        return result


class KNNShapley(Score):
    """Value of a row to the nearest neighbours of the trusted rows."""

    needs = ("embeddings", "labels", "example_embeddings", "example_labels")
    alone = False

    k: int = Field(5, ge=1)
    """Neighbours that vote."""

    def score(
        self,
        embeddings: NDArray[Any],
        labels: Sequence[str | None],
        trusted: NDArray[Any],
        trusted_labels: Sequence[str | None],
    ) -> Array:
        """Exact values.

        Args:
            embeddings: [N, D].
            labels: N classes.
            trusted: [K, D].
            trusted_labels: K classes.

        Returns:
            [N]; NaN for a row without a label or an embedding.

        Raises:
            ValueError: When lengths or widths disagree, or no trusted row has a label.
        """
        game = Game.of(embeddings, labels, trusted, trusted_labels)
        n = len(game.rows)
        values = np.zeros(n)
        if not n:
            return game.column(values)
        place = np.arange(1, n)
        share = np.minimum(self.k, place) / (self.k * place)
        for judge, label in zip(game.trusted_x, game.trusted_y, strict=True):
            order = np.argsort(-(game.x @ judge), kind="stable")
            right = (game.y[order] == label).astype(float)
            last = right[-1] * min(self.k, n) / (self.k * n)
            steps = (right[:-1] - right[1:]) * share
            values[order] += np.append(last + np.cumsum(steps[::-1])[::-1], last)
        return game.column(values / len(game.trusted_x))


class TMCShapley(Score):
    """Value of a row to the class centres, by truncated Monte Carlo."""

    needs = ("embeddings", "labels", "example_embeddings", "example_labels")
    alone = False

    permutations: int = Field(200, ge=1)
    """Random orders; the standard error falls with their root."""
    tolerance: float = Field(0.01, ge=0, lt=1)
    """An order ends when the accuracy is this close to that of all rows; 0 ends none early."""
    seed: int = Field(0, ge=0)
    """Where the random orders start."""

    def score(
        self,
        embeddings: NDArray[Any],
        labels: Sequence[str | None],
        trusted: NDArray[Any],
        trusted_labels: Sequence[str | None],
    ) -> Array:
        """Estimated values; exact where all orders are taken.

        Args:
            embeddings: [N, D].
            labels: N classes.
            trusted: [K, D].
            trusted_labels: K classes.

        Returns:
            [N]; NaN for a row without a label or an embedding.

        Raises:
            ValueError: When lengths or widths disagree, or no trusted row has a label.
        """
        game = Game.of(embeddings, labels, trusted, trusted_labels)
        n = len(game.rows)
        exact = n <= 10 and factorial(n) <= self.permutations
        rng = np.random.default_rng(self.seed)
        orders: Iterable[Any] = (
            all_orders(range(n)) if exact else (rng.permutation(n) for _ in range(self.permutations))
        )
        values, taken = np.zeros(n), 0
        for order in orders:
            values += gains(game, order, 0.0 if exact else self.tolerance)
            taken += 1
        return game.column(values / taken)


def gains(game: Game, order: Sequence[int], tolerance: float) -> Array:
    """[M] what every row adds to the accuracy along one order; 0 after v is within `tolerance` of v(all)."""
    whole = float(accuracy(game, np.ones((1, len(order)), bool))[0])
    before = 1 / len(set(game.trusted_y.tolist()))
    centres = np.zeros((len(game.classes), game.x.shape[1]))
    cosines = np.full((len(game.trusted_x), len(game.classes)), -2.0)
    result = np.zeros(len(order))
    for i in order:
        if tolerance and abs(whole - before) < tolerance:
            break
        c = game.y[i]
        centres[c] += game.x[i]
        length = float(np.sqrt(centres[c] @ centres[c]))
        cosines[:, c] = game.trusted_x @ centres[c] / (length or 1.0)
        after = float((cosines.argmax(1) == game.trusted_y).mean())
        result[i] = after - before
        before = after
    return result


def accuracy(game: Game, masks: NDArray[np.bool_]) -> Array:
    """[S] accuracy on the trusted rows of the centres of every subset."""
    right = np.equal(similarities(game, masks).argmax(2), game.trusted_y, dtype=bool)
    return np.where(masks.any(1), right.mean(axis=1), 1 / len(set(game.trusted_y.tolist())))


def similarities(game: Game, masks: NDArray[np.bool_]) -> Array:
    """Cosine of every trusted row with the class centres of every subset.

    Args:
        game: The rows.
        masks: [S, M] which rows a subset has.

    Returns:
        [S, K, C]; −2 for a class without a row.
    """
    result = np.full((len(masks), len(game.trusted_x), len(game.classes)), -2.0)
    for c in range(len(game.classes)):
        of = np.flatnonzero(game.y == c)
        part = masks[:, of].astype(float)
        centres = part @ game.x[of]
        length = np.linalg.norm(centres, axis=1, keepdims=True)
        cosines = (centres / np.where(length == 0, 1, length)) @ game.trusted_x.T
        result[:, :, c] = np.where(part.sum(axis=1, keepdims=True) > 0, cosines, -2.0)
    return result


def _sound(rows: NDArray[Any], labels: Sequence[str | None], prefix: str) -> tuple[Array, NDArray[np.int64]]:
    """Unit rows, and which of them have a label and an embedding."""
    x = np.asarray(rows, float)
    if x.ndim != 2 or len(labels) != len(x):
        raise ValueError(f"{prefix}embeddings {x.shape} must be [rows, D], a row for each of {len(labels)} labels")
    if np.isinf(x).any():
        raise ValueError(f"{prefix}embeddings: row {int(np.flatnonzero(np.isinf(x).any(1))[0])} is infinite")
    length = np.linalg.norm(x, axis=1, keepdims=True)
    there = [i for i, label in enumerate(labels) if label is not None and not np.isnan(length[i, 0])]
    return x / np.where(length == 0, 1, length), np.array(there, np.int64)
