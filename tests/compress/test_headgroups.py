"""Partitions against brute force over all of them."""

import itertools

import numpy as np
import pytest

from residency.compress.headgroups import EXACT_UP_TO, adjacent, climb, exact, objective, partition


def symmetric(G, seed=0):
    S = np.random.default_rng(seed).standard_normal((G, G))
    return S + S.T


def everything(heads, size):
    """All partitions of a tuple of heads into groups of one size."""
    if not heads:
        yield ()
        return
    first, rest = heads[0], heads[1:]
    for companions in itertools.combinations(rest, size - 1):
        left = tuple(h for h in rest if h not in companions)
        for others in everything(left, size):
            yield ((first, *companions), *others)


@pytest.mark.parametrize(("G", "groups"), [(6, 2), (6, 3), (8, 2), (8, 4), (9, 3), (4, 1), (4, 4), (1, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_exact_is_the_best_of_all(G, groups, seed):
    S = symmetric(G, seed)
    best = max(
        everything(tuple(range(G)), G // groups),
        key=lambda p: sum(S[i, j] for g in p for i, j in itertools.combinations(g, 2)),
    )
    assert exact(S, groups) == best == partition(S, groups)


@pytest.mark.parametrize(("G", "groups"), [(8, 2), (12, 3), (12, 6)])
def test_swaps_find_the_best_of_small_problems(G, groups):
    for seed in range(5):
        S = symmetric(G, seed)
        assert objective(S, climb(S, groups)) == pytest.approx(objective(S, exact(S, groups)))


@pytest.mark.parametrize("groups", [2, 4, 16])
def test_no_swap_improves_and_adjacent_is_never_better(groups):
    S = symmetric(32, 5)
    found = climb(S, groups, restarts=3)
    assert sorted(h for g in found for h in g) == list(range(32))
    assert {len(g) for g in found} == {32 // groups}
    best = objective(S, found)
    assert best >= objective(S, adjacent(32, groups))
    for A, B in itertools.combinations(range(groups), 2):
        for a, b in itertools.product(found[A], found[B]):
            swapped = [tuple(b if h == a else a if h == b else h for h in g) for g in found]
            assert objective(S, tuple(swapped)) <= best + 1e-9
    only = climb(S, groups, restarts=0)  # from the adjacent partition alone
    assert objective(S, adjacent(32, groups)) <= objective(S, only) <= best


def test_planted_groups_of_32_are_found():
    order = np.random.default_rng(0).permutation(32).reshape(8, 4)
    S = 0.1 * symmetric(32)
    for team in order:
        S[np.ix_(team, team)] += 2
    wanted = tuple(sorted(tuple(sorted(team.tolist())) for team in order))
    assert partition(S, 8) == wanted == partition(S, 8, seed=1)


def test_the_diagonal_is_not_read_and_seeds_decide_nothing_else():
    S = symmetric(20, 3)
    T = S + 100 * np.diag(np.arange(20))
    assert len(S) > EXACT_UP_TO
    assert partition(S, 5) == partition(T, 5)
    assert exact(S[:8, :8], 4) == exact(T[:8, :8], 4)
    state = str(np.random.get_state())
    assert climb(S, 5, seed=7) == climb(S, 5, seed=7)
    assert str(np.random.get_state()) == state


def test_bad_arguments():
    for S, groups in ((symmetric(6), 4), (symmetric(6), 0), (np.ones((2, 3)), 1), (np.full((4, 4), np.nan), 2)):
        with pytest.raises(ValueError, match="equal groups|finite square"):
            partition(S, groups)
    with pytest.raises(ValueError, match="6 heads cannot form 4"):
        adjacent(6, 4)
