"""Prototypes: means and running means against loops, the largest cluster, classes without rows, saving."""

from __future__ import annotations

import pytest
import torch

from residency.adapt.classbank import ClassBank
from residency.adapt.contrast import similarity


def rows(n=40, classes=4, width=6, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=g, dtype=dtype), torch.randint(0, classes, (n,), generator=g)


def unit(v):
    return v / v.norm(dim=-1, keepdim=True)


def test_means_equal_a_loop_over_classes():
    z, y = rows()
    y[y == 3] = 0  # a class without rows
    for normalise in (True, False):
        bank = ClassBank(4, 6, normalise).double().of_means(z, y)
        for c in range(3):
            mine = (unit(z) if normalise else z)[y == c].mean(0)
            torch.testing.assert_close(bank.vectors[c], unit(mine) if normalise else mine)
        assert not bank.vectors[3].any()
        assert bank.known.tolist() == [True, True, True, False]
        assert bank.count.tolist() == y.bincount(minlength=4).tolist()


def test_a_class_without_new_rows_keeps_its_mean():
    z, y = rows()
    bank = ClassBank(4, 6).of_means(z, y)
    before = bank.vectors.clone()
    bank.of_means(z[:2], torch.tensor([1, 1]))
    assert torch.equal(bank.vectors[[0, 2, 3]], before[[0, 2, 3]])
    assert not torch.equal(bank.vectors[1], before[1])


def sequential(bank, z, y, m):
    """One row after the other, normalised once at the end, as the equations say."""
    vectors, known = bank.vectors.clone(), bank.known.clone()
    for row, c in zip(unit(z), y.tolist(), strict=True):
        vectors[c] = m * vectors[c] + (1 - m) * row if known[c] else row
        known[c] = True
    return torch.where(known[:, None], vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12), vectors)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.999, 1.0])
def test_running_means_equal_one_row_after_the_other(momentum):
    bank = ClassBank(4, 6).double()
    for seed in range(3):  # the first batch also makes prototypes of classes that have none
        z, y = rows(11, seed=seed)
        if seed == 0:
            y[y == 2] = 1
        expected = sequential(bank, z, y, momentum)
        bank.ema_(z, y, momentum)
        torch.testing.assert_close(bank.vectors, expected)
        torch.testing.assert_close(bank.vectors.norm(dim=-1)[bank.known], torch.ones(int(bank.known.sum())).double())
    assert bank.count.sum() == 33


def test_an_empty_batch_changes_nothing():
    z, y = rows()
    bank = ClassBank(4, 6).of_means(z, y)
    before = bank.vectors.clone()
    bank.ema_(z[:0], y[:0], 0.9)
    assert torch.equal(bank.vectors, before)


def test_the_largest_cluster_of_a_class_is_its_prototype():
    g = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(30, 3, generator=g)
    z = torch.eye(3)[torch.tensor([0] * 20 + [1] * 10)] + noise  # 20 rows of one sense, 10 of another
    y = torch.zeros(30, dtype=torch.long)
    plain = ClassBank(1, 3).of_means(z, y).vectors[0]
    bank = ClassBank(1, 3).of_means(z, y, clusters=2, generator=g)
    assert plain[1] > 0.3
    assert bank.vectors[0, 0] > 0.99
    assert abs(float(bank.vectors[0, 1])) < 0.05
    assert int(bank.count[0]) == 20


def test_logits_of_unknown_classes_are_impossible():
    z, y = rows()
    y[y == 3] = 0
    bank = ClassBank(4, 6).of_means(z, y)
    tau = torch.tensor([0.1, 0.2, 0.3, 0.4])
    logits = bank.logits(z.float(), tau)
    assert (logits[:, 3] == -torch.inf).all()
    torch.testing.assert_close(logits[:, :3], similarity(z.float(), bank.vectors[:3]) / tau[:3])
    assert (bank.logits(z.float()).softmax(-1)[:, 3] == 0).all()


def test_half_precision_rows_and_state():
    z, y = rows(dtype=torch.float32)
    bank = ClassBank(4, 6).of_means(z.half(), y)
    bank.ema_(z.bfloat16(), y, 0.9)
    assert bank.vectors.dtype == torch.float32
    again = ClassBank(4, 6)
    again.load_state_dict(bank.state_dict())
    assert torch.equal(again.vectors, bank.vectors)
    assert torch.equal(again.count, bank.count)


def test_rows_give_no_gradient_to_the_bank():
    z, y = rows(dtype=torch.float32)
    z.requires_grad_(True)
    bank = ClassBank(4, 6).of_means(z, y)
    bank.ema_(z, y, 0.9)
    assert not bank.vectors.requires_grad


@pytest.mark.parametrize(("classes", "width"), [(0, 3), (3, 0)])
def test_nothing_to_hold_is_refused(classes, width):
    with pytest.raises(ValueError, match="at least one"):
        ClassBank(classes, width)
