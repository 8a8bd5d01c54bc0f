"""Difficulty against loops; inclusion probabilities proven by integrating over the one random number."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from residency.adapt.difficulty import EPS, choose, difficulties, inclusion, systematic


def problem(n=30, classes=4, width=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=g, dtype=torch.float64), torch.randn(
        classes, width, generator=g, dtype=torch.float64
    )


def test_difficulty_equals_the_loops():
    z, means = problem()

    def d(a, b):
        return float((1 - torch.nn.functional.cosine_similarity(a, b, dim=0)) / 2 + EPS)

    found = difficulties(z, means)
    for i in range(len(z)):
        total = sum(d(z[i], m) for m in means)
        for k in range(len(means)):
            assert float(found[i, k]) == pytest.approx(d(z[i], means[k]) / total, abs=1e-12)


def test_difficulties_of_a_row_sum_to_one_and_do_not_know_its_length():
    z, means = problem()
    found = difficulties(z, means)
    torch.testing.assert_close(found.sum(1), torch.ones(len(z)).double())
    assert ((found > 0) & (found < 1)).all()
    torch.testing.assert_close(difficulties(z * 37, means), found)
    known = torch.tensor([True, False, True, True])
    some = difficulties(z, means, known)
    assert some[:, 1].isnan().all()
    torch.testing.assert_close(some[:, known], difficulties(z, means[known]))


def test_extreme_rows_are_finite():
    _, means = problem()
    rows = torch.cat([means, -means, torch.zeros(1, 5).double()])  # on a mean, opposite to it, nowhere
    found = difficulties(rows, means)
    assert torch.isfinite(found).all()
    assert found[:4].diagonal().max() < 1e-6
    same = difficulties(means[:1], means[:1].expand(3, -1))  # on top of all means: a third each, not 0 / 0
    torch.testing.assert_close(same, torch.full((1, 3), 1 / 3).double(), atol=1e-6, rtol=0)
    assert torch.isfinite(difficulties(rows.half(), means.half())).all()


@pytest.mark.parametrize("u", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_inclusion_is_linear_in_rank(u):
    p = inclusion(10, u)
    assert float(p[0]) == pytest.approx(1 - u)
    assert float(p[-1]) == pytest.approx(u)
    assert float(p.mean()) == pytest.approx(0.5)
    torch.testing.assert_close(p.diff(), torch.full((9,), (2 * u - 1) / 9).double())
    odd = inclusion(11, u)
    assert float(odd.sum()) == pytest.approx(6)
    assert odd.min() >= 0
    assert odd.max() <= 1
    torch.testing.assert_close(odd.diff().diff(), torch.zeros(9).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("n", "u"), [(1, 0.3), (2, 0.0), (7, 0.0), (12, 0.25), (13, 0.5), (40, 0.9), (41, 1.0)])
def test_every_row_is_included_exactly_with_its_probability(n, u, monkeypatch):
    """The integral over s of "row i is among the rows" is p_i, and there are ⌈n/2⌉ different rows for every s."""
    p = inclusion(n, u)
    grid = 4000
    hits = torch.zeros(n, dtype=torch.float64)
    for i in range(grid):
        monkeypatch.setattr(torch, "rand", lambda *a, s=(i + 0.5) / grid, **k: torch.tensor(s, dtype=torch.float64))
        rows = systematic(p)
        assert len(rows) == -(-n // 2)
        assert (rows.diff() > 0).all()
        assert 0 <= int(rows[0]) <= int(rows[-1]) < n
        hits[rows] += 1 / grid
    torch.testing.assert_close(hits, p, atol=1.5 / grid, rtol=0)


def test_the_number_that_decides_is_uniform():
    g = torch.Generator().manual_seed(0)
    p = inclusion(9, 0.2)
    share = torch.zeros(9, dtype=torch.float64)
    for _ in range(4000):
        share[systematic(p, g)] += 1 / 4000
    assert (share - p).abs().max() < 0.03


def test_many_rows_and_rounding():
    for n in (100_000, 99_999):
        for u in (0.0, 0.37, 1.0):
            rows = systematic(inclusion(n, u), torch.Generator().manual_seed(1))
            assert len(rows) == -(-n // 2) == len(rows.unique())
            assert int(rows.max()) < n


def test_sums_that_are_no_number_of_rows_are_refused():
    with pytest.raises(ValueError, match="whole number"):
        systematic(torch.tensor([0.5, 0.4]))
    with pytest.raises(ValueError, match="progress"):
        inclusion(3, 1.1)
    assert len(systematic(torch.zeros(3))) == 0
    assert len(choose(torch.zeros(0), 0.5)) == 0


def test_epochs_grow_harder():
    g = torch.Generator().manual_seed(0)
    own = torch.rand(501, generator=g)
    means = [float(own[choose(own, u, g)].mean()) for u in (0, 0.25, 0.5, 0.75, 1)]
    assert all(a < b for a, b in pairwise(means)), means
    # at u = 0 density 2(1 − x) on [0, 1]: mean one third
    assert means[0] == pytest.approx(1 / 3, abs=0.03)
    assert means[2] == pytest.approx(float(own.mean()), abs=0.01)
    first = choose(own, 0.0, g)
    assert int(own.argmin()) in first.tolist()
    assert int(own.argmax()) in choose(own, 1.0, g).tolist()
