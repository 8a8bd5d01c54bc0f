"""overlap@k against Python sets."""

import pytest
import torch

from residency.compress.overlap import overlap, overlap_fused
from residency.objective import Head

N, V, DS, DT = 50, 40, 5, 7


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(student, teacher, k):
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        mine, theirs = (set(sorted(range(V), key=lambda v: -row[v])[:k]) for row in (s, t))
        total += len(mine & theirs) / k
    return total


@pytest.mark.parametrize("k", [1, 3, 8, V])
@pytest.mark.parametrize("chunk", [1, 600, None])
def test_python_sets(k, chunk):
    hidden, teacher_hidden = draw(N, DS), draw(N, DT, seed=1)
    head, teacher_head = Head(draw(V, DS, seed=2), draw(V, seed=3)), Head(draw(V, DT, seed=4))
    expected = by_hand(head(hidden), teacher_head(teacher_hidden), k)
    for total, count in (
        overlap(head(hidden), teacher_head(teacher_hidden), k),
        overlap_fused(hidden, head, teacher_hidden, teacher_head, k, chunk_bytes=chunk),
    ):
        assert total.item() == pytest.approx(expected, rel=1e-12)
        assert count == N
    assert (k == V) == (total == N)


def test_itself_scale_and_opposite():
    logits = draw(N, V).bfloat16()
    assert overlap(logits, 3 * logits, 8)[0] == N
    flat = torch.arange(V, dtype=torch.float32).expand(N, V)
    assert overlap(flat, -flat, 8)[0] == 0


def test_empty_and_bad_arguments():
    total, count = overlap(draw(0, V), draw(0, V))
    assert (total.item(), count.item()) == (0, 0)
    with pytest.raises(ValueError, match="one vocabulary"):
        overlap(draw(N, V), draw(N, V + 1))
    with pytest.raises(ValueError, match=f"V = {V}"):
        overlap(draw(N, V), draw(N, V), V + 1)
