"""Sinkhorn against POT, the exponential form, linear programs, closed forms and finite differences."""

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.testing import assert_close

from residency.compress.sinkhorn import sinkhorn


def costs(G=3, n=5, m=7, seed=0, dtype=torch.float64):
    return (2 * torch.rand(G, n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def weights(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


@pytest.mark.parametrize("epsilon", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("uniform", [True, False])
def test_pot(epsilon, uniform):
    ot = pytest.importorskip("ot")
    D, a, b = costs(), weights(3, 5, seed=1), weights(3, 7, seed=2)
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    marginals = {} if uniform else {"a": a, "b": b}
    found = sinkhorn(D, epsilon, iterations=3000, **marginals)
    for g in range(3):
        own = (torch.ones(5).double() / 5, torch.ones(7).double() / 7) if uniform else (a[g], b[g])
        rows, columns = (x.numpy() for x in own)
        plan = ot.sinkhorn(rows, columns, D[g].numpy(), epsilon, method="sinkhorn_log", numItermax=3000, stopThr=1e-12)
        assert_close(found.plan[g], torch.from_numpy(plan), rtol=1e-6, atol=1e-10)
        assert found.transport[g].item() == pytest.approx((plan * D[g].numpy()).sum(), rel=1e-6)


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_exponential_form_at_equal_iterations(iterations):
    # the textbook form, rows then columns, all sums 1
    D = costs(G=2, n=6, m=6)
    expected = torch.exp(-D / 0.3)
    for _ in range(iterations):
        expected = expected / expected.sum(2, keepdim=True)
        expected = expected / expected.sum(1, keepdim=True)
    ones = torch.ones(6, dtype=torch.float64)
    found = sinkhorn(D, 0.3, a=ones, b=ones, iterations=iterations)
    assert found.iterations == iterations
    assert_close(found.plan, expected)
    assert_close(found.plan.sum(1), torch.ones(2, 6, dtype=torch.float64))
    assert_close(sinkhorn(D, 0.3, iterations=iterations).plan * 6, expected)


def test_without_entropy_it_is_the_assignment_problem():
    D = costs(G=4, n=8, m=8)
    found = sinkhorn(D, 2e-3, iterations=4000)
    for g in range(4):
        best = D[g].numpy()[linear_sum_assignment(D[g].numpy())].mean()
        assert found.transport[g].item() == pytest.approx(best, rel=2e-2)
        assert best - 1e-9 <= found.dual[g].item() <= best + 2e-3 * math.log(8) + 1e-9


def test_without_prices_that_matter_it_is_the_mean():
    D, a, b = costs(), weights(5, seed=1), weights(7, seed=2)
    a, b = 3 * a / a.sum(), 3 * b / b.sum()
    found = sinkhorn(D, 1e6, a=a, b=b)
    product = torch.outer(a, b) / 3
    assert_close(found.plan, product.expand(3, 5, 7), rtol=1e-4, atol=1e-8)
    for value in (found.transport, found.dual):
        assert_close(value, (product * D).sum((1, 2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mass", [1.0, 5.0])
def test_dual_is_the_objective(mass):
    D, a, b = costs(), weights(5, seed=1), weights(7, seed=2)
    a, b = mass * a / a.sum(), mass * b / b.sum()
    found = sinkhorn(D, 0.2, a=a, b=b, iterations=2000)
    divergence = (found.plan * (found.plan * mass / torch.outer(a, b)).log()).sum((1, 2))
    assert_close(found.dual, found.transport + 0.2 * divergence)
    assert_close(found.plan.sum(2), a.expand(3, 5))
    assert (found.plan >= 0).all()


def test_gradients():
    D = costs(G=2, n=3, m=4).requires_grad_()
    a, b = weights(3, seed=1), weights(4, seed=2)
    b = b * a.sum() / b.sum()

    def unrolled_values(x, iterations):
        found = sinkhorn(x, 0.5, a=a, b=b, iterations=iterations, gradient="unrolled")
        return found.transport, found.dual

    assert torch.autograd.gradcheck(unrolled_values, (D, 3))
    assert torch.autograd.gradcheck(unrolled_values, (D, 50))
    # at the optimum the derivative of the dual is the plan, whatever happened on the way
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, 0.5, a=a, b=b, iterations=500).dual, D)
    found = sinkhorn(D, 0.5, iterations=500)
    assert not found.plan.requires_grad
    for value in (found.dual, found.transport):
        assert_close(torch.autograd.grad(value.sum(), D, retain_graph=True)[0], found.plan)
    unrolled = sinkhorn(D, 0.5, iterations=500, gradient="unrolled")
    assert_close(torch.autograd.grad(unrolled.dual.sum(), D)[0], found.plan)


def test_rows_and_columns_without_weight_are_left_out():
    D = costs(G=2, n=4, m=5)
    a, b = weights(4, seed=1), weights(5, seed=2)
    a[1], b[3] = 0, 0
    b = b * a.sum() / b.sum()
    rows, columns = [0, 2, 3], [0, 1, 2, 4]
    for gradient in ("unrolled", "envelope"):
        E = D.clone().requires_grad_()
        found = sinkhorn(E, 0.2, a=a, b=b, gradient=gradient)
        kept = sinkhorn(D[:, rows][:, :, columns], 0.2, a=a[rows], b=b[columns])
        assert_close(found.plan[:, rows][:, :, columns], kept.plan)
        assert_close((found.transport, found.dual), (kept.transport, kept.dual))
        (slope,) = torch.autograd.grad(found.dual.sum(), E)
        assert slope.isfinite().all()
        assert (slope[:, 1] == 0).all()


def test_half_precision_does_not_underflow():
    # exp(-2 / 0.1) is 0 in float16, and 0 / 0 follows
    D = torch.full((1, 3, 3), 2.0, dtype=torch.float16)
    assert torch.exp(-D / 0.1).sum() == 0
    for dtype in (torch.float16, torch.bfloat16):
        found = sinkhorn(D.to(dtype), 0.1)
        assert_close(found.plan, torch.full((1, 3, 3), 1 / 9))
        assert found.plan.dtype == torch.float32
    far = sinkhorn(1e4 * costs(dtype=torch.float32), 0.1)
    assert all(x.isfinite().all() for x in (far.plan, far.dual, far.transport))


def test_tolerance_stops_early_and_keeps_its_promise():
    D = costs(G=4, n=6, m=6)
    found = sinkhorn(D, 0.3, iterations=10_000, tolerance=1e-6)
    assert 10 <= found.iterations < 10_000
    assert (found.plan.sum(2) - 1 / 6).abs().sum(1).max() <= 1e-6
    assert_close(found.plan, sinkhorn(D, 0.3, iterations=found.iterations).plan)


def test_permutations_follow():
    D = costs(G=1, n=5, m=5)
    rows, columns = torch.tensor([3, 1, 4, 0, 2]), torch.tensor([1, 0, 2, 4, 3])
    found, moved = sinkhorn(D, 0.2), sinkhorn(D[:, rows][:, :, columns], 0.2)
    assert_close(moved.plan, found.plan[:, rows][:, :, columns])
    assert_close(moved.dual, found.dual)


def test_no_problem_and_the_smallest():
    assert sinkhorn(costs(G=0), 0.1).dual.shape == (0,)
    assert_close(sinkhorn(costs(1, 1, 1), 0.1).transport, costs(1, 1, 1).view(1))


def test_bad_arguments_are_refused():
    for epsilon in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="epsilon"):
            sinkhorn(costs(), epsilon)
    for message, given in (
        ("same total", {"a": torch.ones(5), "b": torch.ones(7)}),
        ("marginal of 5", {"a": torch.ones(4)}),
        ("iterations", {"iterations": 0}),
    ):
        with pytest.raises(ValueError, match=message):
            sinkhorn(costs(), 0.1, **given)
    for shape in ((3, 4), (1, 0, 4)):
        with pytest.raises(ValueError, match=r"\[G, n, m\]"):
            sinkhorn(torch.zeros(shape), 0.1)
