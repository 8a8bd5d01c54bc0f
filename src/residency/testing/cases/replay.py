"""Cases of learning tasks in sequence."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from residency.testing.roles import Case
from residency.testing.rowroles import SelectorCase


class InsCLCase(SelectorCase):
    """Reference: POT's transport, idf by counting, and the published quota rule; every row its own instruction."""

    name = "inscl"
    settings = ({"per_task": 3}, {"per_task": 3, "quota": "equal"}, {"per_task": 5})
    everything: ClassVar[dict[str, Any]] = {"per_task": 1000}
    per_row = (0, 1, 2, 3)

    def problem(self, seed: int = 0) -> tuple[Any, ...]:
        import numpy as np

        rng = np.random.default_rng(seed)
        sizes = {"a": 9, "b": 12, "c": 8}
        tasks = [t for t, n in sizes.items() for _ in range(n)]
        centre = {"a": (2, 0, 0), "b": (0, 2, 0), "c": (1, 1, 1), "new": (2, 0, 0.3)}
        vectors = np.array([centre[t] for t in [*tasks, *["new"] * 6]]) + 0.4 * rng.standard_normal((35, 3))
        tags = [tuple(f"t{i}" for i in sorted({int(k) for k in rng.zipf(1.3, 4) % 17})) for _ in range(35)]
        names = [f"say {i}" for i in range(35)]
        n = len(tasks)
        return tasks, names[:n], vectors[:n], tags[:n], names[n:], vectors[n:], tags[n:]

    def check_order(self) -> None:
        """Shuffled rows give the same choice, as a set (tasks of equal distance go by their first row)."""
        import numpy as np

        inputs = self.problem()
        order = np.random.default_rng(1).permutation(self.rows(inputs)).tolist()
        for params in self.settings:
            mine = set(self.select(*inputs, **params).indices.tolist())
            shuffled = self.select(*self.permuted(inputs, order), **params).indices.tolist()
            assert {order[i] for i in shuffled} == mine, f"with {params}"

    def reference(self, *inputs: Any, per_task: int, quota: str = "transport") -> list[int]:
        import numpy as np
        import ot

        tasks, _, vectors, tags, _, new, new_tags = inputs
        everything = [*tags, *new_tags]
        times = {t: sum(t in its for its in everything) for its in everything for t in its}
        info = [sum(math.log(len(everything) / times[t]) for t in its) for its in tags]
        names = list(dict.fromkeys(tasks))
        members = {t: [i for i, own in enumerate(tasks) if own == t] for t in names}
        far = {}
        for t, rows in members.items():
            cost = ot.dist(np.asarray(vectors)[rows], np.asarray(new), metric="cosine")
            far[t] = ot.emd2(np.full(len(rows), 1 / len(rows)), np.full(len(new), 1 / len(new)), cost)
        if quota == "equal":
            far = dict.fromkeys(names, 0.0)
            share = dict.fromkeys(names, per_task)
        else:
            exact = {t: far[t] / sum(far.values()) * per_task * len(names) for t in names}
            share = {t: math.floor(x) for t, x in exact.items()}
            rest = per_task * len(names) - sum(share.values())
            for t in sorted(names, key=lambda t: -far[t])[:rest]:
                share[t] += 1
            assert all(share[t] < len(members[t]) for t in names), "the problem must not fill a task"
        chosen = []
        for t in sorted(names, key=lambda t: -far[t]):
            chosen += sorted(members[t], key=lambda i: -info[i])[: share[t]]
        return chosen


class RelativeGainCase(Case):
    """Scores of a sequence → per cent. Reference: a double loop."""

    name = "relative-gain"
    role = "Diagnostic"

    def check_reference(self) -> None:
        """Equal to the definition, written as a double loop."""
        import numpy as np

        from residency.evaluate.relative_gain import relative_gain

        r, u = np.random.default_rng(0).random((5, 5)), np.random.default_rng(1).random(5) + 0.1
        expected = [100 / i * sum(r[i][j] / u[j] for j in range(i)) for i in range(1, 5)]
        np.testing.assert_allclose(relative_gain(r, u), expected)
        np.testing.assert_allclose(relative_gain(np.tile(u, (5, 1)), u), 100)
