"""DSIR: how much likelier the n-grams of a row are in the trusted rows than in the pool.

A text is its words and its runs of 2, …, n words, each hashed to one of B buckets; c_b is how often bucket b occurs.
Two bags, p of the trusted rows and q of the pool, give every row the logarithm of an importance weight

    log w = Σ_b c_b (log p_b − log q_b)

Drawing rows without replacement with probability in proportion to w (Gumbel noise on log w, the largest are kept)
turns the pool into a sample that looks like the trusted rows, where keeping the largest w would look for the most
typical row again and again.

Smoothing. With counts t (trusted) and r (pool) of T and R n-grams, m = (t + r) / (T + R) their common bag and
λ = prior / (T + prior),

    p = (1 − λ) t / T + λ m,          q = (1 − λ) r / R + λ m          (our choice: Jelinek-Mercer, λ as Dirichlet's)

so the ratio of a bucket that no trusted row has is about λ, whatever B is; of one that nobody has it is 1; and equal
bags give log w = 0 exactly. The paper's code adds 1e-8 to both sides instead: with few trusted rows an n-gram they do
not have then costs log 1e-8 plus its frequency, and the weight counts little else.

With the default prior, one per bucket, rows drawn by 10 trusted ones are to 83, 55 and 55 % of the same source (three
sources of MedQuAD), and with a prior of 10, hardly any smoothing, to 25, 33 and 7 % (benchmarks/dsir.py).

log w is a sum over n-grams, so it grows with the length of a row in both directions; `per: n-gram` divides by their
number (our choice; the paper has the sum). That ranks rows, but is too flat to draw by. No row is left out for being
short (the paper's code drops all below 100 words, that is most instructions); one without a word has no score.

Words are runs of letters and digits or of punctuation, in lower case, as in the paper's code. Their hashes are
polynomials of the characters, mixed, and mixed again along a run: no word is ever made, so time does not depend on how
many different ones there are, and buckets are the same in every process.

Paper: Xie, Santurkar, Ma & Liang, "Data Selection for Language Models via Importance Resampling", NeurIPS 2023, arXiv
2302.03169. Official code: p-lambda/dsir (package data-selection 1.0.3), whose sha256 of every n-gram and array of B
numbers per row are most of its time.

Cost: linear in the text, 0.15 µs per word and pass; `score` reads the pool once and holds 6 bytes per n-gram, a `Ratio`
reads it twice and holds B numbers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from residency.curate.hashing import mixed
from residency.curate.scoring import Array, Score

BLOCK = 32
"""Texts hashed at a time: their characters fit into the processor's cache."""
FACTOR = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(int(FACTOR), -1, 1 << 64))
_SPACE = 0


class DSIR(Score):
    """The logarithm of the importance weight of a row."""

    needs = ("texts", "example_texts")
    alone = False

    ngram: int = Field(2, ge=1, le=8)
    """Longest run of words that is counted."""
    buckets: int = Field(10_000, ge=2, le=1 << 30)
    """B, numbers that n-grams are hashed to."""
    prior: float = Field(10_000.0, gt=0)
    """N-grams of the common bag that the trusted rows are mixed with: more trust them less."""
    per: Literal["row", "n-gram"] = "row"
    """The whole row's weight, or its mean per n-gram, which does not depend on the row's length."""

    def score(self, texts: Sequence[str], example_texts: Sequence[str]) -> Array:
        """Weigh the rows of a pool.

        Args:
            texts: The pool, N texts.
            example_texts: K texts of trusted rows.

        Returns:
            [N] log w; NaN for a text without a word.

        Raises:
            ValueError: When the trusted rows have no word.
        """
        ratio = Ratio(self)
        ratio.update_target(example_texts)
        kept = list(ratio.hashed(texts))
        for part in kept:
            ratio.raw += np.bincount(part.buckets, minlength=self.buckets)
        return ratio.weights(kept)


class Part(NamedTuple):
    """The n-grams of some rows: of each its bucket and its row, counted from 0; and the number of rows."""

    buckets: NDArray[np.int32]
    rows: NDArray[np.int16]
    size: int


class Ratio:
    """The two bags, filled and used in parts: for a pool that does not fit into memory.

    Call `update_raw` with parts of the pool and `update_target` with the trusted rows, in any order; then `weigh` parts
    of the pool. All parts give what `DSIR.score` gives of the whole.

    Args:
        params: How n-grams are counted and smoothed.
    """

    def __init__(self, params: DSIR) -> None:
        self.params = params
        self.raw = np.zeros(params.buckets, np.int64)
        self.target = np.zeros(params.buckets, np.int64)

    def update_raw(self, texts: Iterable[str]) -> None:
        """Count the n-grams of rows of the pool."""
        for part in self.hashed(texts):
            self.raw += np.bincount(part.buckets, minlength=len(self.raw))

    def update_target(self, texts: Iterable[str]) -> None:
        """Count the n-grams of trusted rows."""
        for part in self.hashed(texts):
            self.target += np.bincount(part.buckets, minlength=len(self.target))

    def weigh(self, texts: Iterable[str]) -> Array:
        """[N] log w of texts; NaN without a word.

        Raises:
            ValueError: When no trusted row, or no row of the pool, with a word was counted before.
        """
        return self.weights(self.hashed(texts))

    def log_ratio(self) -> Array:
        """[B] log p − log q.

        Raises:
            ValueError: When one of the bags is empty.
        """
        t, r = float(self.target.sum()), float(self.raw.sum())
        if not t or not r:
            raise ValueError(f"the {'pool has' if t else 'trusted rows have'} no word: DSIR compares texts of both")
        share = self.params.prior / (t + self.params.prior)
        common = share * ((self.target + self.raw) / (t + r))
        result = np.zeros(len(self.raw))
        met = common > 0
        p = (1 - share) * (self.target[met] / t) + common[met]
        q = (1 - share) * (self.raw[met] / r) + common[met]
        result[met] = np.log(p) - np.log(q)
        return result

    def weights(self, parts: Iterable[Part]) -> Array:
        """[N] log w of rows that are hashed already."""
        found: list[Array] = [np.empty(0)]
        ratio: Array | None = None
        for part in parts:
            ratio = self.log_ratio() if ratio is None else ratio
            sums: Array = np.bincount(part.rows, ratio[part.buckets], part.size).astype(float)
            counts = np.bincount(part.rows, minlength=part.size)
            sums[counts == 0] = np.nan
            found.append(sums / np.maximum(counts, 1) if self.params.per == "n-gram" else sums)
        return np.concatenate(found)

    def hashed(self, texts: Iterable[str]) -> Iterator[Part]:
        """The n-grams of every `BLOCK` texts.

        Raises:
            ValueError: When a single text was given.
        """
        if isinstance(texts, str):
            raise ValueError("a sequence of texts is needed, and this is one text: write [text]")
        modulus = np.uint64(self.params.buckets)
        stream = iter(texts)
        while block := list(islice(stream, BLOCK)):
            words, row = hashed_words(block)
            run = words
            buckets, rows = [words % modulus], [row]
            for k in range(1, min(self.params.ngram, len(words))):
                run = mixed(run[:-1] * FACTOR + words[k:])
                inside = row[k:] == row[:-k]
                buckets.append(run[inside] % modulus)
                rows.append(row[k:][inside])
            yield Part(np.concatenate(buckets).astype(np.int32), np.concatenate(rows), len(block))


def hashed_words(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int16]]:
    """Hashes of all words of some texts, and the text of each.

    The word of characters c_0, c_1, … has the hash mix(Σ (c_k + 1) · F^k mod 2^64), all words at once: runs of
    characters of one kind are found by comparing neighbours, and those of white space dropped.
    """
    lowered = [text.lower() for text in texts]
    letters = np.frombuffer("\n".join(lowered).encode("utf-32-le", "surrogatepass"), np.uint32)
    if not len(letters):
        return np.empty(0, np.uint64), np.empty(0, np.int16)
    kind = _kinds()[letters]
    starts = np.concatenate([[0], np.flatnonzero(kind[1:] != kind[:-1]) + 1])
    lengths = np.diff(starts, append=len(letters))
    place = np.arange(len(letters)) - np.repeat(starts, lengths)
    powers = np.cumprod(np.full(lengths.max(), FACTOR, np.uint64)) * _INVERSE
    found = np.add.reduceat((letters.astype(np.uint64) + np.uint64(1)) * powers[place], starts)
    word = kind[starts] != _SPACE
    ends = np.cumsum([len(text) + 1 for text in lowered])
    row = np.searchsorted(ends, starts[word], "right").astype(np.int16)
    return mixed(found[word]), row


@lru_cache(1)
def _kinds() -> NDArray[np.uint8]:
    """Of every character whether it is white space, part of a word, or neither, as regular expressions have it."""
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    result = np.full(len(every), _SPACE + 2, np.uint8)
    for match in re.finditer(r"(\w+)|\s+", every):
        result[match.start() : match.end()] = _SPACE + 1 if match[1] else _SPACE
    return result
