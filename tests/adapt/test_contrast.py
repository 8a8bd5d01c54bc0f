"""The contrastive kernel against double loops in float64 and against another library; SupCon, and what must not be NaN."""

from __future__ import annotations

import math

import pytest
import torch

from residency.adapt.contrast import SupCon, multi_positive_nce, similarity
from residency.objective import Outputs


def problem(b=6, s=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    sim = torch.randn(b, s, generator=g, dtype=torch.float64)
    positive = torch.rand(b, s, generator=g) < 0.4
    exclude = (torch.rand(b, s, generator=g) < 0.2) & (torch.arange(s) > 0)
    positive[:, 0] = True  # everyone has one
    positive[2] = False  # but the third
    return sim, positive, exclude


def by_loops(sim, positive, exclude, tau, reduce):
    """The definition, term by term."""
    losses = []
    for i in range(len(sim)):
        seen = [a for a in range(sim.shape[1]) if not exclude[i, a]]
        mine = [a for a in seen if positive[i, a]]
        if not mine:
            losses.append(0.0)
            continue
        t = [tau] * sim.shape[1] if isinstance(tau, float) else tau.tolist()
        weight = {a: math.exp(float(sim[i, a]) / t[a]) for a in seen}
        total = math.fsum(weight.values())
        if reduce == "log_sum":
            losses.append(-math.log(math.fsum(weight[p] for p in mine) / len(mine) / total))
        else:
            losses.append(-math.fsum(math.log(weight[p] / total) for p in mine) / len(mine))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("reduce", ["log_sum", "sum_log"])
@pytest.mark.parametrize("tau", [0.3, torch.linspace(0.2, 1.0, 9, dtype=torch.float64)])
def test_kernel_equals_the_double_loop(reduce, tau):
    sim, positive, exclude = problem()
    mine = multi_positive_nce(sim, positive, tau=tau, exclude=exclude, reduce=reduce)
    torch.testing.assert_close(mine, by_loops(sim, positive, exclude, tau, reduce), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduce", ["log_sum", "sum_log"])
def test_gradients_by_finite_differences(reduce):
    sim, positive, exclude = problem(4, 5, seed=3)
    sim.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda x: multi_positive_nce(x, positive, tau=0.5, exclude=exclude, reduce=reduce), (sim,)
    )


def test_log_of_sum_is_never_above_sum_of_logs_and_equal_with_one_positive():
    sim, positive, _ = problem()
    both = [multi_positive_nce(sim, positive, reduce=r) for r in ("log_sum", "sum_log")]
    assert (both[0] <= both[1] + 1e-12).all()
    assert (both[0] < both[1] - 1e-6).any()
    one = torch.zeros_like(positive)
    one[:, 3] = True
    a, b = (multi_positive_nce(sim, one, reduce=r) for r in ("log_sum", "sum_log"))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(
        a, torch.nn.functional.cross_entropy(sim / 0.1, torch.full((len(sim),), 3), reduction="none")
    )


@pytest.mark.parametrize("reduce", ["log_sum", "sum_log"])
def test_an_anchor_without_positive_gives_no_loss_and_no_gradient(reduce):
    sim, positive, exclude = problem()
    exclude[4] = positive[4]  # all its positives are taken from it
    sim.requires_grad_(True)
    losses = multi_positive_nce(sim, positive, exclude=exclude, reduce=reduce)
    assert losses[2] == losses[4] == 0
    losses.sum().backward()
    assert not sim.grad[[2, 4]].any()
    assert sim.grad[0].any()
    assert torch.isfinite(sim.grad).all()
    every = torch.ones_like(exclude)
    assert not multi_positive_nce(sim, positive, exclude=every, reduce=reduce).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_similarities_stay_finite(dtype):
    sim, positive, exclude = problem()
    hot = (1e3 * sim).to(dtype).requires_grad_(True)
    for reduce in ("log_sum", "sum_log"):
        losses = multi_positive_nce(hot, positive, tau=0.05, exclude=exclude, reduce=reduce)
        assert losses.dtype == torch.float32
        assert torch.isfinite(losses).all()
        (gradient,) = torch.autograd.grad(losses.sum(), hot)
        assert torch.isfinite(gradient).all()


def test_order_of_candidates_does_not_matter():
    sim, positive, exclude = problem()
    order = torch.randperm(sim.shape[1], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        multi_positive_nce(sim[:, order], positive[:, order], exclude=exclude[:, order]),
        multi_positive_nce(sim, positive, exclude=exclude),
    )


def test_similarities_against_torch():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 3, generator=g, dtype=torch.float64), torch.randn(5, 3, generator=g, dtype=torch.float64)
    cos = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    torch.testing.assert_close(similarity(a, b), cos)
    torch.testing.assert_close(similarity(a, b, "halfcos"), (1 + cos) / 2)
    torch.testing.assert_close(similarity(a, b, "neg_sqeuclid"), -(torch.cdist(a, b) ** 2))
    torch.testing.assert_close(similarity(a, b, "dot"), torch.einsum("id,jd->ij", a, b))
    assert (similarity(a[:1] * 0, b) == 0).all()  # a zero vector is like nothing, and no NaN
    with pytest.raises(ValueError, match="not 'cosine'"):
        similarity(a, b, "cosine")


def test_wrong_masks_and_forms_are_refused():
    sim, positive, exclude = problem()
    with pytest.raises(ValueError, match="shape"):
        multi_positive_nce(sim, positive[:, :3])
    with pytest.raises(ValueError, match="shape"):
        multi_positive_nce(sim, positive, exclude=exclude[:2])
    with pytest.raises(ValueError, match="log_sum"):
        multi_positive_nce(sim, positive, reduce="mean")


def labelled(n=12, classes=3, width=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=g), torch.randint(0, classes, (n,), generator=g)


def test_supcon_equals_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    z, y = labelled()
    objective = SupCon(3, 5, temperature=0.1)
    total, count = objective(Outputs(features=z), {"labels": y})
    head = torch.nn.functional.cross_entropy(objective.head(z), y, reduction="sum")
    theirs = losses.SupConLoss(temperature=0.1)(z, y)  # its mean is over anchors with a positive: here, all
    assert int(count) == 12 == objective.count({"labels": y})
    torch.testing.assert_close((total - head) / 12, theirs)


def test_supcon_head_shapes_nothing_but_itself():
    z, y = labelled()
    z.requires_grad_(True)
    objective = SupCon(3, 5)
    objective(Outputs(features=z), {"labels": y})[0].backward()
    gradient = z.grad.clone()
    z.grad = None
    torch.nn.init.normal_(objective.head.weight, std=3)
    objective(Outputs(features=z), {"labels": y})[0].backward()
    torch.testing.assert_close(z.grad, gradient)
    assert objective.head.weight.grad.any()


def test_supcon_with_all_alone_or_all_the_same_is_finite():
    z, _ = labelled(4)
    alone = SupCon(4, 5)(Outputs(features=z.requires_grad_(True)), {"labels": torch.arange(4)})[0]
    alone.backward()
    assert not z.grad.any()  # nobody has a positive; the head is detached
    constant = torch.ones(4, 5, requires_grad=True)
    same = SupCon(2, 5)(Outputs(features=constant), {"labels": torch.zeros(4, dtype=torch.long)})[0]
    same.backward()
    assert torch.isfinite(same)
    assert torch.isfinite(constant.grad).all()
