"""The F1 of every class, averaged: the score for classes of unequal size.

With tp, gold and predicted counts per class c,

    F1_c = 2 tp_c / (gold_c + predicted_c),          macro-F1 = mean over classes of F1_c

so that a class of 5 items counts as much as one of 500, and always answering the majority class scores badly.

Which classes? Without `labels`: those that occur as gold or as prediction, as in scikit-learn. With `labels`:
exactly those; a prediction outside of them (a language model can say anything) counts against its gold class and
opens no class of its own. A listed class that neither occurs nor is predicted has F1 0/0, set to `zero_division`
(0.0 as in scikit-learn; nan leaves the class out of the mean).

Macro-F1 is no mean over items, so the interval resamples items and recomputes it from class counts, all resamples
in one matrix product. Without `labels`, a resample averages over the classes that occur in it. Per-item scores are
1 where the label was right, for `flips`.

Source: Sokolova & Lapalme 2009, "A systematic analysis of performance measures", and scikit-learn's f1_score, to
which tests hold it equal (Opitz & Burst 2019, arXiv 1911.03347, discuss the two macro-F1s: this is the mean of F1s).
Empty-set policy: no items is an error (see `metric`).
Cost: N x 3C counts. Relations: `choice` where a label has a text the model can score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from residency.evaluate.metric import Item, Metric
from residency.stats import Array


class MacroF1(Metric):
    """Macro-averaged F1. State: gold and predicted label per item.

    Args:
        labels: The classes to average over; None means those that occur.
        zero_division: F1 of a listed class that never occurs: 0.0, 1.0 or nan (left out).
    """

    name: ClassVar[str] = "macro-f1"

    def __init__(self, labels: Sequence[str] | None = None, zero_division: float = 0.0) -> None:
        super().__init__()
        if labels is not None and (not labels or len(set(labels)) < len(labels)):
            raise ValueError(f"labels must be distinct and at least one, not {list(labels)}")
        self.labels = None if labels is None else list(labels)
        self.zero_division = zero_division

    def update(self, id: str, prediction: str, target: str) -> None:
        """Record one item's label; a repeated id raises DataError."""
        self.add(Item(id, float(prediction == target), prediction=prediction, target=target))

    def parts(self, items: Sequence[Item]) -> Array:
        """Per item and class: hit, gold, predicted. [N, 3C]."""
        said = np.array([item.prediction or "" for item in items], dtype=object)[:, None]
        gold = np.array([item.target or "" for item in items], dtype=object)[:, None]
        classes = np.array(self.labels or sorted({*said.ravel(), *gold.ravel()}), dtype=object)[None, :]
        is_said, is_gold = said == classes, gold == classes  # [N, C]
        return np.concatenate([is_said & is_gold, is_gold, is_said], axis=1).astype(np.float64)

    def statistic(self, totals: Array) -> Array:
        """Macro-F1 [R] of class counts [R, 3C]."""
        hit, gold, said = np.split(totals, 3, axis=1)
        absent = np.nan if self.labels is None else self.zero_division
        with np.errstate(invalid="ignore"):
            f1 = np.where(gold + said > 0, 2 * hit / (gold + said), absent)
        seen = ~np.isnan(f1)
        sums = np.where(seen, f1, 0.0).sum(1)
        return np.divide(sums, seen.sum(1), out=np.full(len(f1), np.nan), where=seen.any(1))
