"""Datamodels: a linear model that predicts, from which rows were trained on, how well the trusted rows come out.

Train on S random subsets of the pool, each a share α of it. With the subset as indicators m_s in {0, 1}^N and what
came out of it as f_s (a margin, a loss), regress

    min over w, b of  (1/2S) Σ_s (f_s − w·m_s − b)² + λ ‖w‖₁              lasso (the paper's), or
    min over w, b of          Σ_s (f_s − w·m_s − b)² + λ ‖w‖²              ridge, in closed form

w_i is the mean effect of row i on f over random companies: like a Shapley value, but all rows share every training.
`fit` works on any (masks, outputs), of whatever model; with many outputs at once it returns a column for each.

The score `datamodels` needs no training loop: what is trained on a subset is the centres of its classes, and f is the
mean margin of the trusted rows (cosine with the centre of their class, less the largest other one). Subsets are drawn
over rows sorted by content, so a row's weight does not depend on its place. The paper trains 300,000 ResNets; a
thousand subsets of a few hundred rows are enough here where effects are large. The error of a weight is about the
spread of f over √(S α (1 − α)).

Paper: Ilyas, Park, Engstrom, Leclerc & Madry, "Datamodels: Predicting Predictions from Training Data", ICML 2022, arXiv
2202.00622; for selection: DsDm, Engstrom, Feldmann & Madry, ICML 2024, arXiv 2401.12926 (the mean weight over targets).
Official code: MadryLab/datamodels (its fast_l1 on GPUs; read for facts). Our choice: ridge by default.

Cost: ridge S² N + S³ (or N² S + N³, whichever is less); lasso S N per sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from residency.curate.scoring import Array, Score
from residency.curate.shapley import Game, similarities

BLOCK = 256
"""Subsets whose outputs are computed at a time."""
SWEEPS = 2000
"""Sweeps of the lasso at most."""


class Datamodels(Score):
    """Effect of a row on the margin of the trusted rows, regressed over random subsets."""

    needs = ("embeddings", "labels", "example_embeddings", "example_labels")
    alone = False

    subsets: int = Field(1000, ge=2)
    """S, random subsets."""
    share: float = Field(0.5, gt=0, lt=1)
    """α, rows of a subset over rows of the pool."""
    penalty: Literal["ridge", "lasso"] = "ridge"
    """What keeps weights small: their squares, or their absolute values, which makes most of them 0."""
    strength: float = Field(1.0, gt=0)
    """λ; for ridge about 1-100, for lasso about 1e-4."""
    seed: int = Field(0, ge=0)
    """Where the random subsets start."""

    def score(
        self,
        embeddings: NDArray[Any],
        labels: Sequence[str | None],
        trusted: NDArray[Any],
        trusted_labels: Sequence[str | None],
    ) -> Array:
        """Weights of the rows.

        Args:
            embeddings: [N, D].
            labels: N classes.
            trusted: [K, D].
            trusted_labels: K classes.

        Returns:
            [N], high for rows that help; NaN for a row without a label or an embedding.

        Raises:
            ValueError: When lengths or widths disagree, or no trusted row has a label.
        """
        game = Game.of(embeddings, labels, trusted, trusted_labels)
        masks = self.masks(len(game.rows))
        parts = (masks[start : start + BLOCK] for start in range(0, len(masks), BLOCK))
        outputs = np.concatenate([margins(game, part).mean(1) for part in parts])
        return game.column(self.fit(masks, outputs)[0])

    def masks(self, rows: int) -> NDArray[np.bool_]:
        """[S, N] random subsets, all of the same size (at least one row, if there are any)."""
        rng = np.random.default_rng(self.seed)
        size = min(rows, max(1, round(self.share * rows)))
        return rng.permuted(np.broadcast_to(np.arange(rows) < size, (self.subsets, rows)), axis=1)

    def fit(self, masks: NDArray[Any], outputs: NDArray[Any]) -> tuple[Array, Array]:
        """Regress outputs on subsets.

        Args:
            masks: [S, N] indicators.
            outputs: [S], or [S, K] for K targets.

        Returns:
            Weights [N] or [N, K], and intercepts [] or [K].

        Raises:
            ValueError: When lengths disagree or an output is not finite.
        """
        x, f = np.asarray(masks, float), np.asarray(outputs, float)
        if x.ndim != 2 or f.ndim not in (1, 2) or len(x) != len(f) or not len(f) or not np.isfinite(f).all():
            raise ValueError(f"masks {x.shape} must be [S, N] and outputs {f.shape} S finite numbers, or [S, K]")
        y = f.reshape(len(f), -1)
        mean, middle = x.mean(0), y.mean(0)
        solve = _ridge if self.penalty == "ridge" else _lasso
        w = solve(x - mean, y - middle, self.strength)
        b = middle - mean @ w
        return (w[:, 0], b[0]) if f.ndim == 1 else (w, b)


def margins(game: Game, masks: NDArray[np.bool_]) -> Array:
    """[S, K] how far the centre of its own class is ahead of the others, for every trusted row."""
    cosines = similarities(game, masks)
    own = cosines[:, np.arange(len(game.trusted_y)), game.trusted_y]
    others = cosines.copy()
    others[:, np.arange(len(game.trusted_y)), game.trusted_y] = -2.0
    # a class without a row is as unlike as can be
    result: Array = np.maximum(own, -1) - np.maximum(others.max(2), -1)
    return result


def _ridge(x: Array, y: Array, strength: float) -> Array:
    few = len(x) < x.shape[1]
    gram = x @ x.T if few else x.T @ x
    found = np.linalg.solve(gram + strength * np.eye(len(gram)), y if few else x.T @ y)
    return np.asarray(x.T @ found if few else found, float)


def _lasso(x: Array, y: Array, strength: float) -> Array:
    """Cyclic coordinate descent, over all targets together."""
    size = len(x)
    w, left = np.zeros((x.shape[1], y.shape[1])), y.copy()
    norms = (x**2).sum(0) / size
    columns = np.ascontiguousarray(x.T)
    for _ in range(SWEEPS):
        moved = 0.0
        for j in np.flatnonzero(norms > 1e-15):
            pull = columns[j] @ left / size + norms[j] * w[j]
            new = np.sign(pull) * np.maximum(np.abs(pull) - strength, 0) / norms[j]
            if (change := new - w[j]).any():
                left -= np.outer(columns[j], change)
                moved = max(moved, float(np.abs(change).max()))
                w[j] = new
        if moved <= 1e-9 * max(float(np.abs(w).max(initial=0.0)), 1e-12):
            break
    return w
