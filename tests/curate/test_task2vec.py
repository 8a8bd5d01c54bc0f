"""Task2Vec: the closed form against autograd, the distance, and that it finds the tag that is like the task."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from residency.curate.task2vec import Task2Vec, distance, diversity, fisher, head


def test_fisher_information_is_the_expected_square_of_the_score():
    rng = np.random.default_rng(0)
    x, weight, bias = rng.standard_normal((7, 4)), rng.standard_normal((3, 4)), rng.standard_normal(3)
    found = np.zeros((3, 4))
    for row in torch.tensor(x):
        w = torch.tensor(weight, requires_grad=True)
        for log_p in (w @ row + torch.tensor(bias)).log_softmax(0):
            (grad,) = torch.autograd.grad(log_p, w, retain_graph=True)
            found += log_p.detach().exp().item() * grad.numpy() ** 2 / 7
    np.testing.assert_allclose(fisher(x, weight, bias), found)
    assert np.isfinite(fisher(1e4 * x, weight, bias)).all()


def test_the_head_separates_and_gives_probabilities_where_its_assumption_holds():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 20_000)
    x = rng.standard_normal((20_000, 3)) + np.outer(y, [1.0, 0.5, 0])
    middle, weight, bias = head(x, [str(c) for c in y], 1e-6)
    logits = (x - middle) @ weight.T + bias
    # of two Gaussians with one covariance the log odds are linear: x·Δ − ‖Δ‖²/2
    expected = x @ [1.0, 0.5, 0] - 0.625 + np.log((y == 1).mean() / (y == 0).mean())
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], expected, atol=0.2)


def test_the_distance():
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 4)), rng.random((3, 4))
    assert distance(a, a) == pytest.approx(0, abs=1e-12)
    assert distance(a, b) == distance(b, a) > 0
    assert distance(5 * a, 5 * b) == pytest.approx(distance(a, b))
    one, other = np.array([1.0, 0]), np.array([0, 1.0])
    assert distance(one, other) == 1
    assert distance(np.array([1.0, 3]), np.array([1.0, 1])) == pytest.approx(
        1 - (0.5 * 0.5 + 0.75 * 0.25) / np.hypot(0.5, 0.75) / np.hypot(0.5, 0.25)
    )
    assert distance(np.zeros(2), np.zeros(2)) == 0
    assert diversity([one, other, one]) == pytest.approx(2 / 3)
    assert np.isnan(diversity([one]))


def pool(seed=0):
    """Three sources that ask about other features, two classes each."""
    rng = np.random.default_rng(seed)
    tags = [("abc"[i % 3],) for i in range(180)]
    x = 0.6 * rng.standard_normal((180, 12))
    labels = []
    for i, (tag,) in enumerate(tags):
        side = (i // 3) % 2
        x[i, 4 * "abc".index(tag) + side] += 2
        labels.append(f"{tag}{side}")
    return x, labels, tags


def test_rows_of_the_source_that_is_like_the_task_are_nearest():
    x, labels, tags = pool()
    judges, answers, _ = pool(1)
    mine = [i for i in range(180) if i % 3 == 1][:8]
    found = Task2Vec().score(x, labels, tags, judges[mine], [answers[i] for i in mine])
    by = {tag: {round(v, 12) for v, each in zip(found, tags, strict=True) if each == (tag,)} for tag in "abc"}
    assert all(len(values) == 1 for values in by.values())
    near = {tag: values.pop() for tag, values in by.items()}
    assert near["b"] < 0.6 * min(near["a"], near["c"])


def test_missing_rows_and_what_is_refused():
    x, labels, tags = pool()
    judges, answers = x[:4], labels[:4]
    gone = x.astype(np.float16)
    gone[5] = np.nan
    found = Task2Vec().score(gone, labels, [*tags[:7], (), *tags[8:]], judges, answers)
    assert np.flatnonzero(np.isnan(found)).tolist() == [5, 7]
    both = Task2Vec().score(x, labels, [("a", "b"), *tags[1:]], judges, answers)
    assert both[0] == min(both[3], both[1])
    assert Task2Vec().score(x[:0], [], [], judges, answers).shape == (0,)
    with pytest.raises(ValueError, match="at least two classes, found 1"):
        Task2Vec().score(x, ["a"] * 180, tags, judges, [None] * 4)
    with pytest.raises(ValueError, match="no trusted row"):
        Task2Vec().score(x, labels, tags, judges[:0], [])
    with pytest.raises(ValueError, match="must be as many"):
        Task2Vec().score(x, labels[:3], tags, judges, answers)
    with pytest.raises(ValueError, match="one width"):
        Task2Vec().score(x, labels, tags, judges[:, :3], answers)
