"""How much to keep: a count of rows (`400`), a share of the pool (`20%`), or words to train on (`50000 tokens`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator

from residency.curate.scoring import Selection


def _checked(value: Any) -> Any:
    """A count stays a number; a share and a number of tokens become one spelling."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError("a budget is a number of rows, a share such as 20%, or such as 50000 tokens")
    if isinstance(value, int):
        if value < 1:
            raise ValueError("a budget is at least 1 row")
        return value
    if found := re.fullmatch(r"\s*(\d[\d_]*)\s*(rows)?\s*", value):
        return _checked(int(found[1].replace("_", "")))
    if found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value):
        if not 0 < float(found[1]) <= 100:
            raise ValueError("a share lies above 0 and at most at 100 %")
        return f"{float(found[1]):g}%"
    if found := re.fullmatch(r"\s*(\d[\d_]*)\s*tokens\s*", value):
        if not int(found[1].replace("_", "")):
            raise ValueError("a budget is at least 1 token")
        return f"{int(found[1].replace('_', ''))} tokens"
    raise ValueError("a budget is a number of rows, a share such as 20%, or such as 50000 tokens")


Budget = Annotated[int | str, BeforeValidator(_checked)]


def rows_of(budget: int | str, rows: int) -> int | None:
    """The budget as a count of rows; None where it counts tokens."""
    if isinstance(budget, int):
        return budget
    if budget.endswith("%"):
        return max(1, round(rows * float(budget[:-1]) / 100))
    return None


def within_tokens(
    budget: str, tokens: NDArray[Any], choose: Callable[[int], Selection], most: int
) -> tuple[Selection, int]:
    """Choose rows until their tokens are spent.

    Greedy selectors choose the same first rows whatever they are asked for, so the answer for a larger count, cut where
    the budget is spent, is the answer; the count is doubled until it is large enough.

    Args:
        budget: Such as "50000 tokens".
        tokens: [N] tokens of every row.
        choose: Selects a count of rows.
        most: Number of rows there are.

    Returns:
        The selection, and how many of its rows fit. The first row that does not fit ends it.
    """
    limit = int(budget.split()[0])
    count = min(most, max(1, int(1.5 * limit / max(1.0, float(np.mean(tokens))))))
    while True:
        chosen = choose(count)
        spent = np.cumsum(tokens[chosen.indices])
        fits = int(np.searchsorted(spent, limit, "right"))
        if fits < len(chosen.indices) or count >= most or len(chosen.indices) < count:
            return chosen, fits
        count = min(most, 2 * count)
