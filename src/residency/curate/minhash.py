"""MinHash near-duplicates: groups of rows whose texts share most of their shingles, in linear time.

A text is the set S of its shingles (runs of n words, or of n characters). Two texts are as alike as their Jaccard index

    J(a, b) = |S_a ∩ S_b| / |S_a ∪ S_b|

For a random order of all shingles, the first shingle of a and of b is the same with probability J. P orders give P
first shingles, the signature; the share of places where two signatures agree estimates J without bias and with
standard deviation √(J (1 − J) / P), at most 0.044 for P = 128.

To find pairs without comparing all, a signature is cut into b bands of r places. Two rows meet when a whole band
agrees, which happens with probability 1 − (1 − J^r)^b. r is the largest for which a pair exactly at the threshold meets
with probability `recall`. Rows that meet in a band are compared with the first of them, those that are not like it with
the first of the rest, and so on `LEADERS` times: linear also where a thousand rows meet. A pair is a near-duplicate if
its J, counted on the sets (or with `verify: estimate`, on the signatures), is at least the threshold. Groups are the
connected components; a row can be in one by way of others, which its reason then says. Each group keeps one row.

Orders are (a·x + c mod 2^64) of mixed 64-bit shingle hashes x, a odd, a and c from the seed; hashes come from blake2b,
not from Python's `hash`, so a row's signature depends on its text and the seed alone, in every process.

Papers: Broder, "On the resemblance and containment of documents", SEQUENCES 1997; bands: Leskovec, Rajaraman & Ullman,
"Mining of Massive Datasets", ch. 3; as the field's habit for training data: Lee et al., ACL 2022, arXiv 2107.06499
(5-grams, J = 0.8). Official code: datasketch is the usual library (read for facts). Our choices: exact verification,
r from a recall, leaders, words that keep their digits (two rows that differ in a number differ).

Cost: P multiplications per shingle; memory 8 bytes per shingle and 4 P per row. 16,000 answers of 200 words take 2 s on
one core. A row without a word is in no group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from residency.curate.hashing import Hashes, mixed
from residency.curate.scoring import Selection, Selector

LEADERS = 8
"""Rows of one bucket that the others are compared with, at most."""
BLOCK = 1 << 15
"""Shingles hashed at a time: 256 KiB, so that all orders of a block find it in the processor's cache."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class NearDuplicates(Selection):
    """What is kept, and what it stands for.

    Args:
        indices: [n] rows kept, in their order: those without near-duplicates, and one of each group.
        score: [N] Jaccard index of a dropped row with the row that stands for it; 1 for a row that is kept.
        reasons: For every row, why it was kept or dropped.
        nearest: [N] the row that stands for it; itself where it is kept.
        group: [N] number of its group, counted from 0 by first row; −1 for a row without near-duplicates.
    """

    group: NDArray[np.int64]


class MinHash(Selector):
    """Near-duplicates by MinHash signatures and bands."""

    needs = ("texts", "quality?")

    threshold: float = Field(0.8, gt=0, le=1)
    """Jaccard index from which two rows count as near-duplicates."""
    shingle: int = Field(5, ge=1)
    """Words (or characters) per shingle; a text with fewer is one shingle."""
    unit: Literal["words", "characters"] = "words"
    """What shingles are made of; lower case, white space as one space."""
    permutations: int = Field(128, ge=8, le=4096)
    """Places of a signature; the estimate's standard deviation is √(J (1 − J) / places)."""
    recall: float = Field(0.95, gt=0, lt=1)
    """Probability that a pair exactly at the threshold is compared at all; likelier pairs are safer."""
    verify: Literal["exact", "estimate"] = "exact"
    """Compare the rows that meet by their shingles, or by their signatures."""
    seed: int = Field(0, ge=0)
    """Where the random orders start."""

    @property
    def bands(self) -> tuple[int, int]:
        """Bands and places per band."""
        for rows in range(self.permutations, 1, -1):
            bands = self.permutations // rows
            if 1 - (1 - self.threshold**rows) ** bands >= self.recall:
                return bands, rows
        return self.permutations, 1

    def select(self, texts: Sequence[str], prefer: Sequence[float] | None = None) -> NearDuplicates:
        """Keep one row of every group of near-duplicates.

        Args:
            texts: N texts.
            prefer: [N] a score; each group keeps its row with the highest (the first of equals). By default the first.

        Returns:
            What is kept, with the groups; deterministic.

        Raises:
            ValueError: When `prefer` has another length or is not finite.
        """
        score = np.zeros(len(texts)) if prefer is None else np.asarray(prefer, float)
        if score.shape != (len(texts),) or not np.isfinite(score).all():
            raise ValueError(f"prefer must be {len(texts)} finite numbers, one per text")
        hashes, bounds = self.shingles(texts)
        root = self._roots(hashes, bounds, self.signatures(hashes, bounds))

        order = np.lexsort((np.arange(len(root)), -score, root))
        first = order[np.concatenate([[True], root[order][1:] != root[order][:-1]])[: len(order)]]
        stands = np.empty(len(root), np.int64)
        stands[root[first]] = first
        nearest = stands[root]
        size = np.bincount(root, minlength=len(root))[root]
        number = np.full(len(root), -1, np.int64)
        heads = np.unique(root[size > 1])
        number[heads] = np.arange(len(heads))
        group = np.where(size > 1, number[root], -1)

        jaccard, reasons = np.ones(len(root)), []
        for i, head in enumerate(nearest.tolist()):
            if head == i:
                others = int(size[i]) - 1
                what = f"stands for {others:,} near-duplicate{'s' * (others > 1)}" if others else "no near-duplicate"
                reasons.append(f"kept: {what}")
                continue
            jaccard[i] = _jaccard(hashes, bounds, i, head)
            by = "" if jaccard[i] >= self.threshold else ", by way of others"
            reasons.append(f"dropped: near-duplicate (Jaccard {jaccard[i]:.2f}{by}) of row {head + 1}")
        return NearDuplicates(np.flatnonzero(nearest == np.arange(len(root))), jaccard, reasons, nearest, group=group)

    def shingles(self, texts: Sequence[str]) -> tuple[Hashes, NDArray[np.int64]]:
        """Shingle sets as sorted 64-bit hashes.

        Args:
            texts: N texts.

        Returns:
            [S] hashes and [N+1] bounds; the set of text i lies in hashes from bounds[i] to bounds[i+1].

        Raises:
            ValueError: When a single text was given.
        """
        if isinstance(texts, str):
            raise ValueError("a sequence of texts is needed, and this is one text: write [text]")
        known = _Known()
        split: Callable[[str], Any] = _WORD.findall if self.unit == "words" else lambda text: " ".join(text.split())
        parts: list[Hashes] = []
        sizes = [0]
        for start in range(0, len(texts), 1024):
            lists = [split(text.lower()) for text in texts[start : start + 1024]]
            counts = np.array([len(each) for each in lists], np.int64)
            found = np.fromiter(map(known.__getitem__, chain.from_iterable(lists)), np.uint64, int(counts.sum()))
            hashes, bounds = _rolled(found, counts, self.shingle)
            text = np.repeat(np.arange(len(lists)), np.diff(bounds))
            order = np.lexsort((hashes, text))
            hashes, text = hashes[order], text[order]
            new = np.concatenate([[True], (hashes[1:] != hashes[:-1]) | (text[1:] != text[:-1])])[: len(hashes)]
            parts.append(hashes[new])
            sizes += np.bincount(text[new], minlength=len(lists)).tolist()
        return np.concatenate([np.empty(0, np.uint64), *parts]), np.cumsum(sizes)

    def signatures(self, hashes: Hashes, bounds: NDArray[np.int64]) -> NDArray[np.uint32]:
        """First shingles under every order.

        Args:
            hashes: [S] shingle hashes.
            bounds: [N+1] where texts begin.

        Returns:
            [N, P]; rows of texts without shingles are the largest number.
        """
        rng = np.random.default_rng(self.seed)
        factors = rng.integers(0, 1 << 64, self.permutations, np.uint64, endpoint=False) | np.uint64(1)
        offsets = rng.integers(0, 1 << 64, self.permutations, np.uint64, endpoint=False)
        result = np.full((len(bounds) - 1, self.permutations), np.iinfo(np.uint32).max, np.uint32)
        filled = np.flatnonzero(np.diff(bounds))
        low = 0
        while low < len(filled):
            begin = bounds[filled[low]]
            high = max(low + 1, int(np.searchsorted(bounds[filled + 1], begin + BLOCK, "right")))
            rows = filled[low:high]
            part = mixed(hashes[begin : bounds[rows[-1] + 1]])
            cuts = bounds[rows] - begin
            for place, (factor, offset) in enumerate(zip(factors, offsets, strict=True)):
                first = np.minimum.reduceat(part * factor + offset, cuts)
                result[rows, place] = first >> np.uint64(32)
            low = high
        return result

    def _roots(self, hashes: Hashes, bounds: NDArray[np.int64], signatures: NDArray[np.uint32]) -> NDArray[np.int64]:
        """[N] the first row of every row's connected component."""
        parent = np.arange(len(signatures))
        filled = np.flatnonzero(np.diff(bounds))
        bands, width = self.bands
        for band in range(bands):
            key = np.zeros(len(filled), np.uint64)
            for place in range(band * width, (band + 1) * width):
                key = mixed(key ^ signatures[filled, place].astype(np.uint64))
            order = np.argsort(key, kind="stable")
            rows, key = filled[order], key[order]
            for _ in range(LEADERS):
                new = np.concatenate([[True], key[1:] != key[:-1]])[: len(key)]
                leader = rows[np.flatnonzero(new)[np.cumsum(new) - 1]] if len(rows) else rows
                parent = _flat(parent)
                apart = parent[rows] != parent[leader]
                alike = ~apart & ~new
                check = np.flatnonzero(apart)
                alike[check] = self._alike(hashes, bounds, signatures, rows[check], leader[check], parent)
                # a leader has met its whole bucket, and what is like it need not lead
                rest = ~alike & ~new
                rows, key = rows[rest], key[rest]
                if not len(rows):
                    break
        return _flat(parent)

    def _alike(
        self, hashes: Any, bounds: Any, signatures: Any, rows: Any, leaders: Any, parent: Any
    ) -> NDArray[np.bool_]:
        """Which rows are near-duplicates of their leaders; joins them in `parent`."""
        result = np.zeros(len(rows), bool)
        deviation = (self.threshold * (1 - self.threshold) / self.permutations) ** 0.5
        least = self.threshold - (5 * deviation if self.verify == "exact" else 1e-9)
        for start in range(0, len(rows), 4096):
            part = slice(start, start + 4096)
            result[part] = (signatures[rows[part]] == signatures[leaders[part]]).mean(1) >= least
        for i in np.flatnonzero(result):
            row, leader = int(rows[i]), int(leaders[i])
            if self.verify == "exact" and _jaccard(hashes, bounds, row, leader) < self.threshold:
                result[i] = False
                continue
            a, b = _root(parent, row), _root(parent, leader)
            parent[max(a, b)] = min(a, b)
        return result


class _Known(dict[str, int]):
    """Hashes of words met before."""

    def __missing__(self, word: str) -> int:
        self[word] = value = _digest(word)
        return value


def _digest(word: str) -> int:
    """The same 64 bits in every process."""
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _rolled(units: Hashes, counts: NDArray[np.int64], n: int) -> tuple[Hashes, NDArray[np.int64]]:
    """Hashes of all runs of n units within each text, or of the whole text where it is shorter."""
    begin = np.cumsum(counts) - counts
    sizes = np.where(counts > 0, np.maximum(counts - n + 1, 1), 0)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    text = np.repeat(np.arange(len(counts)), sizes)
    place = np.arange(bounds[-1]) - bounds[text] + begin[text]
    end = begin[text] + counts[text]
    value = np.zeros(len(place), np.uint64)
    for k in range(n):
        inside = place + k < end
        more = units[np.minimum(place + k, max(len(units) - 1, 0))]
        value = np.where(inside, mixed(value * np.uint64(0x9E3779B97F4A7C15) + more), value)
    return value, bounds


def _jaccard(hashes: Hashes, bounds: NDArray[np.int64], a: int, b: int) -> float:
    """Jaccard index of two shingle sets."""
    one, other = hashes[bounds[a] : bounds[a + 1]], hashes[bounds[b] : bounds[b + 1]]
    at = np.searchsorted(other, one)
    shared = int((other[np.minimum(at, len(other) - 1)] == one).sum())
    return shared / (len(one) + len(other) - shared)


def _flat(parent: NDArray[np.int64]) -> NDArray[np.int64]:
    """Every row's root."""
    while ((up := parent[parent]) != parent).any():
        parent = up
    return parent


def _root(parent: NDArray[np.int64], row: int) -> int:
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = int(parent[row])
    return row
