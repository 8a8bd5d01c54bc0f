"""ULD against sorting by hand and the transport it stands for; alignment against brute force and a real tokenizer."""

import math
import random

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch.testing import assert_close

from residency.compress.uld import ULD, ULDParams, aligned_positions
from residency.objective import Head

N, VS, VT, DS, DT = 6, 31, 44, 5, 7


def draw(*shape, seed=0, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def problem(dtype=torch.float64, n=N, student_words=VS, teacher_words=VT):
    shapes = [(n, DS), (student_words, DS), (student_words,)]
    student = [draw(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]
    return student, draw(n, DT, seed=9, dtype=dtype), Head(draw(teacher_words, DT, seed=10, dtype=dtype))


@pytest.mark.parametrize(("vs", "vt"), [(VS, VT), (VT, VS), (VS, VS), (1, 5)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_sorting_by_hand(vs, vt, temperature):
    student, teacher = draw(N, vs, seed=1), draw(N, vt, seed=2)
    total, count = ULD(ULDParams(temperature=temperature)).dense(student, teacher)
    expected = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = (
            sorted(np.exp(x) / np.exp(x).sum())[::-1] for x in (np.array(s) / temperature, np.array(t) / temperature)
        )
        p, q = (list(x) + [0.0] * (max(vs, vt) - len(x)) for x in (p, q))
        expected += sum(abs(a - b) for a, b in zip(p, q, strict=True))
    assert total.item() == pytest.approx(expected, rel=1e-12)
    assert count == N


def test_it_is_a_wasserstein_distance_of_the_probabilities():
    student, teacher = draw(1, VS, seed=1), draw(1, VS, seed=2)
    p, q = student.softmax(1)[0].numpy(), teacher.softmax(1)[0].numpy()
    assert ULD().dense(student, teacher)[0].item() == pytest.approx(VS * wasserstein_distance(p, q), rel=1e-10)


def test_names_of_words_do_not_matter():
    student, teacher = draw(N, VS, seed=1), draw(N, VT, seed=2)
    order = torch.randperm(VS, generator=torch.Generator().manual_seed(0))
    assert_close(ULD().dense(student[:, order], teacher), ULD().dense(student, teacher))
    assert ULD().dense(student, student[:, order] + 3)[0] < 1e-12


@pytest.mark.parametrize("chunk", [1, 2 * VS * 8, 10**9, None])
@pytest.mark.parametrize(("vs", "vt"), [(VS, VT), (VT, VS)])
def test_fused_equals_dense(chunk, vs, vt):
    student, teacher_hidden, teacher_head = problem(student_words=vs, teacher_words=vt)
    head = Head(*student[1:])
    dense, count = ULD().dense(head(student[0]), teacher_head(teacher_hidden))
    fused, fused_count = ULD().fused(student[0], head, teacher_hidden, teacher_head, chunk_bytes=chunk)
    assert_close(fused, dense)
    assert fused_count == count == N
    assert_close(torch.autograd.grad(fused / 3, student), torch.autograd.grad(dense / 3, student))


def test_gradient():
    student, teacher_hidden, teacher_head = problem(n=2)
    loss = ULD(ULDParams(temperature=1.5))
    assert torch.autograd.gradcheck(lambda h, w, b: loss.fused(h, Head(w, b), teacher_hidden, teacher_head)[0], student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_and_lower_precision(dtype):
    student, teacher_hidden, teacher_head = problem(dtype)
    fused, _ = ULD().fused(student[0], Head(*student[1:]), teacher_hidden, teacher_head, chunk_bytes=300)
    exact = [leaf.detach().double() for leaf in student]
    dense, _ = ULD().dense(Head(*exact[1:])(exact[0]), Head(teacher_head.weight.double())(teacher_hidden.double()))
    assert_close(fused.double(), dense, rtol=1e-4, atol=1e-4)
    assert all(g.dtype == dtype and g.isfinite().all() for g in torch.autograd.grad(fused, student))
    wild = draw(N, VS, dtype=dtype)
    wild[:, :9], wild[:, 9:12], wild[:, 12] = 1e4, -1e4, -math.inf
    wild.requires_grad_()
    total, _ = ULD().dense(wild, draw(N, VT, seed=1, dtype=dtype))
    assert total.isfinite()
    assert torch.autograd.grad(total, wild)[0].isfinite().all()


def test_empty_and_bad_arguments():
    student, teacher_hidden, teacher_head = problem(n=0)
    for total, count in (
        ULD().dense(draw(0, VS), draw(0, VT)),
        ULD().fused(student[0], Head(*student[1:]), teacher_hidden, teacher_head),
    ):
        assert (total.item(), count.item()) == (0, 0)
    with pytest.raises(ValueError, match="same tokens"):
        ULD().dense(draw(N, VS), draw(N + 1, VT))
    student, teacher_hidden, teacher_head = problem()
    with pytest.raises(ValueError, match="same tokens"):
        ULD().fused(student[0], Head(*student[1:]), teacher_hidden[1:], teacher_head)
    with pytest.raises(ValueError, match="the teacher's hidden"):
        ULD().fused(student[0], Head(*student[1:]), teacher_hidden[:, 1:], teacher_head)


def cuts(text, rng, begin):
    """A random tokenisation: offsets of pieces."""
    ends = sorted({len(text), *rng.sample(range(1, len(text)), rng.randint(0, len(text) - 1))})
    return list(zip([begin, *[begin + e for e in ends[:-1]]], [begin + e for e in ends], strict=True))


def test_alignment_by_brute_force():
    rng = random.Random(0)
    text = "the fee for a garage wall"
    found = 0
    for _ in range(200):
        begin = rng.randint(0, 5)
        a, b = cuts(text, rng, begin), cuts(text, rng, begin)
        expected = [
            (i, j) for i, (s, _) in enumerate(a) for j, (t, _) in enumerate(b) if text[: s - begin] == text[: t - begin]
        ]
        assert aligned_positions(a, b) == expected
        assert aligned_positions(b, a) == [(j, i) for i, j in expected]
        found += len(expected)
    assert found > 400


def test_alignment_of_awkward_tokens():
    whole = [(0, 2), (2, 3), (3, 6)]
    # bytes of one character share its offsets: only the first of them stands at a boundary
    assert aligned_positions(whole, [(0, 2), (2, 3), (2, 3), (2, 3), (3, 6)]) == [(0, 0), (1, 1), (2, 4)]
    # the end of text has no width, wherever the tokenizer puts it
    assert aligned_positions([*whole, (0, 0)], [(0, 6), (6, 6)]) == [(0, 0), (3, 1)]
    # a space one tokenizer leaves out of its offsets
    assert aligned_positions([(0, 3), (3, 7)], [(0, 3), (4, 7)]) == [(0, 0), (1, 1)]
    assert aligned_positions([(5, 7), (7, 9)], [(4, 7), (7, 9)], start=4) == [(0, 0), (1, 1)]
    assert aligned_positions([], whole) == aligned_positions(whole, []) == []
    with pytest.raises(ValueError, match="backwards"):
        aligned_positions([(0, 4), (1, 3)], whole)


def test_alignment_of_two_real_tokenizers():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    text = ["the fence of the garden needs a permit 😀 and a fee", "the permit 😀 fee"] * 5
    offsets = []
    for size in (260, 300):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(
            text, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        )
        offsets.append(tokenizer.encode(text[0]).offsets)
    pairs = aligned_positions(*offsets)
    assert len(offsets[0]) > len(offsets[1]) > 5  # they do differ
    assert pairs[0] == (0, 0)
    assert len(pairs) >= 8
    for i, j in pairs:
        assert text[0][: offsets[0][i][0]] == text[0][: offsets[1][j][0]]
