"""The map of the house: every method and every recipe step, by name. Nothing is imported until it is asked for.

A method row says what it is (name, stage, role, paper), where it lives (`object`), how a recipe reaches it
(`step`), how mature it is and what it needs. A step row ties a recipe key (and its variant, such as `tune: {method:
probe}`) to its class.
"""

from __future__ import annotations

from difflib import get_close_matches

from residency.catalog import (
    adapt,
    augment,
    compress,
    curate,
    diversity,
    evaluate,
    importance,
    infer,
    quality,
    selectors,
)
from residency.catalog.rows import Method, Role, Stage, StepRow, load
from residency.errors import ResidencyError

__all__ = [
    "EXAM_STEP",
    "METHODS",
    "METRICS",
    "STEPS",
    "Method",
    "Role",
    "Stage",
    "StepRow",
    "load",
    "method",
    "nearest",
    "step_names",
    "step_rows",
]

_STAGES = (curate, adapt, compress, infer, evaluate)

METHODS: tuple[Method, ...] = (
    *(row for part in (quality, diversity, importance, selectors, augment) for row in part.METHODS),
    *(row for stage in _STAGES for row in stage.METHODS),
)

STEPS: tuple[StepRow, ...] = tuple(row for stage in _STAGES for row in stage.STEPS)

EXAM_STEP = "evaluate"
"""The step whose parameters say how every model of a run is examined."""

METRICS = tuple(m.name for m in METHODS if m.role == "Metric")


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str | None:
    """The known word most like a misspelt one, or None when nothing is alike."""
    lowered = {k.lower(): k for k in known}
    found = get_close_matches(str(word).lower().replace("_", "-"), list(lowered), n=1, cutoff=0.5)
    return lowered[found[0]] if found else None


def method(name: str) -> Method:
    """The catalogue row of a method.

    Raises:
        ResidencyError: When there is none; the message names the nearest.
    """
    for row in METHODS:
        if row.name == name:
            return row
    guess = nearest(name, [m.name for m in METHODS])
    raise ResidencyError(
        f"no method is called `{name}`" + (f"; did you mean `{guess}`?" if guess else ""),
        hint="`residency methods` lists them all",
    )


def step_rows(name: str) -> list[StepRow]:
    """All rows of a step name, default first; empty when unknown."""
    return [row for row in STEPS if row.name == name]


def step_names() -> list[str]:
    """The known step names, each once, in catalogue order."""
    return list(dict.fromkeys(row.name for row in STEPS))
