"""SemDeDup, D4 and ClusterClip: choosing by clusters of embeddings.

Clusters are spherical k-means of unit rows (`residency.curate.clusters`).

`semdedup`: rows of one cluster whose cosine is above 1 − ε mean the same. Within a cluster, rows are ordered by their
cosine to the centre, and a row is dropped when any row before it is that similar (also one that was dropped itself, as
in the official code). `keep-which: hard` puts the farthest from the centre first, `easy` the nearest. What lies in two
clusters is not compared: that saves N² and costs the duplicates across a border.

`d4`: the rest is clustered again, without the weight that duplicates had, and the share of `prototypes` nearest to
their centres, the most ordinary rows, is dropped as well.

`cluster-clip`: clusters take turns, and give one row each time until the budget is spent, so that rare subjects count
as much as common ones; none gives more than `cap` rows, and what a small cluster cannot give, the others do. Within a
cluster and within a turn, rows come by quality, or at random without one.

Papers: Abbas et al., "SemDeDup: Data-efficient learning at web-scale through semantic deduplication", 2023, arXiv
2303.09540, code facebookresearch/SemDeDup @6b41945; Tirumala et al., "D4: Improving LLM Pretraining via Document
De-Duplication and Diversification", NeurIPS 2023, arXiv 2308.12284, no code; Shao et al., "Balanced Data Sampling for
Language Model Training with Clustering", Findings of ACL 2024, arXiv 2402.14526 (samples with repeats and stops a
cluster after some; code choosewhatulike/cluster-clip @0bcd5d3).

Our choices: √N clusters when not told (SemDeDup takes 11,000 for its web corpora, NeMo Curator 100); ε = 0.05;
ClusterClip chooses once, so a row never repeats and its clip is a cap on rows.

Cost: k-means, then O(n² · D) within clusters of n rows, in blocks; memory O(N · D) in float32.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from residency.curate.clusters import Clusters, kmeans
from residency.curate.quotas import ranked
from residency.curate.scoring import Array, Budgeted, Selection, Selector
from residency.curate.vectors import Floats, whole


class SemDeDup(Selector):
    """One of several rows that mean the same."""

    clusters: int | None = Field(None, ge=1)
    """k of k-means; √N by default, and no more than N."""
    eps: float = Field(0.05, ge=0, le=2)
    """ε: rows of a cluster with a cosine above 1 − ε mean the same; 0 drops none."""
    keep_which: Literal["hard", "easy"] = "hard"
    """Of those, keep the one farthest from the centre, or nearest."""
    seed: int = Field(0, ge=0)
    """Where k-means starts."""

    def select(self, pool: Any) -> Selection:
        """Choose.

        Args:
            pool: [N, D] embeddings.

        Returns:
            The rows kept, in row order. `score`: largest cosine to a row before it in its cluster; −1 for the first.

        Raises:
            ValueError: When a row is not finite.
        """
        rows = whole(pool)
        cosine, twin = self._twins(rows, self._clusters(rows))
        kept, reasons = _said(cosine, twin, 1 - self.eps)
        return Selection(np.flatnonzero(kept), cosine, reasons, twin)

    def _clusters(self, rows: Floats) -> Clusters:
        return kmeans(rows, self.clusters or max(1, round(len(rows) ** 0.5)), self.seed)

    def _twins(self, rows: Floats, parts: Clusters) -> tuple[Array, NDArray[np.int64]]:
        """[N] largest cosine to a row met before, within the cluster, and which (−1: none before)."""
        sign = 1 if self.keep_which == "hard" else -1
        order = np.lexsort((sign * parts.cosine, parts.label))
        bounds = np.searchsorted(parts.label[order], np.arange(len(parts.centres) + 1))
        cosine, twin = np.full(len(rows), -1.0), np.full(len(rows), -1, np.int64)
        for low, high in pairwise(bounds.tolist()):
            members = order[low:high]
            vectors = rows[members]
            for start in range(0, len(members), 1024):
                stop = min(start + 1024, len(members))
                found = vectors[start:stop] @ vectors[:stop].T
                found[np.arange(start, stop)[:, None] <= np.arange(stop)] = -2
                which = found.argmax(1)
                best = np.take_along_axis(found, which[:, None], 1)[:, 0]
                some = best > -2
                cosine[members[start:stop][some]] = best[some]
                twin[members[start:stop][some]] = members[which[some]]
        return cosine, twin


class D4(SemDeDup):
    """SemDeDup, then without the most ordinary rows."""

    prototypes: float = Field(0.2, ge=0, lt=1)
    """Share of the deduplicated rows to drop, those nearest to their new centres first."""

    def select(self, pool: Any) -> Selection:
        """Choose.

        Args:
            pool: [N, D] embeddings.

        Returns:
            The rows kept, in row order. `score`: as of SemDeDup for rows it drops; for the others, cosine to
            the new centre.

        Raises:
            ValueError: When a row is not finite.
        """
        rows = whole(pool)
        cosine, twin = self._twins(rows, self._clusters(rows))
        kept, reasons = _said(cosine, twin, 1 - self.eps)
        left = np.flatnonzero(kept)
        again = self._clusters(rows[left])
        cosine[left], twin[left] = again.cosine, -1
        order = left[np.argsort(-again.cosine, kind="stable")]
        ordinary = int(self.prototypes * len(left))
        for rank, row in enumerate(order.tolist(), 1):
            what = "dropped" if rank <= ordinary else "kept"
            reasons[row] = (
                f"{what}: {rank:,} of {len(left):,} most ordinary rows (cosine {cosine[row]:.2f} to its centre)"
            )
        return Selection(np.sort(order[ordinary:]), cosine, reasons, twin)


class ClusterClip(Budgeted):
    """As many rows of every cluster."""

    needs = ("embeddings", "quality?")

    clusters: int | None = Field(None, ge=1)
    """k of k-means; √N by default, and no more than N."""
    cap: int | None = Field(None, ge=1)
    """Rows of one cluster, at most; then fewer than `keep` may be chosen."""
    seed: int = Field(0, ge=0)
    """Where k-means and the random order within clusters start."""

    def select(self, pool: Any, quality: Any = None) -> Selection:
        """Choose.

        Args:
            pool: [N, D] embeddings.
            quality: [N] or None; NaN where a row has none, which is then not chosen.

        Returns:
            The rows, clusters in turn. `score`: the quality, or the random number in its place.

        Raises:
            ValueError: When a row is not finite, or there is not one quality per row.
        """
        rows = whole(pool)
        score, order = ranked(quality, len(rows), self.seed)
        label = kmeans(rows, self.clusters or max(1, round(len(rows) ** 0.5)), self.seed).label
        place = _place(label[order])
        turn = order[np.lexsort((-score[order], place))]
        turn = turn[np.sort(place) < (self.cap or len(rows))]
        kept = set(turn[: self.keep].tolist())
        reasons = ["dropped: has no quality"] * len(rows)
        for row, p in zip(order.tolist(), place.tolist(), strict=True):
            reasons[row] = f"{'kept' if row in kept else 'dropped'}: number {p + 1:,} of cluster {label[row] + 1}"
        return Selection(turn[: self.keep], score, reasons)


def _place(label: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n] how many rows of the same cluster come before."""
    order = np.argsort(label, kind="stable")
    first = np.searchsorted(label[order], label[order])
    place = np.empty(len(label), np.int64)
    place[order] = np.arange(len(label)) - first
    return place


def _said(cosine: Array, twin: NDArray[np.int64], limit: float) -> tuple[NDArray[np.bool_], list[str]]:
    """Which rows stay, and why."""
    kept = cosine <= limit
    reasons = [
        (f"kept: cosine at most {c:.2f}" if t >= 0 else "kept: first of its cluster")
        if k
        else f"dropped: means the same as row {t + 1} (cosine {c:.2f})"
        for k, c, t in zip(kept.tolist(), cosine.tolist(), twin.tolist(), strict=True)
    ]
    return kept, reasons
