"""Alignments against SVDs per plane, SciPy, transformers' own RoPE, and loops over tokens."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from headmodels import random_orthogonal, random_planar
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from residency.compress.headalign import align, align_group, planar, planar_angles, procrustes, scores
from residency.compress.headgrams import Grams

N, d = 40, 8
KINDS = ["key", "value"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grams(X):
    """From tokens [G, N, d]."""
    unit = X / X.norm(dim=-1, keepdim=True)
    return Grams(*(torch.einsum("ina,jnb->ijab", x, x) for x in (X, unit)), X.shape[1])


def related(G=4, seed=0, noise=0.5):
    """Heads [G, N, d] that are noisy copies of one another in other coordinates, and the other coordinates of keys."""
    generator = torch.Generator().manual_seed(seed)
    base = draw(N, d, seed=seed + 1)
    turns = [random_planar(d, generator) for _ in range(G)]
    return torch.stack([base @ R + noise * draw(N, d, seed=seed + 2 + i) for i, R in enumerate(turns)])


def by_planes(A, B):
    """One SVD per plane, its determinant repaired: the rotation x ↦ xR of A [N, d] to B."""
    R, h = np.zeros((d, d)), d // 2
    for m in range(h):
        pair = [m, m + h]
        U, _, Vt = np.linalg.svd(A[:, pair].T @ B[:, pair])
        if np.linalg.det(U @ Vt) < 0:
            U[:, -1] *= -1
        R[np.ix_(pair, pair)] = U @ Vt
    return torch.from_numpy(R)


@pytest.mark.parametrize("seed", range(5))
def test_planar_rotation_is_the_svd_per_plane(seed):
    A, B = draw(N, d, seed=seed), draw(N, d, seed=seed + 50)
    assert_close(planar(planar_angles(A.T @ B)), by_planes(A.numpy(), B.numpy()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_procrustes_is_scipys(seed):
    A, B = draw(N, d, seed=seed), draw(N, d, seed=seed + 50)
    assert_close(procrustes(A.T @ B), torch.from_numpy(scipy.linalg.orthogonal_procrustes(A.numpy(), B.numpy())[0]))


def test_planar_rotations_commute_with_rope_and_are_proper():
    R = planar(draw(3, d // 2))
    positions = torch.arange(17).double()
    frequencies = 10.0 ** -torch.arange(d // 2).double()
    angles = torch.cat([positions[:, None] * frequencies] * 2, -1)[None]
    x = draw(1, 3, 17, d, seed=4)
    turn = lambda y: apply_rotary_pos_emb(y, y, angles.cos(), angles.sin())[0]  # noqa: E731
    assert_close(turn(x @ R), turn(x) @ R, rtol=0, atol=1e-14)
    assert_close(R @ R.mT, torch.eye(d, dtype=torch.float64).expand(3, d, d))
    for m in range(d // 2):
        pair = torch.tensor([m, m + d // 2])
        assert_close(torch.linalg.det(R[:, pair][:, :, pair]), torch.ones(3, dtype=torch.float64))
    general = torch.from_numpy(scipy.linalg.qr(draw(d, d).numpy())[0])  # the check can fail
    assert (turn(x @ general) - turn(x) @ general).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_no_allowed_map_is_better(kind):
    X, Y = related(2, noise=1.0)
    best = (X @ align(X.T @ Y, kind) - Y).square().sum()
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        other = random_planar(d, generator) if kind == "key" else random_orthogonal(d, generator)
        assert (X @ other - Y).square().sum() >= best - 1e-9


@pytest.mark.parametrize("kind", [*KINDS, None])
@pytest.mark.parametrize("criterion", ["cos", "dist"])
def test_scores_by_tokens(kind, criterion):
    X = related(3)
    found = scores(grams(X), kind, criterion)
    looked_at = X / X.norm(dim=-1, keepdim=True) if criterion == "cos" else X
    for i, j in itertools.product(range(3), repeat=2):
        A, B = looked_at[i], looked_at[j]
        R = torch.eye(d, dtype=torch.float64)
        if kind == "key":
            R = by_planes(A.numpy(), B.numpy())
        elif kind == "value":
            R = torch.from_numpy(scipy.linalg.orthogonal_procrustes(A.numpy(), B.numpy())[0])
        if criterion == "cos":
            expected = torch.nn.functional.cosine_similarity(A @ R, B).mean()
        else:
            expected = -(A @ R - B).square().sum(-1).mean()
        assert found[i, j].item() == pytest.approx(expected.item(), abs=1e-12)
    assert_close(found, found.T, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_planted_copies_are_found(kind):
    generator = torch.Generator().manual_seed(0)
    make = random_planar if kind == "key" else random_orthogonal
    base = draw(N, d)
    X = torch.stack([base @ make(d, generator) for _ in range(4)])
    assert_close(scores(grams(X), kind, "cos"), torch.ones(4, 4, dtype=torch.float64))
    assert scores(grams(X), kind, "dist").abs().max() < 1e-12 * X.square().sum()
    R = align_group(grams(X).raw, kind).rotations
    turned = X @ R
    assert_close(turned, turned[:1].expand_as(turned))


@pytest.mark.parametrize("kind", KINDS)
def test_group_alignment_never_gets_worse_and_beats_the_first_head_as_target(kind):
    for seed in range(8):
        X = related(5, seed=10 * seed, noise=1.5)
        C = grams(X).raw
        found = align_group(C, kind)
        assert np.all(np.diff(found.agreement) >= -1e-9)
        pairs = lambda Y: sum(float((Y[i] * Y[j]).sum()) for i, j in itertools.combinations(range(5), 2))  # noqa: E731
        assert pairs(X @ found.rotations) == pytest.approx(max(found.agreement))
        to_first = torch.stack([torch.eye(d, dtype=torch.float64), *(align(X[j].T @ X[0], kind) for j in range(1, 5))])
        assert pairs(X @ found.rotations) >= pairs(X @ to_first)
        # a fixed point: no head gains by being aligned to the others once more (up to the stopping rule)
        turned = X @ found.rotations
        again = torch.stack([X[j] @ align(X[j].T @ (turned.sum(0) - turned[j]), kind) for j in range(5)])
        gain = sum(float(((again[j] - turned[j]) * (turned.sum(0) - turned[j])).sum()) for j in range(5))
        assert gain <= 1e-3 * pairs(X @ found.rotations)


@pytest.mark.parametrize("kind", KINDS)
def test_small_groups(kind):
    X = related(2)
    one = align_group(grams(X[:1]).raw, kind)
    assert_close(one.rotations, torch.eye(d, dtype=torch.float64)[None])
    two = align_group(grams(X).raw, kind).rotations
    residual = (X[0] @ two[0] - X[1] @ two[1]).square().sum()
    assert_close(residual, (X[0] @ align(X[0].T @ X[1], kind) - X[1]).square().sum())
    same = align_group(grams(X[[0, 0, 0]]).raw, kind).rotations
    assert_close(same, torch.eye(d, dtype=torch.float64).repeat(3, 1, 1))


def test_odd_widths_are_refused():
    with pytest.raises(ValueError, match="even"):
        planar_angles(torch.eye(5))
