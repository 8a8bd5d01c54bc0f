"""SPCL against loops in float64, another library and torch's cross-entropy; its state through a killed training."""

from __future__ import annotations

import math

import pytest
import torch

from residency import train
from residency.adapt.contrast import SupCon
from residency.adapt.difficulty import difficulties
from residency.adapt.spcl import FLOOR, SPCL, spcl
from residency.objective import Outputs
from residency.trainable import Adapter
from residency.trainparams import TrainParams
from residency.views import Item, collate_views
from stopping import StopAfter, Stopped


def problem(b=8, classes=4, width=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(b, width, generator=g, dtype=dtype)
    prototypes = torch.randn(classes, width, generator=g, dtype=dtype)
    return z, torch.randint(0, classes, (b,), generator=g), prototypes


def by_loops(z, y, prototypes, tau, known=None):
    """The definition, row by row, candidate by candidate."""

    def f(a, b):
        cos = float(a @ b / (a.norm() * b.norm()))
        return math.exp((1 + cos) / 2 / tau)

    losses = []
    for i in range(len(z)):
        candidates = [(z[j], int(y[j])) for j in range(len(z)) if j != i]
        candidates += [(t, k) for k, t in enumerate(prototypes) if known is None or known[k]]
        all_of_them = [f(z[i], c) for c, _ in candidates]
        mine = [f(z[i], c) for c, k in candidates if k == int(y[i])]
        losses.append(-math.log(sum(mine) / len(mine) / sum(all_of_them)))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("tau", [0.05, 0.08, 1.0])
def test_the_loss_equals_the_double_loop(tau):
    z, y, prototypes = problem()
    torch.testing.assert_close(spcl(z, y, prototypes, tau), by_loops(z, y, prototypes, tau), rtol=1e-9, atol=1e-9)
    known = torch.tensor([True, True, False, True])
    y[y == 2] = 1
    mine = spcl(z, y, prototypes, tau, known)
    torch.testing.assert_close(mine, by_loops(z, y, prototypes, tau, known), rtol=1e-9, atol=1e-9)


def test_with_one_positive_each_it_is_supcon_with_prototypes_for_references():
    """Log of mean and mean of logs coincide; the cosine's temperature is 2 τ."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    z, _, prototypes = problem(4)
    y = torch.arange(4)  # nobody meets another of his class but the prototype
    theirs = losses.SupConLoss(temperature=2 * 0.08)
    both = torch.cat([z, prototypes])
    anchors, references = torch.arange(4), torch.arange(8)
    pairs = [(i, j) for i in anchors.tolist() for j in references.tolist() if i != j]
    positive = torch.tensor([p for p in pairs if (p[1] % 4) == p[0]]).T
    negative = torch.tensor([p for p in pairs if (p[1] % 4) != p[0]]).T
    expected = theirs(z, indices_tuple=(*positive, *negative), ref_emb=both, ref_labels=torch.arange(8) % 4, labels=y)
    torch.testing.assert_close(spcl(z, y, prototypes, 0.08).mean(), expected)


def test_with_more_positives_it_is_never_above_the_mean_of_logs():
    from residency.adapt.contrast import multi_positive_nce, similarity

    z, y, prototypes = problem(12)
    own = torch.eye(12, 16, dtype=torch.bool)
    positive = y[:, None] == torch.cat([y, torch.arange(4)])[None]
    sim = similarity(z, torch.cat([z, prototypes]), "halfcos")
    sum_log = multi_positive_nce(sim, positive, tau=0.08, exclude=own, reduce="sum_log")
    mine = spcl(z, y, prototypes, 0.08)
    assert (mine <= sum_log + 1e-12).all()
    assert (mine < sum_log - 1e-3).any()


def test_dividing_by_the_number_of_positives_shifts_the_value_and_no_gradient():
    z, y, prototypes = problem()
    gradients, values = [], []
    for shifted in (True, False):
        x = z.clone().requires_grad_(True)
        losses = spcl(x, y, prototypes, 0.08)
        positives = (y[:, None] == y[None]).sum(1)  # the others of the class, and the prototype
        losses = losses if shifted else losses - positives.double().log()
        losses.sum().backward()
        gradients.append(x.grad)
        values.append(losses.detach())
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(values[0] - values[1], (y[:, None] == y[None]).sum(1).double().log())


def prepared(z, y, **settings):
    """An objective that has seen rows."""
    loss = SPCL(int(y.max()) + 1, z.shape[1], **{"queue": 4, "support": 2} | settings).to(z.dtype)
    return loss, loss.begin_epoch(0, 4, lambda: iter([(Outputs(features=z), {"labels": y})]))


def test_one_row_and_class_means_are_cross_entropy_of_a_nearest_mean_classifier():
    z, y, _ = problem(12)
    y[:4] = torch.arange(4)
    loss, rows = prepared(z, y)
    assert rows is None
    x, c = z[5:6] + 0.3, y[5:6]
    total, count = loss(Outputs(features=x), {"labels": c})
    g = (1 + torch.nn.functional.cosine_similarity(x[:, None], loss.means.vectors[None], dim=-1)) / 2
    torch.testing.assert_close(total, torch.nn.functional.cross_entropy(g / 0.08, c))
    assert int(count) == 1
    cos = torch.nn.functional.cosine_similarity(z[:, None], loss.means.vectors[None], dim=-1)
    assert torch.equal(loss.predict(z), cos.argmax(1))


def test_a_class_alone_in_its_batch_has_a_loss_here_and_none_in_supcon():
    z, y, prototypes = problem(4)
    y = torch.arange(4)
    x = z.clone().requires_grad_(True)
    losses = spcl(x, y, prototypes, 0.08)
    losses.sum().backward()
    assert (losses > 0).all()
    assert (x.grad.norm(dim=1) > 0).all()
    x2 = z.float().requires_grad_(True)
    SupCon(4, 5)(Outputs(features=x2), {"labels": y})[0].backward()
    assert not x2.grad.any()


def test_means_are_those_of_all_rows_and_prototypes_come_from_full_enough_queues():
    z, y, _ = problem(30, classes=3)
    loss, _ = prepared(z, y)
    for k in range(3):
        torch.testing.assert_close(loss.means.vectors[k], z[y == k].mean(0))
    torch.testing.assert_close(loss.prototypes(), loss.means.vectors)  # empty queues
    loss(Outputs(features=z[:3]), {"labels": torch.tensor([0, 0, 1])})
    torch.testing.assert_close(loss.prototypes()[0], z[:2].mean(0))  # two of two
    torch.testing.assert_close(loss.prototypes()[1:], loss.means.vectors[1:])
    assert loss.queue.count.tolist() == [2, 1, 0]


def test_a_batch_never_meets_itself():
    """The batch joins the queues after the prototypes are drawn, and only in training."""
    z, y, _ = problem(30, classes=3)
    loss, _ = prepared(z, y, support=1)
    before = loss.means.vectors.clone()
    first, _ = loss(Outputs(features=z[:1]), {"labels": y[:1]})
    torch.testing.assert_close(first, spcl(z[:1], y[:1], before, 0.08).sum())
    loss.eval()
    held = loss.queue.pushed.clone()
    loss(Outputs(features=z), {"labels": y})
    assert torch.equal(loss.queue.pushed, held)


def test_features_get_the_gradient_and_prototypes_none():
    z, y, _ = problem(30, classes=3, dtype=torch.float32)
    loss, _ = prepared(z, y)
    x = z.clone().requires_grad_(True)
    loss(Outputs(features=x), {"labels": y})[0].backward()
    assert x.grad.any()
    assert not list(loss.parameters())
    assert not any(b.requires_grad for b in loss.buffers())


def test_official_habits():
    z, y, _ = problem(40, classes=3)
    loss, _ = prepared(z, y, official=True, queue=6)
    assert loss.queue.count.tolist() == [1, 1, 1]  # begun with the class means
    torch.testing.assert_close(loss.queue.vectors[:, 0], loss.means.vectors)
    means = loss.means.vectors.clone()
    total, count = loss(Outputs(features=z[:9]), {"labels": y[:9]})
    losses = spcl(z[:9], y[:9], means, 0.08)
    assert (losses > FLOOR).any()
    torch.testing.assert_close(total / count, losses[losses > FLOOR].mean())
    close = means[y[:9]] * 5  # rows on their means, far below the floor
    easy, _ = loss(Outputs(features=close), {"labels": y[:9]})
    assert torch.isfinite(easy)
    loss.begin_epoch(1, 4, lambda: iter([(Outputs(features=z), {"labels": y})]))
    assert loss.queue.count.tolist() == [1, 1, 1]
    kept, _ = prepared(z, y)
    kept(Outputs(features=z), {"labels": y})
    full = kept.queue.pushed.clone()
    kept.begin_epoch(1, 4, lambda: iter([(Outputs(features=z), {"labels": y})]))
    assert torch.equal(kept.queue.pushed, full)


def test_official_queues_forget_at_random_and_others_the_oldest():
    ages = {}
    for official in (True, False):
        loss = SPCL(2, 2, queue=8, support=1, official=official)
        loss.means.of_means(torch.eye(2), torch.arange(2))
        torch.manual_seed(0)
        for i in range(200):
            loss(Outputs(features=torch.tensor([[1.0, float(i)]])), {"labels": torch.tensor([0])})
        ages[official] = sorted(199 - loss.queue.vectors[0, :, 1])
    assert ages[False] == list(range(8))
    assert max(ages[True]) > 12
    assert min(ages[True]) == 0
    assert len(set(ages[True])) == 8


def test_the_curriculum_goes_from_easy_to_hard_and_is_told():
    z, y, _ = problem(101, classes=3)
    own = None
    chosen = []
    for epoch in range(4):
        loss, _ = prepared(z, y, curriculum="difficulty")
        rows = loss.begin_epoch(epoch, 4, lambda: iter([(Outputs(features=z), {"labels": y})]))
        assert len(rows) == len(set(rows)) == 51 == loss.rows_per_epoch(101)
        own = difficulties(z, loss.means.vectors).gather(1, y[:, None])[:, 0]
        chosen.append(float(own[rows].mean()))
        torch.testing.assert_close(loss.trace[epoch], torch.stack([own.mean(), own[rows].mean()]))
    assert chosen == sorted(chosen)
    assert chosen[0] < float(own.mean()) < chosen[-1]
    half, rows = prepared(z, y, curriculum="half")
    assert len(rows) == 51
    assert rows != sorted(rows, key=lambda i: own[i])
    assert prepared(z, y)[0].rows_per_epoch(101) == 101


def test_a_class_without_rows_is_no_candidate():
    z, y, _ = problem(20, classes=3)
    loss = SPCL(5, 5, queue=4, support=2).double()
    loss.begin_epoch(0, 1, lambda: iter([(Outputs(features=z), {"labels": y})]))
    total, _ = loss(Outputs(features=z), {"labels": y})
    torch.testing.assert_close(total, spcl(z, y, loss.means.vectors[:3], 0.08).sum())
    assert loss.predict(z).max() < 3


def test_what_cannot_work_is_refused():
    for settings, says in (
        ({"classes": 1}, "two"),
        ({"support": 9, "queue": 8}, "mean of 1 to 8"),
        ({"curriculum": "hard"}, "curriculum is"),
    ):
        with pytest.raises(ValueError, match=says):
            SPCL(**{"classes": 3, "width": 2} | settings)
    with pytest.raises(ValueError, match="begin_epoch"):
        SPCL(3, 2)(Outputs(features=torch.randn(2, 2)), {"labels": torch.tensor([0, 1])})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_constant_features(dtype):
    z, y, _ = problem(20, classes=3, dtype=torch.float32)
    loss = SPCL(3, 5, queue=4, support=2, curriculum="difficulty", official=True)
    for rows in (z.to(dtype), torch.ones(20, 5, dtype=dtype), torch.zeros(20, 5, dtype=dtype), 1e4 * z.to(dtype)):
        loss.begin_epoch(0, 2, lambda rows=rows: iter([(Outputs(features=rows), {"labels": y})]))
        x = rows.clone().requires_grad_(True)
        total, _ = loss(Outputs(features=x), {"labels": y})
        total.backward()
        assert torch.isfinite(total)
        assert torch.isfinite(x.grad).all()
    empty, count = loss(Outputs(features=z[:0]), {"labels": y[:0]})
    assert float(empty) == 0
    assert int(count) == 0


# ------------------------------------------------------------------ in a training


def gaussians(n=17, width=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return torch.randn(n, width, generator=g) + 2 * torch.eye(3, width)[y], y


def fit(scratch, progress=None, curriculum="difficulty", official=False, seconds=0, epochs=3):
    z, y = gaussians()
    items = [Item(i, str(i), int(c), row[None]) for i, (row, c) in enumerate(zip(z, y, strict=True))]
    torch.manual_seed(0)
    network = Adapter(6, 8).standardise(z)
    loss = SPCL(3, 6, queue=5, support=2, curriculum=curriculum, official=official)
    params = TrainParams(epochs=epochs, batch=4, learning_rate=1e-2, checkpoint_seconds=seconds, precision="float32")
    calls = []
    begin = loss.begin_epoch
    loss.begin_epoch = lambda epoch, *a: calls.append(epoch) or begin(epoch, *a)
    log = train.fit(
        network, loss, items, params, pad=0, scratch=scratch, seed=2, progress=progress, collator=collate_views
    )
    return {**network.state_dict(), **loss.state_dict()}, log, calls


@pytest.mark.parametrize(
    ("curriculum", "official", "stop"),
    [("difficulty", False, 2), ("difficulty", False, 4), ("half", True, 4), ("none", False, 7)],
)
def test_a_killed_training_goes_on_exactly(tmp_path, curriculum, official, stop):
    whole, log, calls = fit(tmp_path / "whole", None, curriculum, official)
    steps = 5 if curriculum == "none" else 3
    assert log.steps == 3 * steps
    assert calls == [0, 1, 2]
    with pytest.raises(Stopped):
        fit(tmp_path / "cut", StopAfter(stop), curriculum, official)
    resumed, again, calls = fit(tmp_path / "cut", None, curriculum, official)
    assert again.resumed_from == stop
    assert calls == [e for e in range(3) if e * steps >= stop]  # the epoch under way is not begun again
    assert again.loss == log.loss
    for name, tensor in whole.items():
        assert torch.equal(resumed[name].nan_to_num(), tensor.nan_to_num()), name


def test_the_loop_keeps_a_trace_of_the_curriculum(tmp_path):
    trace = fit(tmp_path, seconds=1e9)[0]["trace"]
    assert trace[:3].isfinite().all()
    assert trace[3:].isnan().all()
    assert trace[0, 1] < trace[0, 0]  # easy rows first
    assert trace[2, 1] > trace[2, 0]  # hard ones last


def test_in_small_batches_prototypes_help_where_supcon_has_no_positives():
    """Direction of the pilot on digits (batch 4, balanced, +0.049): SPCL above SupCon by at least two points."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32), torch.tensor(digits.target)
    found = {"spcl": 0.0, "supcon": 0.0}
    for seed in (0, 1):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        rows, held = order[:300], order[300:]
        for name in found:
            torch.manual_seed(seed)
            network = Adapter(64, 64).standardise(x[rows])
            loss = SPCL(10, 64, temperature=0.05, queue=64, support=16) if name == "spcl" else SupCon(10, 64)
            optimiser = torch.optim.AdamW([*network.parameters(), *loss.parameters()], lr=1e-3)

            def look(network=network, rows=rows):
                yield network(x[rows]), {"labels": y[rows]}

            for epoch in range(3):
                loss.begin_epoch(epoch, 3, look)
                for batch in rows[torch.randperm(300)].split(4):
                    total, count = loss(network(x[batch]), {"labels": y[batch]})
                    optimiser.zero_grad()
                    (total / count).backward()
                    optimiser.step()
            judge = SPCL(10, 64)
            judge.begin_epoch(0, 1, look)
            found[name] += float((judge.predict(network(x[held]).features) == y[held]).float().mean()) / 2
    assert found["spcl"] - found["supcon"] > 0.02, found
    assert found["spcl"] > 0.9, found
