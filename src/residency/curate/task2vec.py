"""Task2Vec: sets of rows as vectors of Fisher information, and how far they are from the trusted rows.

A softmax head on embeddings x [D] gives p = softmax(W x + b) over C classes. The diagonal of its Fisher information on
a set S of rows, over the weights w_cd, has a closed form (labels are drawn from the model's own p, so S needs none):

    F_cd(S) = E_{x in S} E_{y ~ p} (∂ log p_y / ∂ w_cd)² = E_{x in S}  p_c (1 − p_c) x_d²

It says which weights the set would pin down: on which features it decides between which classes. Two sets are compared
by the paper's symmetric distance, the cosine between their vectors over what they have together,

    d(S, S') = 1 − cos( F / (F + F'),  F' / (F + F') )

which does not change when both are scaled. The score of a row is the smallest distance of the sets of its tags (a
tag's set is the rows that carry it) to the set of trusted rows: which sources, topics or skills are like the task. Low
is near.

The head is one for all sets, on centred embeddings, in closed form: linear discriminant analysis, W = Σ⁻¹ μ_c with the
classes' common covariance Σ shrunk by `shrink` of its mean variance, over all rows with labels (our choice; the paper
trains a head per task on a fixed network and takes the Fisher information of the network; with an encoder whose
embeddings are all that is kept, the head is the network). So small sets need no head of their own, and sets of one
class have a vector. A head that is sure of every row has no information left, only rounding and chance: hence much
shrinking (planted sources are found in 117 of 120 draws with 10, in 81 with 0.1).

`diversity` is the mean distance of all pairs of sets (Miranda et al. 2023, arXiv 2306.13840, over batches of text).

Paper: Achille, Lam, Tewari et al., "Task2Vec: Task Embedding for Meta-Learning", ICCV 2019, arXiv 1902.03545. Official
code: awslabs/aws-cv-task2vec.

Cost: N D² + D³ for the head, N C D for the vectors, memory C D per tag.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from residency.curate.scoring import Array, Score


class Task2Vec(Score):
    """Distance of the nearest of a row's tagged sets to the trusted rows."""

    needs = ("embeddings", "labels", "tags", "example_embeddings", "example_labels")
    good = "low"
    alone = False

    shrink: float = Field(10.0, gt=0)
    """Variance added to that of every feature, in units of their mean: more make a head that is less sure."""

    def score(
        self,
        embeddings: NDArray[Any],
        labels: Sequence[str | None],
        tags: Sequence[Sequence[str]],
        trusted: NDArray[Any],
        trusted_labels: Sequence[str | None],
    ) -> Array:
        """Distances, equal for all rows with the same tags.

        Args:
            embeddings: [N, D].
            labels: N classes; rows with None do not train the head.
            tags: N lists of tags.
            trusted: [K, D].
            trusted_labels: K classes, or None.

        Returns:
            [N] between 0 and 1; NaN for a row without tags or embedding.

        Raises:
            ValueError: When lengths or widths disagree, there are no trusted rows, or fewer than two classes.
        """
        x, judges = np.asarray(embeddings, float), np.asarray(trusted, float)
        if x.ndim != 2 or judges.ndim != 2 or x.shape[1] != judges.shape[1]:
            raise ValueError(f"embeddings {x.shape} and example_embeddings {judges.shape} must be rows of one width")
        if not len(x) == len(labels) == len(tags) or len(judges) != len(trusted_labels):
            raise ValueError("embeddings, labels and tags must be as many; so must those of the trusted rows")
        both, names = np.concatenate([x, judges]), [*labels, *trusted_labels]
        there = np.isfinite(both).all(1)
        if not there[len(x) :].any():
            raise ValueError("no trusted row has an embedding: the distance is to their set")
        middle, weight, bias = head(both[there], [n for n, t in zip(names, there, strict=True) if t], self.shrink)
        target = fisher(judges[there[len(x) :]] - middle, weight, bias)
        members: dict[str, list[int]] = {}
        for i in np.flatnonzero(there[: len(x)]).tolist():
            for tag in tags[i]:
                members.setdefault(tag, []).append(i)
        near = {tag: distance(fisher(x[rows] - middle, weight, bias), target) for tag, rows in members.items()}
        return np.array(
            [
                min((near[tag] for tag in each), default=np.nan) if ok else np.nan
                for each, ok in zip(tags, there, strict=False)
            ],
            float,
        )


def head(rows: Array, labels: Sequence[str | None], shrink: float) -> tuple[Array, Array, Array]:
    """A linear discriminant of the rows that have labels.

    Args:
        rows: [N, D].
        labels: N classes or None.
        shrink: Share of the mean variance that is added to the diagonal.

    Returns:
        The mean [D] of those rows, weights [C, D] and biases [C] for rows less that mean; classes sorted by name.

    Raises:
        ValueError: When fewer than two classes have a row.
    """
    names = sorted({label for label in labels if label is not None})
    if len(names) < 2:
        raise ValueError(f"a head needs rows of at least two classes, found {len(names)}")
    x = rows[[label is not None for label in labels]]
    y = np.array([names.index(label) for label in labels if label is not None])
    middle = x.mean(0)
    x = x - middle
    means = np.stack([x[y == c].mean(0) for c in range(len(names))])
    inner = x - means[y]
    covariance = inner.T @ inner / len(x)
    scale = float(np.trace(covariance)) / x.shape[1] or 1.0
    weight = np.linalg.solve(covariance + shrink * scale * np.eye(x.shape[1]), means.T).T
    return middle, weight, np.log(np.bincount(y) / len(y)) - 0.5 * (weight * means).sum(1)


def fisher(rows: Array, weight: Array, bias: Array) -> Array:
    """[C, D] the diagonal Fisher information of a softmax head on rows [N, D]."""
    logits = rows @ weight.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return (p * (1 - p)).T @ rows**2 / len(rows)


def distance(one: Array, other: Array) -> float:
    """The symmetric distance of two vectors of Fisher information; 0 for equal ones."""
    both = one + other
    met = both > 0
    a, b = one[met] / both[met], other[met] / both[met]
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return max(0.0, 1 - float(a @ b) / length) if length else float(not np.array_equal(one, other))


def diversity(vectors: Sequence[Array]) -> float:
    """Mean distance of all pairs of sets; NaN for fewer than two."""
    found = [distance(a, b) for a, b in combinations(vectors, 2)]
    return float(np.mean(found)) if found else float("nan")
