"""Cases of the evaluate stage."""

from __future__ import annotations

import math
from typing import Any

from residency.testing.roles import MetricCase


class ChoiceCase(MetricCase):
    """Reference: counting by hand."""

    name = "choice-accuracy"
    best = 1.0

    def new(self) -> Any:
        from residency.evaluate.choice import ChoiceAccuracy

        return ChoiceAccuracy()

    def updates(self, seed: int = 0) -> list[tuple[Any, ...]]:
        import random

        rng = random.Random(seed)
        scores = [([rng.gauss(0, 1) for _ in range(4)], [rng.gauss(0, 1) for _ in range(4)]) for _ in range(30)]
        return [(f"i{i:02}", list("wxyz"), a, b) for i, (a, b) in enumerate(scores)]

    def perfect(self) -> list[tuple[Any, ...]]:
        return [(f"i{i:02}", ["a", "b"], [-1.0, -1.0], [-3.0, -2.0]) for i in range(5)]

    def reference(self, updates: list[tuple[Any, ...]]) -> float:
        right = [all(c[0] - u[0] > c[k] - u[k] for k in (1, 2, 3)) for _, _, c, u in updates]
        return sum(right) / len(right)


class BitsCase(MetricCase):
    """Reference: bits over bytes of all answers together."""

    name = "bits-per-byte"
    best = 0.0

    def new(self) -> Any:
        from residency.evaluate.bits_per_byte import BitsPerByte

        return BitsPerByte()

    def updates(self, seed: int = 0) -> list[tuple[Any, ...]]:
        import random

        rng = random.Random(seed)
        return [(f"i{i:02}", -rng.expovariate(0.05), "é" * rng.randint(1, 40)) for i in range(30)]

    def perfect(self) -> list[tuple[Any, ...]]:
        return [("i0", 0.0, "sure"), ("i1", 0.0, "certain")]

    def reference(self, updates: list[tuple[Any, ...]]) -> float:
        nats = -sum(logprob for _, logprob, _ in updates)
        return nats / math.log(2) / sum(len(answer.encode()) for _, _, answer in updates)


class ExactMatchCase(MetricCase):
    """Reference: SQuAD's normalisation, written out."""

    name = "exact-match"
    best = 1.0

    def new(self) -> Any:
        from residency.evaluate.exact_match import ExactMatch

        return ExactMatch()

    def updates(self, seed: int = 0) -> list[tuple[Any, ...]]:
        forms = {"a": "The cat!", "b": "cat", "c": " a  CAT ", "d": "dog"}
        return [(f"i{i:02}", forms[said], "cat") for i, said in enumerate(_labels(seed))]

    def perfect(self) -> list[tuple[Any, ...]]:
        return [("i0", "An apple.", "apple"), ("i1", "x", "X")]

    def reference(self, updates: list[tuple[Any, ...]]) -> float:
        return sum("cat" in said.lower() for _, said, _ in updates) / len(updates)


class RougeLCase(MetricCase):
    """Reference: the longest common subsequence by recursion over all subsets of the shorter text."""

    name = "rouge-l"
    best = 1.0

    def new(self) -> Any:
        from residency.evaluate.rouge_l import RougeL

        return RougeL()

    def updates(self, seed: int = 0) -> list[tuple[Any, ...]]:
        letters = iter(_labels(seed, 30 * 11))
        take = [next(letters) for _ in range(30 * 11)]
        return [
            (f"i{i:02}", " ".join(take[11 * i : 11 * i + 5]), " ".join(take[11 * i + 5 : 11 * i + 11]))
            for i in range(30)
        ]

    def perfect(self) -> list[tuple[Any, ...]]:
        return [("i0", "The fee is due.", "the fee is due")]

    def reference(self, updates: list[tuple[Any, ...]]) -> float:
        def longest(a: tuple[str, ...], b: tuple[str, ...]) -> int:
            if not a or not b:
                return 0
            if a[0] == b[0]:
                return 1 + longest(a[1:], b[1:])
            return max(longest(a[1:], b), longest(a, b[1:]))

        values = []
        for _, said, gold in updates:
            a, b = tuple(said.split()), tuple(gold.split())
            shared = longest(a, b)
            precision, recall = shared / len(a), shared / len(b)
            values.append(2 * precision * recall / (precision + recall) if shared else 0.0)
        return sum(values) / len(values)


class MacroF1Case(MetricCase):
    """Reference: one class after the other, from counts."""

    name = "macro-f1"
    best = 1.0

    def new(self) -> Any:
        from residency.evaluate.macro_f1 import MacroF1

        return MacroF1()

    def updates(self, seed: int = 0) -> list[tuple[Any, ...]]:
        said, gold = _labels(seed), _labels(seed + 100, classes="aab")
        return [(f"i{i:02}", s, g) for i, (s, g) in enumerate(zip(said, gold, strict=True))]

    def perfect(self) -> list[tuple[Any, ...]]:
        return [("i0", "x", "x"), ("i1", "y", "y")]

    def reference(self, updates: list[tuple[Any, ...]]) -> float:
        pairs = [(s, g) for _, s, g in updates]
        classes = {label for pair in pairs for label in pair}
        values = []
        for c in classes:
            hit = sum(s == g == c for s, g in pairs)
            values.append(2 * hit / (sum(s == c for s, _ in pairs) + sum(g == c for _, g in pairs)))
        return sum(values) / len(values)


class PearsonCase(MetricCase):
    """Reference: scipy.stats.pearsonr."""

    name = "pearson"
    best = 1.0

    def new(self) -> Any:
        from residency.evaluate.pearson import Pearson

        return Pearson()

    def updates(self, seed: int = 0) -> list[tuple[Any, ...]]:
        import random

        rng = random.Random(seed)
        truth = [1000 + rng.gauss(0, 1) for _ in range(30)]
        return [(f"i{i:02}", repr(0.5 * t + rng.gauss(0, 0.4)), repr(t)) for i, t in enumerate(truth)]

    def perfect(self) -> list[tuple[Any, ...]]:
        return [("i0", "1.5", "3"), ("i1", "2.5", "5"), ("i2", "0", "0")]

    def reference(self, updates: list[tuple[Any, ...]]) -> float:
        from scipy.stats import pearsonr

        return float(pearsonr([float(p) for _, p, _ in updates], [float(t) for _, _, t in updates]).statistic)

    def check_constant_predictions(self) -> None:
        """A prediction that never varies correlates with nothing: 0, not NaN."""
        assert self._fed([(f"i{i}", "2.5", str(i)) for i in range(5)]).compute().value == 0.0


def _labels(seed: int, n: int = 30, classes: str = "abcd") -> list[str]:
    import random

    rng = random.Random(seed)
    return [rng.choice(classes) for _ in range(n)]
