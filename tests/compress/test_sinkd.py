"""SinKD against its equations in the exponential domain, POT, closed forms, limits, and its fused form."""

import math

import pytest
import torch
from pydantic import ValidationError
from scipy.optimize import linear_sum_assignment
from torch.testing import assert_close

from residency.compress.sinkd import SinKD, SinKDParams, distances
from residency.compress.uld import ULD, ULDParams
from residency.objective import Head

N, V, DS, DT = 10, 23, 5, 7
BATCH = {"group": None}
VARIANTS = [
    {},
    {"group": 3},
    {"group": 4, "debias": True},
    {"group": 4, "paired": 0.3, "gradient": "envelope"},
    {"group": None, "words": 6},
    {"group": 5, "norm": 2, "temperature": 1, "epsilon": 0.3},
    {"group": 1},
    {"plan": "sample", "iterations": 5},
    {"plan": "sample", "words": 4, "debias": True, "gradient": "envelope"},
]
every = pytest.mark.parametrize("keys", VARIANTS, ids=str)


def draw(*shape, seed=0, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def logits(n=N, classes=V, seed=1):
    return draw(n, classes, seed=seed), draw(n, classes, seed=seed + 1)


def loss_of(student, teacher, **keys):
    return SinKD(SinKDParams(**keys)).dense(student, teacher)[0]


def problem(dtype=torch.float64, n=N):
    """Student hidden, weight, bias (all trainable) and the teacher's frozen hidden and head."""
    shapes = [(n, DS), (V, DS), (V,)]
    student = [draw(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]
    return student, draw(n, DT, seed=9, dtype=dtype), Head(draw(V, DT, seed=10, dtype=dtype))


def official(student, teacher, epsilon=0.1, iterations=20):
    """The equations of the paper's code, in exponentials and through all iterations."""
    p, q = (student / 2).softmax(1), (teacher / 2).softmax(1)
    D = (p.unsqueeze(1) - q.unsqueeze(0)).abs().sum(2)
    K = torch.exp(-D / epsilon)
    for _ in range(iterations):
        K = K / K.sum(1, keepdim=True)
        K = K / K.sum(0, keepdim=True)
    return (K * D).sum()


@pytest.mark.parametrize(("n", "classes"), [(16, 3), (8, 2), (5, 40)])
def test_official_equations_value_and_gradient(n, classes):
    student, teacher = logits(n, classes)
    student.requires_grad_()
    total, count = SinKD(SinKDParams(group=None)).dense(student, teacher)
    expected = official(student, teacher)
    assert_close(total, expected)
    assert count == n
    assert_close(torch.autograd.grad(total, student), torch.autograd.grad(expected, student))


def test_groups_are_the_tokens_in_order():
    student, teacher = logits()
    expected = sum(official(student[i : i + 4], teacher[i : i + 4]) for i in range(0, N, 4))
    assert_close(loss_of(student, teacher, group=4), expected)
    assert_close(loss_of(student, teacher, group=99), official(student, teacher))


def test_pot_at_convergence():
    ot = pytest.importorskip("ot")
    student, teacher = logits(7, 5)
    p, q = (student / 2).softmax(1), (teacher / 2).softmax(1)
    D, even = ot.dist(p.numpy(), q.numpy(), metric="cityblock"), [1 / 7] * 7
    plan = ot.sinkhorn(even, even, D, 0.1, method="sinkhorn_log", numItermax=20_000, stopThr=1e-13)
    found = loss_of(student, teacher, group=None, iterations=3000)
    assert found.item() == pytest.approx(7 * (plan * D).sum(), rel=1e-6)
    euclidean = loss_of(student, teacher, group=None, iterations=3000, norm=2, epsilon=1e-3)
    prices = ot.dist(p.numpy(), q.numpy(), metric="euclidean")
    assert euclidean.item() == pytest.approx(7 * ot.emd2(even, even, prices), rel=1e-2)


def test_limits():
    student, teacher = logits(8, 6)
    p, q = (student / 2).softmax(1), (teacher / 2).softmax(1)
    D = torch.cdist(p, q, p=1)
    own = (p - q).abs().sum(1)
    assert_close(loss_of(student[:1], teacher[:1], group=None), own[0])  # one sample: nothing to transport
    assert_close(loss_of(student, teacher, group=1), own.sum())
    best = D.numpy()[linear_sum_assignment(D.numpy())].sum()
    for gradient in ("unrolled", "envelope"):
        keys = {"group": None, "gradient": gradient, "iterations": 3000}
        assert loss_of(student, teacher, epsilon=1e-3, **keys).item() == pytest.approx(best, rel=1e-2)
        assert_close(loss_of(student, teacher, epsilon=1e5, **keys), D.mean() * 8, rtol=1e-4, atol=1e-4)
        entropy = 8 * 0.1 * math.log(8) if gradient == "envelope" else 0  # of the identity, as a plan
        assert_close(loss_of(student, teacher, paired=50, **keys), own.sum() + entropy, rtol=1e-6, atol=1e-6)


def test_a_batch_is_a_set_unless_pairs_are_paid_for():
    student, teacher = logits()
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    plain = loss_of(student, teacher, group=None)
    assert_close(loss_of(student[order], teacher, group=None), plain, rtol=1e-2, atol=1e-2)  # 20 iterations
    keys = {"group": None, "iterations": 3000}
    plain = loss_of(student, teacher, **keys)
    assert_close(loss_of(student[order], teacher, **keys), plain)
    assert_close(
        loss_of(student[order], teacher[order], **keys, paired=0.5), loss_of(student, teacher, **keys, paired=0.5)
    )
    assert loss_of(student[order], teacher, **keys, paired=0.5) > plain + 0.1


def test_entropic_bias_and_its_remedy():
    student, _ = logits(16, 3)
    with_itself = loss_of(student, student, group=None) / 16
    assert 0.02 < with_itself < 0.1  # the official loss of a batch with itself is not zero
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    keys = {"group": None, "debias": True, "gradient": "envelope", "iterations": 500}
    mine = student.clone().requires_grad_()
    total = loss_of(mine, student[order], **keys)
    assert abs(total.item()) < 1e-9
    assert torch.autograd.grad(total, mine)[0].abs().max() < 1e-5  # 500 iterations
    for seed in range(20):
        assert loss_of(*logits(6, 4, seed=seed), **keys) > 0


@every
@pytest.mark.parametrize("chunk", [1, 3 * V * 8, 10**9, None])
def test_fused_equals_dense(keys, chunk):
    loss = SinKD(SinKDParams(**keys))
    student, teacher_hidden, teacher_head = problem()
    head = Head(*student[1:])
    dense, count = loss.dense(head(student[0]), teacher_head(teacher_hidden))
    fused, fused_count = loss.fused(student[0], head, teacher_hidden, teacher_head, chunk_bytes=chunk)
    assert_close(fused, dense)
    assert fused_count == count == N
    assert_close(torch.autograd.grad(fused / 3, student), torch.autograd.grad(dense / 3, student))


@every
def test_gradient(keys):
    keys = keys | ({"iterations": 200} if keys.get("gradient") == "envelope" else {})
    loss = SinKD(SinKDParams(**keys))
    student, teacher = draw(5, 6, seed=1).requires_grad_(), draw(5, 6, seed=2)
    assert torch.autograd.gradcheck(lambda s: loss.dense(s, teacher)[0], student)


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (1, 1, 1, 1), (2, 3, 3, 100_000), (3, 80, 80, 4)])
@pytest.mark.parametrize("norm", [1.0, 2.0, 3.0])
def test_distances_are_those_of_cdist(shape, norm):
    G, n, m, words = shape
    x, y = draw(G, n, words).requires_grad_(), draw(G, m, words, seed=1).requires_grad_()
    found, expected = distances(x, y, norm), torch.cdist(x, y, p=norm)
    weight = draw(G, n, m, seed=2)
    assert_close(found, expected)
    for ours, theirs in zip(*(torch.autograd.grad(d, (x, y), weight) for d in (found, expected)), strict=True):
        assert_close(ours, theirs)


def test_blocks_hold_whole_groups():
    seen = []

    class Watched(SinKD):
        def between(self, q, p):
            seen.append(len(q))
            return super().between(q, p)

    student, teacher_hidden, teacher_head = problem()
    for group, chunk, expected in ((3, 1, [3, 3, 3, 1]), (3, 7 * V * 8, [6, 4]), (None, 1, [10]), (99, 1, [10])):
        seen.clear()
        Watched(SinKDParams(group=group)).fused(
            student[0], Head(*student[1:]), teacher_hidden, teacher_head, chunk_bytes=chunk
        )
        assert seen == expected


def test_restricted_words_err_as_documented():
    # one group of two makes the price visible: with a huge epsilon the loss is the mean price times two
    student, teacher = draw(2, 60, seed=1), draw(2, 60, seed=2)
    p, q = student.softmax(1), teacher.softmax(1)
    keys = {"temperature": 1, "epsilon": 1e7, "group": None}
    full = loss_of(student, teacher, **keys)
    chosen = (p.sum(0) + q.sum(0)).topk(8).indices
    rest_p, rest_q = (1 - x[:, chosen].sum(1) for x in (p, q))
    bound = sum(2 * min(a, b) for a in rest_p.tolist() for b in rest_q.tolist()) / 2
    restricted = loss_of(student, teacher, **keys, words=8)
    expected = sum(
        (p[i, chosen] - q[j, chosen]).abs().sum() + (rest_p[i] - rest_q[j]).abs() for i in (0, 1) for j in (0, 1)
    )
    assert_close(restricted, expected / 2, rtol=1e-6, atol=1e-6)
    assert full - bound < restricted < full
    assert loss_of(student, teacher, **keys, words=60) == full
    errors = [full - loss_of(student, teacher, **keys, words=k) for k in (4, 16, 40, 59)]
    assert errors == sorted(errors, reverse=True)


def test_sample_wise_is_sorted_difference_in_the_limit():
    student, teacher = logits(4, 6)
    sharp = loss_of(student, teacher, plan="sample", epsilon=2e-4, iterations=5000)
    assert_close(sharp, ULD(ULDParams(temperature=2)).dense(student, teacher)[0], rtol=1e-2, atol=1e-3)
    p, q = (student[:1] / 2).softmax(1), (teacher[:1] / 2).softmax(1)
    D = (p.T - q).abs()
    K = torch.exp(-D / 0.1)
    for _ in range(20):
        K = K / K.sum(1, keepdim=True)
        K = K / K.sum(0, keepdim=True)
    assert_close(loss_of(student[:1], teacher[:1], plan="sample"), (K * D).sum())


@every
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_fused_in_lower_precision(keys, dtype, rtol):
    loss = SinKD(SinKDParams(**keys))
    student, teacher_hidden, teacher_head = problem(dtype)
    fused, _ = loss.fused(student[0], Head(*student[1:]), teacher_hidden, teacher_head, chunk_bytes=300)
    exact = [leaf.detach().double().requires_grad_() for leaf in student]
    dense, _ = loss.dense(Head(*exact[1:])(exact[0]), Head(teacher_head.weight.double())(teacher_hidden.double()))
    assert fused.dtype == torch.float32
    assert_close(fused.double(), dense, rtol=1e-4, atol=1e-4)
    for ours, reference in zip(torch.autograd.grad(fused, student), torch.autograd.grad(dense, exact), strict=True):
        assert ours.dtype == dtype
        assert_close(ours.double(), reference, rtol=rtol, atol=rtol * max(1, reference.abs().max().item()))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite(keys, dtype):
    student, teacher = draw(N, V, seed=1, dtype=dtype), draw(N, V, seed=2, dtype=dtype)
    student[:, :9], teacher[:, 5:15] = 1e4, -1e4
    student[:, 3:7], teacher[:, 10:12] = -1e4, 1e4
    student[:, 20], teacher[:, 20] = -math.inf, -math.inf
    student.requires_grad_()
    total = loss_of(student, teacher, **keys)
    assert total.isfinite()
    assert torch.autograd.grad(total, student)[0].isfinite().all()


@every
def test_empty(keys):
    loss = SinKD(SinKDParams(**keys))
    student, teacher_hidden, teacher_head = problem(n=0)
    head = Head(*student[1:])
    for total, count in (
        loss.dense(head(student[0]), teacher_head(teacher_hidden)),
        loss.fused(student[0], head, teacher_hidden, teacher_head),
    ):
        assert (total.item(), count.item()) == (0, 0)
        total.backward()


def test_bad_arguments_are_refused():
    for keys in ({"epsilon": 0}, {"iterations": 0}, {"group": 0}, {"words": 0}, {"paired": -1}, {"norm": 0.5}):
        with pytest.raises(ValidationError, match=next(iter(keys))):
            SinKDParams(**keys)
    for keys in ({"group": 16}, {"paired": 1}, {"norm": 2}):
        with pytest.raises(ValidationError, match="belongs to plan: batch"):
            SinKDParams(plan="sample", **keys)
    with pytest.raises(ValueError, match="words: 64"):
        loss_of(draw(1, 3000), draw(1, 3000), plan="sample")
    with pytest.raises(ValueError, match="one vocabulary"):
        loss_of(draw(2, 5), draw(2, 6))
