"""Ring buffers against deques, one per class or one for all; draws; saving."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from residency.adapt.queues import ClassQueue, RingQueue


def numbered(*values, width=2):
    """Vectors that carry their number."""
    return torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, width)


@pytest.mark.parametrize("size", [1, 4, 7, 30])
def test_a_ring_holds_what_a_deque_would(size):
    queue, oracle, n = RingQueue(size, 2, payload=1), deque(maxlen=size), 0
    for batch in (1, 3, 0, 9, 2, 7, 5):  # some larger than the queue
        ids = range(n, n + batch)
        queue.push(numbered(*ids) if batch else torch.zeros(0, 2), numbered(*ids, width=1) * 10 if batch else None)
        oracle.extend(ids)
        n += batch
        assert len(queue) == len(oracle)
        assert sorted(queue.filled[:, 0].tolist()) == sorted(oracle)
        assert torch.equal(queue.filled_payloads[:, 0], queue.filled[:, 0] * 10)
    assert int(queue.pushed) == n


@pytest.mark.parametrize("size", [1, 3, 8])
def test_class_queues_hold_what_deques_would(size):
    g = torch.Generator().manual_seed(0)
    queue, oracle, n = ClassQueue(3, size, 2), [deque(maxlen=size) for _ in range(3)], 0
    for batch in (5, 0, 1, 12, 4, 6):
        y = torch.randint(0, 3, (batch,), generator=g)
        if batch == 12:
            y[:] = 1  # one class pushes out all it had, and part of the batch itself
        queue.push(numbered(*range(n, n + batch)) if batch else torch.zeros(0, 2), y)
        for i, c in enumerate(y.tolist()):
            oracle[c].append(n + i)
        n += batch
        for c in range(3):
            held = queue.vectors[c, : int(queue.count[c]), 0].tolist()
            assert sorted(held) == sorted(oracle[c])
    assert int(queue.pushed.sum()) == n


def test_rare_classes_are_not_pushed_out():
    queue = ClassQueue(2, 4, 1)
    queue.push(numbered(7, width=1), torch.tensor([1]))
    queue.push(torch.zeros(100, 1), torch.zeros(100, dtype=torch.long))
    assert queue.count.tolist() == [4, 1]
    assert float(queue.vectors[1, 0, 0]) == 7


def test_a_draw_is_a_mean_of_k_different_members():
    queue = ClassQueue(2, 5, 1)
    queue.push(torch.tensor([[1.0], [10.0], [100.0], [1000.0], [7.0]]), torch.tensor([0, 0, 0, 0, 1]))
    sums = {round(a + b, 3) for i, a in enumerate((1, 10, 100, 1000)) for b in (1, 10, 100, 1000)[i + 1 :]}
    found = set()
    for _ in range(200):
        means, enough = queue.draw(2)
        assert enough.tolist() == [True, False]
        assert not means[1].any()
        found.add(round(2 * float(means[0, 0]), 3))
    assert found == sums  # every pair comes, none of a row with itself, never an empty place
    means, enough = queue.draw(4)
    assert float(means[0, 0]) == pytest.approx(1111 / 4)
    assert queue.draw(1)[1].tolist() == [True, True]


def test_draws_are_uniform():
    queue = ClassQueue(1, 8, 8)
    queue.push(torch.eye(8), torch.zeros(8, dtype=torch.long))
    g = torch.Generator().manual_seed(0)
    share = sum(queue.draw(3, g)[0][0] * 3 for _ in range(4000)) / 4000
    assert (share - 3 / 8).abs().max() < 0.03  # four standard errors


def test_a_generator_decides_the_draw():
    queue = ClassQueue(2, 6, 3)
    queue.push(torch.randn(12, 3), torch.arange(12) % 2)
    a, b = (queue.draw(3, torch.Generator().manual_seed(5))[0] for _ in range(2))
    assert torch.equal(a, b)


def test_clear_and_state():
    queue = ClassQueue(2, 3, 2)
    queue.push(torch.randn(4, 2), torch.tensor([0, 0, 1, 0]))
    again = ClassQueue(2, 3, 2)
    again.load_state_dict(queue.state_dict())
    more = torch.randn(3, 2), torch.tensor([0, 1, 1])
    queue.push(*more)
    again.push(*more)
    assert torch.equal(queue.vectors, again.vectors)
    assert torch.equal(queue.pushed, again.pushed)
    queue.clear()
    assert queue.count.tolist() == [0, 0]
    assert not queue.draw(1)[1].any()


def test_what_is_pushed_is_detached_and_of_any_precision():
    z = torch.randn(3, 2, requires_grad=True)
    queue, ring = ClassQueue(2, 3, 2), RingQueue(4, 2)
    queue.push(z.half(), torch.tensor([0, 1, 1]))
    ring.push(z.bfloat16())
    assert not queue.vectors.requires_grad
    assert not ring.vectors.requires_grad
    assert queue.vectors.dtype == ring.vectors.dtype == torch.float32


def test_sizes_that_hold_nothing_are_refused():
    for make in (lambda: RingQueue(0, 2), lambda: ClassQueue(0, 2, 2), lambda: ClassQueue(2, 0, 2)):
        with pytest.raises(ValueError, match="at least one"):
            make()
    for k in (0, 4):
        with pytest.raises(ValueError, match="cannot give"):
            ClassQueue(2, 3, 2).draw(k)
