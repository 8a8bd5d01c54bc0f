"""N-way K-shot episodes of rows with several labels.

An episode draws N classes, K support rows and Q query rows for each, and asks which of the N labels every query has:

    support [N, K]      rows drawn for class n; they carry it, and perhaps others of the N
    query   [N · Q]     as many for each class, in random order
    target  [N · Q, N]  multi-hot: every one of the N labels a query carries, not only the one it was drawn for

No row is drawn twice in an episode. Rows are told apart by `keys` (their text), because corpora of this kind list a
sentence once under each of its labels: the released loader draws every class by itself, so that a sentence with two of
the N labels can be support of one and query of the other. Here it cannot. Episode i of a seed is a function of both
alone, whatever was drawn before.

Protocol after FewAsp (Hu, Zhao, Guo et al., "Multi-Label Few-Shot Learning for Aspect Category Detection", ACL 2021,
arXiv 2105.14174) as in its follow-up's code (1429904852/LDF, commit ee822da: 5 or 10 ways, 5 or 10 shots, 5 queries per
class). That a class's rows are all rows which carry its label is our choice; there each class has a list of its own.
Cost: O(N · (K + Q)) per episode after one pass over the labels.
"""

from __future__ import annotations

import random
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from residency.errors import DataError

TYPOS = {"entartainment": "entertainment", "servise": "service", "appontment": "appointment", "mani": "manicure"}
"""Words of FewAsp's labels that no tokenizer knows, and what is meant."""


def readable(label: str) -> str:
    """A label as words: underscores and hyphens become spaces, repeated words go, known typos are repaired.

    `food_food_meat_burger` → "food meat burger", `entartainment_casino` → "entertainment casino".
    """
    words = [TYPOS.get(w.lower(), w) for w in re.split(r"[\s_\-/]+", label) if w]
    return " ".join(dict.fromkeys(words)) or label


@dataclass(frozen=True)
class Episode:
    """One task: rows are given by their index.

    Args:
        classes: N labels.
        support: [N][K] rows.
        query: [N · Q] rows.
        target: [N · Q, N] bool.
    """

    classes: tuple[str, ...]
    support: tuple[tuple[int, ...], ...]
    query: tuple[int, ...]
    target: np.ndarray


class Episodes:
    """Episodes over rows.

    Args:
        labels: The labels of each row.
        ways, shots, queries: N, K and Q.
        seed: Together with an episode's number, decides everything.
        keys: What tells rows apart (their texts); by default their index.
        classes: Draw from these classes only; by default from all with enough rows.

    Attributes:
        classes: The classes episodes are drawn from, sorted.
        left_out: Classes with fewer than K + Q different rows.

    Raises:
        DataError: When fewer than N classes have K + Q rows.
    """

    def __init__(
        self,
        labels: Sequence[Sequence[str]],
        *,
        ways: int,
        shots: int,
        queries: int,
        seed: int = 0,
        keys: Sequence[Hashable] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        if min(ways, shots, queries) < 1:
            raise ValueError(f"ways, shots and queries are at least 1, not {ways}, {shots}, {queries}")
        self.ways, self.shots, self.queries, self.seed = ways, shots, queries, seed
        self.labels = [frozenset(found) for found in labels]
        self.keys: Sequence[Hashable] = range(len(labels)) if keys is None else keys
        if len(self.keys) != len(self.labels):
            raise ValueError(f"{len(self.keys)} keys for {len(self.labels)} rows")
        wanted = sorted(set().union(*self.labels) if classes is None else set(classes))
        self.rows: dict[str, list[int]] = {c: [] for c in wanted}
        for i, found in enumerate(self.labels):
            for c in sorted(found):
                if c in self.rows:
                    self.rows[c].append(i)
        enough = {c: len({self.keys[i] for i in found}) >= shots + queries for c, found in self.rows.items()}
        self.classes = [c for c in wanted if enough[c]]
        self.left_out = [c for c in wanted if not enough[c]]
        if len(self.classes) < ways:
            raise DataError(
                f"{ways}-way episodes of {shots} + {queries} rows per class, but only {len(self.classes)} of "
                f"{len(wanted)} classes have so many",
                hint="lower ways, shots or queries, or give more rows",
            )

    def episode(self, number: int) -> Episode:
        """Episode `number`.

        Raises:
            DataError: When rows with several labels leave some class without enough rows of its own, again and again.
        """
        draw = random.Random(f"{self.seed}/{number}")
        for _ in range(50):
            classes = draw.sample(self.classes, self.ways)
            if (found := self._rows(classes, draw)) is not None:
                support, query = found
                draw.shuffle(query)
                target = np.array([[c in self.labels[i] for c in classes] for i in query])
                return Episode(tuple(classes), tuple(support[c] for c in classes), tuple(query), target)
        raise DataError(
            f"no {self.ways} classes were found with {self.shots} + {self.queries} rows each that they do not share",
            hint="lower ways, shots or queries, or give more rows",
        )

    def _rows(self, classes: list[str], draw: random.Random) -> tuple[dict[str, tuple[int, ...]], list[int]] | None:
        """Support by class and all query rows; None when a class runs out. Classes with few rows choose first."""
        used: set[Hashable] = set()
        support, query = {}, []
        for c in sorted(classes, key=lambda c: len(self.rows[c])):
            taken: list[int] = []
            order = self.rows[c]
            for i in draw.sample(order, len(order)) if len(order) < 100 else _lazily(order, draw):
                if self.keys[i] not in used:
                    used.add(self.keys[i])
                    taken.append(i)
                    if len(taken) == self.shots + self.queries:
                        break
            else:
                return None
            support[c] = tuple(taken[: self.shots])
            query += taken[self.shots :]
        return support, query

    def take(self, count: int, start: int = 0) -> Iterator[Episode]:
        """Episodes `start`, `start + 1`, … of this seed."""
        return (self.episode(number) for number in range(start, start + count))


def _lazily(order: list[int], draw: random.Random) -> Iterator[int]:
    """A random permutation that costs only what is taken of it (Fisher and Yates, with the swaps in a dictionary)."""
    moved: dict[int, int] = {}
    for i in range(len(order)):
        j = draw.randrange(i, len(order))
        yield order[moved.get(j, j)]
        moved[j] = moved.get(i, i)
