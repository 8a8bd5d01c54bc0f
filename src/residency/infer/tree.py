"""Token trees: several guesses at the next tokens, verified by the target in one forward pass.

A tree holds n nodes per row. Node 0 is the root: the last token that is certain, whose keys and values are not in the
cache yet. Every other node is a guess at the token after its parent; siblings carry distinct tokens. The target reads
all nodes at once: a node attends to the cache, its ancestors and itself, and its position is that of the root plus its
depth. `Tree` is what was drafted; a `TreePolicy` says, level by level, which guesses are worth a node.

Two policies. `StaticTree` is a fixed shape, given as paths of ranks: (0, 1) is the second-best guess after the best
one. `DynamicTree` spends a budget of nodes where the drafter is sure: at each level the children of a node are its
most probable tokens up to a mass of `top_p`, without those less than `ratio` times as probable as the best; the
survivors of the whole level are ranked by the probability of their path, and as many are kept as the budget still
allows (Clover, section on the token tree; the constants are those of its figure). `least` is ours: a path less
probable than this is not drafted, since every node costs verification time; 0 is the paper's tree.

Cost: a handful of operations on [B, F, K] per level (F nodes of the level, K guesses each), nothing on [B, F, V].

Papers: Xiao et al., "Clover: Regressive Lightweight Speculative Decoding with Sequential Knowledge", 2024, arXiv
2405.00263 (dynamic tree; its public code is the README of github.com/XiaoBin1992/clover, commit 9d37214); Li et al.,
"EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty", ICML 2024, arXiv 2401.15077 (the static tree of
25 nodes, `EAGLE`, also used by Clover-2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

EAGLE: tuple[tuple[int, ...], ...] = (
    *((i,) for i in range(4)),
    *((0, i) for i in range(3)),
    *((1, i) for i in range(2)),
    (2, 0),
    (2, 1),
    (3, 0),
    *((0, 0, i) for i in range(3)),
    *((0, 1, i) for i in range(2)),
    *((0, 2, i) for i in range(2)),
    (1, 0, 0),
    *((0, 0, 0, i) for i in range(3)),
    *((0, 0, 0, 0, i) for i in range(2)),
)
"""Paths of EAGLE-1's static tree: 25 guesses, five levels."""


@dataclass(frozen=True)
class Tree:
    """Drafted tokens.

    Args:
        tokens: [B, n] ids; column 0 is the root.
        parents: [B, n]; -1 at the root, and always an earlier column.
        depth: [B, n]; 0 at the root.
        alive: [B, n]; False where a row has fewer nodes than the widest (such nodes are never accepted).
        drawn_from: Per level, the drafter's log-probabilities [B, F, V'] over its vocabulary from which the children
            of that level's F nodes were drawn, and the tree columns [B, F] of these nodes; empty where nodes are the
            most probable ones and not drawn.
    """

    tokens: Tensor
    parents: Tensor
    depth: Tensor
    alive: Tensor
    drawn_from: tuple[tuple[Tensor, Tensor], ...] = ()

    @classmethod
    def bare(cls, roots: Tensor) -> Tree:
        """Trees of nothing but their roots [B]."""
        column = roots[:, None]
        one = torch.ones_like(column, dtype=torch.bool)
        return cls(column, torch.full_like(column, -1), torch.zeros_like(column), one)

    def ancestors(self) -> Tensor:
        """[B, n, n] bool: [b, i, j] is true where j is i or one of its ancestors."""
        return ancestors(self.parents)


def ancestors(parents: Tensor) -> Tensor:
    """Reflexive-transitive closure of the parent relation: [B, n] → [B, n, n] bool."""
    n = parents.shape[-1]
    own = torch.eye(n, dtype=torch.bool, device=parents.device).expand(*parents.shape, n)
    above, up = own, parents.clamp_min(0)[..., None].expand_as(own)
    inner = (parents >= 0)[..., None]
    while True:
        grown = own | (above.gather(-2, up) & inner)
        if torch.equal(grown, above):
            return above
        above = grown


@dataclass(frozen=True)
class Level:
    """What a policy adds below the nodes of one level: for each new node its parent and its rank among the guesses.

    Args:
        parents: [B, F'] indices into the F nodes of the level above.
        ranks: [B, F'] indices into the K guesses.
        alive: [B, F'] bool.
    """

    parents: Tensor
    ranks: Tensor
    alive: Tensor


class TreePolicy(Protocol):
    """Which guesses become nodes."""

    @property
    def levels(self) -> int:
        """Deepest level; a drafter is not asked for more."""

    @property
    def fanout(self) -> int:
        """How many guesses per node it looks at (K)."""

    def grow(self, level: int, logp: Tensor, path: Tensor, spent: int) -> Level | None:
        """Nodes of `level` (counted from 1), or None to stop.

        Args:
            level: Counted from 1.
            logp: [B, F, K] log-probabilities of each node's best guesses, best first.
            path: [B, F] log-probability of each node's path; -inf where there is no node.
            spent: Nodes drafted so far, roots not counted.
        """

    def parents_of(self, level: int) -> Tensor | None:
        """Which nodes of `level` can have children, as indices [F], or None for all of them."""


class StaticTree:
    """A fixed shape.

    Args:
        paths: Each guess as the ranks on the way to it; every prefix must be there too.

    Raises:
        ValueError: For an empty or incomplete tree.
    """

    def __init__(self, paths: Sequence[Sequence[int]] = EAGLE) -> None:
        known = {tuple(path) for path in paths}
        if not known or () in known or any(rank < 0 for path in known for rank in path):
            raise ValueError("a tree needs at least one path of ranks counted from 0, such as [[0], [1], [0, 0]]")
        if orphans := sorted(path for path in known if path[:-1] and path[:-1] not in known):
            raise ValueError(f"the path {list(orphans[0])} hangs in the air: {list(orphans[0][:-1])} is missing")
        self.paths = tuple(sorted(known, key=lambda path: (len(path), path)))
        self.levels = max(map(len, self.paths))
        self.fanout = 1 + max(rank for path in self.paths for rank in path)
        order: list[list[tuple[int, ...]]] = [[()]]
        self._grown: list[tuple[list[int], list[int]]] = []
        self._kept: list[list[int]] = []
        for depth in range(1, self.levels + 1):
            above, here = order[-1], [path for path in self.paths if len(path) == depth]
            kept = [i for i, path in enumerate(above) if any(child[:-1] == path for child in here)]
            position = {above[i]: n for n, i in enumerate(kept)}
            self._grown.append(([position[path[:-1]] for path in here], [path[-1] for path in here]))
            self._kept.append(kept)
            order.append(here)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def dense(self) -> bool:
        """Whether the children of every node have the ranks 0, 1, … without gaps."""
        known = set(self.paths)
        return all(path[-1] == 0 or (*path[:-1], path[-1] - 1) in known for path in self.paths)

    @classmethod
    def chain(cls, length: int) -> StaticTree:
        """One guess after the other."""
        return cls([(0,) * n for n in range(1, length + 1)])

    def grow(self, level: int, logp: Tensor, path: Tensor, spent: int) -> Level | None:
        """See `TreePolicy.grow`; `logp` holds only the nodes that `parents_of` named."""
        if level > self.levels:
            return None
        parents, ranks = (torch.tensor(x, device=logp.device).expand(len(logp), -1) for x in self._grown[level - 1])
        return Level(parents, ranks, torch.ones_like(parents, dtype=torch.bool))

    def parents_of(self, level: int) -> Tensor | None:
        """See `TreePolicy.parents_of`."""
        kept = self._kept[level] if level < self.levels else []
        return torch.tensor(kept, dtype=torch.long)


@dataclass(frozen=True)
class DynamicTree:
    """A budget of nodes, spent where the drafter is sure.

    Args:
        budget: Guesses per step and row, at most.
        levels: Deepest level.
        top_p: Children of a node are its best tokens up to this mass.
        ratio: And none less than this times as probable as the best.
        least: Paths less probable than this are not drafted.
        fanout: Guesses per node looked at.
    """

    budget: int = 4
    levels: int = 4
    top_p: float = 0.8
    ratio: float = 0.25
    least: float = 0.0
    fanout: int = 8

    def __post_init__(self) -> None:
        if min(self.budget, self.levels, self.fanout) < 1:
            raise ValueError(f"a tree needs a budget, levels and a fanout of at least 1, not {self}")
        if not (0 < self.top_p <= 1 and 0 <= self.ratio <= 1 and 0 <= self.least < 1):
            raise ValueError(f"top_p lies in (0, 1], ratio in [0, 1] and least in [0, 1), not {self}")

    def grow(self, level: int, logp: Tensor, path: Tensor, spent: int) -> Level | None:
        """See `TreePolicy.grow`."""
        room = self.budget - spent
        if level > self.levels or room < 1:
            return None
        p = logp.float().exp()
        before = p.cumsum(-1) - p  # mass of the better guesses: the first guess always stands
        stands = (before < self.top_p) & (p >= self.ratio * p[..., :1])
        joint = (path[..., None] + logp.float()).masked_fill(~stands, -torch.inf)
        joint = joint.masked_fill(joint.exp() < self.least, -torch.inf) if self.least else joint
        B, _, K = joint.shape
        best, index = joint.view(B, -1).topk(min(room, joint[0].numel()), dim=-1)
        alive = best > -torch.inf
        width = int(alive.sum(-1).max())
        if not width:
            return None
        index = index[:, :width]
        return Level(index // K, index % K, alive[:, :width])

    def parents_of(self, level: int) -> Tensor | None:
        """See `TreePolicy.parents_of`."""
        return None
