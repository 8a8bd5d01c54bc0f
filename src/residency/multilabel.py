"""Sets of labels: their text form, their multi-hot matrix, and the scores and thresholds that belong to them.

A row with several labels answers with their names, sorted and joined by " | " (`join`, `split`); a classifier of label
sets says the same text, so that an examination compares texts and never a list of columns.

    macro-F1   mean over classes of 2 tp_c / (gold_c + said_c), 0 where a class neither occurs nor is said
    macro AUC  mean over classes of P(score of a row with the class > score of a row without), ties counting half,
               over the classes that have rows of both kinds

Both are what scikit-learn's `f1_score(average="macro")` and `roc_auc_score(average="macro")` compute, to which tests
hold them equal; the benchmark protocol of FewAsp averages them over episodes (Hu et al., "Multi-Label Few-Shot
Learning for Aspect Category Detection", ACL 2021, arXiv 2105.14174).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

SEPARATOR = " | "
"""What stands between the labels of one answer."""


def join(labels: Iterable[str]) -> str:
    """A label set as text: sorted names with `SEPARATOR` between them."""
    return SEPARATOR.join(sorted(set(labels)))


def split(text: str) -> frozenset[str]:
    """The label set that `join` wrote; the empty text is the empty set."""
    return frozenset(part.strip() for part in text.split(SEPARATOR.strip()) if part.strip())


def multi_hot(sets: Sequence[Iterable[str]], classes: Sequence[str]) -> np.ndarray:
    """Which of `classes` each label set holds: bool [N, C]; labels outside of them are left out."""
    place = {c: i for i, c in enumerate(classes)}
    out = np.zeros((len(sets), len(classes)), bool)
    for row, labels in enumerate(sets):
        out[row, [place[label] for label in labels if label in place]] = True
    return out


def macro_f1(said: np.ndarray, gold: np.ndarray) -> float:
    """Macro-F1 of decisions against the truth, both bool [N, C]."""
    both = said.sum(0) + gold.sum(0)
    return float(np.mean(np.divide(2.0 * (said & gold).sum(0), both, out=np.zeros(len(both)), where=both > 0)))


def macro_auc(scores: np.ndarray, gold: np.ndarray) -> float:
    """Macro AUC of scores [N, C] against bool [N, C]; nan when no class has rows of both kinds."""
    found = []
    for s, y in zip(np.asarray(scores, np.float64).T, gold.T, strict=True):
        if 0 < y.sum() < len(y):
            order = np.unique(s, return_inverse=True)[1]
            counts = np.bincount(order)
            rank = (np.cumsum(counts) - (counts - 1) / 2)[order]  # ranks from 1, ties sharing their mean
            n = y.sum()
            found.append((rank[y].sum() - n * (n + 1) / 2) / (n * (len(y) - n)))
    return float(np.mean(found)) if found else float("nan")


def decide(scores: np.ndarray, threshold: float, *, least_one: bool = False) -> np.ndarray:
    """Decisions bool [N, C]: every class whose score reaches the threshold; with `least_one` the best class too."""
    said = scores >= threshold
    if least_one and scores.shape[1]:
        said[np.arange(len(scores)), scores.argmax(1)] = True
    return said


def thresholds_of(scores: np.ndarray, most: int = 200) -> np.ndarray:
    """Thresholds worth trying: midpoints between the distinct scores, at most `most` of them by even ranks."""
    found = np.unique(np.asarray(scores, np.float64))
    if not len(found):
        return np.array([0.5])
    middle = np.concatenate([found[:1], (found[1:] + found[:-1]) / 2])
    return middle if len(middle) <= most else middle[np.linspace(0, len(middle) - 1, most).round().astype(int)]


def threshold_curve(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], *, least_one: bool = False, most: int = 200
) -> tuple[np.ndarray, np.ndarray]:
    """Mean macro-F1 over parts (episodes, or one validation set) at every threshold worth trying.

    Args:
        parts: (scores [N, C], truth bool [N, C]) of each.
        least_one: See `decide`.
        most: See `thresholds_of`.

    Returns:
        The thresholds, rising, and the mean macro-F1 at each.
    """
    if not parts:
        raise ValueError("a threshold needs scored rows: give at least one (scores, truth) pair")
    tried = thresholds_of(np.concatenate([s.ravel() for s, _ in parts]), most)
    f1 = [[macro_f1(decide(s, t, least_one=least_one), y) for s, y in parts] for t in tried]
    return tried, np.mean(f1, axis=1)


def best_threshold(parts: Sequence[tuple[np.ndarray, np.ndarray]], *, least_one: bool = False) -> float:
    """The threshold of the highest mean macro-F1; the middle of the plateau where several tie."""
    tried, f1 = threshold_curve(parts, least_one=least_one)
    best = tried[f1 >= f1.max() - 1e-12]
    return float(best[len(best) // 2])
