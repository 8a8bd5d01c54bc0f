"""Do two models speak the same words? Asked of their tokenizers, before any weight is loaded.

A loss that compares probabilities word by word needs to know which row of one head is the same word as which row of
the other. Four cases occur:

    identical   the same token for every id, the same number of rows
    padded      the same tokens, but one embedding has more rows, unused ones (often rounded up to a multiple of 64)
    extended    one tokenizer has all tokens of the other under the same ids, and more behind them
    different   anything else: another tokenizer

In the first three the first `shared` rows of both heads are the same words and are compared; a student with more rows
is besides taught to give the others no probability (`distillation.outside_sum`). Texts must be encoded with the smaller
tokenizer, whose every token both models know. In the last, only losses that do
not compare word by word can be used ("uld"). What decides is the map of token to id, not the name of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Relation:
    """How two vocabularies compare.

    Args:
        kind: See the module.
        shared: Rows at the start of both heads that are the same words; 0 when different.
        smaller: Whose tokenizer knows only shared tokens: encode texts with this one.
    """

    kind: Literal["identical", "padded", "extended", "different"]
    shared: int
    smaller: Literal["teacher", "student"] = "teacher"

    def __str__(self) -> str:
        return f"{self.kind} vocabularies ({self.shared:,} shared tokens)" if self.shared else "different vocabularies"


def compare(teacher: Mapping[str, int], student: Mapping[str, int], teacher_rows: int, student_rows: int) -> Relation:
    """How a teacher's vocabulary relates to a student's.

    Args:
        teacher: Token → id (see `bases.vocabulary`).
        student: Likewise.
        teacher_rows: Rows of its embedding (config.vocab_size).
        student_rows: Likewise.
    """
    if not teacher or not student:
        return Relation("different", 0)
    if teacher == student:
        kind: Literal["identical", "padded"] = "identical" if teacher_rows == student_rows else "padded"
        shared = (
            min(teacher_rows, student_rows) if kind == "identical" else min(teacher_rows, student_rows, _size(teacher))
        )
        return Relation(kind, shared)
    small, large = (teacher, student) if len(teacher) < len(student) else (student, teacher)
    inside = all(large.get(token) == index for token, index in small.items())
    behind = min((index for token, index in large.items() if token not in small), default=0) >= _size(small)
    if inside and behind:
        return Relation("extended", _size(small), "teacher" if small is teacher else "student")
    return Relation("different", 0)


def _size(tokens: Mapping[str, int]) -> int:
    """One more than the largest id."""
    return 1 + max(tokens.values())
