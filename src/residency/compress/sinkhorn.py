"""Sinkhorn's algorithm in the log domain, for a batch of small transport problems, with the gradients one may want.

The idea. To compare two sets of things, ask what it costs to carry one onto the other: a plan P says how much of
row i goes to column j at the price D_ij. The cheapest plan is a linear program; a little entropy makes it the limit of
two alternating normalisations, smooth in the prices. In logarithms these never underflow, while exp(−D/ε) of the
textbook form is 0 in half precision as soon as D > 17 ε.

    P = argmin ⟨P, D⟩ + ε KL(P ‖ a bᵀ/m)    over P ≥ 0 with row sums a and column sums b, m = Σa = Σb
    P_ij = exp(u_i + v_j − D_ij/ε)
    u_i ← log a_i − logsumexp_j(v_j − D_ij/ε)       rows first, from v = 0
    v_j ← log b_j − logsumexp_i(u_i − D_ij/ε)       columns last: column sums are exact, row sums in the limit

Value. `transport` is ⟨P, D⟩. `dual` is the value of the objective above, ε(⟨a, u − log a⟩ + ⟨b, v − log b⟩ + m log m):
it includes the entropy, tends to ⟨P, D⟩ for ε → 0 and to the mean price ⟨a bᵀ/m, D⟩ for ε → ∞.

Gradient with respect to D. "unrolled" differentiates what was computed, through all iterations, and keeps them.
"envelope" keeps none: at the optimum the derivative of the dual is the plan itself (Danskin), so both values get the
gradient P, exact for `dual` at convergence; for `transport` it is that of a plan held fixed.

Cost. O(nm) per iteration and problem; memory of one plan, of two per iteration where unrolled.

Papers: Cuturi, "Sinkhorn Distances", NeurIPS 2013, arXiv 1306.0895; the log domain and KL(P ‖ ab) as in Feydy et al.,
"Interpolating between Optimal Transport and MMD using Sinkhorn Divergences", AISTATS 2019, arXiv 1810.08278. Checked
against POT. Our choice: marginals of any equal mass, batches, the order of the two steps (that of SinKD's code).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

CHECK_EVERY = 10
"""Iterations between two looks at the row sums, where a tolerance asks for them."""


@dataclass(frozen=True)
class Transport:
    """The solution of G transport problems.

    Args:
        plan: [G, n, m].
        transport: [G], ⟨P, D⟩.
        dual: [G], the regularised value; see the module.
        iterations: How many were done.
    """

    plan: Tensor
    transport: Tensor
    dual: Tensor
    iterations: int


def sinkhorn(
    cost: Tensor,
    epsilon: float,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    iterations: int = 20,
    tolerance: float = 0.0,
    gradient: Literal["unrolled", "envelope"] = "envelope",
) -> Transport:
    """Solve G entropic transport problems at once.

    Args:
        cost: [G, n, m] finite prices, any float dtype; computed in float32 or float64.
        epsilon: Strength of the entropy, > 0, in units of the prices.
        a: [n] or [G, n] row sums, ≥ 0; None is 1/n each.
        b: [m] or [G, m] column sums of the same total; None is 1/m each.
        iterations: At most so many, ≥ 1; each normalises rows and columns once.
        tolerance: Stop when Σ|row sums − a| ≤ tolerance · Σa in every problem; 0 does all iterations.
        gradient: See the module; the marginals get none.

    Returns:
        The plan and both values.

    Raises:
        ValueError: For shapes that do not fit, ε ≤ 0, or marginals of different mass.
    """
    if cost.ndim != 3 or 0 in cost.shape[1:]:
        raise ValueError(f"cost must be [G, n, m] with n, m ≥ 1, got {[*cost.shape]}")
    if not 0 < epsilon < float("inf"):
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    log_a, log_b = _log_marginal(a, cost, 1), _log_marginal(b, cost, 2)
    mass, other = log_a.exp().sum(1), log_b.exp().sum(1)
    if not torch.allclose(mass, other, rtol=1e-4):
        raise ValueError("row sums a and column sums b must have the same total; scale one of them")
    with torch.set_grad_enabled(gradient == "unrolled" and torch.is_grad_enabled()):
        kernel = cost / -epsilon
        u, v = torch.zeros_like(kernel[:, :, 0]), torch.zeros_like(kernel[:, 0])
        done = 0
        while done < iterations:
            rows = (kernel + v.unsqueeze(1)).logsumexp(2)
            if tolerance and done and done % CHECK_EVERY == 0 and _converged(u + rows, log_a, mass, tolerance):
                break
            u = log_a - rows
            v = log_b - (kernel + u.unsqueeze(2)).logsumexp(1)
            done += 1
        plan = (kernel + u.unsqueeze(2) + v.unsqueeze(1)).exp()
        dual = epsilon * (_dot(log_a, u) + _dot(log_b, v) + mass * mass.log())
    if gradient == "envelope":
        # adds nothing to the value, and the plan to the gradient
        dual = dual + (plan * (cost - cost.detach())).sum((1, 2))
    return Transport(plan, (plan * cost).sum((1, 2)), dual, done)


def _log_marginal(weights: Tensor | None, cost: Tensor, dim: int) -> Tensor:
    """[G, size] logarithms of a marginal."""
    size, shape = cost.shape[dim], (len(cost), cost.shape[dim])
    if weights is None:
        weights = cost.new_full((size,), 1 / size)
    if weights.shape not in ((size,), shape):
        raise ValueError(f"the marginal of {size} must be [{size}] or {[*shape]}, got {[*weights.shape]}")
    return weights.detach().to(cost.dtype).log().expand(shape)


def _converged(log_rows: Tensor, log_a: Tensor, mass: Tensor, tolerance: float) -> bool:
    """Whether the row sums of the plan so far are those wanted, in every problem."""
    missing = (log_rows.exp() - log_a.exp()).abs().sum(1)
    return bool((missing <= tolerance * mass).all())


def _dot(log_weight: Tensor, potential: Tensor) -> Tensor:
    """Σ weight (potential − log weight), weights of 0 left out: [G, n] → [G]."""
    weight = log_weight.exp()
    return (weight * (potential - log_weight).where(weight > 0, 0)).sum(1)
