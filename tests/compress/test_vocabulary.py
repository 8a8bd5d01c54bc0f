"""Vocabularies told apart: identical, padded, extended, different."""

from __future__ import annotations

import pytest

from residency.compress.vocabulary import Relation, compare

WORDS = {f"w{i}": i for i in range(10)}


@pytest.mark.parametrize(
    ("teacher", "student", "rows", "expected"),
    [
        (WORDS, WORDS, (10, 10), Relation("identical", 10)),
        (WORDS, WORDS, (16, 16), Relation("identical", 16)),
        (WORDS, WORDS, (16, 10), Relation("padded", 10)),
        (WORDS, WORDS | {"new": 10}, (10, 11), Relation("extended", 10, "teacher")),
        (WORDS | {"new": 12}, WORDS, (16, 10), Relation("extended", 10, "student")),
        (WORDS, WORDS | {"w3": 4, "w4": 3}, (10, 10), Relation("different", 0)),
        (
            WORDS,
            {w: i for w, i in WORDS.items() if i != 4} | {"other": 4, "more": 10},
            (10, 11),
            Relation("different", 0),
        ),
        ({w: i for w, i in WORDS.items() if i != 4}, WORDS, (10, 10), Relation("different", 0)),
        ({}, WORDS, (0, 10), Relation("different", 0)),
    ],
)
def test_relations(teacher, student, rows, expected):
    assert compare(teacher, student, *rows) == expected
    swapped = compare(student, teacher, *rows[::-1])
    assert (swapped.kind, swapped.shared) == (expected.kind, expected.shared)
