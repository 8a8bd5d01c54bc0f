"""Which rows are easy, and in which order a training meets them.

A row is easy when it lies near its own class mean and far from the others'. With d(a, b) = (1 − cos(a, b)) / 2:

    DIF(i) = d(z_i, m_{y_i}) / Σ_k d(z_i, m_k)                                  in [0, 1], small = easy

Rows are ranked by it, j = 0 … n − 1 from easy to hard. At progress u = epoch / epochs the row of rank j is in the epoch
with a probability linear in its rank:

    p_j = (1 − u) + (2u − 1) j / (n − 1)                                        p_0 = 1 − u,  p_{n−1} = u,  mean ½

so training goes from almost only easy rows over a random half to almost only hard ones. The release draws every row by
itself (and can never draw row 0). Our choice is systematic sampling: one uniform number s, and the rows at which the
running sum of the p_j passes s, s + 1, s + 2, …: the same inclusion probabilities, but always ⌈n/2⌉ rows, evenly spread
over the ranks, so that every epoch has the same number of steps. For odd n, n/2 is not a number of rows: then every p_j
is raised by (1 − p_j) / n, which makes their sum ⌈n/2⌉ exactly.

Cost: one product [N, D] × [D, C] and a sort. The release's loops over rows and classes compute the same.

Paper: Song, Huang, Xue, Hu, SPCL, EMNLP 2022, arXiv 2210.08713; github.com/caskcsg/SPCL, commit cd48939 (read for
facts). Systematic sampling: Madow 1949, Annals of Mathematical Statistics 20(3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from residency.adapt.contrast import similarity

EPS = 1e-8
"""Added to every distance (the release's), so that a row on top of all means is not divided by zero."""


def difficulties(z: Tensor, means: Tensor, known: Tensor | None = None) -> Tensor:
    """How hard each row would be for each class: rows sum to 1 over the known classes.

    Args:
        z: [N, D].
        means: [C, D].
        known: [C] bool, classes that have a mean; others get NaN. All if None.

    Returns:
        [N, C]; a row's DIF is its entry at its own class.
    """
    z, means = (x.float() if x.dtype.itemsize < 4 else x for x in (z, means))
    distance = 1 - similarity(z, means, "halfcos")
    distance = distance.clamp_min(0) + EPS
    if known is not None:
        distance = distance.masked_fill(~known, torch.nan)
    return distance / distance.nansum(-1, keepdim=True)


def inclusion(n: int, progress: float) -> Tensor:
    """Probabilities [n], float64, of being in the epoch, from the easiest row to the hardest; they sum to ⌈n/2⌉.

    Args:
        n: Rows.
        progress: u in [0, 1]; ½ gives every row the same.

    Raises:
        ValueError: For progress outside [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress lies between 0 and 1, not {progress}")
    rank = torch.linspace(0, 1, n, dtype=torch.float64) if n > 1 else torch.full((n,), 0.5, dtype=torch.float64)
    p = (1 - progress) + (2 * progress - 1) * rank
    return p + (1 - p) / n if n % 2 else p


def systematic(p: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Indices [k], rising, such that i is among them with probability p_i, and always k = Σ p of them.

    Args:
        p: [n] probabilities whose sum is a whole number.
        generator: Of the one random number, by default torch's own.

    Raises:
        ValueError: When they do not sum to a whole number.
    """
    total = float(p.double().sum())
    k = round(total)
    if abs(total - k) > 1e-6 * max(1.0, total):
        raise ValueError(f"inclusion probabilities must sum to a whole number of rows, got {total}")
    if not k:
        return torch.zeros(0, dtype=torch.long)
    bounds = p.double().cumsum(0) * (k / total)
    ticks = torch.rand((), dtype=torch.float64, generator=generator) + torch.arange(k)
    at = torch.searchsorted(bounds, ticks, right=True)
    steps = torch.arange(k)
    # two ticks in one row, or one behind the last, can only come of rounding; each row is taken once all the same
    return ((at - steps).cummax(0).values + steps).minimum(steps + len(p) - k)


def choose(difficulty: Tensor, progress: float, generator: torch.Generator | None = None) -> Tensor:
    """The rows of an epoch.

    Args:
        difficulty: [N] DIF.
        progress: u = epoch / epochs.
        generator: Where random numbers come from.

    Returns:
        Indices [⌈N/2⌉], from easy to hard.
    """
    order = difficulty.argsort(stable=True).cpu()
    return order[systematic(inclusion(len(order), progress), generator)]
