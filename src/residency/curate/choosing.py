"""From columns and inputs to a choice: the filter, the quality to rank by, the selector, the budget."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from residency.curate.budget import rows_of, within_tokens
from residency.curate.expressions import Formula
from residency.curate.measuring import Supply
from residency.curate.params import Curating
from residency.curate.scoring import Array, Budgeted, Selection, Selector
from residency.errors import DataError

_ROW = re.compile(r"(?<!trusted )\b((?:kept |accepted )?)(?:pool )?row (\d[\d,]*)")


def choose(
    selector: type[Selector] | None,
    params: Curating,
    quality: str | None,
    columns: dict[str, np.ndarray],
    supply: Supply,
    tokens: Array | None,
    seed: int,
) -> Selection:
    """Filter, then select among what is left.

    Args:
        selector: The class to choose with; None keeps all that passes the filter.
        params: Keys of the step, the selector's among them.
        quality: The formula to rank by, high is good, if there is one.
        columns: [N] scores and facts of every row.
        supply: Inputs over all N rows.
        tokens: [N] tokens per row, for a budget in tokens.
        seed: The recipe's; a selector's own is added to it.

    Returns:
        The selection over all N rows; what the filter dropped says so.

    Raises:
        DataError: When no row is left, or the selector cannot choose from what is.
    """
    names, size = tuple(columns), len(next(iter(columns.values())))
    passed, values = np.ones(size, bool), np.zeros(size)
    if params.filter is not None:
        passed = Formula(params.filter, names)(columns)
    if quality is not None:
        values = Formula(quality, names)(columns)
    valued = ~np.isnan(values)
    finite = values[np.isfinite(values)]
    if len(finite):  # an infinite quality (a text that repeats no word) is the best or worst there is
        values = np.clip(values, finite.min(), finite.max())
    if selector is not None and "quality?" in selector.needs:  # a preference: who has none comes last
        values = np.where(valued, values, finite.min() if len(finite) else 0.0)
        valued[:] = True
    there = np.flatnonzero(passed & valued)
    reasons = np.full(size, "", object)
    reasons[~passed] = f"dropped: filter ({params.filter})"
    reasons[passed & ~valued] = f"dropped: no quality ({quality} has no value)"
    if not len(there):
        why = f"`{quality}` has no value for any row" if passed.any() else f"no row meets `filter: {params.filter}`"
        raise DataError(f"no row of the pool is left to choose from: {why}")
    if selector is None:
        reasons[there] = "kept: passes the filter"
        return Selection(there, passed.astype(float), reasons.tolist())

    inputs = supply.only(there, size)
    if quality is not None:
        inputs["quality"] = values[there].astype(float)
    found = _selected(selector, params, inputs, len(there), None if tokens is None else tokens[there], seed)
    score = np.full(size, np.nan)
    score[there] = found.score
    lines = columns["line"].astype(int)[there]
    reasons[there] = np.array([_in_lines(reason, lines) for reason in found.reasons], object)
    nearest = None
    if found.nearest is not None:
        # a trusted row keeps its number, a pool row gets the one it has in the whole pool
        nearest = np.full(size, -1)
        own = "example_embeddings" not in selector.needs
        nearest[there] = np.where(found.nearest < 0, -1, there[found.nearest]) if own else found.nearest
    return Selection(there[found.indices], score, reasons.tolist(), nearest)


def _in_lines(reason: str, lines: np.ndarray) -> str:
    """A selector counts the rows it was given; a reader of the report counts lines of the source."""
    return _ROW.sub(lambda m: f"{m[1]}line {lines[int(m[2].replace(',', '')) - 1]}", reason)


def _selected(
    selector: type[Selector], params: Curating, inputs: Supply, rows: int, tokens: Array | None, seed: int
) -> Selection:
    """Run the selector within the budget."""
    fields = selector.model_fields
    keys = {name: getattr(params, name) for name in fields if name != "keep"}
    if "seed" in fields:  # of equal recipes with other seeds other draws; 0 and not named are the same
        keys["seed"] += seed

    def run(keep: int) -> Selection:
        more = {"keep": keep} if issubclass(selector, Budgeted) else {}
        try:
            return selector(**keys, **more).select(*inputs.of(selector.needs))
        except ValueError as error:
            raise DataError(f"these rows cannot be chosen from: {error}") from None

    budget = getattr(params, "keep", rows)
    count = rows_of(budget, rows)
    if count is not None:
        return run(count)
    assert tokens is not None
    if int(str(budget).split()[0]) < tokens.min():
        raise DataError(f"`keep: {budget}` holds no row: the shortest has {int(tokens.min()):,} tokens")
    found, fits = within_tokens(str(budget), tokens, run, rows)
    reasons = list(found.reasons)
    for i in found.indices[fits:].tolist():
        reasons[i] = f"dropped: budget spent ({budget})"
    return replace(found, indices=found.indices[:fits], reasons=reasons)
