"""Rotations that make attention heads agree before they are merged, in closed form, from Gram blocks alone.

The idea. Two heads may compute the same thing in different coordinates. Attention does not notice a change of
coordinates that is undone elsewhere: values may be turned by any orthogonal map Q (undone in W_O), keys by any map
that commutes with RoPE (undone in W_Q): one planar rotation for each frequency pair (m, m + d/2). The best such maps,
with C = X_iᵀ X_j of two heads' vectors X_i, X_j [N, d] and row vectors x ↦ xR:

    values   Q  = U Vᵀ,  C = U Σ Vᵀ                                      (orthogonal Procrustes, reflections allowed)
    keys     θ_m = atan2(C[m, m+h] − C[m+h, m],  C[m, m] + C[m+h, m+h]),   h = d/2
             R[m, m] = R[m+h, m+h] = cos θ_m,   R[m, m+h] = −R[m+h, m] = sin θ_m

    score    cos:  S_ij =   mean_n cos(x_i,n R, x_j,n)         dist:  S_ij = − mean_n ‖x_i,n R − x_j,n‖²

Within a group of g heads all are aligned to each other (generalised Procrustes): R_j ← align(X_j → Σ_{k≠j} X_k R_k) in
turn, where X_jᵀ X_k R_k = C_jk R_k. Each turn maximises the sum of pairwise agreements Σ_{i<j} tr(R_iᵀ C_ij R_j) over
R_j, so that sum never falls.

The paper's: the two classes of maps, both scores, the iteration towards the group's mean. Our choice: the closed form
by atan2 (the official code does d/2 little SVDs per pair; equal to 3e-16), Gram blocks instead of tokens; a head is
left out of the target it is aligned to (the mean that includes it holds it back); the start is the head that agrees
best with the others, not the first; the best iterate is kept, while the official loop keeps its last.

Cost: per pair an SVD [d, d] for values, O(d) for keys; a group needs some 10 rounds of g of them.

Paper: Jin et al., Findings of EMNLP 2025, arXiv 2412.20677. Official code: github.com/fpcsong/mha2gqa, commit c0706da.
Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 1966; Gower, "Generalized
Procrustes analysis", Psychometrika 1975.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from residency.compress.headgrams import Grams

Kind = Literal["key", "value"]
Criterion = Literal["cos", "dist"]

ROUNDS = 100
"""At most so many rounds of generalised Procrustes (official code: 100)."""
GAIN = 1e-5
"""Stop when a round gains less than this share of the largest possible agreement (official: 1e-5 of the cosines)."""


class Alignment(NamedTuple):
    """Rotations of a group.

    Args:
        rotations: [g, d, d]; head j's vectors become x R_j.
        agreement: Σ_{i<j} tr(R_iᵀ C_ij R_j) after every round, the start first; never falls.
    """

    rotations: Tensor
    agreement: list[float]


def planar_angles(C: Tensor) -> Tensor:
    """Angles [..., d/2] of the planar rotations that turn X_i best to X_j, from C = X_iᵀ X_j [..., d, d]."""
    h = C.shape[-1] // 2
    if C.shape[-1] % 2:
        raise ValueError(f"RoPE pairs channels m and m + d/2, so d must be even, got {C.shape[-1]}")
    along = C.diagonal(dim1=-2, dim2=-1)
    across = C[..., :h, h:].diagonal(dim1=-2, dim2=-1) - C[..., h:, :h].diagonal(dim1=-2, dim2=-1)
    return torch.atan2(across, along[..., :h] + along[..., h:])


def planar(angles: Tensor) -> Tensor:
    """The rotations [..., d, d] with these angles [..., d/2], for row vectors x ↦ xR in RoPE's half-split layout."""
    cos, sin = torch.diag_embed(angles.cos()), torch.diag_embed(angles.sin())
    return torch.cat([torch.cat([cos, sin], -1), torch.cat([-sin, cos], -1)], -2)


def procrustes(C: Tensor) -> Tensor:
    """The orthogonal maps [..., d, d] that turn X_i best to X_j, from C = X_iᵀ X_j [..., d, d]."""
    U, _, Vh = torch.linalg.svd(C)
    return U @ Vh


def align(C: Tensor, kind: Kind) -> Tensor:
    """The best allowed map [..., d, d] of X_i to X_j: planar for keys, orthogonal for values."""
    return planar(planar_angles(C)) if kind == "key" else procrustes(C)


def blocks(grams: Grams, criterion: Criterion) -> Tensor:
    """The Gram blocks [G, G, d, d] a criterion looks at: of unit vectors for `cos`, of the vectors for `dist`."""
    return grams.unit if criterion == "cos" else grams.raw


def scores(grams: Grams, kind: Kind | None, criterion: Criterion) -> Tensor:
    """How well every pair of heads agrees after the best alignment of the two.

    Args:
        grams: Of one projection of one layer.
        kind: Which maps are allowed; None aligns nothing.
        criterion: `cos` (mean cosine per token) or `dist` (minus the mean squared distance).

    Returns:
        [G, G] float64, symmetric; of `cos` between −1 and 1.
    """
    C = blocks(grams, criterion)
    trace = C.diagonal(dim1=-2, dim2=-1).sum(-1)
    if kind is not None:
        trace = (align(C, kind) * C).sum((-2, -1))  # tr(Rᵀ C)
        trace = (trace + trace.T) / 2  # equal but for rounding
    if criterion == "dist":
        energy = C.diagonal(dim1=-2, dim2=-1).sum(-1).diagonal()
        trace = 2 * trace - energy[:, None] - energy[None, :]
    return trace / grams.tokens


def align_group(C: Tensor, kind: Kind, rounds: int = ROUNDS) -> Alignment:
    """Align all heads of a group to each other.

    Args:
        C: [g, g, d, d] Gram blocks of the group.
        kind: Which maps are allowed.
        rounds: At most so many.
    """
    g, d = C.shape[0], C.shape[-1]
    R = torch.eye(d, dtype=C.dtype).repeat(g, 1, 1)
    if g == 1:
        return Alignment(R, [0.0])
    pairwise = align(C, kind)
    gained = (pairwise * C).sum((-2, -1))
    centre = int((gained.sum(1) - gained.diagonal()).argmax())
    R = torch.where((torch.arange(g) == centre)[:, None, None], R, pairwise[:, centre])
    history, best = [_agreement(C, R)], R
    bound = _bound(C)
    for _ in range(rounds if g > 2 else 0):  # of two heads the first step is already the best
        R = R.clone()
        for j in range(g):
            others = [k for k in range(g) if k != j]
            R[j] = align(torch.einsum("kab,kbc->ac", C[j, others], R[others]), kind)
        history.append(_agreement(C, R))
        if history[-1] > history[-2]:
            best = R
        if history[-1] - history[-2] <= GAIN * bound:
            break
    return Alignment(best, history)


def _agreement(C: Tensor, R: Tensor) -> float:
    """Σ_{i<j} tr(R_iᵀ C_ij R_j)."""
    pairs = torch.einsum("iab,ijac,jcb->ij", R, C, R)
    return float((pairs.sum() - pairs.diagonal().sum()) / 2)


def _bound(C: Tensor) -> float:
    """What Σ_{i<j} tr(R_iᵀ C_ij R_j) cannot exceed: √(tr C_ii · tr C_jj), summed over the pairs."""
    lengths = C.diagonal(dim1=-2, dim2=-1).sum(-1).diagonal().clamp_min(0).sqrt()
    return float((lengths.sum() ** 2 - (lengths**2).sum()) / 2)
