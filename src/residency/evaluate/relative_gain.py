"""What is left of tasks learnt in sequence: Relative Gain, forgetting, and their curves.

R [T, T] holds in row i, column j ≤ i the score on task j of the model that has learnt tasks 0 … i (high is good), and
u [T] the score of a model that learnt that task alone, from the same base:

    Relative Gain_i = 100 / i · Σ_{j<i} R_ij / u_j        per cent of what learning each old task alone gives
    forgetting_i    = 1 / i · Σ_{j<i} (max_{j≤k<i} R_kj − R_ij)

A Relative Gain of 100 means nothing was forgotten; learning later tasks can lift it above.

Papers: Relative Gain: Wang et al., "InsCL", NAACL 2024, arXiv 2403.11435 (from Scialom et al., 2205.12393); forgetting:
Chaudhry et al., "Riemannian Walk", ECCV 2018, arXiv 1801.10112. Official code: none for the figures.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def relative_gain(scores: ArrayLike, alone: ArrayLike) -> NDArray[np.float64]:
    """Relative Gain after every task but the first.

    Args:
        scores: [T, T] R; entries above the diagonal are not looked at.
        alone: [T] u, above 0.

    Returns:
        [T − 1] per cent.

    Raises:
        ValueError: When shapes differ, or a score alone is not above 0.
    """
    r, u = _square(scores), np.asarray(alone, float)
    if u.shape != (len(r),) or not (u > 0).all():
        raise ValueError(f"a Relative Gain needs {len(r)} scores above 0 of tasks learnt alone")
    return np.array([100 * (r[i, :i] / u[:i]).mean() for i in range(1, len(r))])


def forgetting(scores: ArrayLike) -> NDArray[np.float64]:
    """Mean loss of old tasks since they were known best, after every task but the first; [T − 1]."""
    r = _square(scores)
    return np.array([np.mean([r[j:i, j].max() - r[i, j] for j in range(i)]) for i in range(1, len(r))])


def _square(scores: ArrayLike) -> NDArray[np.float64]:
    r = np.asarray(scores, float)
    if r.ndim != 2 or r.shape[0] != r.shape[1]:
        raise ValueError(f"scores are a square, one row per task learnt, and these are {r.shape}")
    if not np.isfinite(r[np.tril_indices(len(r))]).all():
        raise ValueError("a score on or below the diagonal is missing")
    return r
