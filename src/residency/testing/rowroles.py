"""The checks of the roles that work on rows: scores and selectors. A case fills in the hooks."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any, ClassVar

from residency.testing.roles import Case


class RowsCase(Case):
    """What scores and selectors share: a problem of N rows, parameters to try, and who is an input per row."""

    settings: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Parameters to try against the reference; consecutive ones must give different answers."""
    per_row: ClassVar[tuple[int, ...]] = (0,)
    """Which inputs have one entry per row (the others are trusted rows and the like)."""

    @property
    def params(self) -> Any:
        """The method's class is its parameter model."""
        from residency import catalog

        return catalog.method(self.name).load()

    def problem(self, seed: int = 0) -> tuple[Any, ...]:
        """The inputs of the method, in the order of its `needs`."""
        raise NotImplementedError("abstract: a problem")

    def permuted(self, inputs: tuple[Any, ...], order: list[int]) -> tuple[Any, ...]:
        """The same problem with its rows in another order."""
        return tuple(_taken(x, order) if i in self.per_row else x for i, x in enumerate(inputs))

    def rows(self, inputs: tuple[Any, ...]) -> int:
        """How many rows a problem has."""
        return len(inputs[self.per_row[0]])

    def check_needs(self) -> None:
        """A problem brings what the method says it needs, in names that callers can supply."""
        from residency.curate import scoring

        needs = [n.removesuffix("?") for n in self.params.needs]
        known = (scoring.__doc__ or "") + " quality "
        assert len(self.problem()) == len(needs), f"needs {needs}"
        assert all(f"{n} " in known or f"{n}," in known for n in needs), f"unknown input among {needs}"


class ScorerCase(RowsCase):
    """Rows → one float each."""

    role = "Scorer"
    tolerance: ClassVar[float] = 1e-9

    def score(self, *inputs: Any, **params: Any) -> Any:
        """The column."""
        return self.params(**params).score(*inputs)

    def reference(self, *inputs: Any, **params: Any) -> list[float]:
        """The column, by an independent implementation."""
        raise NotImplementedError("abstract: the reference")

    def check_reference(self) -> None:
        """One float per row, equal to an independent implementation; every setting changes something."""
        import numpy as np

        found = []
        for params in self.settings:
            inputs = self.problem()
            mine = np.asarray(self.score(*inputs, **params))
            assert mine.dtype == np.float64, mine.dtype
            assert mine.shape == (self.rows(inputs),), mine.shape
            expected = np.asarray(self.reference(*inputs, **params), float)
            np.testing.assert_allclose(mine, expected, rtol=self.tolerance, atol=self.tolerance, err_msg=str(params))
            found.append(mine)
        assert all(not np.array_equal(a, b, equal_nan=True) for a, b in pairwise(found)), "a parameter changed nothing"

    def check_order(self) -> None:
        """Shuffled rows have shuffled scores."""
        import numpy as np

        inputs = self.problem()
        order = np.random.default_rng(1).permutation(self.rows(inputs)).tolist()
        for params in self.settings:
            whole = np.asarray(self.score(*inputs, **params))
            shuffled = np.asarray(self.score(*self.permuted(inputs, order), **params))
            np.testing.assert_allclose(shuffled, whole[order], rtol=1e-6, atol=1e-9, err_msg=str(params))

    def check_deterministic_and_pure(self) -> None:
        """The same call gives the same column; inputs and the global random states stay as they were."""
        import numpy as np

        inputs = self.problem()
        kept, state = copy.deepcopy(inputs), random_states()
        a, b = (np.asarray(self.score(*inputs, **self.settings[0])) for _ in range(2))
        np.testing.assert_array_equal(a, b)
        _same(inputs, kept)
        assert random_states() == state, "a global random state moved"

    def check_alone(self) -> None:
        """A row's score depends on the other rows just where the class says so."""
        import numpy as np

        inputs = self.problem()
        whole = np.asarray(self.score(*inputs, **self.settings[0]))
        if self.params.alone:
            for i in (0, self.rows(inputs) - 1):
                mine = np.asarray(self.score(*self.permuted(inputs, [i]), **self.settings[0]))
                np.testing.assert_allclose(mine, whole[i : i + 1], rtol=1e-5, atol=1e-6)
        else:
            half = list(range(self.rows(inputs) // 2))
            part = np.asarray(self.score(*self.permuted(inputs, half), **self.settings[0]))
            assert not np.allclose(part, whole[half], equal_nan=True), "no score depends on the other rows: say `alone`"

    def check_empty(self) -> None:
        """No rows give an empty column, or a ValueError that says how many are needed."""
        inputs = self.permuted(self.problem(), [])
        try:
            assert len(self.score(*inputs, **self.settings[0])) == 0
        except ValueError:
            return


class SelectorCase(RowsCase):
    """Rows → the ones to keep, in the order in which they were chosen."""

    role = "Selector"
    everything: ClassVar[dict[str, Any] | None] = {"keep": 10_000}
    """Parameters under which every row is kept; None where the method has no such limit."""
    follows_order: ClassVar[bool] = False
    """Whether the answer may depend on the order of the rows (random draws, clusters started by chance)."""

    def select(self, *inputs: Any, **params: Any) -> Any:
        """The selection."""
        return self.params(**params).select(*inputs)

    def reference(self, *inputs: Any, **params: Any) -> list[int]:
        """The chosen rows in their order, by brute force."""
        raise NotImplementedError("abstract: the reference")

    def check_reference(self) -> None:
        """The same rows in the same order as brute force, and every parameter changes something."""
        inputs = self.problem()
        found = []
        for params in self.settings:
            mine = self.select(*inputs, **params).indices.tolist()
            expected = self.reference(*inputs, **params)
            assert mine == expected, f"with {params}: {mine} against {expected}"
            found.append(mine)
        assert all(a != b for a, b in pairwise(found)), "a parameter changed nothing"

    def check_shape_of_the_answer(self) -> None:
        """Indices are distinct and in range, the budget holds, every row has a reason that fits, a score."""
        import numpy as np

        inputs = self.problem()
        for params in self.settings:
            chosen = self.select(*inputs, **params)
            n = self.rows(inputs)
            kept = set(chosen.indices.tolist())
            assert chosen.indices.dtype == np.int64
            assert len(kept) == len(chosen.indices) <= params.get("keep", n)
            assert all(0 <= i < n for i in kept)
            assert len(chosen.reasons) == len(chosen.score) == n
            assert not np.isinf(chosen.score).any()
            for i, reason in enumerate(chosen.reasons):
                assert reason.startswith("kept" if i in kept else "dropped"), f"row {i}: {reason!r}"
            if chosen.nearest is not None:
                assert chosen.nearest.shape == (n,)

    def check_deterministic_and_pure(self) -> None:
        """The same call gives the same answer; inputs and the global random states stay as they were."""
        inputs = self.problem()
        kept, state = copy.deepcopy(inputs), random_states()
        for params in self.settings:
            a, b = (self.select(*inputs, **params) for _ in range(2))
            assert a.indices.tolist() == b.indices.tolist()
            assert list(a.reasons) == list(b.reasons)
        _same(inputs, kept)
        assert random_states() == state, "a global random state moved"

    def check_order(self) -> None:
        """Shuffled rows give the same choice, in the same order, unless the case says that it follows their order."""
        import numpy as np

        inputs = self.problem()
        order = np.random.default_rng(1).permutation(self.rows(inputs)).tolist()
        if self.follows_order:
            return
        for params in self.settings:
            mine = self.select(*inputs, **params).indices.tolist()
            shuffled = self.select(*self.permuted(inputs, order), **params).indices.tolist()
            assert [order[i] for i in shuffled] == mine, f"with {params}"

    def check_budget_of_everything(self) -> None:
        """A budget of at least N rows with nothing forbidden keeps them all."""
        if self.everything is None:
            return
        inputs = self.problem()
        chosen = self.select(*inputs, **self.everything).indices.tolist()
        assert sorted(chosen) == list(range(self.rows(inputs)))

    def check_bad_input(self) -> None:
        """Embeddings that are not finite, and inputs of different lengths, are refused."""
        import numpy as np

        for place in self.per_row:
            inputs = list(self.problem())
            if isinstance(inputs[place], np.ndarray) and inputs[place].ndim == 2:
                inputs[place][4, 1] = np.nan
                self._refused(tuple(inputs), "an embedding that is not finite")
            if len(self.per_row) > 1:
                inputs = list(self.problem())
                inputs[place] = inputs[place][:-1]
                self._refused(tuple(inputs), f"input {place} one row short")

    def _refused(self, inputs: tuple[Any, ...], what: str) -> None:
        try:
            self.select(*inputs, **self.settings[0])
        except ValueError:
            return
        raise AssertionError(f"accepted: {what}")


def _taken(rows: Any, order: list[int]) -> Any:
    """Rows in another order, of an array, a list or anything with `take`."""
    import numpy as np

    if rows is None:
        return None
    if isinstance(rows, np.ndarray):
        return rows[np.array(order, int)]
    if isinstance(rows, dict):
        return {name: _taken(column, order) for name, column in rows.items()}
    return rows.take(order) if hasattr(rows, "take") else [rows[i] for i in order]


def random_states() -> str:
    """The global random states of Python, numpy and torch, to be compared."""
    import random

    import numpy as np
    import torch

    return str((np.random.get_state(), torch.get_rng_state().sum(), hash(random.getstate())))


def _same(inputs: tuple[Any, ...], kept: tuple[Any, ...]) -> None:
    import numpy as np

    for a, b in zip(inputs, kept, strict=True):
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
        elif isinstance(a, (list, dict)):
            np.testing.assert_equal(a, b)
