"""Formulas over columns: `ifd < 1 and percentile(mtld) > 20`, `complexity * quality`.

What may stand in a formula: column names (hyphens included), numbers and quoted text, + − * / ** and brackets, the
comparisons < <= > >= == != (also chained: 5 < length < 500), `in` with a list of texts, `and`, `or`, `not`, and

    percentile(x)   share of rows with a smaller or equal value, in per cent; ties share the mean of their ranks
    rank(x)         1 for the highest value
    scaled(x)       (x − mean) / standard deviation
    log, exp, sqrt, abs, minimum(a, b), maximum(a, b), missing(x)

A comparison with a missing value is false, so a row without a score does not pass a filter on it; `missing(x)` asks.
percentile, rank and scaled look at the rows of the pool that have a value.

A formula is parsed once and refused with what is wrong and the nearest known column; nothing of it is ever run as
Python. Cost: one pass of numpy per operation.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np

Column = np.ndarray
"""[N] floats, or texts of dtype object."""


def percentile(x: Column) -> Column:
    """Mean rank of every value in per cent; NaN where it is missing."""
    found = np.full(len(x), np.nan)
    there = np.flatnonzero(~np.isnan(x))
    if len(there):
        ordered = np.sort(x[there])
        low, high = np.searchsorted(ordered, x[there], "left"), np.searchsorted(ordered, x[there], "right")
        found[there] = 100 * (low + 1 + high) / 2 / len(there)
    return found


def _rank(x: Column) -> Column:
    there = ~np.isnan(x)
    ordered = np.sort(-x[there])
    return np.where(there, 1.0 + np.searchsorted(ordered, -x, "left"), np.nan)


def _scaled(x: Column) -> Column:
    there = x[np.isfinite(x)]
    spread = there.std() if len(there) else 0.0
    return (x - there.mean()) / spread if spread else np.where(np.isnan(x), np.nan, 0.0)


FUNCTIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "percentile": (1, percentile),
    "rank": (1, _rank),
    "scaled": (1, _scaled),
    "log": (1, np.log),
    "exp": (1, np.exp),
    "sqrt": (1, np.sqrt),
    "abs": (1, np.abs),
    "minimum": (2, np.minimum),
    "maximum": (2, np.maximum),
    "missing": (1, np.isnan),
}

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.true_divide,
    ast.Pow: np.float_power,
    ast.USub: np.negative,
    ast.UAdd: np.positive,
    ast.Lt: np.less,
    ast.LtE: np.less_equal,
    ast.Gt: np.greater,
    ast.GtE: np.greater_equal,
}
_HINT = "for example `ifd < 1 and percentile(mtld) > 20`"


class Formula:
    """A checked formula.

    Args:
        text: What the user wrote.
        known: The columns there are.

    Raises:
        ValueError: When it does not read, or names what is not there.
    """

    def __init__(self, text: str, known: tuple[str, ...]) -> None:
        self.text = text
        self.names: set[str] = set()
        self._known = {_plain(name): name for name in known}
        # a hyphen in a column's name is no minus: write it as Python can read it
        hyphened = sorted((name for name in known if "-" in name), key=len, reverse=True)
        pattern = "|".join(rf"(?<!\w)(?<!\w-){re.escape(name)}(?!\w)(?!-\w)" for name in hyphened)
        parts = re.split(r"""('[^']*'|"[^"]*")""", text)
        if pattern:
            parts[::2] = [re.sub(pattern, lambda m: _plain(m[0]), part) for part in parts[::2]]
        try:
            self._tree = ast.parse("".join(parts).strip(), mode="eval").body
        except (SyntaxError, ValueError):
            raise ValueError(f"the formula `{text}` does not read; {_HINT}") from None
        self._check(self._tree)

    def __call__(self, columns: Mapping[str, Column]) -> Column:
        """The values [N].

        Args:
            columns: Every known column.
        """
        size = len(next(iter(columns.values())))
        with np.errstate(all="ignore"):
            return np.broadcast_to(self._value(self._tree, columns), (size,)).copy()

    def _check(self, node: ast.AST) -> None:
        if isinstance(node, ast.Name):
            if node.id not in self._known:
                near = get_close_matches(node.id, self._known, n=1, cutoff=0.5)
                guess = f"; did you mean `{self._known[near[0]]}`?" if near else ""
                there = ", ".join(self._known.values())
                raise ValueError(f"the formula `{self.text}` names no column: `{node.id}`{guess} (columns: {there})")
            self.names.add(self._known[node.id])
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            if name not in FUNCTIONS or node.keywords or len(node.args) != FUNCTIONS[name][0]:
                there = ", ".join(n + ("(x)" if k == 1 else "(a, b)") for n, (k, _) in FUNCTIONS.items())
                raise ValueError(f"the formula `{self.text}` calls `{ast.unparse(node)}`; functions: {there}")
            for argument in node.args:
                self._check(argument)
        elif isinstance(node, ast.Constant) and (
            isinstance(node.value, str) or (isinstance(node.value, (int, float)) and not isinstance(node.value, bool))
        ):
            pass
        elif isinstance(node, (ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.List, ast.Tuple)):
            for part in ast.iter_child_nodes(node):
                if not isinstance(part, (ast.boolop, ast.operator, ast.unaryop, ast.cmpop, ast.expr_context)):
                    self._check(part)
                elif type(part) not in _OPERATORS and not isinstance(part, _HANDLED):
                    raise ValueError(f"the formula `{self.text}` uses an operation it may not; {_HINT}")
        else:
            raise ValueError(f"the formula `{self.text}` holds `{ast.unparse(node)}`, which it may not; {_HINT}")

    def _value(self, node: ast.AST, columns: Mapping[str, Column]) -> Any:
        if isinstance(node, ast.Name):
            return columns[self._known[node.id]]
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, (ast.List, ast.Tuple)):
            return [self._value(part, columns) for part in node.elts]
        if isinstance(node, ast.Call):
            assert isinstance(node.func, ast.Name)
            return FUNCTIONS[node.func.id][1](*(self._numbers(part, columns) for part in node.args))
        if isinstance(node, ast.BinOp):
            return _OPERATORS[type(node.op)](self._numbers(node.left, columns), self._numbers(node.right, columns))
        if isinstance(node, ast.UnaryOp):
            if isinstance(node.op, ast.Not):
                return ~self._truth(node.operand, columns)
            return _OPERATORS[type(node.op)](self._numbers(node.operand, columns))
        if isinstance(node, ast.BoolOp):
            join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
            return join.reduce([self._truth(part, columns) for part in node.values])
        assert isinstance(node, ast.Compare)
        left, met = self._value(node.left, columns), np.array(True)
        for op, part in zip(node.ops, node.comparators, strict=True):
            right = self._value(part, columns)
            met = met & self._compared(op, left, right)
            left = right
        return met

    def _compared(self, op: ast.cmpop, left: Any, right: Any) -> Any:
        if isinstance(op, (ast.In, ast.NotIn)):
            if not isinstance(right, list):
                raise ValueError(f"the formula `{self.text}` needs a list after `in`: tag in ['a', 'b']")
            found = np.isin(np.asarray(left), np.array(right, np.asarray(left).dtype))
            return ~found if isinstance(op, ast.NotIn) else found
        if isinstance(op, (ast.Eq, ast.NotEq)):
            if _is_text(left) != _is_text(right):
                raise ValueError(f"the formula `{self.text}` compares a text with a number")
            equal = np.asarray(left) == np.asarray(right)
            return ~equal & ~_missing(left) & ~_missing(right) if isinstance(op, ast.NotEq) else equal
        if _is_text(left) or _is_text(right):
            raise ValueError(f"the formula `{self.text}` compares texts by size; use == or `in`")
        return _OPERATORS[type(op)](left, right)

    def _numbers(self, node: ast.AST, columns: Mapping[str, Column]) -> Any:
        found = self._value(node, columns)
        if isinstance(found, list) or _is_text(found):
            raise ValueError(f"the formula `{self.text}` calculates with a text: `{ast.unparse(node)}`")
        return np.asarray(found, float)

    def _truth(self, node: ast.AST, columns: Mapping[str, Column]) -> Any:
        found = np.asarray(self._value(node, columns))
        if found.dtype != bool:
            raise ValueError(f"in the formula `{self.text}`, `{ast.unparse(node)}` is a value, not a condition")
        return found


_HANDLED = (ast.And, ast.Or, ast.Not, ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Load)


def _plain(name: str) -> str:
    return name.replace("-", "_")


def _is_text(value: Any) -> bool:
    return np.asarray(value).dtype.kind in "OU"


def _missing(value: Any) -> Any:
    return np.asarray(False) if _is_text(value) else np.isnan(np.asarray(value, float))
