"""The fused head against the dense one: same loss, same gradients, whatever the chunk."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from residency.fusedhead import (
    chunk_logits,
    cross_entropy_sum,
    fused_sum,
    selected_logits,
    top_k,
    top_k_logits,
)
from residency.objective import IGNORE, Head

N, V, D = 7, 37, 5
CHUNKS = [1, 3 * V * 8, 5 * D * 8, 10**9, None]  # one row, a few, a few columns, everything, the default


@pytest.fixture(scope="module", autouse=True)
def _one_thread():  # tiny matrices: a second thread would only wait
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem(dtype=torch.float64, bias=True, seed=0, n=N):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight, offset = draw(n, D), draw(V, D), draw(V)
    targets = torch.randint(V, (n,), generator=generator)
    leaves = [t.requires_grad_() for t in ([hidden, weight, offset] if bias else [hidden, weight])]
    return leaves, Head(weight, offset if bias else None), targets


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("bias", [True, False])
def test_cross_entropy_equals_torch(chunk, bias):
    leaves, head, targets = problem(bias=bias)
    targets[2] = IGNORE
    dense = F.cross_entropy(head(leaves[0]), targets, reduction="sum", ignore_index=IGNORE)
    fused = cross_entropy_sum(leaves[0], head, targets, chunk_bytes=chunk)
    assert_close(fused, dense)
    # an upstream factor, as the division by the step's count is
    assert_close(gradients(fused / 3, leaves), gradients(dense / 3, leaves))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("chunk", [1, 200, None])
def test_lower_precision_computes_in_float32(dtype, rtol, chunk):
    leaves, head, targets = problem(dtype)
    fused = cross_entropy_sum(leaves[0], head, targets, chunk_bytes=chunk)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    dense = F.cross_entropy(Head(*exact[1:])(exact[0]), targets, reduction="sum")
    assert fused.dtype == torch.float32
    assert_close(fused.double(), dense, rtol=1e-5, atol=1e-5)  # the loss has no half precision in it
    for ours, reference in zip(gradients(fused, leaves), gradients(dense, exact), strict=True):
        assert ours.dtype == dtype
        assert_close(ours.double(), reference, rtol=rtol, atol=rtol)


def test_autocast_and_mixed_dtypes_do_not_lower_the_precision():
    leaves, head, targets = problem(torch.float32)
    plain = cross_entropy_sum(leaves[0], head, targets)
    picked = selected_logits(leaves[0], head, targets[:, None]).sum()
    expected = gradients(plain + picked, leaves)
    values = top_k_logits(leaves[0], head, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(cross_entropy_sum(leaves[0], head, targets), plain, rtol=0, atol=0)
        assert_close(top_k_logits(leaves[0], head, 3), values, rtol=0, atol=0)
        total = cross_entropy_sum(leaves[0], head, targets)
        total = total + selected_logits(leaves[0], head, targets[:, None]).sum()
        assert_close(gradients(total, leaves), expected, rtol=0, atol=0)
    mixed = Head(head.weight, head.bias)  # bf16 activations on an f32 head, as autocast training gives
    half = leaves[0].detach().bfloat16().requires_grad_()
    loss = cross_entropy_sum(half, mixed, targets)
    loss.backward()
    assert half.grad.dtype == torch.bfloat16
    assert head.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("chunk", [1, 10**9])
def test_gradcheck_of_both_functions(chunk):
    leaves, _, targets = problem(n=3)
    words = torch.tensor([[0, 5, 5], [36, 1, 5], [2, 3, 4]])  # a word twice, in a row and across rows
    assert torch.autograd.gradcheck(
        lambda h, w, b: cross_entropy_sum(h, Head(w, b), targets, chunk_bytes=chunk), leaves
    )
    assert torch.autograd.gradcheck(lambda h, w, b: selected_logits(h, Head(w, b), words, chunk_bytes=chunk), leaves)
    assert torch.autograd.gradcheck(lambda h, w, b: fused_sum(h, Head(w, b), square_rows, chunk_bytes=chunk), leaves)


def square_rows(logits, rows, differentiate):
    total = logits.square().sum()
    if differentiate:
        logits.mul_(2)
    return total


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_only_what_is_trained_gets_a_gradient(frozen):
    leaves, head, targets = problem()
    for i in frozen:
        leaves[i].requires_grad_(False)
    loss = cross_entropy_sum(leaves[0], head, targets)
    picked = selected_logits(leaves[0], head, targets[:, None]).sum()
    assert loss.requires_grad == picked.requires_grad == (len(frozen) < 3)
    if loss.requires_grad:
        (loss + picked).backward()
    assert [leaf.grad is None for leaf in leaves] == [i in frozen for i in range(3)]


def test_no_grad_asks_the_row_loss_for_no_gradient():
    leaves, head, _ = problem()
    asked = []

    def row_loss(logits, rows, differentiate):
        asked.append(differentiate)
        return logits.sum()

    with torch.no_grad():
        fused_sum(leaves[0], head, row_loss)
    assert asked == [False]


def test_second_backward_and_accumulation():
    leaves, head, targets = problem()
    loss = cross_entropy_sum(leaves[0], head, targets)
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    (2 * loss).backward()
    assert_close([leaf.grad for leaf in leaves], [3 * grad for grad in once])


def test_empty_and_non_contiguous():
    leaves, head, targets = problem(n=0)
    loss = cross_entropy_sum(leaves[0], head, targets)
    picked = selected_logits(leaves[0], head, torch.empty(0, 3, dtype=torch.long))
    (loss + picked.sum()).backward()
    assert loss.item() == 0
    assert all(leaf.grad.eq(0).all() for leaf in leaves)
    assert top_k_logits(leaves[0], head, 4)[1].shape == (0, 4)

    leaves, head, targets = problem()
    strided = Head(head.weight.t().contiguous().t(), head.bias)
    slanted = leaves[0].t().contiguous().t()
    expected = cross_entropy_sum(leaves[0], head, targets)
    assert_close(cross_entropy_sum(slanted, strided, targets, chunk_bytes=300), expected)
    assert_close(top_k_logits(slanted, strided, 5), top_k_logits(leaves[0], head, 5))
    words = torch.arange(2 * N).view(2, N).t()
    assert_close(
        gradients(selected_logits(slanted, strided, words).sum(), leaves[:2]),
        gradients(head(leaves[0]).gather(1, words).sum(), leaves[:2]),
    )


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_stay_finite(scale):
    leaves, head, targets = problem(torch.float32)
    hidden = (leaves[0].detach() * scale).requires_grad_()
    loss = cross_entropy_sum(hidden, head, targets)
    dense = F.cross_entropy(head(hidden), targets, reduction="sum")
    assert_close(loss, dense)
    assert all(grad.isfinite().all() for grad in gradients(loss, [hidden, head.weight]))


@pytest.mark.parametrize("chunk", [1, 64, 10**9, None])
@pytest.mark.parametrize("k", [1, 3, V])
def test_top_k_is_streamed_exactly(chunk, k):
    leaves, head, _ = problem()
    values, indices = top_k_logits(leaves[0], head, k, chunk_bytes=chunk)
    logits = head(leaves[0])
    assert not values.requires_grad
    assert_close((values, indices), top_k(logits, k))
    assert_close(values, logits.topk(k).values.detach())
    assert_close(values, logits.gather(1, indices).detach())


def test_equal_logits_are_listed_by_index():
    logits = torch.tensor([[1.0, 5.0, 1.0, 5.0, 5.0, 0.0, 1.0]])
    assert top_k(logits, 6)[1].tolist() == [[1, 3, 4, 0, 2, 6]]
    head = Head(logits.T)
    for chunk in (1, 8, None):
        assert top_k_logits(torch.ones(1, 1), head, 6, chunk_bytes=chunk)[1].tolist() == [[1, 3, 4, 0, 2, 6]]


@pytest.mark.parametrize("chunk", [1, 3 * D * 8, None])
def test_selected_logits_equal_gathered_ones(chunk):
    leaves, head, _ = problem()
    words = torch.randint(V, (N, 4), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(N, 4, dtype=torch.float64)
    fused = selected_logits(leaves[0], head, words, chunk_bytes=chunk)
    dense = head(leaves[0]).gather(1, words)
    assert_close(fused, dense)
    found = gradients((fused * weights).sum(), leaves)
    assert_close(found, gradients((dense * weights).sum(), leaves))
    untouched = torch.ones(V, dtype=torch.bool)
    untouched[words.flatten()] = False
    assert found[1][untouched].eq(0).all()


def test_frequent_words_do_not_lose_gradient_in_half_precision():
    head = Head(torch.ones(4, 1, dtype=torch.bfloat16, requires_grad=True))
    hidden = torch.ones(1000, 1, dtype=torch.bfloat16)
    words = torch.zeros(1000, 1, dtype=torch.long)
    selected_logits(hidden, head, words).sum().backward()
    assert head.weight.grad[0].item() == 1000  # a running bfloat16 sum would stop at 256


def test_chunk_logits_converts_block_by_block():
    leaves, head, _ = problem(torch.bfloat16)
    out = torch.empty(N, V)
    logits = chunk_logits(leaves[0], head, out=out, chunk_bytes=64)
    exact = Head(head.weight.float(), head.bias.float())(leaves[0].float())
    assert logits is out
    assert_close(logits, exact.detach())


def test_bad_arguments_say_what_to_do():
    leaves, head, targets = problem()
    with pytest.raises(ValueError, match=r"hidden\[mask\]"):
        cross_entropy_sum(leaves[0][None], head, targets[None])
    with pytest.raises(ValueError, match="targets must be"):
        cross_entropy_sum(leaves[0], head, targets[1:])
    with pytest.raises(ValueError, match="chunk_bytes"):
        cross_entropy_sum(leaves[0], head, targets, chunk_bytes=0)
    for k in (0, V + 1):
        with pytest.raises(ValueError, match="V = 37"):
            top_k_logits(leaves[0], head, k)
