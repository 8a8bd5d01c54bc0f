"""Episodes: their promises checked row by row on generated corpora, and the draw against its expected frequencies."""

from __future__ import annotations

import random
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residency.adapt.episodes import Episodes, _lazily, readable
from residency.errors import DataError

CLASSES = [f"c{i}" for i in range(9)]


def corpus(n=240, seed=0, classes=CLASSES):
    """Rows with one to three labels."""
    rng = random.Random(seed)
    return [tuple(rng.sample(classes, rng.choice([1, 1, 2, 3]))) for _ in range(n)]


@given(st.integers(2, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_promises(ways, shots, queries, seed):
    labels = corpus()
    keys = [f"text {i // 2}" for i in range(240)]  # every text twice, perhaps with other labels
    episode = Episodes(labels, ways=ways, shots=shots, queries=queries, seed=seed, keys=keys).episode(3)
    assert len(set(episode.classes)) == ways
    assert [len(rows) for rows in episode.support] == [shots] * ways
    assert all(c in labels[i] for c, rows in zip(episode.classes, episode.support, strict=True) for i in rows)
    assert len(episode.query) == ways * queries
    drawn = [keys[i] for rows in (*episode.support, episode.query) for i in rows]
    assert len(set(drawn)) == len(drawn)  # no text twice, so support and query are disjoint
    assert episode.target.shape == (ways * queries, ways)
    for row, target in zip(episode.query, episode.target, strict=True):
        assert [c for c, y in zip(episode.classes, target, strict=True) if y] == [
            c for c in episode.classes if c in labels[row]
        ]
    assert (episode.target.sum(0) >= queries).all()


def test_seed_and_number_decide_and_nothing_else():
    def make(seed):
        return Episodes(corpus(), ways=3, shots=2, queries=2, seed=seed)

    def same(a, b):
        return (a.classes, a.support, a.query) == (b.classes, b.support, b.query) and (a.target == b.target).all()

    episodes, again = make(5), make(5)
    state = random.getstate()
    wanted = [episodes.episode(i) for i in range(6)]
    assert random.getstate() == state
    assert same(again.episode(4), wanted[4])  # without the four before it
    assert all(same(a, b) for a, b in zip(again.take(3, start=2), wanted[2:5], strict=True))
    assert not same(make(6).episode(0), wanted[0])
    assert len({e.query for e in wanted}) == 6


def test_classes_and_rows_are_drawn_evenly():
    labels = [(CLASSES[i % 6],) for i in range(120)]
    episodes = Episodes(labels, ways=3, shots=1, queries=1, seed=0)
    classes, rows = Counter(), Counter()
    for e in episodes.take(600):
        classes.update(e.classes)
        rows.update(i for part in (*e.support, e.query) for i in part)
    assert max(abs(classes[c] - 300) for c in CLASSES[:6]) < 60  # sd about 12
    first = [int(e.target[0].argmax()) for e in episodes.take(600)]  # queries come in no order
    assert max(abs(first.count(n) - 200) for n in range(3)) < 60  # sd 12
    assert len(rows) == 120
    assert max(rows.values()) < 60  # 30 expected


def test_lazy_permutation_is_one_and_even():
    rng = random.Random(0)
    found = Counter(tuple(_lazily([7, 8, 9], rng)) for _ in range(6000))
    assert set(found) == set(permutations([7, 8, 9]))
    assert max(abs(n - 1000) for n in found.values()) < 150  # sd 29
    big = list(range(5000))
    assert sorted(_lazily(big, rng)) == big


def test_rare_classes_are_left_out_and_too_few_refused():
    labels = [("a",)] * 6 + [("b",)] * 6 + [("c",)] * 2 + [("d", "a")]
    episodes = Episodes(labels, ways=2, shots=2, queries=2)
    assert episodes.classes == ["a", "b"]
    assert episodes.left_out == ["c", "d"]
    with pytest.raises(DataError, match="only 2 of 4"):
        Episodes(labels, ways=3, shots=2, queries=2)
    with pytest.raises(DataError, match="only 0 of 0"):
        Episodes([], ways=2, shots=1, queries=1)
    with pytest.raises(DataError, match="only 1 of 1"):
        Episodes(labels, ways=2, shots=2, queries=2, classes=["a"])
    with pytest.raises(ValueError, match="at least 1"):
        Episodes(labels, ways=2, shots=0, queries=2)
    with pytest.raises(ValueError, match="3 keys"):
        Episodes(labels, ways=2, shots=1, queries=1, keys=["x"] * 3)


def test_one_text_under_many_ids_is_one_row():
    with pytest.raises(DataError, match="only 0 of 2"):
        Episodes([("a",)] * 9 + [("b",)] * 9, ways=2, shots=1, queries=1, keys=["same"] * 9 + ["other"] * 9)


def test_classes_that_share_their_rows_are_refused_only_if_nothing_else_is_left():
    shared = [("a", "b")] * 3
    with pytest.raises(DataError, match="do not share"):
        Episodes(shared, ways=2, shots=1, queries=1).episode(0)
    for number in range(20):  # a and b never meet, for they cannot
        classes = Episodes([*shared, *[("c",)] * 2], ways=2, shots=1, queries=1).episode(number).classes
        assert "c" in classes


def test_the_class_with_fewer_rows_chooses_first():
    labels = [("a", "b")] * 2 + [("b",)] * 2  # a has only the shared rows
    episodes = Episodes(labels, ways=2, shots=1, queries=1)
    for number in range(20):
        assert episodes._rows(["b", "a"], random.Random(number)) is not None  # at the first attempt
        e = episodes.episode(number)
        assert set(e.support[e.classes.index("a")]) < {0, 1}
        assert np.array_equal(e.target[:, e.classes.index("b")], [True, True])


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("food_food_meat_burger", "food meat burger"),
        ("entartainment_casino", "entertainment casino"),
        ("staff-servise", "staff service"),
        ("decor", "decor"),
        ("_", "_"),
        ("Late fees", "Late fees"),
    ],
)
def test_readable(label, text):
    assert readable(label) == text
