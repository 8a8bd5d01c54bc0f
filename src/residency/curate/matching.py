"""Gradient matching: few rows with weights whose summed gradient is that of all.

With gradients g_i and the target t, the mean gradient of the trusted rows if there are any, else of the pool, choose
rows S and weights w ≥ 0 for

    min  ‖t − Σ_{i in S} w_i g_i‖² + λ ‖w‖²,        |S| ≤ keep

by orthogonal matching pursuit: take the row with the largest product with what is left, t − Σ w g; fit the weights of
all rows taken anew (non-negative least squares); go on. It ends when no row has a product above `tolerance` times its
norm and that of t, so nothing can lower the rest. The rows of the budget that are left are filled by falling cosine
with t, with weight 0 (the paper's code fills them by chance).

λ is `ridge` times the mean squared norm of the gradients, so it does not depend on their scale: it keeps single rows
from taking large weights. Weights are in the reasons, and in `weight` of the selection, for whoever trains with them.

Paper: Killamsetty, Sivasubramanian, Ramakrishnan, De & Iyer, "GRAD-MATCH: Gradient Matching based Data Subset
Selection for Efficient Deep Model Training", ICML 2021, arXiv 2103.00123. Official code: decile-team/cords. Our
choices: a relative λ, the end, the filling, an active-set solver that starts from the last weights.

Cost: n N P multiplications for n rows, and n fits of up to n weights (together about n⁴/12 multiplications, n = 1000:
a minute); memory n (P + n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from residency.curate.scoring import Array, Budgeted, Selection


@dataclass(frozen=True, kw_only=True)
class Matched(Selection):
    """The rows, their weights, and what they leave.

    Args:
        indices: [n] rows kept, in the order in which they were chosen.
        score: [N] cosine of a row's gradient with the target; NaN for a row without a gradient.
        reasons: For every row, why it was kept or dropped.
        nearest: None.
        weight: [N] w; 0 for all rows that are not matched.
        rest: ‖t − Σ w g‖ / ‖t‖.
    """

    weight: Array
    rest: float


class GradientMatching(Budgeted):
    """Rows whose weighted gradients add up to the target."""

    needs = ("gradients", "example_gradients?")

    keep: int = Field(1000, ge=1)
    """Rows to choose."""
    ridge: float = Field(0.01, gt=0)
    """λ over the mean squared norm of the gradients."""
    tolerance: float = Field(1e-4, gt=0, lt=1)
    """Cosine-like product with the rest below which matching ends."""

    def select(self, gradients: NDArray[Any], examples: NDArray[Any] | None = None) -> Matched:
        """Choose rows.

        Args:
            gradients: [N, P]; a row of NaN is never chosen.
            examples: [K, P] of trusted rows, or None.

        Returns:
            The selection; deterministic.

        Raises:
            ValueError: When shapes disagree, a row is partly NaN, infinite, or no trusted row has a gradient.
        """
        rows = np.asarray(gradients, np.float32 if np.asarray(gradients).dtype == np.float16 else None)
        if rows.ndim != 2:
            raise ValueError(f"gradients must be [N, P], not {rows.shape}")
        there = np.isfinite(rows).all(1)
        if (~there & ~np.isnan(rows).all(1)).any():
            bad = int(np.flatnonzero(~there & ~np.isnan(rows).all(1))[0])
            raise ValueError(f"row {bad} has a gradient that is not finite (a missing one is NaN throughout)")
        target = _target(rows[there], examples)
        pool = rows[there]
        size, length = np.linalg.norm(pool, axis=1), float(np.linalg.norm(target))
        scale = np.where(size == 0, 1, size) * (length or 1.0)
        cosine = (pool @ target) / scale
        chosen, weights, rest = self._match(pool, target, scale)
        matched = len(chosen)
        taken = set(chosen)
        fill = [int(i) for i in np.argsort(-cosine, kind="stable") if int(i) not in taken]
        chosen = chosen + fill[: max(0, self.keep - matched)]

        place = np.flatnonzero(there)
        score, weight = np.full(len(rows), np.nan), np.zeros(len(rows))
        score[place] = cosine
        weight[place[chosen[:matched]]] = weights
        reasons = [f"dropped: cosine {c:.2f} with the target, not needed to match it" for c in score]
        for i in np.flatnonzero(~there):
            reasons[i] = "dropped: no gradient"
        for rank, i in enumerate(place[chosen]):
            what = f"weight {weight[i]:.3g}" if rank < matched else "weight 0, fills the budget"
            reasons[i] = f"kept: {what}, cosine {score[i]:.2f} with the target"
        return Matched(place[chosen].astype(np.int64), score, reasons, weight=weight, rest=rest / (length or 1.0))

    def _match(self, pool: Array, target: Array, scale: Array) -> tuple[list[int], Array, float]:
        """The rows matched, their weights, and the norm of the rest."""
        chosen: list[int] = []
        weights = np.empty(0)
        left = target
        free = np.ones(len(pool), bool)
        penalty = self.ridge * float((pool.astype(float) ** 2).sum(1).mean()) if len(pool) else 0.0
        gram, products = np.empty((0, 0)), np.empty(0)
        while len(chosen) < min(self.keep, len(pool)):
            gain = np.where(free, pool @ left, -np.inf)
            best = int(gain.argmax())
            if gain[best] <= self.tolerance * scale[best]:
                break
            chosen.append(best)
            free[best] = False
            column = pool[chosen].astype(float) @ pool[best].astype(float)
            gram = np.block([[gram, column[:-1, None]], [column[None, :]]])
            products = np.append(products, pool[best].astype(float) @ target)
            weights = nonnegative(gram + penalty * np.eye(len(chosen)), products, np.append(weights, 0.0))
            left = target - weights @ pool[chosen]
        return chosen, weights, float(np.linalg.norm(left))


def nonnegative(gram: Array, products: Array, start: Array) -> Array:
    """Minimise wᵀ G w − 2 bᵀ w over w ≥ 0 by active sets (Lawson & Hanson), from a feasible start.

    Args:
        gram: [n, n] positive definite.
        products: [n].
        start: [n] ≥ 0.

    Returns:
        [n].
    """
    w, active = start.copy(), start > 0
    slack = 1e-12 * float(np.abs(products).max(initial=0.0))
    for _ in range(10 * len(w) + 10):
        while True:
            solved = np.zeros_like(w)
            solved[active] = np.linalg.solve(gram[np.ix_(active, active)], products[active])
            below = np.flatnonzero(active & (solved <= 0))
            if not len(below):
                break
            # as far towards the solution as all stay non-negative; the first to reach 0 leaves
            steps = w[below] / (w[below] - solved[below])
            w = w + steps.min() * (solved - w)
            active[below[steps.argmin()]] = False
            w[~active] = 0
        w = solved
        slope = np.where(active, -np.inf, products - gram @ w)
        if slope.max(initial=-np.inf) <= slack:
            break
        active[int(slope.argmax())] = True
    return w


def _target(pool: Array, examples: NDArray[Any] | None) -> Array:
    """[P] what is to be matched."""
    if examples is None:
        return np.asarray(pool, float).mean(0) if len(pool) else np.zeros(pool.shape[1])
    trusted = np.asarray(examples, float)
    if trusted.ndim != 2 or trusted.shape[1] != pool.shape[1]:
        raise ValueError(f"example_gradients must be [K, {pool.shape[1]}], not {trusted.shape}")
    trusted = trusted[np.isfinite(trusted).all(1)]
    if not len(trusted):
        raise ValueError("no trusted row has a gradient: give at least one, or none at all to match the pool")
    return trusted.mean(0)
