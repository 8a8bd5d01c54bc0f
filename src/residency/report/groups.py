"""The exam by group of test rows: what each step did to each, and so what was forgotten of tasks learnt in sequence."""

from __future__ import annotations

from typing import Any

from residency.report.facts import Facts
from residency.report.formats import dig, mapping, mappings, number

MOST = 12
LEAST = 3


def by_tag(facts: Facts) -> dict[str, Any] | None:
    """A lines figure with one line per tag of the test rows, from exam to exam.

    Returns:
        The figure; None where there is one exam, or not between 2 and `MOST` tags of at least `LEAST` scored items.
    """
    texts = mapping(facts.record, "task", "items")
    tags = {identity: str(tag) for identity in texts if (tag := dig(texts, identity, "tag")) is not None}
    exams = [exam for exam in facts.exams if mappings(exam, "task", "items")]
    sums: list[dict[str, list[float]]] = []
    for exam in exams:
        found: dict[str, list[float]] = {}
        for item in mappings(exam, "task", "items"):
            score, tag = number(item.get("score")), tags.get(str(item.get("id")))
            if score is not None and tag is not None:
                found.setdefault(tag, []).append(score)
        sums.append(found)
    shown = sorted({tag for found in sums for tag in found if len(found[tag]) >= LEAST})
    if len(exams) < 2 or not 2 <= len(shown) <= MOST:
        return None
    labels = [f"{i}. {facts.label(str(exam.get('id')))}" if i else "base" for i, exam in enumerate(exams)]
    turn = f"A line that {'falls' if facts.scale.higher else 'rises'} is being forgotten"
    counts = ", ".join(f"{tag} {max(len(found.get(tag, [])) for found in sums)}" for tag in shown)
    return {
        "kind": "lines",
        "title": "Every group of test rows, step by step",
        "series": [
            {
                "name": tag,
                "x": labels,
                "y": [sum(found[tag]) / len(found[tag]) if found.get(tag) else None for found in sums],
            }
            for tag in shown
        ],
        "xlabel": "examination",
        "ylabel": "mean score of its items",
        "note": f"Rows are grouped by their tag. Items: {counts}. {turn}.",
    }
