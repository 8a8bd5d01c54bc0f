"""Vendi score: the effective number of different rows, from their embeddings.

With a kernel k(x, x) = 1, K [N, N] of the rows, and λ the eigenvalues of K / N (they sum to 1):

    VS_q = exp( log Σ λ^q / (1 − q) )          VS_1 = exp( −Σ λ log λ )          VS_∞ = 1 / max λ

N rows that have nothing in common score N, N copies of one row score 1. Large q looks at what is common, small q at
what is rare; VS_q never rises with q. VS_2 needs no eigenvalues: 1 / ‖K/N‖². With the rbf kernel q < 1 is not to be
trusted: its eigenvalues fall exponentially, and those that rounding decides on (below 1e-13) then count.

Kernels: cosine, K = UUᵀ of unit rows, and rbf, exp(−‖x − y‖² / (2 h²)). The cosine kernel has a dual form: UᵀU / N
[D, D] has the same eigenvalues other than 0, so the cost is that of min(N, D). The rbf kernel has no finite one; with
`features` F it is replaced by F/2 random frequencies w ~ N(0, I/h²), φ(x) = (cos wx, sin wx)·√(2/F), whose inner
products estimate K with error O(1/√F), whose diagonal is exactly 1, and which have a dual form of F × F.

Per row (our choice, q = 1): log VS_1 is the von Neumann entropy of ρ = UᵀU / N, and −u log ρ u is what row u adds to
it. `surprise` returns that; its mean over rows is log VS_1, so a row above it makes the set more diverse.

Papers: Friedman & Dieng, "The Vendi Score", TMLR 2023, arXiv 2210.02410; any order: Pasarkar & Dieng, "Cousins of the
Vendi Score", AISTATS 2024, arXiv 2310.12952; random features: Ospanov et al., NeurIPS 2024, arXiv 2407.02961. Official
code: vertaix/Vendi-Score, whose dual form (0.0.3) ignores q and always returns VS_1.

Cost: N D min(N, D) multiplications in blocks of rows, float64; memory min(N, D)² and a block. rbf without `features`
is N² D and N² memory, and refused above `EXACT` rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from residency.step import Params

Array = NDArray[np.float64]
BLOCK = 8_192
"""Rows per matrix product."""
EXACT = 20_000
"""Most rows for which an N × N kernel is made."""


class Vendi(Params):
    """The effective number of different rows."""

    order: float | Literal["inf"] = Field(1.0)
    """q ≥ 0: 1 is the Vendi score, 2 is the cheapest, `inf` sees only the commonest direction."""
    kernel: Literal["cos", "rbf"] = "cos"
    """How alike two rows are: their cosine, or a Gaussian of their distance."""
    bandwidth: float | None = Field(None, gt=0)
    """h of the rbf kernel: the distance at which two rows are 61 % alike; by default 1."""
    features: int | None = Field(None, ge=2)
    """Random features that stand for the rbf kernel, an even number; by default none, the kernel is exact."""
    seed: int | None = Field(None, ge=0)
    """Where the random features start; by default 0."""

    @model_validator(mode="after")
    def _keys_that_act(self) -> Vendi:
        if self.order != "inf" and self.order < 0:
            raise ValueError(f"order is {self.order}; it must be 0 or more, or inf")
        if self.kernel == "cos" and (self.bandwidth is not None or self.features is not None):
            raise ValueError("bandwidth and features belong to kernel: rbf; the cosine needs neither")
        if self.features is None and self.seed is not None:
            raise ValueError("seed belongs to features; without them nothing is random")
        if self.features is not None and self.features % 2:
            raise ValueError(f"features is {self.features}; it must be even (a cosine and a sine per frequency)")
        return self

    def of(self, rows: NDArray[Any]) -> float:
        """The score of a set of rows.

        Args:
            rows: [N, D] embeddings of any scale and precision; a memory map is read in blocks.

        Returns:
            A number between 1 and N.

        Raises:
            ValueError: When there is no row, one is not finite, or (cosine) one is all zeros.
        """
        if self.order == 2:
            matrix, scale = self._matrix(rows)
            return float(1 / np.square(matrix / scale).sum())
        return hill(self.spectrum(rows), float(self.order))

    def spectrum(self, rows: NDArray[Any]) -> Array:
        """Eigenvalues of K / N other than 0, falling, summing to 1; see `of`."""
        matrix, scale = self._matrix(rows)
        values = np.linalg.eigvalsh(matrix / scale)[::-1]
        return values[values > len(values) * np.finfo(float).eps * values[0]]

    def surprise(self, rows: NDArray[Any]) -> Array:
        """What each row adds to log VS_1.

        Args:
            rows: [N, D] embeddings.

        Returns:
            [N] values ≥ 0 whose mean is log VS_1; common rows are low.

        Raises:
            ValueError: As in `of`, and when another order than 1 is set.
        """
        if self.order != 1:
            raise ValueError(f"what a row adds is defined for order 1, and order is {self.order}")
        matrix, scale = self._matrix(rows)
        values, vectors = np.linalg.eigh(matrix / scale)
        keep = values > len(values) * np.finfo(float).eps * values[-1]
        values, vectors = values[keep], vectors[:, keep]
        if self._primal(rows):
            return -scale * np.square(vectors) @ (values * np.log(values))
        return np.concatenate([-np.square(part @ vectors) @ np.log(values) for part in self._mapped(rows)])

    def _primal(self, rows: NDArray[Any]) -> bool:
        """Whether the N × N kernel is the smaller problem, or the only one."""
        width = rows.shape[1] if self.kernel == "cos" else self.features
        return width is None or len(rows) <= width

    def _matrix(self, rows: NDArray[Any]) -> tuple[Array, int]:
        """K [N, N], or its dual, and N."""
        if rows.ndim != 2 or not rows.size:
            raise ValueError(f"a Vendi score needs rows [N, D], and the array has shape {rows.shape}")
        if self.kernel == "rbf" and self.features is None:
            if len(rows) > EXACT:
                raise ValueError(
                    f"the exact rbf kernel of {len(rows):,} rows has {len(rows):,}² entries: set `features` (2048 "
                    f"serves), or draw at most {EXACT:,} rows"
                )
            x = np.concatenate([part for part, _ in _finite(rows)])
            x -= x.mean(0)  # distances stay as they are, and lose fewer digits
            square = np.square(x).sum(1)
            distance = np.maximum(square[:, None] + square - 2 * x @ x.T, 0)
            np.fill_diagonal(distance, 0)
            return np.exp(distance / (-2 * (self.bandwidth or 1.0) ** 2)), len(x)
        if self._primal(rows):
            mapped = np.concatenate(list(self._mapped(rows)))
            return mapped @ mapped.T, len(rows)
        width = rows.shape[1] if self.kernel == "cos" else self.features
        gram = np.zeros((width or 0, width or 0))
        for part in self._mapped(rows):
            gram += part.T @ part
        return gram, len(rows)

    def _mapped(self, rows: NDArray[Any]) -> Iterator[Array]:
        """Blocks of rows φ(x), whose inner products are the kernel."""
        if self.kernel == "cos":
            for part, start in _finite(rows):
                part /= np.where((largest := np.abs(part).max(1, keepdims=True)) > 0, largest, 1)
                length = np.linalg.norm(part, axis=1, keepdims=True)
                if not length.all():
                    row = start + int(np.flatnonzero(length == 0)[0])
                    raise ValueError(f"row {row} is all zeros and has no cosine to any other: drop it first")
                yield part / length
            return
        half = (self.features or 0) // 2
        rng = np.random.default_rng(self.seed or 0)
        frequencies = rng.standard_normal((rows.shape[1], half)) / (self.bandwidth or 1.0)
        for part, _ in _finite(rows):
            angles = part @ frequencies
            yield np.concatenate([np.cos(angles), np.sin(angles)], 1) / np.sqrt(half)


def hill(shares: Array, order: float) -> float:
    """Hill number: the effective number of categories behind shares that sum to 1.

    Args:
        shares: Shares ≥ 0.
        order: q ≥ 0, `inf` included; 1 is exp(entropy), 2 the inverse Simpson index, 0 the number of categories.

    Returns:
        Between 1 and the number of positive shares.
    """
    p = np.asarray(shares, float)
    p = p[p > 0]
    if not len(p):
        raise ValueError("an effective number needs a positive share")
    if order < 0 or np.isnan(order):
        raise ValueError(f"order is {order}; it must be 0 or more")
    if order == 1:
        return float(np.exp(-(p * np.log(p)).sum()))
    if np.isinf(order):
        return float(1 / p.max())
    # relative to the largest share, so that no power underflows to a sum of 0
    largest = p.max()
    power = order * np.log(largest) + np.log(((p / largest) ** order).sum())
    return float(np.exp(power / (1 - order)))


def _finite(rows: NDArray[Any]) -> Iterator[tuple[Array, int]]:
    """Blocks of rows in float64, and where each starts."""
    for start in range(0, len(rows), BLOCK):
        part = np.array(rows[start : start + BLOCK], np.float64)
        if not np.isfinite(part).all():
            row = start + int(np.flatnonzero(~np.isfinite(part).all(1))[0])
            raise ValueError(f"row {row} has an embedding that is not finite")
        yield part, start
