"""Cases of the curate stage: scores of rows by what they do for a target: likelihood ratios, gradients, values."""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Any

from residency.testing.rowroles import ScorerCase, SelectorCase


class DSIRCase(ScorerCase):
    """Reference: the equations by plain loops over dictionaries, a run's hash built word by word."""

    name = "dsir"
    settings = ({}, {"ngram": 1}, {"ngram": 3, "buckets": 17}, {"prior": 5.0}, {"per": "n-gram"})

    def problem(self, seed: int = 0) -> tuple[list[str], list[str]]:
        """Sentences of two kinds, an empty one, and trusted ones."""
        import numpy as np

        rng = np.random.default_rng(seed)
        words = ["die", "der,", "das", "zwei", "DREI.", "vier-fünf!", "6", "sieben"]
        texts = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(12)]
        return [*texts, " \n", "neu"], ["die der, das 6 6", "vier-fünf zwei DREI."]

    def reference(self, texts: list[str], examples: list[str], **params: Any) -> list[float]:
        import re
        from collections import Counter
        from math import log, nan

        factor = 0x9E3779B97F4A7C15

        def mix(x: int) -> int:
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                x = (x ^ (x >> shift)) * factor % 2**64
            return x ^ (x >> 31)

        def grams(text: str) -> Counter[int]:
            words = re.findall(r"\w+|[^\w\s]+", text.lower())
            hashes = [mix(sum((ord(c) + 1) * factor**k for k, c in enumerate(w)) % 2**64) for w in words]
            found: Counter[int] = Counter()
            for n in range(params.get("ngram", 2)):
                for i in range(len(words) - n):
                    value = hashes[i]
                    for following in hashes[i + 1 : i + n + 1]:
                        value = mix((value * factor + following) % 2**64)
                    found[value % params.get("buckets", 10_000)] += 1
            return found

        target = sum((grams(text) for text in examples), Counter())
        raw = sum((grams(text) for text in texts), Counter())
        t, r = target.total(), raw.total()
        share = params.get("prior", 10_000) / (t + params.get("prior", 10_000))

        def ratio(b: int) -> float:
            common = share * (target[b] + raw[b]) / (t + r)
            return log((1 - share) * target[b] / t + common) - log((1 - share) * raw[b] / r + common)

        def weight(text: str) -> float:
            mine = grams(text)
            total = sum(count * ratio(b) for b, count in mine.items())
            return (total / mine.total() if params.get("per") else total) if mine else nan

        return [weight(text) for text in texts]

    def check_equal_bags_weigh_nothing(self) -> None:
        """Trusted rows that are the pool give every row the weight 1, in any order."""
        import numpy as np

        texts = self.problem()[0]
        found = np.asarray(self.score(texts, texts[::-1]))
        assert np.nanmax(np.abs(found)) == 0


class GradientsCase(ScorerCase):
    """Gradients of rows that are alike and unlike, of trusted rows in two tasks."""

    def gradients(self, seed: int = 0) -> tuple[Any, Any]:
        """[30, 6], of which one is missing and one zero; and [5, 6]."""
        import numpy as np

        rng = np.random.default_rng(seed)
        pool = rng.standard_normal((30, 6)) * rng.uniform(0.1, 3, (30, 1))
        pool[4], pool[9] = np.nan, 0
        return pool, rng.standard_normal((5, 6))


class LESSCase(GradientsCase):
    """Reference: the cosines one by one, means of tasks, their maximum."""

    name = "less"
    settings = ({}, {"weights": (0.5,)})

    def problem(self, seed: int = 0) -> tuple[Any, ...]:
        """Two tasks of trusted rows."""
        return (*self.gradients(seed), ["a", "b", "a", None, "b"])

    def reference(self, pool: Any, examples: Any, labels: Any, **params: Any) -> list[float]:
        import numpy as np

        def cosine(a: Any, b: Any) -> float:
            return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) or 1))

        eta = params.get("weights", (1.0,))[0]
        tasks = [[g for g, each in zip(examples, labels, strict=True) if each == name] for name in ("a", "b", None)]
        return [np.max([eta * np.mean([cosine(row, g) for g in task]) for task in tasks]) for row in pool]


class TracInCase(GradientsCase):
    """Reference: what is left of a linear loss after a step along every row, by its definition."""

    name = "tracin"
    settings = ({}, {"weights": (0.5,)})

    def problem(self, seed: int = 0) -> tuple[Any, Any]:
        return self.gradients(seed)

    def reference(self, pool: Any, examples: Any, **params: Any) -> list[float]:
        import numpy as np

        eta = params.get("weights", (1.0,))[0]
        # losses that are linear in the weights, one per trusted row: a step of size η drops them by η g·g'
        return [float(np.mean([-(g @ (-eta * row)) for g in examples])) for row in pool]


class GraNdCase(GradientsCase):
    """Reference: the root of the sum of squares."""

    name = "grand"

    def problem(self, seed: int = 0) -> tuple[Any]:
        return (self.gradients(seed)[0],)

    def reference(self, pool: Any, **params: Any) -> list[float]:
        from math import sqrt

        return [sqrt(sum(v * v for v in row)) for row in pool.tolist()]


class GradientMatchingCase(SelectorCase):
    """Reference: matching pursuit whose weights are scipy's non-negative least squares, then the cosines."""

    name = "gradient-matching"
    settings = ({"keep": 6}, {"keep": 12}, {"keep": 12, "ridge": 3.0}, {"keep": 12, "ridge": 3.0, "tolerance": 0.4})

    def problem(self, seed: int = 0) -> tuple[Any, Any]:
        """A pool with groups, and trusted rows."""
        import numpy as np

        rng = np.random.default_rng(seed)
        return rng.standard_normal((40, 8)) + 0.5, rng.standard_normal((3, 8)) + 0.5

    def reference(self, pool: Any, examples: Any, **params: Any) -> list[int]:
        import numpy as np
        from scipy.optimize import nnls

        target = examples.mean(0)
        root = np.sqrt(params.get("ridge", 0.01) * (np.linalg.norm(pool, axis=1) ** 2).mean())
        chosen: list[int] = []
        left = target
        norms = np.linalg.norm(pool, axis=1) * np.linalg.norm(target)
        while len(chosen) < params["keep"]:
            gain = {i: float(pool[i] @ left) for i in range(len(pool)) if i not in chosen}
            best = max(gain, key=lambda i: gain[i])
            if gain[best] <= params.get("tolerance", 1e-4) * norms[best]:
                break
            chosen.append(best)
            stacked = np.concatenate([pool[chosen].T, root * np.eye(len(chosen))])
            weights, _ = nnls(stacked, np.concatenate([target, np.zeros(len(chosen))]))
            left = target - weights @ pool[chosen]
        rest = [i for i in np.argsort(-(pool @ target) / norms).tolist() if i not in chosen]
        return chosen + rest[: params["keep"] - len(chosen)]


class ValuedCase(ScorerCase):
    """A handful of rows of three classes, one of them without a label, and trusted rows of two."""

    per_row = (0, 1)

    def problem(self, seed: int = 0) -> tuple[Any, ...]:
        """Seven rows, of which six play; four trusted rows."""
        import numpy as np

        rng = np.random.default_rng(seed)
        centres = {"a": [3, 0, 1], "b": [0, 3, 1], "c": [0, 0, 3]}
        labels = ["a", "b", "a", None, "c", "b", "a"]
        x = np.array([centres[label or "c"] for label in labels]) + rng.standard_normal((7, 3))
        judges = ["a", "b", "b", "a"]
        return x, labels, np.array([centres[j] for j in judges]) + rng.standard_normal((4, 3)), judges

    def played(self, x: Any, labels: Any) -> list[int]:
        """Rows with a label."""
        return [i for i in range(len(x)) if labels[i] is not None]

    def all_columns(self, total: int, found: dict[int, float]) -> list[float]:
        """One value per row, NaN for those without."""
        return [found.get(i, float("nan")) for i in range(total)]

    def enumerated(self, players: list[int], value: Any) -> dict[int, float]:
        """Shapley values by their definition: over all subsets."""
        found = {}
        for i in players:
            others = [j for j in players if j != i]
            found[i] = sum(
                (value([*subset, i]) - value(list(subset))) / (len(players) * comb(len(others), size))
                for size in range(len(others) + 1)
                for subset in combinations(others, size)
            )
        return found


class KNNShapleyCase(ValuedCase):
    """Reference: the definition, over all subsets, with the vote of the k nearest."""

    name = "knn-shapley"
    settings = ({"k": 1}, {"k": 3}, {"k": 9})

    def reference(self, x: Any, labels: Any, judges: Any, answers: Any, **params: Any) -> list[float]:
        import numpy as np

        def value(subset: list[int]) -> float:
            right = 0.0
            for judge, answer in zip(judges, answers, strict=True):
                near = sorted(subset, key=lambda i: -float(x[i] @ judge / np.linalg.norm(x[i])))[: params["k"]]
                right += sum(labels[i] == answer for i in near) / params["k"]
            return right / len(judges)

        return self.all_columns(len(x), self.enumerated(self.played(x, labels), value))


class TMCShapleyCase(ValuedCase):
    """Reference: the definition, over all subsets, with the nearest class centre; 6! = 720 orders are all taken."""

    name = "tmc-shapley"
    settings = ({"permutations": 720},)

    def reference(self, x: Any, labels: Any, judges: Any, answers: Any, **params: Any) -> list[float]:
        import numpy as np

        unit = x / np.linalg.norm(x, axis=1, keepdims=True)

        def value(subset: list[int]) -> float:
            if not subset:
                return 1 / len(set(answers))
            centres = {}
            for name in sorted({labels[i] for i in subset}):
                centre = np.mean([unit[i] for i in subset if labels[i] == name], 0)
                centres[name] = centre / np.linalg.norm(centre)
            said = [max(centres, key=lambda name: float(centres[name] @ judge)) for judge in judges]
            return sum(a == b for a, b in zip(said, answers, strict=True)) / len(answers)

        return self.all_columns(len(x), self.enumerated(self.played(x, labels), value))


class InfluenceCase(ValuedCase):
    """Reference: leave every row out and fit again; and the inverse Hessian times the gradients."""

    name = "influence"
    settings = ({}, {"ridge": 1.0}, {"exact": False})

    def reference(self, x: Any, labels: Any, judges: Any, answers: Any, **params: Any) -> list[float]:
        import numpy as np

        names = ["a", "b", "c"]

        def rows(z: Any) -> Any:
            return np.concatenate([z / np.linalg.norm(z, axis=1, keepdims=True), np.ones((len(z), 1))], 1)

        def hot(given: Any) -> Any:
            return np.array([[float(name == label) for name in names] for label in given])

        players = self.played(x, labels)
        a, b, p, q = rows(x[players]), hot([labels[i] for i in players]), rows(judges), hot(answers)
        strength = params.get("ridge", 0.01) * (a**2).mean() * len(a)

        def fitted(keep: list[int]) -> Any:
            return np.linalg.solve(a[keep].T @ a[keep] + strength * np.eye(4), a[keep].T @ b[keep])

        everyone = list(range(len(a)))
        whole = fitted(everyone)
        found = {}
        for place, i in enumerate(players):
            if params.get("exact", True):
                without = fitted([j for j in everyone if j != place])
                each = ((q - p @ without) ** 2).sum(1) - ((q - p @ whole) ** 2).sum(1)
            else:
                hessian = np.kron(2 * (a.T @ a + strength * np.eye(4)), np.eye(3))
                mine = np.outer(a[place], -2 * (b[place] - a[place] @ whole)).ravel()
                theirs = [np.outer(z, -2 * (y - z @ whole)).ravel() for z, y in zip(p, q, strict=True)]
                each = np.array([g @ np.linalg.inv(hessian) @ mine for g in theirs])
            found[i] = float(each.mean())
        return self.all_columns(len(x), found)


class DatamodelsCase(ValuedCase):
    """Reference: margins by plain loops, and scikit-learn's regressions."""

    name = "datamodels"
    tolerance = 1e-6
    settings = (
        {"subsets": 40},
        {"subsets": 40, "share": 0.7},
        {"subsets": 40, "strength": 0.01},
        {"subsets": 40, "strength": 0.01, "penalty": "lasso"},
        {"subsets": 4, "strength": 0.01},
        {"subsets": 4, "strength": 0.01, "seed": 1},
    )

    def reference(self, x: Any, labels: Any, judges: Any, answers: Any, **params: Any) -> list[float]:
        import numpy as np
        from sklearn.linear_model import Lasso, Ridge

        def unit(z: Any) -> Any:
            return z / np.linalg.norm(z)

        players = sorted(self.played(x, labels), key=lambda i: (labels[i], unit(x[i]).tobytes()))
        masks = self.params(**params).masks(len(players))
        assert (masks.sum(1) == round(params.get("share", 0.5) * len(players))).all()

        def margin(mask: Any) -> float:
            centres = {}
            for name in "abc":
                mine = [unit(x[i]) for i, kept in zip(players, mask, strict=True) if kept and labels[i] == name]
                centres[name] = unit(np.sum(mine, 0)) if mine else None
            said = []
            for judge, answer in zip(judges, answers, strict=True):
                cosines = {n: -1.0 if c is None else float(unit(judge) @ c) for n, c in centres.items()}
                said.append(cosines[answer] - max(v for n, v in cosines.items() if n != answer))
            return float(np.mean(said))

        alpha = params.get("strength", 1.0)
        model = Lasso(alpha, tol=1e-12, max_iter=100_000) if params.get("penalty") == "lasso" else Ridge(alpha)
        weights = model.fit(masks.astype(float), [margin(mask) for mask in masks]).coef_
        return self.all_columns(len(x), dict(zip(players, weights.tolist(), strict=True)))


class ForgettingCase(ScorerCase):
    """Reference: traces as text, in which a forgetting is "10"."""

    name = "forgetting"
    traces = ("0000", "1111", "0101", "1010", "1100", "0001", "----", "1-0-", "0-1-", "--00")

    def problem(self, seed: int = 0) -> tuple[dict[str, Any]]:
        """Ten columns would sort wrongly by name, so their numbers are 9 to 12."""
        import numpy as np

        value = {"0": 0.0, "1": 1.0, "-": np.nan}
        record = {f"right-{9 + t}": np.array([value[row[t]] for row in self.traces]) for t in (3, 0, 1, 2)}
        return ({**record, "right-side": np.full(10, 7.0)},)

    def rows(self, inputs: tuple[Any, ...]) -> int:
        return len(next(iter(inputs[0].values())))

    def reference(self, columns: dict[str, Any], **params: Any) -> list[float]:
        seen = [row.replace("-", "") for row in self.traces]
        return [
            float("nan") if not s else s.count("10") if "1" in s else len(row)
            for s, row in zip(seen, self.traces, strict=True)
        ]


class Task2VecCase(ScorerCase):
    """Reference: scikit-learn's discriminant as the head, and Fisher information by torch, label by label."""

    name = "task2vec"
    per_row = (0, 1, 2)
    tolerance = 1e-7
    settings = ({}, {"shrink": 2.0})

    def problem(self, seed: int = 0) -> tuple[Any, ...]:
        """Three tags that lie apart, rows with two tags, none, and no label."""
        import numpy as np

        rng = np.random.default_rng(seed)
        tags = [("x",), ("y",), ("z",), ("x", "z"), ()] * 5
        labels = [("a", "b", "c", None)[i % 4] for i in range(25)]
        shift = {"x": 2.0, "y": -2.0, "z": 0.0}
        x = rng.standard_normal((25, 4)) + np.array([[sum(shift[t] for t in each), 0, 1, 0] for each in tags])
        judges = rng.standard_normal((6, 4)) + np.array([2, 0, 1, 0])
        return x, labels, tags, judges, ["a", "b", "a", "b", None, "a"]

    def reference(self, x: Any, labels: Any, tags: Any, judges: Any, answers: Any, **params: Any) -> list[float]:
        import numpy as np
        import torch
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

        both, names = np.concatenate([x, judges]), [*labels, *answers]
        there = [i for i, name in enumerate(names) if name is not None]
        z, y = both[there], [names[i] for i in there]
        inner = z - np.stack([z[[j for j, n in enumerate(y) if n == name]].mean(0) for name in y])
        # the library's own shrinking mixes; with the solver told a covariance it is the plain discriminant
        covariance = inner.T @ inner / len(z)
        covariance += params.get("shrink", 10.0) * np.trace(covariance) / 4 * np.eye(4)

        class Given:
            def fit(self, _: Any) -> Any:
                self.covariance_ = covariance
                return self

        lda = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=Given()).fit(z, y)
        weight, bias = torch.tensor(lda.coef_), torch.tensor(lda.intercept_)
        middle = torch.tensor(z.mean(0))

        def information(rows: Any) -> Any:
            found = torch.zeros(weight.shape, dtype=torch.float64)
            for row in torch.tensor(rows):
                w = weight.clone().requires_grad_()
                # the library's biases belong to rows that are not centred
                logs = (w @ (row - middle) + (weight @ middle + bias)).log_softmax(0)
                for value in logs:
                    (grad,) = torch.autograd.grad(value, w, retain_graph=True)
                    found += value.detach().exp() * grad**2 / len(rows)
            return found.numpy().ravel()

        target = information(judges)
        near = {}
        for tag in "xyz":
            mine = information(x[[i for i, each in enumerate(tags) if tag in each]])
            a, b = mine / (mine + target), target / (mine + target)
            near[tag] = 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        return [min((near[tag] for tag in each), default=float("nan")) for each in tags]
