"""The F1 of every label, averaged, where an item has a set of labels.

Items are compared as sets: a label counts as hit where it is in both. With tp, gold and predicted counts per label c,

    F1_c = 2 tp_c / (gold_c + predicted_c),          macro-F1 = mean over labels of F1_c

so that a rare label counts as much as a common one. Sets come as texts, labels joined by " | " (see
`residency.multilabel`); the empty text is the empty set. The mean runs over the labels that occur as gold or as
prediction, or over `labels` where they are given; a listed label that never occurs has F1 0 (scikit-learn's default).
Where every set is empty and nothing was said, the score is 1 (our choice). The interval resamples items and recomputes
all counts. An item's own score is the F1 of its two sets (both empty: 1), and it is right, for `flips`, where it is 1:
every label found and none too many.

Source: Lewis, Yang, Rose, Li, "RCV1: A New Benchmark Collection for Text Categorization Research", JMLR 2004
(macro-averaged F1 of label sets); the score of FewAsp's protocol (Hu et al., ACL 2021, arXiv 2105.14174), there
averaged over episodes. Equal to scikit-learn's `f1_score` on multi-hot matrices. Official code: none needed.
Empty-set policy: no items is an error (see `metric`).
Cost: N × 3C counts. Relations: `macro-f1` where an item has one label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from residency import multilabel
from residency.evaluate.macro_f1 import MacroF1
from residency.evaluate.metric import Item
from residency.stats import Array


class MultilabelF1(MacroF1):
    """Macro-averaged F1 of label sets. State: gold and predicted set per item, as text.

    Args:
        labels: The labels to average over; None means those that occur.
        zero_division: F1 of a listed label that never occurs: 0.0, 1.0 or nan (left out).
    """

    name: ClassVar[str] = "multilabel-f1"
    threshold: ClassVar[float | None] = 1.0

    def update(self, id: str, prediction: str, target: str) -> None:
        """Record one item's label sets, as `multilabel.join` writes them; a repeated id raises DataError."""
        said, gold = multilabel.split(prediction), multilabel.split(target)
        score = 2 * len(said & gold) / (len(said) + len(gold)) if said or gold else 1.0
        self.add(Item(id, score, prediction=multilabel.join(said), target=multilabel.join(gold)))

    def parts(self, items: Sequence[Item]) -> Array:
        """Per item and label: hit, gold, predicted. [N, 3C]."""
        said = [multilabel.split(item.prediction or "") for item in items]
        gold = [multilabel.split(item.target or "") for item in items]
        classes = self.labels or sorted(set().union(*said, *gold)) or [""]
        is_said, is_gold = multilabel.multi_hot(said, classes), multilabel.multi_hot(gold, classes)
        return np.concatenate([is_said & is_gold, is_gold, is_said], axis=1).astype(np.float64)

    def statistic(self, totals: Array) -> Array:
        """Macro-F1 [R] of label counts [R, 3C]; 1 where no label occurs and none is said."""
        return np.nan_to_num(super().statistic(totals), nan=1.0)
