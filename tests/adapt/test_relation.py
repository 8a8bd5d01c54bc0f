"""The decomposed relation metric is the metric on concatenated pairs."""

from __future__ import annotations

import torch

from residency.adapt.relation import Relation


def test_the_two_halves_are_the_layer_on_the_concatenation():
    torch.manual_seed(0)
    relation = Relation(7, 11).double()
    z, c = (torch.randn(n, 7, dtype=torch.float64, requires_grad=True) for n in (5, 4))
    whole = torch.cat([relation.of_vector.weight, relation.of_prototype.weight], 1)
    pairs = torch.cat([z.repeat_interleave(4, 0), c.repeat(5, 1)], 1)
    dense = (torch.nn.functional.linear(torch.nn.functional.linear(pairs, whole).relu(), relation.out.weight)).view(
        5, 4
    )
    mine = relation(z, c)
    torch.testing.assert_close(mine, dense, rtol=1e-12, atol=1e-12)
    weights = torch.randn(5, 4, dtype=torch.float64)
    parameters = (z, c, *relation.parameters())
    for a, b in zip(
        torch.autograd.grad((mine * weights).sum(), parameters),
        torch.autograd.grad((dense * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_order_of_the_pair_matters():
    torch.manual_seed(0)
    relation = Relation(6)
    z, c = torch.randn(3, 6), torch.randn(3, 6)
    assert not torch.allclose(relation(z, c), relation(c, z).T)


def test_it_learns_a_metric_that_cosine_is_not():
    """Prototypes whose class is told by the sign of a dimension that cosine drowns."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    y = torch.randint(2, (200,), generator=g)
    noise = 3 * torch.randn(200, 7, generator=g)
    z = torch.nn.functional.normalize(torch.cat([(2.0 * y - 1)[:, None], noise], 1), dim=-1)
    c = torch.nn.functional.normalize(
        torch.cat([torch.tensor([[-1.0], [1.0]]), torch.randn(2, 7, generator=g)], 1), dim=-1
    )
    relation = Relation(8, 32)
    optimiser = torch.optim.Adam(relation.parameters(), 1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(relation(z, c), y).backward()
        optimiser.step()
    learnt = (relation(z, c).argmax(1) == y).float().mean()
    cosine = ((z @ c.T).argmax(1) == y).float().mean()
    assert learnt > 0.95
    assert cosine < 0.8


def test_no_rows():
    assert Relation(4)(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0, 3)
