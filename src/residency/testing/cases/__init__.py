"""One case per catalogue row: its tiny input, its baseline, its independent reference; a module per stage."""

from __future__ import annotations

import inspect

from residency.testing.cases import (
    adapt,
    augment,
    compress,
    diversity,
    drafting,
    evaluate,
    eviction,
    importance,
    losses,
    noisy,
    prompts,
    prototypes,
    quality,
    replay,
    selectors,
    sinks,
)
from residency.testing.roles import Case, Factory


def _cases() -> dict[str, Factory]:
    """Every case class that names a method."""
    found: dict[str, Factory] = {}
    for module in (
        *(quality, diversity, importance, selectors, replay, augment),
        *(adapt, prototypes, noisy, prompts),
        *(compress, losses, drafting, eviction, evaluate, sinks),
    ):
        for _, case in inspect.getmembers(module, inspect.isclass):
            if issubclass(case, Case) and case.__module__ == module.__name__ and hasattr(case, "name"):
                found[case.name] = case
    return found


CASES = _cases()
