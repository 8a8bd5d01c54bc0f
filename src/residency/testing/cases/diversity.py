"""Cases of the curate stage: how many different words, how far apart the rows are."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, ClassVar

from residency.testing.roles import Case
from residency.testing.rowroles import ScorerCase


class LexicalCase(ScorerCase):
    """Texts of few words, as token lists; references walk over them in plain loops."""

    def problem(self, seed: int = 0) -> tuple[Any]:
        import numpy as np

        rng = np.random.default_rng(seed)
        texts = [" ".join(f"w{'x' * int(w)}" for w in rng.zipf(1.4, n) % 40) for n in (90, 61, 150, 75, 3, 44)]
        return (texts,)

    def words(self, texts: list[str]) -> list[list[str]]:
        return [text.split() for text in texts]


class TypeTokenCase(LexicalCase):
    """Reference: the textbook formulas on Python sets."""

    name = "type-token"
    settings = tuple({"form": f} for f in ("ttr", "rttr", "cttr", "herdan", "summer", "dugast", "maas"))

    def reference(self, texts: Any, form: str) -> list[float]:
        found = []
        for n, u in ((len(t), len(set(t))) for t in self.words(texts)):
            log_n, log_u = math.log(n), math.log(u)
            found.append(
                {
                    "ttr": lambda n=n, u=u: u / n,
                    "rttr": lambda n=n, u=u: u / n**0.5,
                    "cttr": lambda n=n, u=u: u / (2 * n) ** 0.5,
                    "herdan": lambda n=log_n, u=log_u: u / n,
                    "summer": lambda n=log_n, u=log_u: math.log(u) / math.log(n) if u else math.nan,
                    "dugast": lambda n=log_n, u=log_u: n**2 / (n - u) if n > u else math.inf,
                    "maas": lambda n=log_n, u=log_u: (n - u) / n**2,
                }[form]()
            )
        return found


class MATTRCase(LexicalCase):
    """Reference: every window's set."""

    name = "mattr"
    settings = ({}, {"window": 40})

    def reference(self, texts: Any, window: int = 100) -> list[float]:
        def one(t: list[str]) -> float:
            ratios = [len(set(t[i : i + window])) / window for i in range(len(t) - window + 1)]
            return sum(ratios) / len(ratios) if ratios else math.nan

        return [one(t) for t in self.words(texts)]


class MTLDCase(LexicalCase):
    """Reference: the running ratio, word by word, in both directions."""

    name = "mtld"
    settings = ({}, {"threshold": 0.5})

    def reference(self, texts: Any, threshold: float = 0.72) -> list[float]:
        def one(words: list[str]) -> float:
            factors, seen, n = 0.0, set(), 0
            for word in words:
                seen.add(word)
                n += 1
                if len(seen) / n <= threshold:
                    factors, seen, n = factors + 1, set(), 0
            if n:
                factors += (1 - len(seen) / n) / (1 - threshold)
            return len(words) / (factors or 1)

        return [(one(t) + one(t[::-1])) / 2 for t in self.words(texts)]


class HDDCase(LexicalCase):
    """Reference: binomial coefficients as exact integers."""

    name = "hdd"
    settings = ({}, {"draws": 30})

    def reference(self, texts: Any, draws: int = 42) -> list[float]:
        def one(t: list[str]) -> float:
            if len(t) < draws:
                return math.nan
            all_draws = math.comb(len(t), draws)
            return sum(1 - math.comb(len(t) - f, draws) / all_draws for f in Counter(t).values()) / draws

        return [one(t) for t in self.words(texts)]


class VocDCase(LexicalCase):
    """Reference: scipy's least squares on the exact means."""

    name = "vocd"
    settings = ({}, {"smallest": 30, "largest": 40})
    tolerance = 1e-5

    def reference(self, texts: Any, smallest: int = 35, largest: int = 50) -> list[float]:
        import numpy as np
        from scipy.optimize import minimize_scalar

        def one(t: list[str]) -> float:
            if len(t) < largest:
                return math.nan
            k = np.arange(smallest, largest + 1)
            drawn = [
                sum(1 - math.comb(len(t) - f, n) / math.comb(len(t), n) for f in Counter(t).values()) / n for n in k
            ]

            def miss(log_d: float) -> float:
                d = math.exp(log_d)
                return float(np.square(d / k * (np.sqrt(1 + 2 * k / d) - 1) - drawn).sum())

            return math.exp(minimize_scalar(miss, bounds=(-3, 9), method="bounded", options={"xatol": 1e-12}).x)

        return [one(t) for t in self.words(texts)]


class DistinctCase(LexicalCase):
    """Reference: sets of tuples."""

    name = "distinct"
    settings = ({}, {"n": 2}, {"n": 2, "per": "ngram"}, {"n": 3})

    def reference(self, texts: Any, n: int = 1, per: str = "token") -> list[float]:
        found = []
        for t in self.words(texts):
            grams = [tuple(t[i : i + n]) for i in range(len(t) - n + 1)]
            total = len(t) if per == "token" else len(grams)
            found.append(len(set(grams)) / total if grams else math.nan)
        return found


class RarityCase(ScorerCase):
    """Reference: counts by a loop."""

    name = "rarity"

    def problem(self, seed: int = 0) -> tuple[Any]:
        return ([("a",), ("a", "b"), (), ("c",), ("a",), ("b",), ("b", "c"), ("a",), ("d",)],)

    def reference(self, tags: Any) -> list[float]:
        flat = [t for row in tags for t in row]
        own = {t: -math.log(flat.count(t) / len(flat)) for t in flat}
        return [sum(own[t] for t in row) / len(row) if row else math.nan for row in tags]


class EmbeddedRowsCase(ScorerCase):
    """Embeddings with a few near-copies."""

    def embeddings(self, seed: int = 0) -> Any:
        import numpy as np

        rows = np.random.default_rng(seed).standard_normal((30, 6)).astype(np.float32)
        rows[20:25] = rows[:5] + 1e-3
        return rows


class KNNCase(EmbeddedRowsCase):
    """Reference: all distances, sorted."""

    name = "knn"
    settings = ({}, {"neighbour": 6}, {"neighbour": 6, "metric": "euclid"})
    tolerance = 1e-6

    def problem(self, seed: int = 0) -> tuple[Any]:
        return (self.embeddings(seed),)

    def reference(self, rows: Any, neighbour: int = 1, metric: str = "cos") -> list[float]:
        import numpy as np

        rows = np.asarray(rows, float)

        def far(a: Any, b: Any) -> float:
            if metric == "euclid":
                return float(np.linalg.norm(a - b))
            return float(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))

        return [sorted(far(a, b) for j, b in enumerate(rows) if j != i)[neighbour - 1] for i, a in enumerate(rows)]


class SimilarityCase(EmbeddedRowsCase):
    """Reference: cosines pair by pair."""

    name = "similarity"
    tolerance = 1e-6

    def problem(self, seed: int = 0) -> tuple[Any, Any]:
        return self.embeddings(seed), self.embeddings(seed + 1)[:4]

    def reference(self, pool: Any, examples: Any) -> list[float]:
        import numpy as np

        return [max(float(np.dot(u, v) / np.linalg.norm(u) / np.linalg.norm(v)) for u in examples) for v in pool]


class VendiCase(Case):
    """A set of rows → one number. Reference: eigenvalues of the N × N kernel, by numpy."""

    name = "vendi"
    role = "Diagnostic"
    settings: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"order": 2},
        {"order": 0.5},
        {"order": "inf"},
        {"kernel": "rbf", "order": 2, "bandwidth": 2.0},
    )

    @property
    def params(self) -> Any:
        from residency.curate.vendi import Vendi

        return Vendi

    def rows(self, n: int = 30) -> Any:
        import numpy as np

        return np.random.default_rng(0).standard_normal((n, 6))

    def reference(self, rows: Any, order: Any = 1.0, kernel: str = "cos", bandwidth: float = 1.0) -> float:
        import numpy as np

        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        far = np.square(rows[:, None] - rows[None]).sum(-1)
        k = unit @ unit.T if kernel == "cos" else np.exp(-far / (2 * bandwidth**2))
        p = np.clip(np.linalg.eigvalsh(k / len(rows)), 1e-18, None)
        if order == "inf":
            return float(1 / p.max())
        if order == 1:
            return math.exp(-float((p * np.log(p)).sum()))
        return float(p[p > 1e-12].__pow__(order).sum()) ** (1 / (1 - order))

    def check_reference(self) -> None:
        """Equal to the definition; every setting gives another number."""
        found = [self.params(**s).of(self.rows()) for s in self.settings]
        for value, s in zip(found, self.settings, strict=True):
            expected = self.reference(self.rows(), **s)
            assert abs(value - expected) < 1e-6 * expected, f"{s}: {value} against {expected}"
        assert len(set(found)) == len(found)

    def check_known_sets(self) -> None:
        """N orthogonal rows count as N, N equal rows as 1, and turning all rows changes nothing."""
        import numpy as np

        turn = np.linalg.qr(np.random.default_rng(1).standard_normal((6, 6)))[0]
        for s in self.settings[:4]:
            vendi = self.params(**s)
            assert abs(vendi.of(np.eye(9)) - 9) < 1e-6
            assert abs(vendi.of(np.ones((9, 4))) - 1) < 1e-6
            assert abs(vendi.of(self.rows() @ turn) - vendi.of(self.rows())) < 1e-6

    def check_order_and_purity(self) -> None:
        """The order of rows does not matter, and they stay as they were."""
        rows = self.rows()
        kept = rows.copy()
        assert abs(self.params().of(rows[::-1]) - self.params().of(rows)) < 1e-9
        assert (rows == kept).all()
