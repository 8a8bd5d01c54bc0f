"""Clusters of embeddings: spherical k-means, and the nearest rows of every row found by way of clusters.

k-means finds k unit centres c that make Σ_x max_c x · c large, in turn: every unit row goes to its nearest centre,
every centre becomes the mean of its rows, scaled to length 1 (Lloyd's steps with cosine). Centres start at rows drawn
with probability in proportion to 1 − the cosine to the nearest drawn so far (k-means++, whose squared distances of unit
rows are 2 − 2 cos; the best of 2 + log k draws each time, as in scikit-learn). They are trained on a sample of `SAMPLE`
rows per centre, and all rows are assigned.

`neighbours` finds every row's most similar rows among those in the `probes` clusters whose centres are nearest to it
(an inverted file): exact within them, and exact altogether when there are no more clusters than probes. All rows that
ask one cluster do so in one matrix product.

Papers: Dhillon & Modha, "Concept Decompositions for Large Sparse Text Data Using Clustering", Machine Learning 2001
(spherical k-means); Arthur & Vassilvitskii, "k-means++", SODA 2007; Jégou, Douze & Schmid, "Product Quantization for
Nearest Neighbor Search", TPAMI 2011 (inverted files). scikit-learn's k-means is Euclidean and an optional package here;
it serves the tests.

Our choices: 64 rows per centre (faiss takes 256, for centres a little better and a start four times as long); a centre
that loses all its rows stays where it is; about 400 rows to a cluster, so that 8 probes look at 3,200 rows.

Cost: k-means O(sample · k · D) per step; neighbours O(N · candidates · D); memory O(N · D) for the caller's rows, plus
a block.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from residency.curate.vectors import BLOCK, Floats, unit

SAMPLE, SMALL = 64, 16_384
"""Rows per centre that k-means is trained on, at most; but no fewer than so many rows in all."""


class Clusters(NamedTuple):
    """What k-means finds.

    Args:
        centres: [k, D] unit rows.
        label: [N] number of each row's cluster.
        cosine: [N] cosine of each row to its centre.
    """

    centres: Floats
    label: NDArray[np.int64]
    cosine: Floats


def kmeans(rows: Floats, clusters: int, seed: int = 0, steps: int = 20, plus: bool = True) -> Clusters:
    """Cluster unit rows.

    Args:
        rows: [N, D] unit rows, float32.
        clusters: k; no more than N are made.
        seed: Where the random numbers start.
        steps: Lloyd's steps, at most (fewer when no row moves).
        plus: Start by k-means++, k passes over the sample; or at rows drawn uniformly.

    Returns:
        The clusters.
    """
    k = min(clusters, len(rows))
    if not k:
        return Clusters(np.empty((0, rows.shape[1]), np.float32), np.empty(0, np.int64), np.empty(0, np.float32))
    rng = np.random.default_rng(seed)
    most = max(SMALL, SAMPLE * k)
    some = rows if len(rows) <= most else rows[np.sort(rng.choice(len(rows), most, replace=False))]
    centres = _spread(some, k, rng) if plus else some[np.sort(rng.choice(len(some), k, replace=False))]
    before = None
    for _ in range(steps):
        label = assign(some, centres)[0]
        if before is not None and np.array_equal(label, before):
            break
        before = label
        order = np.argsort(label, kind="stable")
        filled, starts = np.unique(label[order], return_index=True)
        centres = centres.copy()
        centres[filled] = unit(np.add.reduceat(some[order], starts, axis=0, dtype=np.float64))
    return Clusters(centres, *assign(rows, centres))


def assign(rows: Floats, centres: Floats) -> tuple[NDArray[np.int64], Floats]:
    """[N] nearest centre of every row, and its cosine."""
    label, cosine = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
    for start in range(0, len(rows), BLOCK // 4):
        place = slice(start, start + BLOCK // 4)
        found = rows[place] @ centres.T
        label[place] = found.argmax(1)
        cosine[place] = found.max(1)
    return label, cosine


def _spread(rows: Floats, k: int, rng: np.random.Generator) -> Floats:
    """k-means++, the best of some draws each time: [k, D] rows far from each other."""
    chosen = [int(rng.integers(len(rows)))]
    far = np.maximum(1 - rows @ rows[chosen[0]], 0)
    for _ in range(k - 1):
        weight = far.cumsum(dtype=np.float64)
        if weight[-1] <= 1e-6 * len(rows):
            break
        drawn = np.searchsorted(weight, rng.random(2 + int(np.log(k))) * weight[-1], side="right")
        drawn = drawn.clip(max=len(rows) - 1)
        left = np.minimum(np.maximum(1 - rows[drawn] @ rows.T, 0), far)
        best = int(left.sum(1, dtype=np.float64).argmin())
        chosen.append(int(drawn[best]))
        far = left[best]
    return rows[chosen]


def neighbours(rows: Floats, count: int, seed: int = 0, probes: int = 8) -> tuple[NDArray[np.int32], Floats]:
    """The most similar rows of every row, itself among them.

    Args:
        rows: [N, D] unit rows, float32.
        count: How many of each; no more than N.
        seed: Where k-means starts.
        probes: Clusters searched for each row; where there are no more (N < 400 · probes), the result is exact.

    Returns:
        [N, count] row numbers by falling cosine, and the cosines; −1 and 0 where the searched clusters hold fewer rows.
    """
    import torch

    n, count = len(rows), min(count, len(rows))
    near, cosine = np.full((n, count), -1, np.int32), np.full((n, count), -2, np.float32)
    parts = kmeans(rows, max(1, n // 400), seed, steps=8, plus=False)
    probes = min(probes, len(parts.centres))
    asked = np.empty((n, probes), np.int32)
    for start in range(0, n, BLOCK // 4):
        some = torch.from_numpy(rows[start : start + BLOCK // 4] @ parts.centres.T)
        asked[start : start + BLOCK // 4] = some.topk(probes, dim=1).indices.numpy()
    members, asking = _groups(parts.label, len(parts.centres)), _groups(asked.ravel(), len(parts.centres))
    for theirs, who in zip(members, asking, strict=True):
        if not len(theirs):
            continue
        table = rows[theirs].T
        step = max(1, (1 << 23) // len(theirs))
        for start in range(0, len(who), step):
            mine = who[start : start + step] // probes
            best = torch.from_numpy(rows[mine] @ table).topk(min(count, len(theirs)), dim=1)
            both = torch.cat([torch.from_numpy(cosine[mine]), best.values], 1).topk(count, dim=1)
            names = np.concatenate([near[mine], theirs[best.indices.numpy()]], 1)
            near[mine] = np.take_along_axis(names, both.indices.numpy(), 1)
            cosine[mine] = both.values.numpy()
    cosine[near < 0] = 0
    return near, cosine


def _groups(label: NDArray[Any], k: int) -> list[NDArray[np.int64]]:
    """Where each of the numbers below k stands."""
    order = np.argsort(label, kind="stable")
    bounds = np.searchsorted(label[order], np.arange(k + 1))
    return [order[a:b] for a, b in pairwise(bounds.tolist())]
