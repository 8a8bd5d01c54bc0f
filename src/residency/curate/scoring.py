"""What every score and every selector of the curate stage is: parameters, the names of its inputs, one method.

A score makes one float per row; a selector chooses rows. Neither reads a file or knows a recipe: `score` and `select`
take arrays and lists. `needs` names those inputs, in order, and that is all a caller who has many scores to compute
has to know: whoever can supply the names below (the recipe step does, each computed once) can run any of them.

    texts             list[str]   question and answer of every row as one text
    questions         list[str]   what is asked
    answers           list[str]   what is answered
    tokens            lexicaltokens.Tokens   the texts' words as numbers
    labels            list[str | None]   the class of a row (the step takes its tag where it has no label)
    tags              list[tuple[str, …]]   the tags of a row
    embeddings        [N, D]      of the texts, by a sentence encoder
    reading           reading.Reading   what one forward pass of a language model says of every row
    judge             callable (messages) → str | float; its attribute many(list of messages) is used where it has one
    reward            callable (questions, answers) → N numbers
    own_answers       list[str]   what the model itself answers
    gradients         [N, P]      of every row's loss, projected
    columns           dict[str, [N]]   scores computed before
    tasks, instructions   list[str]   which of several tasks a row belongs to, and what it is told to do
    example_texts, example_labels, example_embeddings, example_gradients, example_tags, example_instructions : the same
                      of the K trusted rows (of the new task's rows, where tasks are learnt in sequence)

Missing values are NaN: a score that a row does not have is not a number, and no selector chooses such a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from residency.step import Params

Array = NDArray[np.float64]


class Score(Params):
    """Rows → one float each.

    Class attributes:
        needs: Names of the inputs of `score`, in order (see the module); one that may be missing ends in "?".
        good: Which end the literature keeps: "high", "low", or "middle" where both ends are bad.
        alone: Whether a row's value depends on that row only (and on trusted rows or a model), not on the pool.
    """

    needs: ClassVar[tuple[str, ...]] = ("texts",)
    good: ClassVar[Literal["high", "low", "middle"]] = "high"
    alone: ClassVar[bool] = True

    def score(self, *inputs: Any) -> Array:
        """One value per row.

        Args:
            inputs: What `needs` names.

        Returns:
            [N]; NaN where a row has no value.
        """
        raise NotImplementedError("a score computes `score(…)`")


@dataclass(frozen=True)
class Selection:
    """What a selector returns.

    Args:
        indices: [n] rows kept, in the order in which they were chosen.
        score: [N] what the decision went by, of every row (a similarity, a gain, a quality); NaN where it was not
            computed.
        reasons: For every row, why it was kept or dropped; begins with "kept" or "dropped".
        nearest: [N] the row it was compared with (which trusted row, which chosen row), or None where there is none.
    """

    indices: NDArray[np.int64]
    score: NDArray[Any]
    reasons: Sequence[str]
    nearest: NDArray[np.int64] | None = None


class Selector(Params):
    """Rows → the ones to keep.

    Class attributes:
        needs: Names of the inputs of `select`, in order (see the module). An input that may be missing ends in "?",
            and is then passed as None.
    """

    needs: ClassVar[tuple[str, ...]] = ("embeddings",)

    def select(self, *inputs: Any) -> Selection:
        """Choose.

        Args:
            inputs: What `needs` names; `quality` is the [N] column (or combination of columns) that the caller ranks
                rows by.

        Returns:
            The selection.
        """
        raise NotImplementedError("a selector computes `select(…)`")


class Budgeted(Selector):
    """A selector that is told how many rows to keep."""

    keep: int = Field(1000, ge=1)
    """Rows to choose."""
