"""Closed forms against integration, torch's gradients and scipy's integrator and minimiser."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import minimize

from residency.evaluate.sinkdynamics import ReducedModel


def model(V=12, weight=5.0, seed=0, weighted=False):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(V), size=V) + 1e-6
    p /= p.sum(1, keepdims=True)
    return ReducedModel(p, rng.standard_normal(V), weight, rng.dirichlet(np.ones(V)) if weighted else None)


def test_gradients_and_loss_equal_torch():
    reduced, rng = model(weighted=True), np.random.default_rng(1)
    alpha, beta = (
        torch.tensor(rng.normal(size=12), requires_grad=True),
        torch.tensor(rng.normal(size=12), requires_grad=True),
    )
    p, xi, W = torch.tensor(reduced.p), torch.tensor(reduced.xi), reduced.weight
    delta = (alpha.exp()[:, None] * beta + W * xi) / (alpha.exp() + W)[:, None]
    q = (p.log() + delta).log_softmax(-1)
    loss = torch.nn.functional.kl_div(q, p, reduction="none").sum(-1) @ torch.tensor(reduced.pi)
    loss.backward()
    a, b = alpha.detach().numpy(), beta.detach().numpy()
    assert reduced.loss(a, b) == pytest.approx(float(loss.detach()), rel=1e-10)
    by_alpha, by_beta = reduced.gradient(a, b)
    np.testing.assert_allclose(by_alpha, alpha.grad.numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(by_beta, beta.grad.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_logit_grows_like_half_the_logarithm(weighted):
    reduced = model(weighted=weighted)
    for t, near in ((1e6, 0.01), (1e8, 0.001)):
        alpha = reduced.flow([t])[0][0]
        slack = near if not weighted else 10 * near  # a rare character's clock runs slower by its weight
        assert abs(float((alpha - reduced.logit_law(t)).mean())) < slack
        assert float(alpha.std()) == pytest.approx(float(reduced.logit_law(t).std()), abs=slack)
    early, late = reduced.flow([1e6, 1e8])[0]
    np.testing.assert_allclose(late - early, 0.5 * np.log(100), atol=0.05)  # concentration: all grow alike


def test_the_flow_equals_scipy():
    reduced, times = model(seed=3, weighted=True), [1.0, 10.0, 100.0, 1000.0]
    for move in (False, True):

        def rate(t, y, move=move):
            a, b = reduced.gradient(y[:12], y[12:])
            return -np.concatenate([a, b if move else np.zeros(12)])

        known = solve_ivp(rate, (0, 1000), np.zeros(24), method="LSODA", t_eval=times, rtol=1e-10, atol=1e-12).y.T
        alpha, beta = reduced.flow(times, move_value=move)
        np.testing.assert_allclose(np.hstack([alpha, beta]), known, rtol=1e-4, atol=1e-5)
        assert beta.any() == move


def test_the_best_value_drains():
    reduced = model()
    for alpha in (0.0, 2.0, 5.0):
        same = np.full(12, alpha)
        best = reduced.drained_value(alpha)
        assert reduced.loss(same, best) < 1e-13
        np.testing.assert_allclose(
            reduced.delta(same, best), reduced.delta(same, best)[:, :1] * np.ones(12), atol=1e-13
        )
        found = minimize(
            lambda b, same=same: reduced.loss(same, b), np.zeros(12), jac=lambda b, same=same: reduced.gradient(same, b)[1],
            options={"gtol": 1e-12},
        )  # fmt: skip
        np.testing.assert_allclose(found.x - found.x.mean(), best, atol=2e-3 * (1 + np.exp(-alpha) * 5))
        assert np.linalg.norm(best) == pytest.approx(np.exp(-alpha) * np.linalg.norm(reduced.drained_value(0.0)))


def test_they_drive_each_other():
    """Together, the loss falls below what either reaches alone, and the logit still grows."""
    reduced = model(seed=5)
    alpha, beta = reduced.flow([10.0, 100.0, 1000.0], move_value=True)
    alone = reduced.flow([1000.0])[0][0]
    losses = [reduced.loss(a, b) for a, b in zip(alpha, beta, strict=True)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < reduced.loss(alone, np.zeros(12))
    assert (np.diff(alpha, axis=0).mean(1) > 0).all()


def test_extremes_and_wrong_input():
    reduced = model()
    huge = np.full(12, 800.0)
    assert reduced.loss(huge, np.zeros(12)) == pytest.approx(0.0, abs=1e-12)
    assert np.isfinite(reduced.gradient(-huge, np.full(12, 50.0))[0]).all()
    p = reduced.p
    for bad in (
        (p[:, :5], reduced.xi, 5.0),
        (p, reduced.xi, 0.0),
        (p * 0.5, reduced.xi, 1.0),
        (p - p, reduced.xi, 1.0),
    ):
        with pytest.raises(ValueError, match="need|distribution"):
            ReducedModel(*bad)
    with pytest.raises(ValueError, match="one positive weight"):
        ReducedModel(p, reduced.xi, 1.0, np.ones(3))
    for times in ([], [0.0], [2.0, 1.0], [1.0, 1.0]):
        with pytest.raises(ValueError, match="ascending"):
            reduced.flow(times)
