"""The rule by enumeration of all its cases, its limits, and what cleanlab finds on the same rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from residency.adapt.correction import correct, soft_vote

C, GAMMA = 5, 0.6


def scores(own_above, best_above):
    """One row labelled 0: its own score above 1/C or not, the best (of class 2) above γ or not."""
    if own_above and best_above:
        s = [0.25, 0.0, 0.65, 0.05, 0.05]
    elif own_above:
        s = [0.3, 0.0, 0.5, 0.1, 0.1]
    elif best_above:
        s = [0.1, 0.05, 0.75, 0.05, 0.05]
    else:
        s = [0.1, 0.2, 0.4, 0.2, 0.1]
    return torch.tensor([s], dtype=torch.float64)


TABLE = {
    # (own > 1/C, best > γ, u_y > γ, trusted) → (kept, label)
    (False, False, False, False): (False, 0),
    (True, False, False, False): (True, 0),
    (False, True, False, False): (True, 2),
    (True, True, False, False): (True, 2),
    (False, False, True, False): (True, 0),
    (True, False, True, False): (True, 0),
    (False, True, True, False): (True, 0),
    (True, True, True, False): (True, 0),
} | {(a, b, c, True): (True, 0) for a, b, c in itertools.product([False, True], repeat=3)}


def test_the_table_is_whole():
    assert set(TABLE) == set(itertools.product([False, True], repeat=4))


@pytest.mark.parametrize("case", TABLE, ids=lambda c: "".join("ny"[v] for v in c))
def test_truth_table(case):
    own, best, metric, trusted = case
    u = torch.full((1, C), 0.1, dtype=torch.float64)
    u[0, 0] = 0.9 if metric else 0.5
    found = correct(scores(own, best), torch.tensor([0]), relabel=GAMMA, protect=torch.tensor([trusted]), second=u)
    assert (bool(found.keep), int(found.labels)) == TABLE[case]
    assert bool(found.relabelled) == (TABLE[case][1] == 2)
    assert float(found.confidence) == (1.0 if trusted else float(scores(own, best)[0, TABLE[case][1]]))


@pytest.mark.parametrize("case", [c for c in TABLE if not c[2]], ids=lambda c: "".join("ny"[v] for v in c))
def test_without_a_second_opinion_it_is_the_table_with_none(case):
    own, best, _, trusted = case
    found = correct(scores(own, best), torch.tensor([0]), relabel=GAMMA, protect=torch.tensor([trusted]))
    assert (bool(found.keep), int(found.labels)) == TABLE[case]


def test_official_confidence_is_that_of_the_label_as_given():
    s = scores(True, True)
    assert float(correct(s, torch.tensor([0]), relabel=GAMMA).confidence) == 0.65
    assert float(correct(s, torch.tensor([0]), relabel=GAMMA, official=True).confidence) == 0.25


def random_problem(n=300, seed=0):
    g = torch.Generator().manual_seed(seed)
    s = (2 * torch.randn(n, C, generator=g, dtype=torch.float64)).softmax(-1)
    return s, torch.randint(C, (n,), generator=g), torch.rand(n, generator=g) < 0.1


def test_a_second_pass_with_the_same_scores_changes_nothing():
    s, y, trusted = random_problem()
    once = correct(s, y, relabel=GAMMA, protect=trusted)
    twice = correct(s, once.labels, relabel=GAMMA, protect=trusted)
    assert once.relabelled.any()
    assert not twice.relabelled.any()
    assert torch.equal(once.labels, twice.labels)
    assert torch.equal(once.keep, twice.keep)


def test_trusted_rows_keep_their_label_and_their_target_is_one_hot():
    s, y, trusted = random_problem()
    found = correct(s, y, relabel=0.0, keep=1.0, protect=trusted)
    assert torch.equal(found.labels[trusted], y[trusted])
    assert found.keep[trusted].all()
    mixed = soft_vote(s, s.flip(1), 0.5, y, trusted)
    assert torch.equal(mixed[trusted], torch.nn.functional.one_hot(y[trusted], C).double())
    torch.testing.assert_close(mixed.sum(1), torch.ones(len(y), dtype=torch.float64))


def test_alpha_chooses_whom_to_hear():
    s, y, _ = random_problem()
    q = s.flip(0)
    assert torch.equal(soft_vote(s, q, 1.0), s)
    assert torch.equal(soft_vote(s, q, 0.0), q)
    # prototypes alone: confident rows take the nearest prototype's class, nobody else's label changes
    found = correct(soft_vote(s, q, 0.0), y, relabel=GAMMA)
    sure = q.max(1).values > GAMMA
    assert torch.equal(found.labels[sure], q.argmax(1)[sure])
    assert torch.equal(found.labels[~sure], y[~sure])


def test_thresholds_are_monotone_and_bad_shapes_are_refused():
    s, y, _ = random_problem()
    moved = [int(correct(s, y, relabel=g).relabelled.sum()) for g in (0.3, 0.6, 0.9, 1.0)]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > moved[2]
    assert moved[-1] == 0
    held = [int(correct(s, y, relabel=1.0, keep=k).keep.sum()) for k in (0.0, 0.2, 0.5, 1.0)]
    assert held == sorted(held, reverse=True)
    for bad in ((s[0], y[:1]), (s, y[:-1])):
        with pytest.raises(ValueError, match="scores are"):
            correct(*bad, relabel=GAMMA)
    with pytest.raises(ValueError, match="weight"):
        soft_vote(s, s, 1.5)
    empty = correct(s[:0], y[:0], relabel=GAMMA)
    assert len(empty.labels) == len(empty.keep) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    s, y, trusted = random_problem()
    found = correct(s.to(dtype), y, relabel=GAMMA, protect=trusted)
    assert torch.isfinite(found.confidence).all()
    assert torch.equal(found.labels[trusted], y[trusted])


def test_it_takes_out_the_rows_that_confident_learning_finds():
    """Symmetric noise on separable rows, out-of-sample probabilities: Jaccard with confident learning and the truth.

    cleanlab's filter is that rule with other thresholds; where it is not installed, the rule written out stands in.
    """
    linear_model = pytest.importorskip("sklearn.linear_model")
    from sklearn.model_selection import cross_val_predict

    rng = np.random.default_rng(0)
    true = rng.integers(0, 3, 600)
    x = rng.standard_normal((600, 4)) + 3 * np.eye(4)[true]
    given = np.where(rng.random(600) < 0.3, (true + rng.integers(1, 3, 600)) % 3, true)
    p = cross_val_predict(linear_model.LogisticRegression(), x, given, cv=5, method="predict_proba")
    found = correct(torch.from_numpy(p), torch.from_numpy(given), relabel=0.5)
    mine = (found.relabelled | ~found.keep).numpy()
    try:
        from cleanlab.filter import find_label_issues

        theirs = find_label_issues(given, p, filter_by="confident_learning")
    except ModuleNotFoundError:
        threshold = np.array([p[given == c, c].mean() for c in range(3)])
        above = np.where(p >= threshold, p, -1)
        theirs = (above.max(1) >= 0) & (above.argmax(1) != given)
    wrong = given != true
    assert (mine & wrong).sum() / (mine | wrong).sum() > 0.8
    assert (mine & theirs).sum() / (mine | theirs).sum() > 0.7
    assert np.array_equal(found.labels.numpy()[mine & found.keep.numpy()], p.argmax(1)[mine & found.keep.numpy()])
