"""Shapley values: the axioms, the estimate against the exact value, wrong labels, missing rows."""

from __future__ import annotations

import numpy as np
import pytest

from residency.curate.shapley import Game, KNNShapley, TMCShapley, accuracy, gains
from residency.testing.cases.importance import KNNShapleyCase, TMCShapleyCase


def problem(n, seed=0, wrong=0):
    """Two classes that lie apart, the first `wrong` labels exchanged."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = rng.standard_normal((n, 4)) + 3 * np.eye(4)[y]
    labels = ["ab"[c ^ (i < wrong)] for i, c in enumerate(y)]
    judges = rng.standard_normal((20, 4)) + 3 * np.eye(4)[np.arange(20) % 2]
    return x, labels, judges, ["ab"[i % 2] for i in range(20)]


def test_efficiency_values_add_up_to_what_all_rows_are_worth():
    x, labels, judges, answers = problem(31, wrong=5)
    for k in (1, 4, 40):
        values = KNNShapley(k=k).score(x, labels, judges, answers)
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        near = np.argsort(-judges @ unit.T, axis=1)[:, :k]
        votes = [sum(labels[i] == a for i in row) / k for row, a in zip(near, answers, strict=True)]
        assert values.sum() == pytest.approx(np.mean(votes))
    game = Game.of(x, labels, judges, answers)
    values = TMCShapley(permutations=3, tolerance=0).score(x, labels, judges, answers)
    assert values.sum() == pytest.approx(accuracy(game, np.ones((1, 31), bool))[0] - 0.5)


@pytest.mark.parametrize("score", [KNNShapley(k=2), TMCShapley(permutations=720)])
def test_symmetry_and_dummy(score):
    # the same row twice, next to each other in no order; and a row of a class that nobody asks for, far from all
    x = np.array([[1.0, 0.2, 0], [0, 1, 0], [1.0, 0.2, 0], [0.3, 1, 0], [0, 0, -1]])
    labels = ["a", "b", "a", "b", "z"]
    judges, answers = np.array([[1.0, 0, 0], [0, 1, 0.0], [1, 0.5, 0]]), ["a", "b", "b"]
    values = score.score(x, labels, judges, answers)
    assert values[0] == pytest.approx(values[2], abs=1e-12)
    if isinstance(score, TMCShapley):
        # as a class of its own it is chosen only where it is alone: then v falls from chance to 0
        without = TMCShapley(permutations=720).score(x[:4], labels[:4], judges, answers)
        assert values[4] == pytest.approx(-0.5 / 5)
        assert without.sum() == pytest.approx(values.sum())


def test_the_estimate_comes_to_the_exact_value_as_its_error_says():
    case = TMCShapleyCase()
    inputs = case.problem()
    exact = np.array(case.reference(*inputs))
    orders = 600  # fewer than 6!, so they are drawn
    game = Game.of(*inputs)
    one = np.stack([gains(game, np.random.default_rng(i).permutation(6), 0.0) for i in range(200)])
    error = game.column(one.std(0) / orders**0.5)
    found = TMCShapley(permutations=orders, tolerance=0).score(*inputs)
    assert np.nanmax(np.abs(found - exact) / error) < 4
    assert np.nanmax(np.abs(found - exact)) > 0
    other = TMCShapley(permutations=orders, tolerance=0, seed=1).score(*inputs)
    assert np.nanmax(np.abs(found - other)) > 0


def test_drawn_orders_belong_to_rows_and_not_to_their_places_and_exact_values_are_never_cut_off():
    x, labels, judges, answers = problem(20, wrong=4)
    order = np.random.default_rng(0).permutation(20)
    score = TMCShapley(permutations=5)
    shuffled = score.score(x[order], [labels[i] for i in order], judges, answers)
    np.testing.assert_array_equal(shuffled, score.score(x, labels, judges, answers)[order])
    few = TMCShapleyCase().problem()
    np.testing.assert_array_equal(
        TMCShapley(permutations=720, tolerance=0.9).score(*few), TMCShapley(permutations=720, tolerance=0).score(*few)
    )


def test_an_order_is_cut_off_once_all_is_said():
    x, labels, judges, answers = problem(40)
    game = Game.of(x, labels, judges, answers)
    order = np.random.default_rng(0).permutation(40)
    whole, cut = gains(game, order, 0.0), gains(game, order, 0.06)
    goal = accuracy(game, np.ones((1, 40), bool))[0]
    reached = 0.5 + np.cumsum(whole[order])
    stop = int(np.flatnonzero(np.abs(reached - goal) < 0.06)[0])
    np.testing.assert_array_equal(cut[order[: stop + 1]], whole[order[: stop + 1]])
    assert not cut[order[stop + 1 :]].any()
    assert whole[order[stop + 1 :]].any()


def test_accuracy_of_subsets_is_that_of_the_walk():
    x, labels, judges, answers = problem(12, wrong=3)
    game = Game.of(x, labels, judges, answers)
    order = np.random.default_rng(0).permutation(12)
    masks = np.array([[i in order[:n] for i in range(12)] for n in range(13)])
    np.testing.assert_allclose(np.diff(accuracy(game, masks)), gains(game, order, 0.0)[order], atol=1e-12)


@pytest.mark.parametrize(("score", "least"), [(KNNShapley(), 7), (TMCShapley(permutations=100), 5)])
def test_wrong_labels_come_last(score, least):
    values = score.score(*problem(60, wrong=8))
    assert len(set(np.argsort(values)[:8].tolist()) & set(range(8))) >= least
    assert values[:8].mean() < 0 < values[8:].mean()


@pytest.mark.parametrize("case", [KNNShapleyCase(), TMCShapleyCase()])
def test_edges(case):
    score = case.params()
    x, labels, judges, answers = case.problem()
    assert np.isnan(score.score(x, [None] * 7, judges, answers)).all()
    missing = x.astype(np.float32)
    missing[1] = np.nan
    assert np.flatnonzero(np.isnan(score.score(missing, labels, judges, answers))).tolist() == [1, 3]
    half = score.score(x.astype(np.float16), labels, judges.astype(np.float16), answers)
    np.testing.assert_allclose(half, score.score(x, labels, judges, answers), atol=0.02)
    assert np.ptp(score.score(np.ones((3, 3)), ["a"] * 3, judges, answers)) < 1e-12
    with pytest.raises(ValueError, match="no trusted row has a label"):
        score.score(x, labels, judges, [None] * 4)
    with pytest.raises(ValueError, match="have width 2"):
        score.score(x[:, :2], labels, judges, answers)
    with pytest.raises(ValueError, match="a row for each of 6 labels"):
        score.score(x, labels[:6], judges, answers)
    with pytest.raises(ValueError, match="row 2 is infinite"):
        score.score(np.where(np.arange(7)[:, None] == 2, np.inf, x), labels, judges, answers)
