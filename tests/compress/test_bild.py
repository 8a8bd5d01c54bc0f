"""BiLD against the official numbers, a plain-Python reference, a closed form, and itself."""

import math

import pytest
import torch
from torch.testing import assert_close

from residency.compress.bild import BiLD, BiLDParams, bild, bild_fused
from residency.objective import Head

N, V, DS, DT = 6, 41, 5, 7
CHUNKS = [1, 3 * V * 8, 2 * 16 * DS * 8, 10**9, None]
DIRECTIONS = ["both", "teacher", "student"]


def draw(*shape, seed=0, dtype=torch.float64, scale=4.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def problem(dtype=torch.float64, n=N, scale=1.5):
    """Student hidden, weight, bias (all trainable) and the teacher's frozen hidden and head."""
    shapes = [(n, DS), (V, DS), (V,)]
    student = [draw(*shape, seed=i, dtype=dtype, scale=scale).requires_grad_() for i, shape in enumerate(shapes)]
    teacher = [draw(*shape, seed=9 + i, dtype=dtype) for i, shape in enumerate([(n, DT), (V, DT)])]
    return student, teacher[0], Head(teacher[1])


def brute_force(student, teacher, k, temperature, directions):
    """The equations, one token, one pair at a time, in Python floats."""
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        leaders = {"teacher": [t], "student": [s], "both": [t, s]}[directions]
        for leader in leaders:
            words = sorted(range(len(s)), key=lambda v: (-leader[v], v))[:k]
            pairs = [(m, n) for i, m in enumerate(words) for n in words[i + 1 :]]
            dt = [(t[m] - t[n]) / temperature for m, n in pairs]
            ds = [(s[m] - s[n]) / temperature for m, n in pairs]
            zt, zs = math.fsum(map(math.exp, dt)), math.fsum(map(math.exp, ds))
            total += math.fsum(
                math.exp(a) / zt * (a - math.log(zt) - b + math.log(zs)) for a, b in zip(dt, ds, strict=True)
            )
    return total


@pytest.mark.parametrize(
    ("k", "temperature", "teacher_led", "student_led"),
    [
        (8, 3, 6.388702251690766, 6.08352305067222),
        (3, 1, 10.673394573630826, 3.1980005387773605),
        (16, 2, 15.513215050415184, 11.150715123373319),
    ],
)
def test_official_implementation(k, temperature, teacher_led, student_led):
    # What `bild_loss` of fpcsong/BiLD at c8d40a8 returns on these logits, summed, in float64.
    grid = torch.arange(6 * 40, dtype=torch.float64).view(6, 40)
    student = 5 * torch.sin(grid * grid * 0.37 + 1)
    teacher = 6 * torch.cos(grid * grid * 0.11 + 2)
    expected = {
        "teacher": teacher_led,
        "student": student_led,
        "both": teacher_led + student_led,
    }
    for directions, value in expected.items():
        total, count = bild(student, teacher, BiLDParams(k=k, temperature=temperature, directions=directions))
        assert total.item() == pytest.approx(value, rel=1e-12)
        assert count.item() == 6


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize(("k", "temperature"), [(3, 1.0), (8, 3.0), (V, 2.0)])
def test_brute_force(k, temperature, directions):
    student, teacher = draw(N, V, seed=1), draw(N, V, seed=2)
    total, _ = bild(student, teacher, BiLDParams(k=k, temperature=temperature, directions=directions))
    expected = brute_force(student, teacher, k, temperature, directions)
    assert total.item() == pytest.approx(expected, rel=1e-12)


def test_closed_form_for_three_words():
    # d12 = 1, d23 = 2, d13 = d12 + d23 for the teacher; 2, -1, 1 for the student; temperature 1
    teacher = torch.tensor([[3.0, 2.0, 0.0, -9.0]], dtype=torch.float64)
    student = torch.tensor([[2.0, 0.0, 1.0, -9.0]], dtype=torch.float64)
    e = math.e
    p = [e / (e + e**2 + e**3), e**3 / (e + e**2 + e**3), e**2 / (e + e**2 + e**3)]  # 12, 13, 23
    q = [e**2 / (e**2 + e + 1 / e), e / (e**2 + e + 1 / e), e**-1 / (e**2 + e + 1 / e)]
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    total, _ = bild(student, teacher, BiLDParams(k=3, temperature=1.0, directions="teacher"))
    assert total.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k", [-1, 0, 1, 2])
def test_fewer_than_three_words_are_refused(k):
    with pytest.raises(ValueError, match="identically zero"):
        BiLDParams(k=k)


def test_bad_parameters_are_refused():
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            BiLDParams(temperature=temperature)
    with pytest.raises(ValueError, match="'sideways'"):
        BiLDParams(directions="sideways")
    with pytest.raises(ValueError, match="V = 41"):
        bild(draw(N, V), draw(N, V), BiLDParams(k=V + 1))
    with pytest.raises(ValueError, match="one vocabulary"):
        bild(draw(N, V), draw(N, V + 1))
    (hidden, weight, bias), teacher_hidden, teacher_head = problem()
    with pytest.raises(ValueError, match="one vocabulary"):
        bild_fused(hidden, Head(weight[1:]), teacher_hidden, teacher_head)
    with pytest.raises(ValueError, match="tokens"):
        bild_fused(hidden[1:], Head(weight, bias), teacher_hidden, teacher_head)


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_constants_cancel(directions):
    student, teacher, shift = draw(N, V, seed=1), draw(N, V, seed=2), draw(N, 1, seed=3, scale=50)
    params = BiLDParams(directions=directions)
    expected = bild(student, teacher, params)
    assert_close(bild(student + shift, teacher, params), expected)
    assert_close(bild(student, teacher - shift, params), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nothing_to_learn_from_oneself(dtype):
    logits = draw(N, V, dtype=dtype).requires_grad_()
    total, _ = bild(logits, logits.detach())
    assert total.abs().item() <= 1e-7
    assert torch.autograd.grad(total, logits)[0].float().abs().max() <= 1e-6


def test_only_the_selected_words_matter():
    student, teacher = draw(N, V, seed=1), draw(N, V, seed=2)
    params = BiLDParams(directions="teacher")
    expected = bild(student, teacher, params)
    outside = torch.ones(N, V, dtype=torch.bool).scatter_(1, teacher.topk(8).indices, False)
    for value in (-1e4, 1e4, -math.inf, math.inf):
        assert_close(bild(student.masked_fill(outside, value), teacher, params), expected)


def test_vocabulary_permutation():
    student, teacher = draw(N, V, seed=1).requires_grad_(), draw(N, V, seed=2)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(3))
    total, permuted = bild(student, teacher)[0], bild(student[:, order], teacher[:, order])[0]
    assert_close(permuted, total)
    assert_close(torch.autograd.grad(permuted, student), torch.autograd.grad(total, student))


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_gradient_lives_on_the_selection_and_sums_to_zero(directions):
    student, teacher = draw(N, V, seed=1).requires_grad_(), draw(N, V, seed=2).requires_grad_()
    bild(student, teacher, BiLDParams(directions=directions))[0].backward()
    selected = torch.zeros(N, V, dtype=torch.bool)
    if directions != "student":
        selected.scatter_(1, teacher.topk(8).indices, True)
    if directions != "teacher":
        selected.scatter_(1, student.topk(8).indices, True)
    assert student.grad[~selected].eq(0).all()
    assert student.grad[selected].ne(0).all()
    assert student.grad.sum(1).abs().max() < 1e-12
    assert teacher.grad is None


def test_a_swap_costs_more_the_wider_its_gap():
    losses = []
    for gap in (0.0, 0.5, 1.0, 2.0, 4.0):
        teacher = torch.arange(20, 0, -1, dtype=torch.float64)[None] * 0.1
        teacher[0, 0] = teacher[0, 3] + gap
        student = teacher.clone()
        student[0, [0, 3]] = student[0, [3, 0]]
        losses.append(bild(student, teacher, BiLDParams(directions="teacher"))[0].item())
    assert losses[0] == pytest.approx(0, abs=1e-12)
    assert losses == sorted(losses)
    assert losses[1] > 1e-6


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("k", [3, 8, V])
def test_fused_equals_dense(chunk, directions, k):
    (hidden, weight, bias), teacher_hidden, teacher_head = problem()
    params, leaves = BiLDParams(k=k, directions=directions), (hidden, weight, bias)
    dense, count = bild(Head(weight, bias)(hidden), teacher_head(teacher_hidden), params)
    fused, fused_count = bild_fused(hidden, Head(weight, bias), teacher_hidden, teacher_head, params, chunk_bytes=chunk)
    assert_close(fused, dense)
    assert fused_count == count == N
    assert_close(torch.autograd.grad(fused / 3, leaves), torch.autograd.grad(dense / 3, leaves))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("chunk", [1, 300, None])
def test_fused_in_lower_precision(dtype, rtol, chunk):
    student, teacher_hidden, teacher_head = problem(dtype)
    fused, _ = bild_fused(student[0], Head(*student[1:]), teacher_hidden, teacher_head, chunk_bytes=chunk)
    exact = [leaf.detach().double().requires_grad_() for leaf in student]
    teacher_logits = Head(teacher_head.weight.double())(teacher_hidden.double())
    dense, _ = bild(Head(*exact[1:])(exact[0]), teacher_logits)
    assert fused.dtype == torch.float32
    assert_close(fused.double(), dense, rtol=1e-4, atol=1e-4)
    found, expected = torch.autograd.grad(fused, student), torch.autograd.grad(dense, exact)
    for ours, reference in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert_close(ours.double(), reference, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_gradcheck(directions):
    (hidden, weight, bias), teacher_hidden, teacher_head = problem(n=3)
    params = BiLDParams(k=4, directions=directions)
    assert torch.autograd.gradcheck(
        lambda h, w, b: bild_fused(h, Head(w, b), teacher_hidden, teacher_head, params)[0],
        (hidden, weight, bias),
    )
    student, teacher = draw(3, V, seed=1).requires_grad_(), draw(3, V, seed=2)
    assert torch.autograd.gradcheck(lambda s: bild(s, teacher, params)[0], student)


def test_empty():
    (hidden, weight, bias), teacher_hidden, teacher_head = problem(n=0)
    for total, count in (
        bild(Head(weight, bias)(hidden), teacher_head(teacher_hidden)),
        bild_fused(hidden, Head(weight, bias), teacher_hidden, teacher_head),
    ):
        assert (total.item(), count.item()) == (0, 0)
        for gradient in torch.autograd.grad(total, (hidden, weight, bias), allow_unused=True):
            assert gradient is None or not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite(dtype):
    student, teacher = draw(N, V, seed=1, dtype=dtype), draw(N, V, seed=2, dtype=dtype)
    student[:, :20], teacher[:, 10:30] = 1e4, -1e4
    student[:, 5:15], teacher[:, 20:25] = -1e4, 1e4
    student[:, 40], teacher[:, 40] = -math.inf, -math.inf  # a word neither model can say
    student.requires_grad_()
    total, _ = bild(student, teacher)
    assert total.isfinite()
    assert torch.autograd.grad(total, student)[0].isfinite().all()


def test_module_speaks_both_forms():
    (hidden, weight, bias), teacher_hidden, teacher_head = problem()
    loss, head = BiLD(BiLDParams(k=5, directions="student")), Head(weight, bias)
    dense = loss.dense(head(hidden), teacher_head(teacher_hidden))
    assert_close(loss.fused(hidden, head, teacher_hidden, teacher_head, chunk_bytes=99), dense)
    assert_close(loss(head(hidden), teacher_head(teacher_hidden)), dense)
    assert not list(loss.parameters())
    assert "k=5" in repr(loss)
    ignored = torch.zeros(len(hidden), dtype=torch.long)
    assert_close(loss.dense(head(hidden), teacher_head(teacher_hidden), ignored), dense)
    assert_close(loss.fused(hidden, head, teacher_hidden, teacher_head, ignored), dense)
