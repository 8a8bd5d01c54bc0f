"""KL against torch's kl_div, and its fused form against its dense one."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from residency.compress.kl import KL, KLParams, kl, kl_fused
from residency.objective import Head

N, V, DS, DT = 6, 41, 5, 7
CHUNKS = [1, 4 * V * 8, 10**9, None]


def draw(*shape, seed=0, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def problem(dtype=torch.float64, n=N):
    """Student hidden, weight, bias (all trainable) and the teacher's frozen hidden and head."""
    shapes = [(n, DS), (V, DS), (V,)]
    student = [draw(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]
    return student, draw(n, DT, seed=9, dtype=dtype), Head(draw(V, DT, seed=10, dtype=dtype))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("scaled", [True, False])
def test_torch_kl_div(temperature, scaled):
    student, teacher = draw(N, V, seed=1).requires_grad_(), draw(N, V, seed=2)
    total, count = kl(student, teacher, KLParams(temperature=temperature, scale_by_t2=scaled))
    reference = F.kl_div(
        (student / temperature).log_softmax(1),
        (teacher / temperature).softmax(1),
        reduction="sum",
    ) * (temperature**2 if scaled else 1)
    assert_close(total, reference)
    assert count == N
    assert_close(torch.autograd.grad(total, student), torch.autograd.grad(reference, student))


def test_closed_form_for_two_words():
    student = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert kl(student, teacher)[0].item() == pytest.approx(expected, rel=1e-12)


def test_high_temperature_limit_matches_logits():
    # Hinton et al., section 2.1: with zero-mean logits and a large temperature, the scaled gradient
    # tends to (s - t) / V, the gradient of matching logits
    student, teacher = draw(N, V, seed=1), draw(N, V, seed=2)
    student, teacher = student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(kl(student, teacher, KLParams(temperature=1e4))[0], student)
    assert_close(gradient, (student - teacher).detach() / V, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    "params", [KLParams(), KLParams(temperature=3.0), KLParams(temperature=3.0, scale_by_t2=False)]
)
def test_fused_equals_dense(chunk, params):
    student, teacher_hidden, teacher_head = problem()
    head = Head(*student[1:])
    dense, count = kl(head(student[0]), teacher_head(teacher_hidden), params)
    fused, fused_count = kl_fused(student[0], head, teacher_hidden, teacher_head, params, chunk_bytes=chunk)
    assert_close(fused, dense)
    assert fused_count == count == N
    assert_close(torch.autograd.grad(fused / 3, student), torch.autograd.grad(dense / 3, student))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("chunk", [1, 300, None])
def test_fused_in_lower_precision(dtype, rtol, chunk):
    student, teacher_hidden, teacher_head = problem(dtype)
    fused, _ = kl_fused(student[0], Head(*student[1:]), teacher_hidden, teacher_head, chunk_bytes=chunk)
    exact = [leaf.detach().double().requires_grad_() for leaf in student]
    teacher_logits = Head(teacher_head.weight.double())(teacher_hidden.double())
    dense, _ = kl(Head(*exact[1:])(exact[0]), teacher_logits)
    assert fused.dtype == torch.float32
    assert_close(fused.double(), dense, rtol=1e-4, atol=1e-4)
    found, expected = torch.autograd.grad(fused, student), torch.autograd.grad(dense, exact)
    for ours, reference in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert_close(ours.double(), reference, rtol=rtol, atol=rtol)


def test_gradcheck():
    student, teacher_hidden, teacher_head = problem(n=3)
    assert torch.autograd.gradcheck(
        lambda h, w, b: kl_fused(
            h, Head(w, b), teacher_hidden, teacher_head, KLParams(temperature=2.0), chunk_bytes=400
        )[0],
        student,
    )


def test_nothing_to_learn_from_oneself():
    student, _, _ = problem(torch.float32)
    head = Head(*student[1:])
    total, _ = kl_fused(student[0], head, student[0], head)
    assert total.abs().item() <= 1e-5
    assert all(grad.abs().max() <= 1e-5 for grad in torch.autograd.grad(total, student))


def test_the_teacher_gets_no_gradient():
    student, teacher_hidden, _ = problem()
    teacher_hidden.requires_grad_()
    weight = draw(V, DT).requires_grad_()
    total, _ = kl_fused(student[0], Head(student[1]), teacher_hidden, Head(weight))
    (total + kl(draw(N, V).requires_grad_(), teacher_hidden @ weight.T)[0]).backward()
    assert teacher_hidden.grad is None
    assert weight.grad is None


def test_words_the_teacher_excludes_cost_nothing():
    student, teacher = draw(N, V, seed=1).requires_grad_(), draw(N, V, seed=2)
    both = student.detach().clone()
    teacher[:, 30:], both[:, 30:] = -math.inf, -math.inf  # a padded vocabulary, masked in both
    total, _ = kl(student, teacher)
    assert_close(total, F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="sum"))
    assert torch.autograd.grad(total, student)[0].isfinite().all()
    assert_close(kl(both, teacher), kl(both[:, :30], teacher[:, :30]))
    # fused: the mask is a bias of -inf
    eye, bias = torch.eye(V, dtype=torch.float64), torch.zeros(V, dtype=torch.float64)
    bias[30:] = -math.inf
    fused = kl_fused(student, Head(eye, bias), teacher.nan_to_num(neginf=0), Head(eye, bias))
    assert_close(fused, kl(both, teacher))
    assert torch.autograd.grad(fused[0], student)[0].isfinite().all()


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_stay_finite(scale):
    student, teacher_hidden, teacher_head = problem(torch.float32)
    hidden = (student[0].detach() * scale).requires_grad_()
    total, _ = kl_fused(hidden, Head(student[1]), teacher_hidden * scale, teacher_head)
    assert total.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(total, [hidden, student[1]]))


def test_empty():
    student, teacher_hidden, teacher_head = problem(n=0)
    head = Head(*student[1:])
    for total, count in (
        kl(head(student[0]), teacher_head(teacher_hidden)),
        kl_fused(student[0], head, teacher_hidden, teacher_head),
    ):
        assert (total.item(), count.item()) == (0, 0)
        total.backward()


def test_bad_arguments_are_refused():
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            KLParams(temperature=temperature)
    with pytest.raises(ValueError, match="one vocabulary"):
        kl(draw(N, V), draw(N, V - 1))
    student, teacher_hidden, teacher_head = problem()
    with pytest.raises(ValueError, match="one vocabulary"):
        kl_fused(student[0], Head(student[1][1:]), teacher_hidden, teacher_head)


def test_module_speaks_both_forms():
    student, teacher_hidden, teacher_head = problem()
    loss, head = KL(KLParams(temperature=2.0)), Head(*student[1:])
    dense = loss.dense(head(student[0]), teacher_head(teacher_hidden))
    assert_close(loss.fused(student[0], head, teacher_hidden, teacher_head), dense)
    assert_close(loss(head(student[0]), teacher_head(teacher_hidden)), dense)
    assert "temperature=2.0" in repr(loss)
    ignored = torch.zeros(N, dtype=torch.long)
    assert_close(loss.dense(head(student[0]), teacher_head(teacher_hidden), ignored), dense)
    assert_close(loss.fused(student[0], head, teacher_hidden, teacher_head, ignored), dense)
