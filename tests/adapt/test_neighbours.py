"""kNN against scikit-learn, k-reciprocal distances against the definition in loops, smoothing against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from residency.adapt import neighbours
from residency.adapt.neighbours import Reciprocal, knn, operator, smooth


def points(n=50, width=6, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, width, generator=g, dtype=dtype)
    return centres[torch.arange(n) % 5] + 0.6 * torch.randn(n, width, generator=g, dtype=dtype)


def literal(x, k1, k2, share):
    """Zhong et al.'s definition, set by set."""
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    square = ((unit[:, None] - unit[None]) ** 2).sum(-1)
    n = len(unit)
    d = square / square.max(1, keepdims=True)
    order = [sorted(range(n), key=lambda j, i=i: (d[i, j], j != i)) for i in range(n)]

    def near(i, k):
        return order[i][: k + 1]

    def mutual(i, k):
        return {j for j in near(i, k) if i in near(j, k)}

    v = np.zeros((n, n))
    for i in range(n):
        base = mutual(i, k1)
        grown = set(base)
        for j in base:
            half = mutual(j, round(k1 / 2))
            if len(half & base) > 2 / 3 * len(half):
                grown |= half
        for j in grown:
            v[i, j] = np.exp(-d[i, j])
        v[i] /= v[i].sum()
    v = np.stack([v[order[i][:k2]].mean(0) for i in range(n)])
    jaccard = np.array([[1 - np.minimum(a, b).sum() / np.maximum(a, b).sum() for b in v] for a in v])
    return (1 - share) * jaccard + share * d


def all_pairs(x, **keys):
    n = len(x)
    return Reciprocal(x, **keys).distances(torch.arange(n), torch.arange(n).expand(n, n))


@pytest.mark.parametrize(("k1", "k2", "share"), [(20, 6, 0.3), (5, 2, 0.0), (7, 1, 0.5), (3, 3, 0.1)])
def test_k_reciprocal_distances_are_those_of_the_definition(k1, k2, share, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 16)  # blocks are not seen in the result
    x = points()
    mine = all_pairs(x, k1=k1, k2=k2, share=share).numpy()
    np.testing.assert_allclose(mine, literal(x, k1, k2, share), rtol=1e-9, atol=1e-9)


def test_nothing_is_nearer_than_itself_and_names_do_not_matter():
    x = points()
    found = all_pairs(x)
    assert (found.diagonal() <= found.min(1).values + 1e-12).all()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(all_pairs(x[order]), found[order][:, order], rtol=1e-9, atol=1e-9)


def test_asked_pairs_are_those_of_the_whole():
    x = points()
    index, _ = knn(x, 7)
    some = torch.tensor([3, 0, 41])
    mine = Reciprocal(x).distances(some, index[some])
    torch.testing.assert_close(mine, all_pairs(x)[some].gather(1, index[some]))


def test_knn_is_scikit_learns(monkeypatch):
    sklearn = pytest.importorskip("sklearn.neighbors")
    monkeypatch.setattr(neighbours, "BLOCK", 8)
    x = points()
    index, cosine = knn(x, 9)
    distance, expected = sklearn.NearestNeighbors(metric="cosine", n_neighbors=10).fit(x.numpy()).kneighbors(x.numpy())
    assert np.array_equal(index.numpy(), expected[:, 1:])
    np.testing.assert_allclose(cosine.numpy(), 1 - distance[:, 1:], atol=1e-12)


SETTINGS = [{}, {"rerank": False}, {"weight": "distance"}, {"candidates": 5, "keep": 5, "k1": 5, "k2": 2}]


@pytest.mark.parametrize("keys", SETTINGS, ids=str)
def test_rows_sum_to_one_and_a_constant_stays(keys):
    x = points()
    averages = operator(x, **keys)
    dense = averages.dense()
    torch.testing.assert_close(dense.sum(1), torch.ones(50, dtype=torch.float64))
    assert not dense.diagonal().any()
    assert torch.equal(dense > 0, dense.T > 0)
    same = torch.full((50, 3), 1.7, dtype=torch.float64)
    for weight in (0.0, 0.4, 1.0):
        torch.testing.assert_close(smooth(averages, same, self_weight=weight, hops=3)[0], same)


def test_smoothing_is_scipys_product():
    sparse = pytest.importorskip("scipy.sparse")
    x, s = points(), points(seed=5)
    averages = operator(x)
    matrix = sparse.csr_matrix(averages.dense().numpy())
    mine, there = smooth(averages, s, self_weight=0.25, hops=2)
    expected = s.numpy()
    for _ in range(2):
        expected = 0.25 * expected + 0.75 * (matrix @ expected)
    np.testing.assert_allclose(mine.numpy(), expected, rtol=1e-10)
    assert there.all()


def test_two_cliques_never_mix():
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.eye(4)[i] + 0.01 * torch.randn(15, 4, generator=g) for i in (0, 1)])
    s = torch.cat([torch.zeros(15, 1), torch.ones(15, 1)])
    for rerank in (True, False):
        mine, _ = smooth(operator(x, candidates=10, keep=4, rerank=rerank, k1=10, k2=3), s, hops=5)
        torch.testing.assert_close(mine, s)


def test_unknown_captions_are_left_out_and_filled_in():
    x, s = points(), points(seed=5)
    averages = operator(x)
    known = torch.rand(50, generator=torch.Generator().manual_seed(2)) < 0.5
    mine, there = smooth(averages, s, known=known)
    dense = averages.dense() * known
    heard = dense.sum(1) > 0
    assert there[heard].all()
    torch.testing.assert_close(mine[heard], (dense @ s)[heard] / dense.sum(1)[heard, None])
    poisoned = s.masked_fill(~known[:, None], 1e6)  # what stands there does not matter
    torch.testing.assert_close(smooth(averages, poisoned, known=known)[0], mine)
    own, there = smooth(averages, s, known=torch.zeros(50, dtype=torch.bool))
    assert not there.any()
    assert not own.any()


def test_distance_weights_turn_the_order_round():
    """The release's weights: the farthest of the neighbours kept counts most."""
    x = points()
    near, far = (operator(x, candidates=10, keep=3, weight=w).dense() for w in ("similarity", "distance"))
    assert torch.equal(near > 0, far > 0)
    distance = all_pairs(x)
    by_near = (near * distance).sum(1).mean()
    assert by_near < (far * distance).sum(1).mean()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_points(n):
    x = points(n)
    averages = operator(x)
    mine, there = smooth(averages, x)
    assert mine.shape == x.shape
    assert there.all()
    if n == 1:
        assert torch.equal(mine, x)
    assert all_pairs(x).shape == (n, n)


def test_identical_points_and_half_precision_are_finite():
    same = torch.ones(30, 4)
    assert torch.isfinite(all_pairs(same)).all()
    assert torch.isfinite(operator(same).dense()).all()
    assert torch.isfinite(all_pairs(points(dtype=torch.float32).to(torch.bfloat16).float())).all()


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda x: knn(x, 0), "at least one row"),
        (lambda x: operator(x, candidates=3, keep=4), "4 neighbours cannot be kept of 3"),
        (lambda x: operator(x, weight="inverse"), "inverse"),
        (lambda x: Reciprocal(x, k1=2, k2=3), "k2 ≤ k1"),
        (lambda x: smooth(operator(x), x, self_weight=1.5), "1.5"),
    ],
)
def test_bad_settings_are_refused(act, said):
    with pytest.raises(ValueError, match=said):
        act(points())
