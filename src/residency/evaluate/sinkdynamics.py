"""Why a sink grows without end and its value drains: the Bigram-Backcopy task reduced to a few numbers.

For a character v that is no trigger, let α_v be the sink's attention logit less that of the other keys, W the weight
of these keys, β the sink's value and ξ the mean of the other values, both read out to logits [V], and let the
feed-forward part already know log p_v. Then

    logits_v = log p_v + δ_v,    δ_v = (e^{α_v} β + W ξ) / (e^{α_v} + W),    L = Σ_v π_v KL(p_v ‖ softmax logits_v).

Two closed forms, and what they say together:

    β = 0:    L ≈ ½ Σ_v π_v W² Var_{p_v}(ξ) / (e^{α_v} + W)², so gradient flow gives α̇_v ≈ π_v W² Var_{p_v}(ξ) e^{-2α_v}
              α_v(t) = ½ log t + ½ log(2 π_v W² Var_{p_v}(ξ)) + o(1)
              the logit grows like the logarithm of time, and characters differ by a constant only: concentration.
    α fixed:  β = c·1 − W e^{-α} ξ makes δ constant, hence L = 0: the value drains like e^{-α} down to a constant that
              does nothing (softmax does not see c).

A small value makes a large logit harmless, a large logit makes the best value small: each drives the other, and
neither has a reason to stop. Under Adam the logit grows far faster than the law, which is that of gradient flow.

The paper's: the reduction and the two laws, as far as its abstract and code tell; the derivation above is ours, and so
is the integrator (Bogacki and Shampine's embedded pair of orders 3 and 2, in log t, where α moves at an even pace).

Cost: milliseconds; the joint flow of α and β is stiff at large t and needs steps in proportion to t.

Source: Guo et al., "Active-Dormant Attention Heads", NeurIPS 2024 workshop M3L, arXiv 2410.13835. Integrator: Bogacki
and Shampine, Applied Mathematics Letters 2 (1989).

Relations: `backcopy` is the whole task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ReducedModel:
    """The reduced model; N characters that are no triggers, V characters in all.

    Args:
        p: [N, V] next-character distributions, positive.
        xi: [V] mean of the other tokens' values, read out to logits.
        weight: W.
        pi: [N] weight of each character in the loss; all 1 if left out.
    """

    p: Array
    xi: Array
    weight: float
    pi: Array | None = None

    def __post_init__(self) -> None:
        if self.p.ndim != 2 or self.xi.shape != self.p.shape[1:] or self.weight <= 0:
            raise ValueError(f"need p [N, V], xi [V] and a positive weight, got {self.p.shape}, {self.xi.shape}")
        if (self.p <= 0).any() or not np.allclose(self.p.sum(1), 1):
            raise ValueError("every row of p is a distribution without zeros")
        if self.pi is not None and (self.pi.shape != self.p.shape[:1] or (self.pi <= 0).any()):
            raise ValueError("pi has one positive weight per row of p")

    @property
    def shares(self) -> Array:
        """π [N]."""
        return np.ones(len(self.p)) if self.pi is None else self.pi

    @property
    def variance(self) -> Array:
        """Var_{p_v}(ξ) [N]."""
        return self.p @ self.xi**2 - (self.p @ self.xi) ** 2

    def _share(self, alpha: Array) -> Array:
        """The sink's share of the attention, e^α / (e^α + W), without overflow."""
        return 0.5 * (1 + np.tanh((alpha - np.log(self.weight)) / 2))

    def delta(self, alpha: Array, beta: Array) -> Array:
        """δ [N, V]; α is [N], β is [V]."""
        share = self._share(alpha)
        return share[:, None] * beta + (1 - share)[:, None] * self.xi

    def loss(self, alpha: Array, beta: Array) -> float:
        """L in nats."""
        delta = self.delta(alpha, beta)
        most = delta.max(1, keepdims=True)
        partition = most[:, 0] + np.log((self.p * np.exp(delta - most)).sum(1))
        return float(self.shares @ (partition - (self.p * delta).sum(1)))

    def gradient(self, alpha: Array, beta: Array) -> tuple[Array, Array]:
        """∂L/∂α [N] and ∂L/∂β [V]."""
        delta = self.delta(alpha, beta)
        q = self.p * np.exp(delta - delta.max(1, keepdims=True))
        error = self.shares[:, None] * (q / q.sum(1, keepdims=True) - self.p)
        share = self._share(alpha)
        return (share * (1 - share)) * (error @ (beta - self.xi)), share @ error

    def logit_law(self, t: float) -> Array:
        """α(t) [N] that gradient flow with β = 0 approaches."""
        return 0.5 * np.log(t) + 0.5 * np.log(2 * self.shares * self.weight**2 * self.variance)

    def drained_value(self, alpha: float) -> Array:
        """The β [V] without a mean that makes the loss 0 when every character has this α."""
        return -self.weight * np.exp(-alpha) * (self.xi - self.xi.mean())

    def flow(
        self,
        times: Sequence[float],
        *,
        alpha: Array | None = None,
        beta: Array | None = None,
        move_value: bool = False,
        tolerance: float = 1e-7,
    ) -> tuple[Array, Array]:
        """Gradient flow from t = 0.

        Args:
            times: Positive and ascending.
            alpha: [N] where it starts; 0 if left out.
            beta: [V] where it starts; 0 if left out.
            move_value: Whether β follows its gradient too; otherwise it stays.
            tolerance: Error of one step.

        Returns:
            α [K, N] and β [K, V] at the K times.
        """
        times = [float(t) for t in times]
        if not times or times[0] <= 0 or sorted(set(times)) != times:
            raise ValueError(f"times are positive and ascending, got {times}")
        N, V = self.p.shape
        a = np.zeros(N) if alpha is None else np.asarray(alpha, np.float64)
        b = np.zeros(V) if beta is None else np.asarray(beta, np.float64)

        def rate(s: float, y: Array) -> Array:
            """The motion of (α, β) per unit of log(1 + t)."""
            by_alpha, by_beta = self.gradient(y[:N], y[N:])
            return -np.exp(s) * np.concatenate([by_alpha, by_beta if move_value else np.zeros(V)])

        y, s, h = np.concatenate([a, b]), 0.0, 1e-3
        found = []
        for t in times:
            end = np.log1p(t)
            while s < end:
                h = min(h, end - s)
                y, h, moved = _step(rate, s, y, h, tolerance)
                s += moved
            found.append(y.copy())
        path = np.stack(found)
        return path[:, :N], path[:, N:]


def _step(
    rate: Callable[[float, Array], Array], s: float, y: Array, h: float, tolerance: float
) -> tuple[Array, float, float]:
    """One step of Bogacki and Shampine's pair: y, the next step's size, and how far this one went."""
    k1 = rate(s, y)
    k2 = rate(s + h / 2, y + h / 2 * k1)
    k3 = rate(s + 3 * h / 4, y + 3 * h / 4 * k2)
    new = y + h * (2 * k1 + 3 * k2 + 4 * k3) / 9
    k4 = rate(s + h, new)
    error = float(np.abs(h * (-5 * k1 / 72 + k2 / 12 + k3 / 9 - k4 / 8)).max()) / tolerance
    following = h * float(np.clip(0.9 * max(error, 1e-12) ** (-1 / 3), 0.2, 5.0))
    return (new, following, h) if error <= 1 else (y, following, 0.0)
