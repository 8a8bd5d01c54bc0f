"""One vector per class, however it was come by.

    of means      c_k = normalise( mean of the normalised z_i of class k )            few-shot rows, a support set
    running       c_k ← normalise( m c_k + (1 − m) z_i ),  one z_i after the other    while training
    clustered     the mean of the largest of a class's k-means clusters               when rows of a class disagree

The running mean is applied to a batch at once: after n vectors of a class, in the order given, it holds
mⁿ c + (1 − m) Σ_j m^{n−j} z_j, and is normalised then, once per batch (the release of FoPro does the same, with a
Python loop over rows). All state is in buffers: saved, resumed and moved with the objective that holds it.

Cost: C × D numbers; an update is one matrix product [C, B] × [B, D].

Papers: Snell, Swersky, Zemel, "Prototypical Networks for Few-shot Learning", NeurIPS 2017, arXiv 1703.05175 (means);
Li et al., "Prototypical Contrastive Learning", ICLR 2021, arXiv 2005.04966, and "MoPro", ICLR 2021, arXiv 2009.07995
(running means). Taking the largest cluster is our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from residency.adapt.contrast import Kind, similarity


class ClassBank(nn.Module):
    """Prototypes of C classes.

    Args:
        classes: C.
        width: D.
        normalise: Keep vectors at length 1.

    Attributes:
        vectors: [C, D]; zero where a class has none yet.
        count: [C] rows that went into each.
    """

    vectors: Tensor
    count: Tensor

    def __init__(self, classes: int, width: int, normalise: bool = True) -> None:
        super().__init__()
        if classes < 1 or width < 1:
            raise ValueError(f"a bank needs at least one class and one dimension, got {classes} and {width}")
        self.normalise = normalise
        self.register_buffer("vectors", torch.zeros(classes, width))
        self.register_buffer("count", torch.zeros(classes, dtype=torch.long))

    @property
    def known(self) -> Tensor:
        """[C] bool: which classes have a prototype."""
        return self.count > 0

    @torch.no_grad()
    def of_means(self, z: Tensor, y: Tensor, clusters: int = 1, generator: torch.Generator | None = None) -> ClassBank:
        """Set prototypes from rows; classes without rows keep theirs.

        Args:
            z: [N, D].
            y: [N] classes.
            clusters: 1 for the mean of a class; k for the mean of its largest k-means cluster.
            generator: Of the clusters' beginnings.
        """
        z = self._shaped(z)
        if clusters > 1:
            keep = torch.ones(len(y), dtype=torch.bool, device=z.device)
            for c in y.unique().tolist():
                rows = (y == c).nonzero()[:, 0]
                groups = _kmeans(z[rows], min(clusters, len(rows)), generator)
                keep[rows] = groups == groups.bincount().argmax()
            z, y = z[keep], y[keep]
        classes = len(self.vectors)
        sums = torch.zeros_like(self.vectors).index_add_(0, y, z)
        n = y.bincount(minlength=classes)
        found = n > 0
        means = self._shaped(sums / n.clamp_min(1)[:, None])
        self.vectors.copy_(torch.where(found[:, None], means, self.vectors))
        self.count.copy_(torch.where(found, n, self.count))
        return self

    @torch.no_grad()
    def ema_(self, z: Tensor, y: Tensor, momentum: float) -> None:
        """Running means over a batch's rows, in their order; a class's first row ever becomes its prototype.

        Args:
            z: [B, D].
            y: [B] classes.
            momentum: m, weight of what was there before each row.
        """
        if not len(y):
            return
        z, classes = self._shaped(z), len(self.vectors)
        member = nn.functional.one_hot(y, classes).T.to(z.dtype)  # [C, B]
        n = member.sum(1)
        after = n[:, None] - member.cumsum(1)  # rows of the class behind this one
        weight = member * (1 - momentum) * momentum**after
        first = (member.cumsum(1) == 1) & (member > 0) & ~self.known[:, None]
        weight = torch.where(first, momentum**after, weight)
        old = torch.where(self.known, momentum**n, torch.zeros_like(n))
        mixed = self._shaped(old[:, None] * self.vectors + weight @ z)
        self.vectors.copy_(torch.where(n[:, None] > 0, mixed, self.vectors))
        self.count += n.long()

    def logits(self, z: Tensor, tau: float | Tensor = 0.1, kind: Kind = "cos") -> Tensor:
        """[B, C] similarities over temperature (a number, or one per class); −inf for classes without a prototype."""
        return (similarity(z, self.vectors.to(z.dtype), kind) / tau).masked_fill(~self.known, -torch.inf)

    def _shaped(self, z: Tensor) -> Tensor:
        z = z.detach().to(self.vectors.dtype)
        return nn.functional.normalize(z, dim=-1) if self.normalise else z


def _kmeans(z: Tensor, k: int, generator: torch.Generator | None, rounds: int = 20) -> Tensor:
    """Groups [N] of Lloyd's algorithm, begun at k different rows."""
    centres = z[torch.randperm(len(z), generator=generator)[:k].to(z.device)]
    groups = torch.zeros(len(z), dtype=torch.long, device=z.device)
    for _ in range(rounds):
        found = torch.cdist(z, centres).argmin(1)
        if torch.equal(found, groups) and _:
            break
        groups = found
        n = groups.bincount(minlength=k)
        sums = torch.zeros_like(centres).index_add_(0, groups, z)
        centres = torch.where(n[:, None] > 0, sums / n.clamp_min(1)[:, None], centres)
    return groups
