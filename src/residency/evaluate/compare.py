"""Two examinations of the same items: the difference with its paired interval, and which items flipped.

Works on run.json's own entries, so that a record can be compared long after its models are gone.
"""

from __future__ import annotations

from typing import Any

from residency import catalog
from residency.evaluate.metric import Item, Metric, Score

UNITS = {
    "choice-accuracy": ("share", 0.25),
    "bits-per-byte": ("bits/byte", None),
    "exact-match": ("share", None),
    "rouge-l": ("F-measure", None),
    "macro-f1": ("F1", None),
    "multilabel-f1": ("F1", None),
    "pearson": ("correlation", 0.0),
}
"""Unit of each metric, and its chance level where it has one (four choices)."""


def metric_of(name: str) -> Metric:
    """A fresh metric by its catalogue name."""
    return catalog.method(name).load()()


def properties(name: str) -> dict[str, Any]:
    """Unit, direction and chance level of a metric."""
    unit, chance = UNITS[name]
    return {"unit": unit, "higher_is_better": metric_of(name).higher_is_better, "chance": chance}


def entry(score: Score) -> dict[str, Any]:
    """A score as run.json holds it."""
    items = [{k: v for k, v in vars(item).items() if v is not None} for item in score.items]
    for item in items:
        item["score"] = round(item["score"], 6)
        if item["weight"] == 1:
            del item["weight"]
    rounded = {k: round(getattr(score, k), 6) for k in ("value", "low", "high")}
    return rounded | {"n": score.n, "items": items}


def _score(entry: dict[str, Any]) -> Score:
    items = tuple(Item(**item) for item in entry["items"])
    return Score(entry["value"], entry["low"], entry["high"], entry["n"], items)


def compare(after: dict[str, Any], before: dict[str, Any], task: str, guard: str | None) -> dict[str, Any]:
    """One entry of run.json's `comparisons`.

    Args:
        after: Entry of run.json's `exams`.
        before: The entry it is held against.
        task: The task's metric.
        guard: The guard's metric, or None.

    Returns:
        {of, against, difference, low, high, n, fixed, broken, guard}; numbers are None where a score is missing.
    """
    both = guard is not None and bool(after["guard"]) and bool(before["guard"])
    return {
        "of": after["id"],
        "against": before["id"],
        **_part(after["task"], before["task"], task),
        "guard": _part(after["guard"], before["guard"], guard) if both and guard else None,
    }


def _part(after: Any, before: Any, name: str) -> dict[str, Any]:
    nothing: dict[str, Any] = {"difference": None, "low": None, "high": None, "n": 0, "fixed": [], "broken": []}
    if not after or not before:
        return nothing
    metric, a, b = metric_of(name), _score(after), _score(before)
    if not {i.id for i in a.items} & {i.id for i in b.items}:
        return nothing
    difference = metric.difference(b, a)
    fixed, broken = metric.flips(b, a)
    numbers = {k: round(getattr(difference, k), 6) for k in ("difference", "low", "high")}
    return numbers | {"n": difference.n, "fixed": fixed, "broken": broken}
