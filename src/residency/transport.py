"""Optimal transport between two weighted sets of points: what it costs to turn one into the other.

For costs C [n, m] and weights a [n], b [m], each summing to 1:

    W(a, b) = min over P ≥ 0 with P 1 = a, Pᵀ 1 = b  of  Σ P_ij C_ij                              (exact)
    W_ε     = the same with + ε Σ P log P, solved by scaling rows and columns in turn              (Sinkhorn)

`exact` gives the linear program to a solver: POT's network simplex where it is installed, else scipy's HiGHS.
`sinkhorn` works on logarithms, so that no ε underflows, and lowers ε in steps towards the one asked for. What it
returns is a plan whose sums are a and b to rounding (the last plan, scaled down where a sum is too large, and the rest
filled in as a product), so its cost is one that a plan really has: never below the exact one.

Papers: Kantorovich 1942; Cuturi, "Sinkhorn Distances", NeurIPS 2013, arXiv 1306.0895; the rounding: Altschuler, Weed,
Rigollet, NeurIPS 2017, arXiv 1705.09634; ε in steps: Schmitzer 2019, arXiv 1610.06519. Official code: none used; POT
(Flamary et al., JMLR 2021) is the solver and, in the tests, the oracle.

Cost: `exact` about O(n m (n + m)) in practice; `sinkhorn` O(n m) per round, some hundred rounds; memory O(n m) both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from residency.errors import MissingError

Array = NDArray[np.float64]


def cosine_costs(x: NDArray[Any], y: NDArray[Any]) -> Array:
    """1 − cosine of every pair of rows.

    Args:
        x: [n, D].
        y: [m, D].

    Returns:
        [n, m], between 0 and 2.

    Raises:
        ValueError: When a row is not finite or all zeros.
    """
    sides = []
    for rows in (x, y):
        each = np.asarray(rows, float)
        length = np.linalg.norm(each, axis=1, keepdims=True)
        if not np.isfinite(length).all() or not length.all():
            raise ValueError("a row is all zeros or not finite, and has no cosine")
        sides.append(each / length)
    return np.maximum(1 - sides[0] @ sides[1].T, 0)


def exact(costs: NDArray[Any], a: NDArray[Any], b: NDArray[Any]) -> float:
    """W(a, b) by linear programming.

    Args:
        costs: [n, m].
        a: [n] weights ≥ 0; scaled to sum to 1.
        b: [m] weights.

    Returns:
        The cost of the cheapest plan.

    Raises:
        ValueError: When shapes or weights do not fit.
        MissingError: When neither POT nor scipy is installed.
    """
    costs, a, b = _checked(costs, a, b)
    try:
        import ot
    except ModuleNotFoundError:
        return _by_highs(costs, a, b)
    return float(ot.emd2(a, b, costs, numItermax=1_000_000))


def _by_highs(costs: Array, a: Array, b: Array) -> float:
    try:
        from scipy.optimize import linprog
        from scipy.sparse import eye_array, kron, vstack
    except ModuleNotFoundError:
        raise MissingError(
            "exact transport needs a solver, and neither POT nor scipy is installed",
            hint="pip install 'residency[transport]', or take the Sinkhorn form",
        ) from None
    n, m = costs.shape
    sums = vstack([kron(eye_array(n), np.ones((1, m))), kron(np.ones((1, n)), eye_array(m))])
    found = linprog(costs.ravel(), A_eq=sums.tocsr()[:-1], b_eq=np.concatenate([a, b])[:-1], method="highs")
    if found.x is None:
        raise ValueError(f"the transport problem was not solved: {found.message}")
    return float(found.fun)


def sinkhorn(
    costs: NDArray[Any],
    a: NDArray[Any],
    b: NDArray[Any],
    epsilon: float = 0.01,
    rounds: int = 500,
    tolerance: float = 1e-6,
) -> float:
    """Cost of a nearly cheapest plan.

    Args:
        costs: [n, m].
        a: [n] weights ≥ 0; scaled to sum to 1.
        b: [m] weights.
        epsilon: ε as a share of the largest cost.
        rounds: Most rounds at the last ε.
        tolerance: Stops when the rows' sums are this near (total variation).

    Returns:
        The cost of the rounded plan, at least that of `exact`.

    Raises:
        ValueError: When shapes or weights do not fit.
    """
    costs, a, b = _checked(costs, a, b)
    rows, columns = a > 0, b > 0
    c, p, q = costs[np.ix_(rows, columns)], a[rows], b[columns]
    if not c.max(initial=0) > 0:
        return 0.0
    log_p, log_q = np.log(p), np.log(q)
    f, g = np.zeros(len(p)), np.zeros(len(q))
    target = epsilon * float(c.max())
    step = float(c.max())
    while True:
        step = max(step / 4, target)
        last = step == target
        for _ in range(rounds if last else 20):
            f = step * (log_p - _log_sum((g[None] - c) / step, 1))
            g = step * (log_q - _log_sum((f[:, None] - c) / step, 0))
            plan = np.exp((f[:, None] + g[None] - c) / step)
            if np.abs(plan.sum(1) - p).sum() / 2 < tolerance:
                break
        if last:
            return float((rounded(plan, p, q) * c).sum())


def rounded(plan: Array, a: Array, b: Array) -> Array:
    """The nearby plan whose rows sum to a and whose columns sum to b.

    Args:
        plan: [n, m] values ≥ 0, nearly a plan.
        a: [n] weights that sum to 1.
        b: [m] weights that sum to 1.
    """
    plan = plan * np.minimum(1, a / np.maximum(plan.sum(1), 1e-300))[:, None]
    plan = plan * np.minimum(1, b / np.maximum(plan.sum(0), 1e-300))[None]
    over, under = np.maximum(a - plan.sum(1), 0), np.maximum(b - plan.sum(0), 0)
    left = over.sum()
    return plan + np.outer(over, under) / left if left > 0 else plan


def _log_sum(x: Array, axis: int) -> Array:
    top = x.max(axis, keepdims=True)
    return np.squeeze(top, axis) + np.log(np.exp(x - top).sum(axis))


def _checked(costs: NDArray[Any], a: NDArray[Any], b: NDArray[Any]) -> tuple[Array, Array, Array]:
    costs, a, b = (np.asarray(each, float) for each in (costs, a, b))
    if costs.ndim != 2 or costs.shape != (len(a), len(b)) or not costs.size:
        raise ValueError(f"costs {costs.shape} need weights of {costs.shape}, and there are {len(a)} and {len(b)}")
    if not np.isfinite(costs).all():
        raise ValueError("a cost is not finite")
    for each in (a, b):
        if not np.isfinite(each).all() or (each < 0).any() or not each.sum() > 0:
            raise ValueError("weights are numbers of at least 0, not all 0")
    return costs, a / a.sum(), b / b.sum()
