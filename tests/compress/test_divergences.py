"""Nine divergences against torch.distributions, scipy, the official code's numbers, plain loops, and themselves."""

import math

import pytest
import torch
from scipy.spatial.distance import cityblock, jensenshannon
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

from residency.compress import divergences as d
from residency.compress.divergence import RowDivergence
from residency.compress.kl import KL, KLParams
from residency.objective import IGNORE, Head
from residency.step import Params

N, V, DS, DT = 6, 41, 5, 7
CHUNKS = [1, 2 * V * 8, 10**9, None]
LOSSES = [
    d.ReverseKL(),
    d.ReverseKL(d.ReverseKLParams(temperature=2)),
    d.JS(),
    d.JS(d.JSParams(beta=0.1, temperature=3)),
    d.JS(d.JSParams(beta=0)),
    d.JS(d.JSParams(beta=1)),
    d.SkewedKL(),
    d.SkewedKL(d.SkewedKLParams(direction="reverse", skew=0.3, temperature=2)),
    d.TVD(),
    d.TVD(d.TVDParams(temperature=2)),
    d.DKD(),
    d.DKD(d.DKDParams(alpha=0.5, beta=0.5, temperature=1, scale_by_t2=False)),
    d.NKD(),
    d.NKD(d.NKDParams(gamma=0.25, temperature=3)),
    d.NormKD(),
    d.NormKD(d.NormKDParams(temperature=3, scale_by_t2=False)),
    d.AdaptiveKL(),
    d.AdaptiveKL(d.AdaptiveKLParams(mass=0.9, temperature=3)),
    d.TopKL(d.TopKLParams(k=5)),
    d.TopKL(),
]
every = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{type(loss).__name__}-{loss.params!r}"[:60])


def draw(*shape, seed=0, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def problem(dtype=torch.float64, n=N):
    """Student hidden, weight, bias (all trainable), the teacher's frozen hidden and head, and targets."""
    shapes = [(n, DS), (V, DS), (V,)]
    student = [draw(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]
    targets = torch.arange(n) * 7 % V
    targets[1::3] = IGNORE
    return student, draw(n, DT, seed=9, dtype=dtype), Head(draw(V, DT, seed=10, dtype=dtype)), targets


def grids():
    grid = torch.arange(6 * 40, dtype=torch.float64).view(6, 40)
    return 5 * torch.sin(grid * grid * 0.37 + 1), 6 * torch.cos(grid * grid * 0.11 + 2)


def pair(temperature=1.0, seed=1):
    """Logits, and the distributions they stand for, student first."""
    student, teacher = draw(N, V, seed=seed), draw(N, V, seed=seed + 1)
    return student, teacher, Categorical(logits=student / temperature), Categorical(logits=teacher / temperature)


# ── against others ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_torch_distributions(temperature):
    student, teacher, q, p = pair(temperature)

    def expect(loss, divergence):
        total, count = loss.dense(student, teacher)
        assert_close(total, divergence.sum())
        assert count == N

    expect(d.ReverseKL(d.ReverseKLParams(temperature=temperature)), kl_divergence(q, p))
    expect(d.JS(d.JSParams(temperature=temperature, beta=0)), kl_divergence(p, q))
    expect(d.JS(d.JSParams(temperature=temperature, beta=1)), kl_divergence(q, p))
    for w in (0.1, 0.5, 0.7):
        mixed, other = (Categorical(probs=a * p.probs + (1 - a) * q.probs) for a in (w, 1 - w))
        js = w * kl_divergence(p, mixed) + (1 - w) * kl_divergence(q, mixed)
        expect(d.JS(d.JSParams(temperature=temperature, beta=w)), js)
        expect(d.SkewedKL(d.SkewedKLParams(temperature=temperature, skew=w)), kl_divergence(p, mixed))
        reverse = d.SkewedKLParams(temperature=temperature, skew=w, direction="reverse")
        expect(d.SkewedKL(reverse), kl_divergence(q, other))


def test_scipy():
    student, teacher, q, p = pair()
    rows = list(zip(p.probs.numpy(), q.probs.numpy(), strict=True))
    assert d.JS().dense(student, teacher)[0].item() == pytest.approx(sum(jensenshannon(*row) ** 2 for row in rows))
    assert d.TVD().dense(student, teacher)[0].item() == pytest.approx(sum(cityblock(*row) / 2 for row in rows))


DISTILLM, MDISTILLER = "jongwooko/distillm 17c0f98", "megvii-research/mdistiller e8c5bb3"


@pytest.mark.parametrize(
    ("loss", "expected", "code"),
    [
        (d.ReverseKL(), 34.47017276024033, DISTILLM),
        (d.TVD(), 4.776804010899781, DISTILLM),
        (d.SkewedKL(), 23.348453453262454, "distillm, without the teacher's entropy"),
        (d.SkewedKL(d.SkewedKLParams(direction="reverse")), 9.491426319567406, DISTILLM),
        (d.JS(d.JSParams(beta=0.1)), 1.2543940002372667, DISTILLM),
        (d.JS(), 2.829193938873379, "trl generalized_jsd_loss"),
        (d.JS(d.JSParams(beta=0.1, temperature=2)), 0.8718828204931207, "trl generalized_jsd_loss"),
        (d.DKD(), 598.7308970633238, MDISTILLER),
        (d.DKD(d.DKDParams(alpha=0.5, beta=2, temperature=1)), 55.21271105380559, MDISTILLER),
        (d.NKD(), 62.87681334643382, "yzd-v/cls_KD e21ad37"),
        (d.NKD(d.NKDParams(gamma=0.25, temperature=3)), 58.78522034477987, "yzd-v/cls_KD e21ad37"),
        (d.NormKD(), 97.93668099629457, "gizi1/NormKD cb53528"),
        (d.NormKD(d.NormKDParams(temperature=1)), 84.75661968453582, "gizi1/NormKD cb53528"),
        (d.AdaptiveKL(), 32.720009278022275, "wutaiqiang/LLM_KD_AKL 91853fb"),
        (d.TopKL(d.TopKLParams(k=8)), 3.14565877557531, "fpcsong/BiLD c8d40a8"),
        (d.TopKL(d.TopKLParams(k=20, temperature=1)), 21.156807253649376, "fpcsong/BiLD c8d40a8"),
    ],
)
def test_official_implementations(loss, expected, code):
    # What that code returns on these logits and targets, in float64, times the 6 tokens where it is a mean.
    student, teacher = grids()
    total, _ = loss.dense(student, teacher, torch.tensor([3, 1, 4, 1, 5, 9]))
    if code.endswith("entropy"):
        total = total + Categorical(logits=teacher).entropy().sum()
    assert total.item() == pytest.approx(expected, rel=1e-11)


def log_softmax(values):
    top = max(values)
    return [v - top - math.log(math.fsum(math.exp(w - top) for w in values)) for v in values]


def loops(loss, s, t, y):
    """One token in Python floats."""
    p, words, tau = loss.params, range(len(s)), loss.params.temperature
    if y == IGNORE:
        y = max(words, key=lambda v: t[v])
    q, log_t = log_softmax([x / tau for x in s]), log_softmax([x / tau for x in t])
    rest = [v for v in words if v != y]
    among_q, among_t = log_softmax([s[v] / tau for v in rest]), log_softmax([t[v] / tau for v in rest])

    def kl(a, b):
        return math.fsum(math.exp(x) * (x - z) for x, z in zip(a, b, strict=True))

    if isinstance(loss, d.DKD):
        sure = [[x[y], math.log(math.fsum(math.exp(x[v]) for v in rest))] for x in (log_t, q)]
        value = p.alpha * kl(*sure) + p.beta * kl(among_t, among_q)
        return value * (tau**2 if p.scale_by_t2 else 1)
    if isinstance(loss, d.NKD):
        first = -math.exp(log_softmax(t)[y]) * log_softmax(s)[y]
        return first - p.gamma * tau**2 * math.fsum(math.exp(a) * b for a, b in zip(among_t, among_q, strict=True))
    if isinstance(loss, d.NormKD):
        own = [tau * torch.tensor(x, dtype=torch.float64).std().item() for x in (s, t)]
        value = kl(log_softmax([x / own[1] for x in t]), log_softmax([x / own[0] for x in s]))
        return value * (own[1] ** 2 if p.scale_by_t2 else 1)
    if isinstance(loss, d.AdaptiveKL):
        head, whole, held = 0.0, 0.0, 0.0
        for place, v in enumerate(sorted(words, key=lambda v: -t[v])):
            held += math.exp(log_t[v])
            gap = abs(math.exp(log_t[v]) - math.exp(q[v]))
            whole += gap
            head += gap if place == 0 or held <= p.mass else 0
        return head / whole * kl(log_t, q) + (1 - head / whole) * kl(q, log_t)
    best = sorted(words, key=lambda v: -t[v])[: p.k]
    return kl(*(log_softmax([x[v] / tau for v in best]) for x in (t, s)))


@pytest.mark.parametrize("with_targets", [True, False])
@pytest.mark.parametrize("loss", LOSSES[10:], ids=lambda loss: f"{type(loss).__name__}-{loss.params!r}"[:60])
def test_plain_loops(loss, with_targets):
    student, teacher = draw(N, V, seed=1), draw(N, V, seed=2)
    targets = problem()[3] if with_targets else None
    expected = sum(
        loops(loss, s, t, y)
        for s, t, y in zip(
            student.tolist(), teacher.tolist(), [IGNORE] * N if targets is None else targets.tolist(), strict=True
        )
    )
    assert loss.dense(student, teacher, targets)[0].item() == pytest.approx(expected, rel=1e-10)


# ── the two forms ─────────────────────────────────────────────────────────────────────────────────────────────────


@every
@pytest.mark.parametrize("chunk", CHUNKS)
def test_fused_equals_dense(loss, chunk):
    student, teacher_hidden, teacher_head, targets = problem()
    head = Head(*student[1:])
    dense, count = loss.dense(head(student[0]), teacher_head(teacher_hidden), targets)
    fused, fused_count = loss.fused(student[0], head, teacher_hidden, teacher_head, targets, chunk_bytes=chunk)
    assert_close(fused, dense)
    assert fused_count == count == N
    assert_close(torch.autograd.grad(fused / 3, student), torch.autograd.grad(dense / 3, student))


@every
def test_gradient(loss):
    if isinstance(loss, d.AdaptiveKL):
        pytest.skip("its weights are not differentiated; see test_adaptive_weights_are_constants")
    student, teacher_hidden, teacher_head, targets = problem(n=3)
    assert torch.autograd.gradcheck(
        lambda h, w, b: loss.fused(h, Head(w, b), teacher_hidden, teacher_head, targets)[0], student
    )


def test_adaptive_weights_are_constants():
    student, teacher, _, p = pair()
    student.requires_grad_()
    total, _ = d.AdaptiveKL().dense(student, teacher)
    h = d.AdaptiveKL().head_share(p.logits, student.detach().log_softmax(1))
    q = Categorical(logits=student)
    frozen = (h * kl_divergence(p, q) + (1 - h) * kl_divergence(q, p)).sum()
    assert_close(total, frozen)
    assert_close(torch.autograd.grad(total, student), torch.autograd.grad(frozen, student))
    assert 0 < h.min() < h.max() < 1


@every
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-4), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_fused_in_lower_precision(loss, dtype, rtol):
    student, teacher_hidden, teacher_head, targets = problem(dtype)
    fused, _ = loss.fused(student[0], Head(*student[1:]), teacher_hidden, teacher_head, targets, chunk_bytes=400)
    exact = [leaf.detach().double().requires_grad_() for leaf in student]
    teacher_logits = Head(teacher_head.weight.double())(teacher_hidden.double())
    dense, _ = loss.dense(Head(*exact[1:])(exact[0]), teacher_logits, targets)
    assert fused.dtype == torch.float32
    assert_close(fused.double(), dense, rtol=2e-4, atol=2e-4)
    for ours, reference in zip(torch.autograd.grad(fused, student), torch.autograd.grad(dense, exact), strict=True):
        assert ours.dtype == dtype
        assert_close(ours.double(), reference, rtol=rtol, atol=rtol * reference.abs().max().item())


def test_a_loss_of_ones_own_in_a_few_lines():
    class NoParams(Params):
        """None."""

    class SquaredLogits(RowDivergence):
        Params = NoParams

        def rows(self, student, teacher, targets):
            return (student - teacher).square().sum()

    student, teacher_hidden, teacher_head, _ = problem()
    head = Head(*student[1:])
    expected = torch.nn.functional.mse_loss(head(student[0]), teacher_head(teacher_hidden), reduction="sum")
    found, _ = SquaredLogits().fused(student[0], head, teacher_hidden, teacher_head, chunk_bytes=1)
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found, student), torch.autograd.grad(expected, student))


# ── limits and invariants ─────────────────────────────────────────────────────────────────────────────────────────


def test_limits_are_kl():
    student, teacher, q, p = pair()
    forward, reverse = kl_divergence(p, q).sum(), kl_divergence(q, p).sum()
    near = {"rtol": 1e-4, "atol": 1e-4}
    b = 1e-8
    assert_close(d.JS(d.JSParams(beta=b)).dense(student, teacher)[0] / b, forward, **near)
    assert_close(d.JS(d.JSParams(beta=1 - b)).dense(student, teacher)[0] / b, reverse, **near)
    assert_close(d.SkewedKL(d.SkewedKLParams(skew=b)).dense(student, teacher)[0], forward, **near)
    skewed = d.SkewedKL(d.SkewedKLParams(skew=b, direction="reverse"))
    assert_close(skewed.dense(student, teacher)[0], reverse, **near)
    top = d.TopKL(d.TopKLParams(k=V, temperature=2))
    assert_close(top.dense(student, teacher), KL(KLParams(temperature=2, scale_by_t2=False)).dense(student, teacher))
    assert_close(d.TopKL(d.TopKLParams(k=1)).dense(student, teacher)[0], torch.zeros((), dtype=torch.float64))


def test_dkd_is_a_decomposition_of_kl():
    # equation 5 of the paper: KL = TCKD + (1 − p_y) NCKD
    student, teacher, q, p = pair()
    for row in range(N):
        y = torch.tensor([row])
        s, t, sure = student[row : row + 1], teacher[row : row + 1], p.probs[row, row].item()
        loss = d.DKD(d.DKDParams(alpha=1, beta=1 - sure, temperature=1))
        assert_close(loss.dense(s, t, y)[0], kl_divergence(p, q)[row])


def test_normkd_ignores_scale_and_shift():
    student, teacher = draw(N, V, seed=1), draw(N, V, seed=2)
    loss = d.NormKD(d.NormKDParams(scale_by_t2=False))
    assert_close(loss.dense(7 * student + 3, teacher), loss.dense(student, teacher))
    assert_close(loss.dense(student, teacher / 5 - 1), loss.dense(student, teacher))
    flat = loss.dense(torch.zeros(2, V, requires_grad=True), torch.ones(2, V))[0]
    flat.backward()
    assert flat == 0


def test_bounds():
    student, teacher = 50 * draw(200, V, seed=1), 50 * draw(200, V, seed=2)
    for loss, bound in ((d.JS(), math.log(2)), (d.TVD(), 1.0), (d.SkewedKL(), math.log(10))):
        most = max(loss.dense(student[i : i + 1], teacher[i : i + 1])[0].item() for i in range(200))
        assert 0.95 * bound < most <= bound + 1e-12


@pytest.mark.parametrize("V", [1, 2, 70, 600, 5000])
def test_adaptive_head_without_sorting_everything(V):
    # flat rows need more words than the first 64, peaked ones fewer
    teacher, student = draw(4, V, seed=1, scale=1.0), draw(4, V, seed=2)
    teacher[0] *= 0.01
    log_p, log_q = teacher.log_softmax(1), student.log_softmax(1)
    found = d.AdaptiveKL().head_share(log_p, log_q)
    p, words = log_p.exp().sort(1, descending=True)
    gap = (p - log_q.exp().gather(1, words)).abs()
    tail = p.cumsum(1) > 0.5
    tail[:, 0] = False
    expected = gap.masked_fill(tail, 0).sum(1) / gap.sum(1)
    assert_close(found, expected.nan_to_num(nan=0.5))


@every
def test_nothing_to_learn_from_oneself(loss):
    logits = draw(N, V, dtype=torch.float32).requires_grad_()
    total, _ = loss.dense(logits, logits.detach())
    (gradient,) = torch.autograd.grad(total, logits)
    if isinstance(loss, d.NKD):  # cross-entropies: the entropy of the rest is left, and the pull towards the target
        assert total > 1
        assert gradient.abs().max() > 1e-3
    else:
        assert total.abs() <= 1e-4
        assert gradient.abs().max() <= 1e-5


@every
def test_words_both_exclude_do_not_exist(loss):
    student, teacher = draw(N, V, seed=1).requires_grad_(), draw(N, V, seed=2)
    cut = torch.zeros(V, dtype=torch.float64)
    cut[30:] = -math.inf
    total, _ = loss.dense(student + cut, teacher + cut)
    short = student[:, :30]
    expected, _ = loss.dense(short, teacher[:, :30])
    assert_close(total, expected)
    assert_close(torch.autograd.grad(total, student), torch.autograd.grad(expected, student))
    eye = torch.eye(V, dtype=torch.float64)
    fused, _ = loss.fused(student, Head(eye, cut), teacher, Head(eye, cut))
    assert_close(fused, expected)
    assert torch.autograd.grad(fused, student)[0].isfinite().all()


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_words_one_excludes(who):
    logits = {"student": draw(N, V, seed=1), "teacher": draw(N, V, seed=2)}
    logits[who][:, 30:] = -math.inf
    student = logits["student"].requires_grad_()
    for loss in (d.JS(), d.SkewedKL(), d.SkewedKL(d.SkewedKLParams(direction="reverse")), d.TVD()):
        total, _ = loss.dense(student, logits["teacher"])
        assert 0 < total < N * math.log(10)
        assert torch.autograd.grad(total, student)[0].isfinite().all()
    reverse, _ = d.ReverseKL().dense(student, logits["teacher"])
    assert reverse.isfinite() == (who == "student")


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite(loss, dtype):
    student, teacher = draw(N, V, seed=1, dtype=dtype), draw(N, V, seed=2, dtype=dtype)
    student[:, :20], teacher[:, 10:30] = 1e4, -1e4
    student[:, 5:15], teacher[:, 20:25] = -1e4, 1e4
    student.requires_grad_()
    total, _ = loss.dense(student, teacher)
    assert total.isfinite()
    assert torch.autograd.grad(total, student)[0].isfinite().all()


@every
def test_empty_and_single(loss):
    student, teacher_hidden, teacher_head, targets = problem(n=0)
    head = Head(*student[1:])
    for total, count in (
        loss.dense(head(student[0]), teacher_head(teacher_hidden), targets),
        loss.fused(student[0], head, teacher_hidden, teacher_head, targets),
    ):
        assert (total.item(), count.item()) == (0, 0)
        total.backward()


def test_the_teacher_gets_no_gradient_and_targets_may_be_missing():
    student, teacher_hidden, teacher_head, targets = problem()
    weight = teacher_head.weight.clone().requires_grad_()
    for loss in LOSSES:
        total, _ = loss.fused(student[0], Head(student[1]), teacher_hidden, Head(weight))
        (total + loss.dense(student[0] @ student[1].T, teacher_hidden @ weight.T)[0]).backward()
    assert weight.grad is None
    best = teacher_head(teacher_hidden).argmax(1)
    logits = draw(N, V), teacher_head(teacher_hidden)
    for loss in (d.DKD(), d.NKD()):
        assert_close(loss.dense(*logits), loss.dense(*logits, best))
        assert_close(loss.dense(*logits, torch.full_like(best, IGNORE)), loss.dense(*logits, best))
        assert loss.dense(*logits)[0] != loss.dense(*logits, (best + 1) % V)[0]


def test_bad_arguments_are_refused():
    for params in (d.ReverseKLParams, d.JSParams, d.SkewedKLParams, d.DKDParams, d.NKDParams, d.NormKDParams):
        for temperature in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="temperature"):
                params(temperature=temperature)
    for make in (
        lambda: d.JSParams(beta=1.1),
        lambda: d.SkewedKLParams(skew=0),
        lambda: d.SkewedKLParams(skew=1),
        lambda: d.TopKLParams(k=0),
        lambda: d.AdaptiveKLParams(mass=1),
    ):
        with pytest.raises(ValueError, match="validation error"):
            make()
    student, teacher_hidden, teacher_head, _ = problem()
    for loss in (d.ReverseKL(), d.DKD()):
        with pytest.raises(ValueError, match="one vocabulary"):
            loss.dense(draw(N, V), draw(N, V - 1))
        with pytest.raises(ValueError, match="one vocabulary"):
            loss.fused(student[0], Head(student[1][1:]), teacher_hidden, teacher_head)
        with pytest.raises(ValueError, match="targets"):
            loss.dense(draw(N, V), draw(N, V), torch.zeros(N + 1, dtype=torch.long))
        with pytest.raises(ValueError, match=f"has {V} words"):
            loss.dense(draw(N, V), draw(N, V), torch.full((N,), V))
    with pytest.raises(ValueError, match="only one class"):
        d.DKD().dense(draw(N, 1), draw(N, 1))
