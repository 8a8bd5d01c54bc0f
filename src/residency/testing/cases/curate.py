"""Cases of the curate stage."""

from __future__ import annotations

from typing import Any

from residency.testing.roles import SelectorCase


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

    @property
    def params(self) -> Any:
        from residency.curate.simdiv import SimDiv

        return SimDiv

    def select(self, pool: Any, examples: Any, **params: Any) -> Any:
        return self.params(**params).select(pool, examples)

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
