"""Entropies of categories against scipy and closed forms; neighbour distances against brute force."""

from __future__ import annotations

import math
import tracemalloc
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residency.curate.entropies import KNN, Rarity, entropy, evenness, renyi, shares, simpson

ROWS = st.lists(st.sampled_from("aabcd"), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_entropies_equal_scipy_and_enumeration(rows):
    stats = pytest.importorskip("scipy.stats")
    counts = [rows.count(c) for c in dict.fromkeys(rows)]
    assert list(shares(rows).values()) == [c / len(rows) for c in counts]
    assert entropy(rows) == pytest.approx(stats.entropy(counts), abs=1e-12)
    assert renyi(rows, 0) == pytest.approx(math.log(len(counts)))
    assert renyi(rows, math.inf) == pytest.approx(-math.log(max(counts) / len(rows)))
    assert renyi(rows, 3) == pytest.approx(math.log(sum((c / len(rows)) ** 3 for c in counts)) / -2)
    assert simpson(rows) == pytest.approx(np.mean([a != b for a, b in product(rows, rows)]))
    assert renyi(rows, 2) == pytest.approx(-math.log(1 - simpson(rows)))
    orders = [renyi(rows, a) for a in (0, 0.5, 1, 2, 5, math.inf)]
    assert all(a >= b - 1e-12 for a, b in pairwise(orders))
    if len(rows) > 1:
        assert simpson(rows, replacement=False) == pytest.approx(np.mean([a != b for a, b in combinations(rows, 2)]))
    rarity = Rarity().score(rows)
    assert rarity.mean() == pytest.approx(entropy(rows), abs=1e-12)
    assert rarity[np.argmax([rows.count(r) for r in rows])] == rarity.min()


def test_evenness():
    assert evenness(list("abcabc")) == pytest.approx(1)
    assert evenness(list("aaab"), possible=4) == pytest.approx(entropy(list("aaab")) / math.log(4))
    assert math.isnan(evenness(["a", "a"]))
    assert evenness(["a", "a"], possible=3) == 0
    with pytest.raises(ValueError, match="possible"):
        evenness(list("abc"), possible=2)


def test_rows_with_several_tags_or_none():
    tags = [("x", "y"), (), ("x",), ["z"]]
    assert shares(tags) == {"x": 0.5, "y": 0.25, "z": 0.25}
    found = Rarity().score(tags)
    assert np.isnan(found[1])
    np.testing.assert_allclose(found[[0, 2, 3]], np.log([8**0.5, 2, 4]))
    assert entropy([3, 3, 3]) == 0
    assert math.isnan(simpson([1], replacement=False))
    for broken in ([], [(), ()]):
        for function in (entropy, simpson, evenness):
            with pytest.raises(ValueError, match="no row has a category"):
                function(broken)


def brute(rows, j, metric):
    rows = np.asarray(rows, np.float64)
    if metric == "cos":
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        distance = 1 - unit @ unit.T
    else:
        distance = np.linalg.norm(rows[:, None] - rows[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    return np.sort(distance, axis=1)[:, j - 1]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 60), st.integers(1, 6), st.sampled_from(["cos", "euclid"]), st.integers(1, 70), st.integers(0, 999)
)
def test_neighbours_equal_brute_force_at_every_block(n, j, metric, block, seed):
    rows = np.random.default_rng(seed).standard_normal((n, 4)) + 3
    knn = KNN(neighbour=min(j, n - 1), metric=metric)
    distance, who = knn.neighbours(rows, block)
    np.testing.assert_allclose(distance, brute(rows, knn.neighbour, metric), rtol=1e-4, atol=1e-7)
    assert (who != np.arange(n)).all()


def test_copies_are_at_zero_and_an_outlier_is_farthest():
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((500, 32)) + 20).astype(np.float16)
    rows[400] = rows[3]
    rows[77] = -rows[77]
    for metric in ("cos", "euclid"):
        distance, who = KNN(metric=metric).neighbours(rows, 64)
        assert distance[[3, 400]].tolist() == [0, 0]
        assert who[[3, 400]].tolist() == [400, 3]
        assert distance.argmax() == 77
        assert (np.delete(distance, [3, 400]) > 0).all()
        np.testing.assert_array_equal(KNN(metric=metric).score(np.concatenate([rows, rows])), 0)


def test_memory_grows_with_the_block_and_not_with_the_square_of_rows():
    rows = np.random.default_rng(0).standard_normal((6000, 8)).astype(np.float32)
    tracemalloc.start()
    KNN(neighbour=3).score(rows, block=256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6000 * 6000 * 4 / 20


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (np.ones((1, 3)), "more than 1 rows"),
        (np.ones(4), "more than 1 rows"),
        (np.array([[1.0, 2], [np.inf, 1]]), "row 1 is not finite"),
        (np.array([[1.0, 2], [0, 0]]), "row 1 is all zeros"),
    ],
)
def test_bad_rows_are_named(rows, words):
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=words):
        KNN().score(rows)
