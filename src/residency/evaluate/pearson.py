"""Pearson correlation: do predicted numbers rise and fall with the true ones?

The idea. A regression head's scale can be off while its order and spacing are right; correlation asks for the latter,
and is the score of GLUE's similarity task. Over items with prediction p and truth t,

    r = (N Σpt − Σp Σt) / sqrt((N Σp² − (Σp)²) (N Σt² − (Σt)²))         from −1 to 1

It is a function of six sums over the items, so a resample of the bootstrap costs six additions per item; p and t are
centred once beforehand, which leaves r as it is and the sums exact enough. Where either side does not vary, r is
undefined, and is reported as 0 (our choice): a constant prediction explains nothing.

Source: Pearson, "Note on regression and inheritance in the case of two parents", Proc. R. Soc. 1895; as a task's score:
Cer et al., "SemEval-2017 Task 1: Semantic Textual Similarity", 2017, arXiv 1708.00055. Equal to `scipy.stats.pearsonr`.
Official code: none needed.
Empty-set policy: no items is an error (see `metric`).
Cost: N × 6 numbers. Relations: `macro-f1` where the labels are classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from residency.errors import DataError
from residency.evaluate.metric import Item, Metric
from residency.stats import Array


class Pearson(Metric):
    """Pearson's r of predicted and true numbers. State: both, as text, per item; the item's score is −|error|."""

    name: ClassVar[str] = "pearson"
    threshold: ClassVar[float | None] = None

    def update(self, id: str, prediction: str, target: str) -> None:
        """Record one item; both are numbers written out.

        Raises:
            DataError: A side is no finite number, or the id was scored before.
        """
        numbers = []
        for side, text in (("prediction", prediction), ("label", target)):
            try:
                numbers.append(float(text))
            except ValueError:
                numbers.append(math.nan)
            if not math.isfinite(numbers[-1]):
                raise DataError(f"the {side} {text!r} is not a number, and pearson compares numbers", where=id)
        self.add(Item(id, -abs(numbers[0] - numbers[1]), prediction=prediction, target=target))

    def parts(self, items: Sequence[Item]) -> Array:
        """Per item: 1, p, t, p², t², pt, both centred. [N, 6]."""
        both = np.array([[float(item.prediction or 0), float(item.target or 0)] for item in items])
        p, t = (both - both.mean(0)).T
        return np.stack([np.ones(len(p)), p, t, p * p, t * t, p * t], axis=1)

    def statistic(self, totals: Array) -> Array:
        """Correlations [R] of sums [R, 6]."""
        n, p, t, pp, tt, pt = totals.T
        spread = np.maximum(n * pp - p * p, 0) * np.maximum(n * tt - t * t, 0)
        tiny = 1e-12 * np.maximum(n * pp, 0) * np.maximum(n * tt, 0)
        varied = spread > tiny
        r = np.divide(n * pt - p * t, np.sqrt(spread), out=np.zeros(len(n)), where=varied)
        return np.round(r, 12)  # the same sums in another order differ in their last bits
