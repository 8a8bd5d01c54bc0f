"""Cases of the curate stage: choosing rows under a budget."""

from __future__ import annotations

from typing import Any, ClassVar

from residency.testing.rowroles import SelectorCase


class KShotCase(SelectorCase):
    """Reference: the paper's pairwise rule by double loop, over as many candidates as the budget takes."""

    name = "k-shot"
    settings = (
        {"keep": 20, "near_duplicates": 0.9},
        {"keep": 12, "near_duplicates": 0.9},
        {"keep": 12, "near_duplicates": 0.8},
        {"keep": 12, "near_duplicates": 0.8, "candidates": 9},
    )
    everything = {"keep": 10_000, "near_duplicates": 1.0}  # noqa: RUF012

    def problem(self, seed: int = 0) -> tuple[Any, Any]:
        """A pool with near-duplicates, and trusted rows."""
        import numpy as np

        rng = np.random.default_rng(seed)
        pool = rng.standard_normal((60, 5)).astype(np.float32)
        pool[30::3] = pool[:10] + 0.05 * rng.standard_normal((10, 5))
        return pool, rng.standard_normal((3, 5)).astype(np.float32)

    def reference(self, pool: Any, examples: Any, **params: Any) -> list[int]:
        import numpy as np

        def cosine(a: Any, b: Any) -> float:
            return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))

        score = [max(cosine(u, v) for u in examples) for v in pool]
        order = sorted(range(len(pool)), key=lambda j: -score[j])[: params.get("candidates") or len(pool)]
        kept = []
        for place, j in enumerate(order):
            if not any(cosine(pool[i], pool[j]) > params["near_duplicates"] for i in order[:place]):
                kept.append(j)
        return kept[: params["keep"]]

    def check_planted_rows_come_first(self) -> None:
        """Copies of the trusted rows hidden in the pool are chosen before anything else."""
        pool, examples = self.problem()
        pool[[7, 30, 51]] = examples
        assert set(self.select(pool, examples, **self.settings[0]).indices[:3].tolist()) == {7, 30, 51}

    def check_trusted_rows(self) -> None:
        """Widths that differ and missing trusted rows are refused."""
        pool, examples = self.problem()
        self._refused((pool, examples[:, :2]), "another width")
        self._refused((pool, examples[:0]), "no trusted row")


class MinHashCase(SelectorCase):
    """Reference: the Jaccard index of all pairs by Python sets, connected components by walking."""

    name = "minhash"
    settings = ({"threshold": 0.6, "shingle": 2}, {"threshold": 0.6}, {"threshold": 0.3, "unit": "characters"})
    everything = {"threshold": 1.0}  # noqa: RUF012
    per_row = (0, 1)

    def problem(self, seed: int = 0) -> tuple[Any, Any]:
        """Texts of 30 words, ten of them again with 1 to 10 words changed."""
        import numpy as np

        rng = np.random.default_rng(seed)
        texts = [[f"w{w}" for w in rng.integers(0, 500, 30)] for _ in range(20)]
        texts += [[w if place > i else "new" for place, w in enumerate(row)] for i, row in enumerate(texts[:10])]
        return [" ".join(row) for row in texts], rng.random(30)

    def reference(self, texts: Any, quality: Any, **params: Any) -> list[int]:
        n, words = params.get("shingle", 5), params.get("unit", "words") == "words"
        sets = []
        for text in texts:
            units = text.split() if words else text
            sets.append({tuple(units[i : i + n]) for i in range(len(units) - n + 1)})
        kept: list[int] = []
        seen: set[int] = set()
        for start in range(len(texts)):
            group: set[int] = set()
            todo = [start]
            while todo:
                i = todo.pop()
                if i not in group:
                    group.add(i)
                    todo += [
                        j
                        for j in range(len(texts))
                        if len(sets[i] & sets[j]) >= params["threshold"] * len(sets[i] | sets[j])
                    ]
            if not group & seen:
                kept.append(max(group, key=lambda i: quality[i]))
            seen |= group
        return sorted(kept)

    def check_order(self) -> None:
        """Shuffled rows give the same rows; they come in row order."""
        texts, quality = self.problem()
        mine = self.select(texts, quality, **self.settings[0]).indices
        other = self.select(texts[::-1], quality[::-1], **self.settings[0]).indices
        assert sorted(len(texts) - 1 - other) == mine.tolist()


class TopCase(SelectorCase):
    """Reference: percentiles by counting, then a sort."""

    name = "top"
    settings = (
        {"keep": 5},
        {"keep": 5, "best": "low"},
        {"keep": 5, "percentiles": (20.0, 60.0)},
        {"keep": 50, "percentiles": (20.0, 60.0)},
    )

    def problem(self, seed: int = 0) -> tuple[Any, ...]:
        """Qualities of 40 rows."""
        import numpy as np

        return (np.random.default_rng(seed).standard_normal(40),)

    def reference(self, quality: Any, **params: Any) -> list[int]:
        low, high = params.get("percentiles", (0, 100))
        within = [
            i for i, q in enumerate(quality) if low <= 100 * sum(other <= q for other in quality) / len(quality) <= high
        ]
        return sorted(within, key=lambda i: quality[i], reverse=params.get("best") != "low")[: params["keep"]]


class SampleCase(SelectorCase):
    """Reference: the keys u^(1/w) of Efraimidis and Spirakis, 2006, with weights w = exp(q / T)."""

    name = "sample"
    settings = ({"keep": 8}, {"keep": 8, "temperature": 0.2}, {"keep": 8, "temperature": 0.2, "seed": 3})
    follows_order = True

    def problem(self, seed: int = 0) -> tuple[Any, ...]:
        """Qualities of 30 rows."""
        import numpy as np

        return (np.random.default_rng(seed + 7).standard_normal(30),)

    def reference(self, quality: Any, **params: Any) -> list[int]:
        import math

        import numpy as np

        drawn = np.random.default_rng(params.get("seed", 0)).random(len(quality)).tolist()
        temperature = params.get("temperature", 1.0)
        key = [math.log(u) / math.exp(q / temperature) for u, q in zip(drawn, quality, strict=True)]
        return sorted(range(len(key)), key=lambda i: -key[i])[: params["keep"]]


class RandomCase(SelectorCase):
    """Reference: a sort of the random numbers."""

    name = "random"
    settings = ({"keep": 8}, {"keep": 8, "seed": 3}, {"keep": 4, "seed": 3})
    follows_order = True

    def problem(self, seed: int = 0) -> tuple[Any, ...]:
        """30 texts."""
        return ([f"text {i}" for i in range(30)],)

    def reference(self, texts: Any, **params: Any) -> list[int]:
        import numpy as np

        drawn = np.random.default_rng(params.get("seed", 0)).random(len(texts)).tolist()
        return sorted(range(len(texts)), key=lambda i: -drawn[i])[: params["keep"]]


class _Embedded(SelectorCase):
    """Selectors over embeddings: 40 rows of 5 numbers, of different lengths."""

    def problem(self, seed: int = 0) -> tuple[Any, ...]:
        """The rows."""
        import numpy as np

        rng = np.random.default_rng(seed)
        return ((rng.standard_normal((40, 5)) * rng.uniform(0.5, 2, (40, 1)) + 0.5).astype(np.float32),)


class _WithQuality(_Embedded):
    """The same with a quality."""

    per_row = (0, 1)

    def problem(self, seed: int = 0) -> tuple[Any, ...]:
        """The rows and their qualities."""
        import numpy as np

        return *super().problem(seed), np.random.default_rng(seed + 1).standard_normal(40)


class KCentreCase(_Embedded):
    """Reference: all distances by double loop at every pick."""

    name = "k-centre"
    settings = (
        {"keep": 10},
        {"keep": 10, "start": "mean"},
        {"keep": 10, "start": "mean", "metric": "euclid"},
        {"keep": 20, "metric": "euclid"},
    )

    def problem(self, seed: int = 0) -> tuple[Any, ...]:
        """The rows, and three trusted ones."""
        import numpy as np

        return *super().problem(seed), np.random.default_rng(9).standard_normal((3, 5)).astype(np.float32)

    def reference(self, pool: Any, examples: Any, **params: Any) -> list[int]:
        import math

        rows, met = _plain(pool, params), _plain(examples, params)
        chosen: list[int] = []
        if params.get("start") == "mean":
            mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
            chosen = [min(range(len(rows)), key=lambda i: math.dist(rows[i], mean))]
            met = [rows[chosen[0]]]
        while len(chosen) < params["keep"]:
            left = [i for i in range(len(rows)) if i not in chosen]
            chosen.append(max(left, key=lambda i: min(math.dist(rows[i], m) for m in met)))
            met.append(rows[chosen[-1]])
        return chosen


class HerdingCase(_Embedded):
    """Reference: the mean with every row left, computed anew at every pick."""

    name = "herding"
    settings = ({"keep": 12}, {"keep": 12, "metric": "euclid"}, {"keep": 5, "metric": "euclid"})

    def reference(self, pool: Any, **params: Any) -> list[int]:
        import numpy as np

        rows = np.array(_plain(pool, params))
        chosen: list[int] = []
        for _ in range(params["keep"]):
            left = [i for i in range(len(rows)) if i not in chosen]
            gap = [np.linalg.norm(rows[[*chosen, i]].mean(0) - rows.mean(0)) for i in left]
            chosen.append(left[int(np.argmin(gap))])
        return chosen


class FacilityLocationCase(_Embedded):
    """Reference: the plain greedy choice over all similarities."""

    name = "facility-location"
    settings: ClassVar[tuple[dict[str, Any], ...]] = (
        {"keep": 12},
        {"keep": 6, "greedy": "neighbours", "near": 40},
        {"keep": 5, "greedy": "lazy"},
    )

    def reference(self, pool: Any, quality: Any = None, **params: Any) -> list[int]:
        import numpy as np

        rows = np.array(_plain(pool, {}))
        alike = np.maximum(rows @ rows.T, 0)
        a = 0.0 if quality is None else params.get("alpha", 0.7)
        value = np.zeros(len(rows)) if quality is None else (quality - min(quality)) / (max(quality) - min(quality))
        chosen: list[int] = []
        while len(chosen) < params["keep"]:
            left = [i for i in range(len(rows)) if i not in chosen]
            total = [(1 - a) * alike[:, [*chosen, i]].max(1).sum() + a * value[i] for i in left]
            chosen.append(left[int(np.argmax(total))])
        return chosen


class QDITCase(_WithQuality, FacilityLocationCase):
    """Reference: as of facility location."""

    name = "qdit"
    settings = (
        {"keep": 12},
        {"keep": 12, "alpha": 0.2},
        {"keep": 12, "alpha": 1.0},
        {"keep": 8, "greedy": "neighbours", "near": 40},
    )


class DPPCase(_WithQuality):
    """Reference: the log-determinant of every larger submatrix, by LU."""

    name = "dpp"
    settings = (
        {"keep": 4},
        {"keep": 4, "quality_weight": 0.1},
        {"keep": 10, "bandwidth": 0.6},
        {"keep": 10, "bandwidth": 0.2},
    )
    everything = {"keep": 10_000, "bandwidth": 0.1}  # noqa: RUF012

    def reference(self, pool: Any, quality: Any, **params: Any) -> list[int]:
        import numpy as np

        rows = np.array(_plain(pool, {}))
        alike = rows @ rows.T
        if params.get("bandwidth"):
            alike = np.exp((alike - 1) / params["bandwidth"] ** 2)
        q = np.exp(params.get("quality_weight", 1.0) * quality)
        kernel = q[:, None] * alike * q
        chosen: list[int] = []
        for _ in range(params["keep"]):
            left = [i for i in range(len(rows)) if i not in chosen]
            total = [np.linalg.slogdet(kernel[np.ix_([*chosen, i], [*chosen, i])])[1] for i in left]
            chosen.append(left[int(np.argmax(total))])
        return chosen


class _Clustered(SelectorCase):
    """Rows around three axes, which any k-means finds, with planted copies."""

    follows_order = True

    def problem(self, seed: int = 0) -> tuple[Any, ...]:
        """30, 15 and 5 rows around three axes."""
        import numpy as np

        rng = np.random.default_rng(seed)
        rows = np.repeat(np.eye(6)[:3], (30, 15, 5), axis=0) + 0.1 * rng.standard_normal((50, 6))
        rows[20:28] = rows[:8] + 0.02 * rng.standard_normal((8, 6))
        return (rows.astype(np.float32),)

    def groups(self, rows: Any, clusters: int) -> list[tuple[list[int], Any]]:
        """Members of every cluster, and its centre."""
        import numpy as np

        label = [int(np.argmax(row[:3])) if clusters == 3 else 0 for row in rows]
        members = [[i for i in range(len(rows)) if label[i] == c] for c in range(clusters)]
        return [(m, rows[m].mean(0) / np.linalg.norm(rows[m].mean(0))) for m in members]


class SemDeDupCase(_Clustered):
    """Reference: pairs within the planted clusters, by double loop."""

    name = "semdedup"
    settings: ClassVar[tuple[dict[str, Any], ...]] = (
        {"clusters": 3, "eps": 0.01},
        {"clusters": 3, "eps": 0.01, "keep_which": "easy"},
        {"clusters": 1, "eps": 0.01},
        {"clusters": 3, "eps": 0.002},
    )
    everything = {"eps": 0.0}  # noqa: RUF012

    def reference(self, pool: Any, **params: Any) -> list[int]:
        import numpy as np

        rows = np.array(_plain(pool, {}))
        sign = -1 if params.get("keep_which") == "easy" else 1
        kept = []
        for members, centre in self.groups(rows, params["clusters"]):
            order = sorted(members, key=lambda i: sign * rows[i] @ centre)
            kept += [
                i for place, i in enumerate(order) if all(rows[i] @ rows[j] <= 1 - params["eps"] for j in order[:place])
            ]
        return sorted(kept)


class D4Case(SemDeDupCase):
    """Reference: SemDeDup's, and the most ordinary rows of the rest by the planted clusters' new centres."""

    name = "d4"
    settings = (
        {"clusters": 3, "eps": 0.01},
        {"clusters": 3, "eps": 0.01, "prototypes": 0.6},
        {"clusters": 3, "eps": 0.003, "prototypes": 0.6},
    )
    everything = {"eps": 0.0, "prototypes": 0.0}  # noqa: RUF012

    def reference(self, pool: Any, **params: Any) -> list[int]:
        import numpy as np

        left = super().reference(pool, **params)
        rows = np.array(_plain(pool, {}))[left]
        ordinary = {left[i]: rows[i] @ centre for m, centre in self.groups(rows, params["clusters"]) for i in m}
        drop = int(params.get("prototypes", 0.2) * len(left))
        return sorted(sorted(left, key=lambda i: -ordinary[i])[drop:])


class ClusterClipCase(_Clustered):
    """Reference: the planted clusters give one row after another."""

    name = "cluster-clip"
    settings = ({"keep": 12, "clusters": 3}, {"keep": 12, "clusters": 1}, {"keep": 25, "clusters": 3, "cap": 7})
    per_row = (0, 1)

    def problem(self, seed: int = 0) -> tuple[Any, ...]:
        """The rows and their qualities."""
        import numpy as np

        return *super().problem(seed), np.random.default_rng(seed + 1).standard_normal(50)

    def reference(self, pool: Any, quality: Any, **params: Any) -> list[int]:
        import numpy as np

        groups = self.groups(np.array(_plain(pool, {})), params["clusters"])
        queues = [sorted(members, key=lambda i: -quality[i])[: params.get("cap")] for members, _ in groups]
        chosen: list[int] = []
        while any(queues):
            chosen += sorted((queue.pop(0) for queue in queues if queue), key=lambda i: -quality[i])
        return chosen[: params["keep"]]


class DeitaCase(_WithQuality):
    """Reference: the rule by double loop."""

    name = "deita"
    settings = ({"keep": 12}, {"keep": 12, "near_duplicates": 0.5}, {"keep": 40, "near_duplicates": 0.8})
    everything = {"keep": 10_000, "near_duplicates": 1.0}  # noqa: RUF012

    def reference(self, pool: Any, quality: Any, **params: Any) -> list[int]:
        rows = _plain(pool, {})
        chosen: list[int] = []
        for i in sorted(range(len(rows)), key=lambda i: -quality[i]):
            alike = [sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) for j in chosen]
            if max(alike, default=-1) <= params.get("near_duplicates", 0.9):
                chosen.append(i)
        return chosen[: params["keep"]]


class QuotasCase(SelectorCase):
    """Reference: largest remainders in exact fractions."""

    name = "quotas"
    settings = (
        {"keep": 13},
        {"keep": 13, "shares": {"a": 5, "b": 1, "d": 1}},
        {"keep": 20, "shares": {"c": 1, "d": 3}},
        {"keep": 21},
    )
    per_row = (0, 1)

    def problem(self, seed: int = 0) -> tuple[Any, ...]:
        """Tags of 20, 12, 6, 2 and 1 rows, and their qualities."""
        import numpy as np

        rng = np.random.default_rng(seed)
        tags = [("a",)] * 20 + [("b", "a")] * 12 + [("c",)] * 6 + [("d", "b")] * 2 + [()]
        return tags, rng.standard_normal(41)

    def reference(self, tags: Any, quality: Any, **params: Any) -> list[int]:
        from fractions import Fraction
        from math import floor

        rows: dict[str, list[int]] = {}
        for i in sorted(range(len(tags)), key=lambda i: -quality[i]):
            rows.setdefault(tags[i][0] if tags[i] else "", []).append(i)
        shares = params.get("shares") or dict.fromkeys(rows, 1)
        quota: dict[str, int] = {}
        left, open_ = params["keep"], sorted(shares)
        while True:
            exact = {g: Fraction(left * shares[g], sum(shares[o] for o in open_)) for g in open_}
            full = [g for g in open_ if exact[g] >= len(rows[g])]
            quota |= {g: len(rows[g]) for g in full}
            left -= sum(len(rows[g]) for g in full)
            open_ = [g for g in open_ if g not in full]
            if not full or not open_:
                break
        quota |= {g: floor(exact[g]) for g in open_}
        missing = max(0, left - sum(quota[g] for g in open_))
        for g in sorted(open_, key=lambda g: (floor(exact[g]) - exact[g], g))[:missing]:
            quota[g] += 1
        return [i for g in sorted(quota) for i in rows[g][: quota[g]]]


class InsTagCase(SelectorCase):
    """Reference: the paper's algorithm on lists."""

    name = "instag"
    settings = ({"keep": 5}, {"keep": 12}, {"keep": 25})
    everything = {"keep": 10_000}  # noqa: RUF012
    per_row = (0, 1)

    def problem(self, seed: int = 0) -> tuple[Any, ...]:
        """One to five of nine tags for 40 rows, and their qualities."""
        import numpy as np

        rng = np.random.default_rng(seed)
        tags = [tuple(f"t{t}" for t in rng.choice(9, rng.integers(1, 6), replace=False)) for _ in range(40)]
        return tags, rng.standard_normal(40)

    def reference(self, tags: Any, quality: Any, **params: Any) -> list[int]:
        left = sorted(range(len(tags)), key=lambda i: (-len(tags[i]), -quality[i]))
        chosen: list[int] = []
        while len(chosen) < params["keep"] and left:
            seen: list[str] = []
            for i in list(left):
                if any(tag not in seen for tag in tags[i]):
                    seen += tags[i]
                    chosen.append(i)
                    left.remove(i)
        return chosen[: params["keep"]]


def _plain(rows: Any, params: dict[str, Any]) -> list[list[float]]:
    """Rows as lists of floats, of length 1 unless the metric says otherwise."""
    lists = [[float(x) for x in row] for row in rows]
    if params.get("metric") == "euclid":
        return lists
    return [[x / sum(y * y for y in row) ** 0.5 for x in row] for row in lists]
