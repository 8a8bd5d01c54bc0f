"""Cases of the curate stage: choosing rows under a budget."""

from __future__ import annotations

from typing import Any

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
