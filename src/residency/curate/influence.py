"""Scores from gradients: which rows, trained on, lower the loss of the trusted rows most.

One step of size η on row z changes the loss of a trusted row z' by −η g(z')·g(z) + O(η²). Summed over checkpoints c
with step sizes η_c, over a mean of trusted rows, that is TracIn; with cosines instead of products, and the best of
several tasks instead of their mean, it is LESS; a row on itself gives the squared norm that GraNd takes the root of:

    tracin_i = Σ_c η_c  g_c(z_i) · mean_k g_c(z'_k)
    less_i   = max_tasks  Σ_c η_c  mean_{k in task} cos( Γ_c(z_i), g_c(z'_k) )
    grand_i  = mean_c ‖g_c(z_i)‖

Gradients come projected (`gradients.py`): products and norms are then estimates. Short answers have large gradients, so
products favour them; cosines do not, which is why LESS takes them. For LESS the pool's rows should be Adam's directions
Γ and the trusted rows' plain gradients. A task is a class of trusted rows; without labels there is one.

A trusted row without a gradient (NaN) is left out, a row of the pool without one has no score. Where all weights are
equal, they only scale a column; `weights` belongs to several checkpoints.

Papers: LESS, Xia, Malladi, Gururangan, Arora & Chen, ICML 2024, arXiv 2402.04333 (code: princeton-nlp/LESS, which
knows three benchmarks as tasks); TracIn, Pruthi, Liu, Kale & Sundararajan, NeurIPS 2020, arXiv 2002.08484; GraNd,
Paul, Ganguli & Dziugaite, NeurIPS 2021, arXiv 2107.07075 (an expectation over initialisations early in training: that
is what checkpoints stand for here). Our choice: TracIn's mean over trusted rows (the paper has one test row).

Cost: N P multiplications per checkpoint and task (a task is the mean of its unit rows); memory a block of rows in
float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from residency.curate.scoring import Array, Score

BLOCK = 1024
"""Rows in float64 at a time."""


class Traced(Score):
    """A score from gradients at one or more checkpoints."""

    weights: tuple[float, ...] | None = Field(None, min_length=1)
    """η of every checkpoint (its mean learning rate); by default 1 each."""

    def eta(self, checkpoints: int) -> Array:
        """[C] the weights.

        Raises:
            ValueError: When their number is another.
        """
        if self.weights is not None and len(self.weights) != checkpoints:
            raise ValueError(f"{len(self.weights)} weights for {checkpoints} checkpoints: give one for each")
        return np.ones(checkpoints) if self.weights is None else np.array(self.weights, float)


class LESS(Traced):
    """Cosine of a row's gradient with those of the trusted rows, in its best task."""

    needs = ("gradients", "example_gradients", "example_labels?")

    def score(
        self, gradients: NDArray[Any], examples: NDArray[Any], labels: Sequence[str | None] | None = None
    ) -> Array:
        """Influence on the task that gains most.

        Args:
            gradients: [N, P], or [C, N, P] of C checkpoints.
            examples: [K, P], or [C, K, P].
            labels: K names of tasks; None for one task.

        Returns:
            [N] in units of η, between −Σ η and Σ η; NaN for a row without a gradient.

        Raises:
            ValueError: When shapes disagree, or no trusted row has a gradient.
        """
        pool, trusted, there = checked(gradients, examples)
        labels = [None] * trusted.shape[1] if labels is None else list(labels)
        if len(labels) != trusted.shape[1]:
            raise ValueError(f"{len(labels)} labels for {trusted.shape[1]} trusted rows: give one for each")
        tasks = [np.array([name == each for each in labels]) & there for name in dict.fromkeys(labels)]
        unit = _unit(np.asarray(trusted, float))
        eta = self.eta(len(pool))
        means = [np.stack([unit[c][task].mean(0) for task in tasks if task.any()]) for c in range(len(pool))]
        result = np.empty(pool.shape[1])
        for start in range(0, len(result), BLOCK):
            part = _unit(np.asarray(pool[:, start : start + BLOCK], float))
            each = sum(e * rows @ mean.T for e, rows, mean in zip(eta, part, means, strict=True))
            result[start : start + BLOCK] = each.max(1)
        return result


class TracIn(Traced):
    """Inner product of a row's gradient with the mean of the trusted rows'."""

    needs = ("gradients", "example_gradients")

    def score(self, gradients: NDArray[Any], examples: NDArray[Any]) -> Array:
        """First-order drop of the trusted rows' mean loss.

        Args:
            gradients: [N, P], or [C, N, P] of C checkpoints.
            examples: [K, P], or [C, K, P].

        Returns:
            [N], high for rows that help; NaN for a row without a gradient.

        Raises:
            ValueError: When shapes disagree, or no trusted row has a gradient.
        """
        pool, trusted, there = checked(gradients, examples)
        eta = self.eta(len(pool))
        target = np.asarray(trusted[:, there], float).mean(1) * eta[:, None]
        result = np.empty(pool.shape[1])
        for start in range(0, len(result), BLOCK):
            part = np.asarray(pool[:, start : start + BLOCK], float)
            result[start : start + BLOCK] = np.einsum("cnp,cp->n", part, target)
        return result


class GraNd(Score):
    """Norm of a row's gradient."""

    needs = ("gradients",)

    def score(self, gradients: NDArray[Any]) -> Array:
        """How far one step on the row alone would move the weights.

        Args:
            gradients: [N, P], or [C, N, P] of C checkpoints.

        Returns:
            [N]; NaN for a row without a gradient.
        """
        pool = _checkpoints(gradients, "gradients")
        result = np.empty(pool.shape[1])
        for start in range(0, len(result), BLOCK):
            result[start : start + BLOCK] = np.linalg.norm(
                np.asarray(pool[:, start : start + BLOCK], float), axis=2
            ).mean(0)
        return result


def checked(gradients: NDArray[Any], examples: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_]]:
    """Both as [C, …, P], and which trusted rows have a gradient.

    Raises:
        ValueError: When shapes disagree, or no trusted row has a gradient.
    """
    pool, trusted = _checkpoints(gradients, "gradients"), _checkpoints(examples, "example_gradients")
    if len(pool) != len(trusted) or pool.shape[2] != trusted.shape[2]:
        raise ValueError(f"gradients {pool.shape} and example_gradients {trusted.shape} differ in checkpoints or width")
    there = np.isfinite(trusted).all((0, 2))
    if not there.any():
        raise ValueError("no trusted row has a gradient: give at least one that is not too long and has an answer")
    return pool, trusted, there


def _checkpoints(rows: NDArray[Any], name: str) -> NDArray[Any]:
    rows = np.asarray(rows)
    if rows.ndim not in (2, 3):
        raise ValueError(f"{name} must be [rows, P] or [checkpoints, rows, P], not {rows.shape}")
    return rows[None] if rows.ndim == 2 else rows


def _unit(rows: Array) -> Array:
    """Rows scaled to length 1; a zero row stays zero."""
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(length == 0, 1, length)
