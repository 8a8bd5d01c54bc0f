"""Which rows look alike, and what a row's neighbours say: a kNN graph, k-reciprocal re-ranking, smoothing.

Neighbours by cosine contain hubs and one-sided relations. k-reciprocal encoding keeps what is mutual: with N(i, k) the
k nearest of i and i itself, and d_ij = ‖x_i − x_j‖² / max_j ‖x_i − x_j‖² of unit vectors,

    R(i, k)  = { j ∈ N(i, k) : i ∈ N(j, k) }                                mutual neighbours
    R*(i)    = R(i, k₁) ∪ { R(j, k₁/2) : j ∈ R(i, k₁), |R(j, k₁/2) ∩ R(i, k₁)| > ⅔ |R(j, k₁/2)| }
    V_ij     ∝ e^{−d_ij} on R*(i), rows sum to 1; then V_i ← mean of V over the k₂ nearest of i, itself included
    J(i, j)  = 1 − Σ_m min(V_im, V_jm) / Σ_m max(V_im, V_jm),          distance = (1 − λ) J + λ d

V has about k₁ · k₂ entries per row, so it is kept sparse, and only asked-for pairs are compared.

Smoothing replaces what is known of a row by what is known of its neighbours: with A the edges, symmetrised by their
maximum and without loops, Ŝ = w S + (1 − w) D⁻¹ A S. Rows of that operator sum to 1. Rows without a neighbour keep
their own. What nobody knows (a missing caption) is left out of the means.

Our choices: re-ranking looks at the whole set, and edges weigh 1 − distance. CAPro's release re-ranks every row within
its own list of 20 neighbours with k₁ = 20, where everyone is everyone's mutual neighbour and only the k₂ mean is left,
and weighs edges by their *distance*, so that the farthest of a row's neighbours count most; `weight="distance"` does.

Cost: N² D multiplications in blocks; N × k₁ k₂ numbers for V; N k (k₁ k₂) additions for the pairs.

Papers: Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017, arXiv 1701.08398;
Qin et al., CAPro, NeurIPS 2023, arXiv 2310.09761 (the graph), official code github.com/yuleiqin/capro, commit bd1771c
(no licence; read for facts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BLOCK = 512
"""Rows whose distances to all are held at a time."""


def knn(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest others of every row by cosine (N − 1 where there are fewer).

    Args:
        x: [N, D].
        k: How many.

    Returns:
        Indices [N, k], nearest first, and cosines [N, k].

    Raises:
        ValueError: For k < 1.
    """
    if k < 1:
        raise ValueError(f"a neighbourhood has at least one row, not {k}")
    unit = torch.nn.functional.normalize(x, dim=-1)
    k = min(k, len(x) - 1)
    index, cosine = [], []
    for start in range(0, len(x), BLOCK):
        block = unit[start : start + BLOCK] @ unit.T
        mine = torch.arange(len(block), device=x.device)
        block[mine, start + mine] = -torch.inf
        best = block.topk(k, dim=1)
        index.append(best.indices)
        cosine.append(best.values)
    return torch.cat(index), torch.cat(cosine)


class Reciprocal:
    """k-reciprocal encodings of a set of points.

    Args:
        x: [N, D]; scaled to length 1 here.
        k1: k₁.
        k2: k₂.
        share: λ, of the plain distance.
    """

    def __init__(self, x: Tensor, k1: int = 20, k2: int = 6, share: float = 0.3) -> None:
        if not 1 <= k2 <= k1 or not 0 <= share <= 1:
            raise ValueError(f"k-reciprocal encoding needs 1 ≤ k2 ≤ k1 and λ in [0, 1], got {k2}, {k1}, {share}")
        self.unit = torch.nn.functional.normalize(x, dim=-1)
        self.share = share
        n = len(x)
        others, _ = knn(x, k1) if n > 1 else (torch.empty(n, 0, dtype=torch.long, device=x.device), None)
        near = torch.cat([torch.arange(n, device=x.device)[:, None], others], 1)  # [N, k₁ + 1], itself first
        wide, half = near, near[:, : round(k1 / 2) + 1]
        both, both_half = _mutual(wide), _mutual(half)
        self.farthest = torch.empty(n, dtype=x.dtype, device=x.device)
        rows, columns, values = [], [], []
        for start in range(0, n, BLOCK):
            part = slice(start, min(start + BLOCK, n))
            square = (2 - 2 * self.unit[part] @ self.unit.T).clamp_min(0)
            self.farthest[part] = square.max(1).values.clamp_min(1e-12)
            member = torch.zeros_like(square, dtype=torch.bool).scatter_(1, wide[part], both[part])
            at = torch.arange(len(square), device=x.device)[:, None, None]
            theirs, there = half[wide[part]], both_half[wide[part]]  # [b, k₁ + 1, k₁/2 + 1]
            inside = (member[at, theirs] & there).sum(-1)
            close = both[part] & (3 * inside > 2 * there.sum(-1))
            added = there & close[..., None]
            grown = member.clone()
            grown[at.expand_as(theirs)[added], theirs[added]] = True
            weight = (-square / self.farthest[part, None]).exp() * grown
            weight = weight / weight.sum(1, keepdim=True)
            row, column = grown.nonzero(as_tuple=True)
            rows.append(row + start)
            columns.append(column)
            values.append(weight[row, column])
        self._set(torch.cat(rows), torch.cat(columns), torch.cat(values))
        nearest = near[:, :k2]
        place, entry = self._entries(nearest.flatten())
        keys, which = torch.unique(place // nearest.shape[1] * n + self.columns[entry], return_inverse=True)
        mean = torch.zeros(len(keys), dtype=x.dtype, device=x.device)
        self._set(keys // n, keys % n, mean.index_add_(0, which, self.values[entry] / nearest.shape[1]))

    def _set(self, rows: Tensor, columns: Tensor, values: Tensor) -> None:
        """Hold V by its entries [E], ordered by row."""
        self.columns, self.values = columns, values
        self.begins = torch.zeros(len(self.unit) + 1, dtype=torch.long, device=rows.device)
        self.begins[1:] = rows.bincount(minlength=len(self.unit)).cumsum(0)

    def distances(self, points: Tensor, candidates: Tensor) -> Tensor:
        """Re-ranked distances [P, M] of points [P] to their candidates [P, M]."""
        found = []
        for start in range(0, len(points), BLOCK):
            i, j = points[start : start + BLOCK], candidates[start : start + BLOCK]
            plain = (2 - 2 * (self.unit[i][:, None] * self.unit[j]).sum(-1)).clamp_min(0) / self.farthest[i, None]
            found.append((1 - self.share) * self._jaccard(i, j) + self.share * plain)
        return torch.cat(found) if found else candidates.to(self.unit.dtype)

    def _jaccard(self, i: Tensor, j: Tensor) -> Tensor:
        """Jaccard distances [P, M] of the encodings of points [P] and [P, M]."""
        dense = torch.zeros(len(i), len(self.unit), dtype=self.values.dtype, device=self.values.device)
        at, entry = self._entries(i)
        dense[at, self.columns[entry]] = self.values[entry]
        pair, entry = self._entries(j.flatten())
        smaller = torch.minimum(self.values[entry], dense[pair // max(1, j.shape[1]), self.columns[entry]])
        shared = torch.zeros(j.numel(), dtype=smaller.dtype, device=smaller.device).index_add_(0, pair, smaller)
        return (1 - shared / (2 - shared)).view(j.shape)  # both encodings sum to 1, so Σ max = 2 − Σ min

    def _entries(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """(which of `points`, place in `values`) of every entry of their encodings."""
        size = self.begins[points + 1] - self.begins[points]
        which = torch.arange(len(points), device=points.device).repeat_interleave(size)
        within = torch.arange(len(which), device=points.device) - (size.cumsum(0) - size)[which]
        return which, self.begins[points][which] + within


def _mutual(near: Tensor) -> Tensor:
    """[N, K] bool: whether a row stands in the list of the one it lists. `near` is [N, K]."""
    own = torch.arange(len(near), device=near.device)
    return torch.cat(
        [(near[near[s : s + BLOCK]] == own[s : s + BLOCK, None, None]).any(-1) for s in range(0, len(near), BLOCK)]
    )


@dataclass(frozen=True)
class Averages:
    """D⁻¹ A by its entries, ordered by row.

    Args:
        row: [E].
        column: [E].
        weight: [E], positive; sums to 1 in every row that has any.
        n: N.
    """

    row: Tensor
    column: Tensor
    weight: Tensor
    n: int

    def of(self, s: Tensor) -> Tensor:
        """D⁻¹ A S [N, D] of S [N, D]; 0 for rows without neighbours."""
        begins = torch.searchsorted(self.row, torch.arange(self.n, device=s.device))
        return torch.nn.functional.embedding_bag(
            self.column, s, begins, mode="sum", per_sample_weights=self.weight.to(s.dtype)
        )

    def dense(self) -> Tensor:
        """As a matrix [N, N]."""
        out = self.weight.new_zeros(self.n, self.n)
        out[self.row, self.column] = self.weight
        return out


def operator(
    x: Tensor,
    candidates: int = 20,
    keep: int = 4,
    *,
    rerank: bool = True,
    k1: int = 20,
    k2: int = 6,
    share: float = 0.3,
    weight: Literal["similarity", "distance"] = "similarity",
) -> Averages:
    """The row-normalised adjacency D⁻¹ A of rows [N, D]; its diagonal is empty.

    Args:
        x: What rows look like, [N, D].
        candidates: k nearest by cosine from which a row's neighbours are taken.
        keep: How many of them, after re-ranking (CAPro's 4 of 20, itself not counted).
        rerank: By k-reciprocal distance; the nearest by cosine otherwise.
        k1: See `Reciprocal`.
        k2: The same.
        share: The same.
        weight: Edges weigh their similarity, or by distance as in the release.

    Raises:
        ValueError: For a weight of another name, or fewer candidates than kept.
    """
    if weight not in ("similarity", "distance"):
        raise ValueError(f"edges weigh by similarity or distance, not {weight!r}")
    if not 1 <= keep <= candidates:
        raise ValueError(f"{keep} neighbours cannot be kept of {candidates}")
    n = len(x)
    if n < 2:
        nothing = torch.empty(0, dtype=torch.long, device=x.device)
        return Averages(nothing, nothing, nothing.to(x.dtype), n)
    index, cosine = knn(x, candidates)
    distance = (1 - cosine).clamp(0, 2) / 2
    if rerank:
        distance = Reciprocal(x, k1, k2, share).distances(torch.arange(n, device=x.device), index)
    near = distance.topk(min(keep, index.shape[1]), dim=1, largest=False, sorted=True)
    edge = near.values if weight == "distance" else 1 - near.values
    # an edge of weight 0 is none; rows whose neighbours all have it still must have some
    edge = edge.clamp_min(1e-6)
    row = torch.arange(n, device=x.device)[:, None].expand_as(edge)
    column = index.gather(1, near.indices)
    one, other = torch.cat([row.flatten(), column.flatten()]), torch.cat([column.flatten(), row.flatten()])
    keys, place = torch.unique(one * n + other, return_inverse=True)
    both = torch.zeros(len(keys), dtype=x.dtype, device=x.device)
    both.scatter_reduce_(0, place, edge.flatten().repeat(2), "amax", include_self=False)
    row, column = keys // n, keys % n
    degree = torch.zeros(n, dtype=x.dtype, device=x.device).index_add_(0, row, both)
    return Averages(row, column, both / degree[row], n)


def smooth(
    averages: Averages, s: Tensor, *, self_weight: float = 0.0, hops: int = 1, known: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Ŝ = w S + (1 − w) D⁻¹ A S, `hops` times.

    Args:
        averages: What `operator` returned.
        s: [N, D].
        self_weight: w; CAPro's 0 replaces a row's own text wholly.
        hops: How often.
        known: [N] bool, rows that have an s at all; means are taken over those, and a row that knows nothing of its
            own takes its neighbours' whatever w is.

    Returns:
        Ŝ [N, D], and [N] bool: rows that now have one (the others are 0).

    Raises:
        ValueError: For a weight outside [0, 1].
    """
    if not 0 <= self_weight <= 1:
        raise ValueError(f"a row's own weight lies in [0, 1], not {self_weight}")
    there = torch.ones(len(s), dtype=s.dtype, device=s.device) if known is None else known.to(s.dtype)
    s = s * there[:, None]
    for _ in range(hops):
        mass = averages.of(there[:, None])[:, 0]
        mean = averages.of(s) / mass.clamp_min(1e-12)[:, None]
        heard = (mass > 1e-12).to(s.dtype)
        own = there * (heard * self_weight + (1 - heard))  # of a row without neighbours that know something: all
        other = heard * (1 - own)
        s = own[:, None] * s + other[:, None] * mean
        there = ((own + other) > 0).to(s.dtype)
    return s, there > 0
