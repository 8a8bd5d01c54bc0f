"""Two examinations of the same items: the difference with its paired interval, and which items flipped."""

from __future__ import annotations

from typing import Any

from residency import stats

PROPERTIES: dict[str, dict[str, Any]] = {
    "choice-accuracy": {"unit": "share", "higher_is_better": True, "chance": 0.25},
    "bits-per-byte": {"unit": "bits/byte", "higher_is_better": False, "chance": None},
    "exact-match": {"unit": "share", "higher_is_better": True, "chance": None},
    "rouge-l": {"unit": "F-measure", "higher_is_better": True, "chance": None},
    "macro-f1": {"unit": "F1", "higher_is_better": True, "chance": None},
}


def properties(metric: str) -> dict[str, Any]:
    """Unit, direction and chance level of a metric."""
    return dict(PROPERTIES[metric])


def compare(
    after: dict[str, Any], before: dict[str, Any], metric: str, guard: str | None, resamples: int = 2000
) -> dict[str, Any]:
    """One entry of run.json's `comparisons`.

    Args:
        after, before: Entries of run.json's `exams`.
        metric: The task's metric.
        guard: The guard's metric, or None.
        resamples: Of the paired bootstrap.

    Returns:
        {of, against, difference, low, high, n, fixed, broken, guard}; the numbers are None where one of the two has no score.
    """
    found = {"of": after["id"], "against": before["id"]} | _part(after["task"], before["task"], metric, resamples)
    both = guard is not None and after["guard"] is not None and before["guard"] is not None
    return found | {"guard": _part(after["guard"], before["guard"], guard or "", resamples) if both else None}


def _part(after: Any, before: Any, metric: str, resamples: int) -> dict[str, Any]:
    empty = {"difference": None, "low": None, "high": None, "n": 0, "fixed": [], "broken": []}
    if not after or not before:
        return empty
    a = {item["id"]: item["score"] for item in after["items"]}
    b = {item["id"]: item["score"] for item in before["items"]}
    weights = {item["id"]: item["weight"] for item in before["items"] if "weight" in item} or None
    if not set(a) & set(b):
        return empty
    fixed, broken = stats.flips(b, a) if PROPERTIES[metric]["higher_is_better"] else ([], [])
    if metric == "macro-f1":
        from residency.evaluate.macro_f1 import paired

        difference = paired(before["items"], after["items"], resamples)
    else:
        difference = stats.paired_difference(b, a, weights, n=resamples)
    numbers = {k: round(getattr(difference, k), 6) for k in ("difference", "low", "high")}
    return numbers | {"n": difference.n, "fixed": fixed, "broken": broken}
