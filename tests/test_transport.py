"""Optimal transport against POT, scipy's assignment, sorted differences and what is true of every distance."""

from __future__ import annotations

import builtins

import numpy as np
import ot
import pytest
from scipy.optimize import linear_sum_assignment

from residency import transport
from residency.errors import MissingError


def problem(n, m, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, 4)), rng.standard_normal((m, 4)) + 0.5
    return transport.cosine_costs(x, y), rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(m))


def without(monkeypatch, *names):
    real = builtins.__import__

    def importing(name, *rest, **more):
        if name.split(".")[0] in names:
            raise ModuleNotFoundError(name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", importing)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 7), (9, 9), (30, 12)])
def test_both_solvers_equal_pot_and_sinkhorn_is_a_little_above(n, m, monkeypatch):
    costs, a, b = problem(n, m)
    expected = ot.emd2(a, b, costs)
    assert transport.exact(costs, a, b) == pytest.approx(expected, abs=1e-9)
    near = transport.sinkhorn(costs, a, b)
    assert expected - 1e-9 <= near <= expected + 0.02
    assert transport.sinkhorn(costs, a, b, epsilon=1e-3, rounds=5000) <= expected + 2e-3
    without(monkeypatch, "ot")
    assert transport.exact(costs, a, b) == pytest.approx(expected, abs=1e-7)


def test_without_a_solver_the_error_names_the_extra(monkeypatch):
    without(monkeypatch, "ot", "scipy")
    with pytest.raises(MissingError, match=r"transport"):
        transport.exact(*problem(3, 3))


def test_equal_sets_are_an_assignment():
    costs = problem(12, 12)[0]
    rows, columns = linear_sum_assignment(costs)
    assert transport.exact(costs, np.ones(12), np.ones(12)) == pytest.approx(costs[rows, columns].mean())


def test_on_a_line_it_is_the_sorted_difference():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal(20), rng.standard_normal(20) * 2
    expected = np.abs(np.sort(x) - np.sort(y)).mean()
    assert transport.exact(np.abs(x[:, None] - y), np.ones(20), np.ones(20)) == pytest.approx(expected)


@pytest.mark.parametrize("solve", [transport.exact, transport.sinkhorn])
def test_a_set_costs_nothing_to_itself_and_direction_does_not_matter(solve):
    costs, a, b = problem(8, 8)
    x = np.random.default_rng(5).standard_normal((8, 4))
    assert solve(transport.cosine_costs(x, x), a, a) == pytest.approx(0, abs=5e-3)
    assert solve(costs, a, b) == pytest.approx(solve(costs.T, b, a), abs=5e-3)


def test_the_triangle_holds_for_a_metric():
    rng = np.random.default_rng(1)
    sets = [rng.standard_normal((6, 2)) + i for i in range(3)]

    def w(x, y):
        return transport.exact(np.linalg.norm(x[:, None] - y, axis=-1), np.ones(6), np.ones(6))

    assert w(sets[0], sets[2]) <= w(sets[0], sets[1]) + w(sets[1], sets[2]) + 1e-9


def test_rounding_gives_the_sums_asked_for():
    rng = np.random.default_rng(0)
    a, b = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(7))
    plan = transport.rounded(rng.random((5, 7)), a, b)
    np.testing.assert_allclose(plan.sum(1), a, atol=1e-12)
    np.testing.assert_allclose(plan.sum(0), b, atol=1e-12)
    assert (plan >= 0).all()
    exact_already = np.outer(a, b)
    np.testing.assert_allclose(transport.rounded(exact_already, a, b), exact_already, atol=1e-15)


def test_rows_without_weight_do_not_matter():
    costs, a, b = problem(6, 5)
    more = np.vstack([costs, np.full((1, 5), 9.0)])
    for solve in (transport.exact, transport.sinkhorn):
        assert solve(more, np.append(a, 0), b) == pytest.approx(solve(costs, a, b), abs=5e-3)


@pytest.mark.parametrize(
    ("costs", "a", "b"),
    [
        (np.zeros((2, 3)), np.ones(3), np.ones(2)),
        (np.full((2, 2), np.nan), np.ones(2), np.ones(2)),
        (np.zeros((2, 2)), np.zeros(2), np.ones(2)),
        (np.zeros((2, 2)), np.array([1, -1]), np.ones(2)),
        (np.zeros((0, 2)), np.ones(0), np.ones(2)),
    ],
)
def test_what_does_not_fit_is_refused(costs, a, b):
    for solve in (transport.exact, transport.sinkhorn):
        with pytest.raises(ValueError, match="weights|finite"):
            solve(costs, a, b)
