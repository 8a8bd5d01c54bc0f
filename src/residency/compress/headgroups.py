"""Which heads to merge with which: the partition into equal groups with the most agreement inside.

    maximise  Σ_groups Σ_{i<j in group} S_ij          S [G, G] symmetric; groups of g = G / n heads each

Exact where that is feasible, by dynamic programming over subsets: the lowest head that is not yet placed takes g − 1
companions, and the best value of what is left depends on the set that is left alone. Elsewhere by hill climbing: from
random partitions, always make the best of all G² swaps of two heads until none helps. With T[i, A] = Σ_{x in A} S_ix,
the swap of a in A with b in B changes the objective by

    T[b, A] − T[a, A] + T[a, B] − T[b, B] − 2 S_ab                        (S_aa = 0)

The paper's: the objective, and swaps from random starts. Our choice: the exact search; the best swap instead of 3,000
random ones, whose value the official code recomputes from scratch each time; adjacent heads as one of the starts, so
that the result is never worse than not searching.

Cost. Exact: Σ over reachable sets of C(left − 1, g − 1) steps, at most 0.2 s for G = 16 (a layer); far too many for 32.
Swaps: some G steps of O(G²) per start, 0.05 s for G = 32 and 65 starts.

Paper: Jin et al., Findings of EMNLP 2025, arXiv 2412.20677. Official code: github.com/fpcsong/mha2gqa, commit c0706da.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

Groups = tuple[tuple[int, ...], ...]

EXACT_UP_TO = 16
"""Heads up to which the exact search takes a fraction of a second per layer."""


def adjacent(heads: int, groups: int) -> Groups:
    """Heads that stand next to each other, as they are."""
    _check(heads, groups)
    size = heads // groups
    return tuple(tuple(range(i, i + size)) for i in range(0, heads, size))


def objective(S: np.ndarray, groups: Groups) -> float:
    """Σ_groups Σ_{i<j in group} S_ij."""
    return float(sum(S[i, j] for group in groups for i, j in combinations(group, 2)))


def partition(S: np.ndarray, groups: int, *, restarts: int = 64, seed: int = 0) -> Groups:
    """The best partition found: exactly up to `EXACT_UP_TO` heads, else by swaps.

    Args:
        S: [G, G] symmetric scores; the diagonal is not read.
        groups: How many, a divisor of G.
        restarts: Random starts of the swaps.
        seed: Of the random starts.

    Returns:
        Members ascending in each group, groups by their first member.
    """
    S = _clean(S, groups)
    return exact(S, groups) if len(S) <= EXACT_UP_TO else climb(S, groups, restarts=restarts, seed=seed)


def exact(S: np.ndarray, groups: int) -> Groups:
    """The best partition of all. Of equals, the first in lexical order."""
    S = _clean(S, groups)
    heads, size = len(S), len(S) // groups
    value = {
        sum(1 << i for i in team): sum(float(S[i, j]) for i, j in combinations(team, 2))
        for team in combinations(range(heads), size)
    }
    known: dict[int, tuple[float, int]] = {0: (0.0, 0)}

    def solve(left: int) -> float:
        if left not in known:
            first, *rest = (i for i in range(heads) if left >> i & 1)
            best, chosen = -np.inf, 0
            for companions in combinations(rest, size - 1):
                team = 1 << first | sum(1 << i for i in companions)
                total = value[team] + solve(left & ~team)
                if total > best:
                    best, chosen = total, team
            known[left] = best, chosen
        return known[left][0]

    left, found = (1 << heads) - 1, []
    solve(left)
    while left:
        team = known[left][1]
        found.append(tuple(i for i in range(heads) if team >> i & 1))
        left &= ~team
    return tuple(found)


def climb(S: np.ndarray, groups: int, *, restarts: int = 64, seed: int = 0) -> Groups:
    """The best local optimum under swaps, from adjacent heads and from random partitions."""
    S = _clean(S, groups)
    heads, size = len(S), len(S) // groups
    rng = np.random.default_rng(seed)
    start = np.arange(heads) // size
    best, kept = -np.inf, start
    for attempt in range(1 + restarts):
        label = _swaps(S, start if attempt == 0 else rng.permutation(start))
        total = float((S * (label[:, None] == label[None, :])).sum() / 2)
        if total > best + 1e-12:
            best, kept = total, label
    found = [tuple(np.flatnonzero(kept == group).tolist()) for group in range(groups)]
    return tuple(sorted(found))


def _swaps(S: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The local optimum reached from a labelling [G] by always making the best swap."""
    label = label.copy()
    scale = max(1.0, float(np.abs(S).max()))
    while True:
        member = label[:, None] == np.arange(label.max() + 1)[None, :]
        T = S @ member  # [G, n]
        there = T[:, label]  # [a, b]: what a would have in b's group
        own = T[np.arange(len(S)), label]
        gain = there + there.T - own[:, None] - own[None, :] - 2 * S
        gain[label[:, None] == label[None, :]] = -np.inf
        a, b = divmod(int(gain.argmax()), len(S))
        if not gain[a, b] > 1e-12 * scale:
            return label
        label[a], label[b] = label[b], label[a]


def _clean(S: np.ndarray, groups: int) -> np.ndarray:
    S = np.array(S, dtype=np.float64)
    if S.ndim != 2 or S.shape[0] != S.shape[1] or not np.isfinite(S).all():
        raise ValueError(f"scores must be a finite square matrix, got shape {S.shape}")
    _check(len(S), groups)
    S = (S + S.T) / 2
    np.fill_diagonal(S, 0.0)
    return S


def _check(heads: int, groups: int) -> None:
    if groups < 1 or heads % groups:
        raise ValueError(f"{heads} heads cannot form {groups} equal groups")
