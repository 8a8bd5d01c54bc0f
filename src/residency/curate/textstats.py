"""What can be counted in a text without any model: length, repetition, what its characters are.

    length       words or characters of the question, the answer, or both
    repetition   n-grams      share of the characters of words that lie in an n-gram of words which stood before
                 top-n-gram   share of those characters that lies in the most frequent n-gram, 0 where none repeats
                 lines        share of lines that stood before (blank lines do not count)
    characters   share of characters, white space aside, that are letters, digits or symbols

Words are what white space separates. n-grams and lines are compared as they stand. Every character counts once, also
where repeated n-grams overlap, as Gopher's rules ask; the first occurrence does not count, so a text written twice has
1/2. Gopher drops documents with more than 30 % of duplicate lines, 20 / 18 / 16 % in the top 2 / 3 / 4-gram, and 15 …
10 % in duplicate 5 … 10-grams. Of several n-grams that are equally frequent, the one with most characters is the top
one.

Letters are Unicode's L and M (marks are part of a letter), digits N, symbols P and S; the rest (separators, control
characters, white space) is left out. Code and tables are high in symbols, and so is broken text.

Length has two bad ends; a rank by length alone is a strong baseline for instruction tuning (Zhao et al. 2024, arXiv
2402.04833, keep the 1,000 longest answers), and the bias of many judges.

Paper: Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", arXiv 2112.11446,
table A1; code: none released (huggingface/datatrove at 06c98b0 skips over an n-gram once counted, so finds a little
less). Cost: linear in characters; n-grams are held for one text at a time.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from residency.curate.scoring import Array, Score


class Length(Score):
    """How long a row is."""

    needs = ("questions", "answers")
    good = "middle"

    of: Literal["question", "answer", "both"] = "answer"
    """What is measured."""
    unit: Literal["words", "characters"] = "words"
    """What is counted; words are what white space separates."""

    def score(self, questions: Sequence[str], answers: Sequence[str]) -> Array:
        """A count per row, [N]; an empty text has length 0.

        Args:
            questions: N texts.
            answers: N texts.
        """
        sides = {"question": (questions,), "answer": (answers,), "both": (questions, answers)}[self.of]
        count = (lambda text: len(text.split())) if self.unit == "words" else len
        return np.array([sum(map(count, texts)) for texts in zip(*sides, strict=True)], float)


class Repetition(Score):
    """How much of the answer repeats itself."""

    needs = ("answers",)
    good = "low"

    form: Literal["n-grams", "top-n-gram", "lines"] = "n-grams"
    """What is looked for; see the module."""
    n: int | None = Field(None, ge=1, le=100)
    """Words of an n-gram; by default 5, and 2 for the top n-gram. Lines have none."""

    @model_validator(mode="after")
    def _n_is_used(self) -> Repetition:
        if self.form == "lines" and self.n is not None:
            raise ValueError("`n` says how many words an n-gram has: leave it out with `form: lines`")
        return self

    def score(self, answers: Sequence[str]) -> Array:
        """A share per row, [N]; NaN for an answer without words.

        Args:
            answers: N texts.
        """
        if self.form == "lines":
            return np.array([_repeated_lines(text) for text in answers], float)
        measure = _repeated if self.form == "n-grams" else _top
        n = self.n or (5 if self.form == "n-grams" else 2)
        return np.array([measure(text.split(), n) for text in answers], float)


def _repeated_lines(text: str) -> float:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else np.nan


def _repeated(words: list[str], n: int) -> float:
    if not words:
        return np.nan
    seen: set[tuple[str, ...]] = set()
    covered, characters = 0, 0  # words before `covered` have been looked at
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        if gram in seen:
            characters += sum(map(len, words[max(i, covered) : i + n]))
            covered = i + n
        seen.add(gram)
    return characters / sum(map(len, words))


def _top(words: list[str], n: int) -> float:
    if not words:
        return np.nan
    times = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    most = max(times.values(), default=1)
    if most == 1:
        return 0.0
    top = max((gram for gram, k in times.items() if k == most), key=lambda gram: sum(map(len, gram)))
    covered, characters = 0, 0
    for i in range(len(words) - n + 1):
        if tuple(words[i : i + n]) == top:
            characters += sum(map(len, words[max(i, covered) : i + n]))
            covered = i + n
    return characters / sum(map(len, words))


KINDS = ("letters", "digits", "symbols")
"""Kinds of characters that are counted; others are left out."""


class Characters(Score):
    """What share of a row's characters is of one kind."""

    good = "middle"

    kind: Literal["letters", "digits", "symbols"] = "symbols"
    """Which characters are counted."""

    def score(self, texts: Sequence[str]) -> Array:
        """A share per row, [N]; NaN for a text of white space.

        Args:
            texts: N texts.
        """
        kinds, shares = _kinds(), np.full(len(texts), np.nan)
        for i, text in enumerate(texts):
            codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
            times = np.bincount(kinds[codes], minlength=len(KINDS) + 1)[: len(KINDS)]
            if times.any():
                shares[i] = times[KINDS.index(self.kind)] / times.sum()
        return shares


@cache
def _kinds() -> NDArray[Any]:
    """Of every code point its place in `KINDS`, or 3."""
    kind = dict.fromkeys("LM", 0) | dict.fromkeys("N", 1) | dict.fromkeys("PS", 2)
    return np.array([kind.get(unicodedata.category(chr(code))[0], 3) for code in range(0x110000)], np.uint8)
