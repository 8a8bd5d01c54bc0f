"""Shapes of token trees: closures against matrix powers, the figure of the paper, malformed trees refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from residency.infer.tree import EAGLE, DynamicTree, StaticTree, ancestors


def test_ancestors_are_the_reflexive_transitive_closure():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 23):
        parents = np.stack([[-1, *(rng.integers(0, i) for i in range(1, n))] for _ in range(4)])
        found = ancestors(torch.tensor(parents))
        for row, mine in zip(parents, found.numpy(), strict=True):
            step = np.eye(n, dtype=int)
            for child, parent in enumerate(row):
                if parent >= 0:
                    step[child, parent] = 1
            assert (mine == (np.linalg.matrix_power(step, n) > 0)).all()


def test_the_static_tree_of_eagle():
    tree = StaticTree()
    assert len(tree) == len(EAGLE) == 25
    assert tree.levels == 5
    assert tree.fanout == 4
    per_level = [sum(len(path) == d for path in tree.paths) for d in range(1, 6)]
    assert per_level == [4, 8, 8, 3, 2]
    # level 2 hangs below the nodes of level 1 that have children, in the paths' order
    level = tree.grow(2, torch.zeros(1, 4, 4), torch.zeros(1, 4), 4)
    below = list(zip(level.parents[0].tolist(), level.ranks[0].tolist(), strict=True))
    assert below == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    assert tree.parents_of(1).tolist() == [0, 1, 2, 3]
    assert tree.parents_of(5).tolist() == []


def test_malformed_trees_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 0\] hangs in the air: \[1\] is missing"):
        StaticTree([[0], [1, 0]])
    with pytest.raises(ValueError, match="at least one path"):
        StaticTree([])
    with pytest.raises(ValueError, match="at least 1"):
        DynamicTree(budget=0)
    with pytest.raises(ValueError, match="top_p"):
        DynamicTree(top_p=0)


def test_the_worked_example_of_clover():
    """Budget 4, depth 1: .5 .3 .1 .05 .05 → a, b; depth 2: joints .40 .05 (a) and .09 .03 (b) → a.1 and b.1."""
    tree = DynamicTree(budget=4, levels=5)
    first = tree.grow(1, torch.tensor([[[0.5, 0.3, 0.1, 0.05, 0.05]]]).log(), torch.zeros(1, 1), 0)
    assert first.ranks[0].tolist() == [0, 1]
    guesses = torch.tensor([[[0.8, 0.1, 0.05], [0.3, 0.1, 0.05]]]).log()
    second = tree.grow(2, guesses, torch.tensor([[0.5, 0.3]]).log(), 2)
    assert list(zip(second.parents[0].tolist(), second.ranks[0].tolist(), strict=True)) == [(0, 0), (1, 0)]
    assert tree.grow(3, guesses, torch.zeros(1, 2), 4) is None


def test_least_stops_where_a_guess_is_not_worth_a_node():
    sure = torch.tensor([[[0.9, 0.05]], [[0.2, 0.19]]]).log()
    level = DynamicTree(budget=4, least=0.3).grow(1, sure, torch.zeros(2, 1), 0)
    assert level.alive.tolist() == [[True], [False]]
    assert DynamicTree(budget=4, least=0.3).grow(1, sure[1:], torch.zeros(1, 1), 0) is None
