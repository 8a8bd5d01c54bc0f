"""How often a linear classifier that never saw a row gets its label right: AFLite's predictability.

Of m random partitions, each trains a linear classifier on a share of the rows' embeddings and predicts the rest:

    predictability(i) = #(right predictions of held-out row i) / #(partitions that held row i out)

AFLite removes the most predictable rows: what a linear probe finds in an embedding may be an artefact of how the rows
were made, and a model trained on the rest generalises better out of domain. The survey 2408.02085 reads the same
number the other way: a label that no classifier predicts may be wrong. Both ends are worth a look; rank by low for
the first, by high for the second.

The classifier is ridge regression on one-hot labels by default, in closed form (our choice; the paper uses logistic
regression, here `classifier: logistic`, much slower). A row's place in a partition is drawn from its content and the
seed, so it does not depend on the order of the rows, and equal rows stand on the same side: none is predicted from its
own copy.

Paper: Le Bras et al., "Adversarial Filters of Dataset Biases", ICML 2020, arXiv 2002.04108 (first in WinoGrande,
Sakaguchi et al., arXiv 1907.10641). Code: allenai/aflite-public, not consulted. The paper repeats filtering and
scoring; this is one round. Cost: m (N D² + D³) multiply-adds in float32 for ridge; memory N D.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from residency.curate.scoring import Array, Score


class AFLite(Score):
    """Share of right predictions of a row's label by classifiers that were not trained on it."""

    needs = ("embeddings", "labels")
    good = "low"
    alone = False

    partitions: int = Field(64, ge=1, le=10_000)
    """m, random partitions of the rows."""
    train: float = Field(0.8, gt=0, lt=1)
    """Share of the rows that a classifier is trained on."""
    classifier: Literal["ridge", "logistic"] = "ridge"
    """Closed form, or scikit-learn's logistic regression."""
    penalty: float = Field(1.0, gt=0)
    """Weight of the squared norm, of embeddings scaled to a mean squared length of 1 around their mean."""
    seed: int = Field(0, ge=0)
    """Of the partitions."""

    def score(self, embeddings: NDArray[Any], labels: Sequence[str | None]) -> Array:
        """Predictability of every row.

        Args:
            embeddings: [N, D], finite.
            labels: N labels; rows with None take no part.

        Returns:
            [N] between 0 and 1; NaN for a row without a label, or never held out.

        Raises:
            ValueError: When inputs differ in length or are not finite, or fewer than 2 classes or 4 rows are left.
        """
        if len(embeddings) != len(labels) or np.ndim(embeddings) != 2:
            raise ValueError(f"embeddings {np.shape(embeddings)} must be [N, D] for the {len(labels)} labels given")
        known = np.array([i for i, label in enumerate(labels) if label is not None], np.int64)
        classes = sorted({labels[i] or "" for i in known})
        if len(known) < 4 or len(classes) < 2:
            raise ValueError(f"{len(known)} labelled rows of {len(classes)} classes: at least 4 rows and 2 are needed")
        rows = np.asarray(embeddings[known], np.float32)
        if not np.isfinite(rows).all():
            raise ValueError("an embedding is not finite")
        y = np.array([classes.index(labels[i] or "") for i in known])
        keys = content_keys(rows, y, self.seed)
        order = np.argsort(keys, kind="stable")  # sums run in an order of their own, whatever that of the rows
        known, rows, y = known[order], rows[order], y[order]
        rows = rows - rows.mean(0)
        rows /= max(float(np.sqrt(np.square(rows).sum(1).mean())), 1e-12)
        right, held = np.zeros(len(rows)), np.zeros(len(rows))
        fit = _ridge if self.classifier == "ridge" else _logistic
        for trained in partitions(keys[order], self.partitions, self.train):
            if not trained.any():  # more copies of one row than are held out
                continue
            others = np.flatnonzero(~trained)
            held[others] += 1
            right[others] += fit(rows[trained], y[trained], rows[others], self.penalty) == y[others]
        result = np.full(len(labels), np.nan)
        with np.errstate(invalid="ignore"):
            result[known] = right / held
        return result


def content_keys(rows: NDArray[np.float32], labels: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """[N] numbers drawn from each row's content and a seed; equal rows have equal ones."""
    digests = (
        blake2b(row.tobytes() + int(y).to_bytes(8, "big"), digest_size=8, salt=seed.to_bytes(16, "big")).digest()
        for row, y in zip(np.ascontiguousarray(rows), labels, strict=True)
    )
    return np.frombuffer(b"".join(digests), np.uint64)


def partitions(keys: NDArray[np.uint64], count: int, train: float) -> Iterator[NDArray[np.bool_]]:
    """For each of `count` partitions, which of N rows train: the `train` share whose draws are smallest."""
    size = min(max(1, round(train * len(keys))), len(keys) - 1)
    for j in range(1, count + 1):
        # SplitMix64 (Steele, Lea & Flood 2014): a draw per key and partition
        z = keys + np.uint64(j * 0x9E3779B97F4A7C15 % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        yield z < np.partition(z, size)[size]  # equal rows at the border are held out together


def _ridge(x: NDArray[Any], y: NDArray[Any], new: NDArray[Any], penalty: float) -> NDArray[Any]:
    """Classes predicted by ridge regression on one-hot labels, with an intercept that is not penalised."""
    targets = np.eye(int(y.max()) + 1, dtype=np.float32)[y]
    mean, level = x.mean(0), targets.mean(0)
    centred = x - mean
    gram = (centred.T @ centred).astype(float) + penalty * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, (centred.T @ (targets - level)).astype(float))
    return ((new - mean) @ weights + level).argmax(1)


def _logistic(x: NDArray[Any], y: NDArray[Any], new: NDArray[Any], penalty: float) -> NDArray[Any]:
    """Classes predicted by scikit-learn's logistic regression."""
    from sklearn.linear_model import LogisticRegression

    if y.min() == y.max():
        return np.full(len(new), y[0])
    return LogisticRegression(C=1 / penalty, max_iter=1_000).fit(x, y).predict(new)
