"""Influence of a row on the trusted rows under a ridge head: what leaving it out would do, without retraining.

A head W on embeddings x (with a constant 1 appended), fitted to classes y (one-hot, C columns) by

    W = argmin  Σ_i ‖y_i − Wᵀx_i‖² + λ ‖W‖²  =  A⁻¹ Xᵀ Y,        A = XᵀX + λ I

Leaving row i out changes it by a rank-one term, exactly:

    W_{−i} = W − A⁻¹ x_i e_iᵀ / (1 − h_i),        e_i = y_i − Wᵀx_i,   h_i = x_iᵀ A⁻¹ x_i

and the squared error of a trusted row (x, y), with r = y − Wᵀx and s_i = xᵀA⁻¹x_i, by

    Δ_i = 2 s_i r·e_i / (1 − h_i) + s_i² ‖e_i‖² / (1 − h_i)²

The score is the mean of Δ_i over trusted rows: positive where the row helps (without it the error is larger). The
influence function, −∇ℓ(trusted)ᵀ H⁻¹ ∇ℓ(i), is the first-order part of it with h_i = 0: `exact: false`. The two part
where a row carries its own prediction (h_i near 1: few rows, small λ, outliers).

Paper: Koh & Liang, "Understanding Black-box Predictions via Influence Functions", ICML 2017, arXiv 1703.04730; exact
leave-one-out of ridge: Allen, Technometrics 1974 (PRESS). Official code: kohpangwei/influence-release. Our choices: a
ridge head in place of a network (there the inverse Hessian is exact), λ = `ridge` times the mean of XᵀX's diagonal. For
networks: kronfluence and pyDVL (EK-FAC), or the first-order scores of `influence.py`.

Cost: N D² + D³ and N K (D + C), in blocks of rows; memory N (D + C).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from residency.curate.scoring import Array, Score
from residency.curate.shapley import Game

BLOCK = 4096
"""Rows whose effects are computed at a time."""


class Influence(Score):
    """Rise of the trusted rows' error when a row is left out."""

    needs = ("embeddings", "labels", "example_embeddings", "example_labels")
    alone = False

    ridge: float = Field(0.01, gt=0)
    """λ over the mean of the diagonal of XᵀX."""
    exact: bool = True
    """Leave the row out exactly; otherwise the influence function, its first-order part."""

    def score(
        self,
        embeddings: NDArray[Any],
        labels: Sequence[str | None],
        trusted: NDArray[Any],
        trusted_labels: Sequence[str | None],
    ) -> Array:
        """Influence of the rows.

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
        if not len(game.rows):
            return game.column(np.empty(0))
        classes = np.eye(len(game.classes))
        return game.column(
            self.effects(_with_one(game.x), classes[game.y], _with_one(game.trusted_x), classes[game.trusted_y])
        )

    def effects(self, x: Array, y: Array, trusted_x: Array, trusted_y: Array) -> Array:
        """The same for any regression.

        Args:
            x: [N, D] rows.
            y: [N, C] what they are fitted to.
            trusted_x: [K, D].
            trusted_y: [K, C].

        Returns:
            [N].
        """
        gram = x.T @ x
        inverse = np.linalg.inv(gram + self.strength(x) * np.eye(len(gram)))
        weight = inverse @ (x.T @ y)
        error, residual = y - x @ weight, trusted_y - trusted_x @ weight
        through = trusted_x @ inverse
        result = np.empty(len(x))
        for start in range(0, len(x), BLOCK):
            rows, e = x[start : start + BLOCK], error[start : start + BLOCK]
            reach = rows @ through.T
            first = 2 * reach * (e @ residual.T)
            if self.exact:
                free = 1 - np.einsum("nd,de,ne->n", rows, inverse, rows, optimize=True)[:, None]
                first = first / free + reach**2 * (e**2).sum(1, keepdims=True) / free**2
            result[start : start + BLOCK] = first.mean(1)
        return result

    def strength(self, x: Array) -> float:
        """λ for rows [N, D]."""
        return self.ridge * float((x**2).sum()) / x.shape[1]


def _with_one(x: Array) -> Array:
    return np.concatenate([x, np.ones((len(x), 1))], 1)
