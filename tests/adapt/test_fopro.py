"""FoPro against its equations by loops in float64, its phases, its limits, resuming, and what may not break it."""

from __future__ import annotations

import math

import pytest
import torch

from residency import train
from residency.adapt.fopro import FoPro
from residency.adapt.ledger import ledger
from residency.adapt.momentum import Momentum
from residency.objective import Outputs
from residency.trainable import Adapter, ImageFeatures
from residency.trainparams import TrainParams
from residency.views import Item, collate_views
from stopping import StopAfter, Stopped

B, D, C = 8, 6, 4
SMALL = {"project": 5, "middle": 7, "queue": 16}


def problem(seed=0, b=B, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(b, D, generator=g, dtype=dtype)
    batch = {
        "features": features,
        "strong": features + 0.3 * torch.randn(b, D, generator=g, dtype=dtype),
        "labels": torch.arange(b) % C,
        "rows": torch.arange(b) + 100,
        "clean": torch.arange(b) < 3,
    }
    return Outputs(features=features), batch


def made(phase, seed=0, model=True, **keys):
    """In float64, with prototypes, densities and a queue as if in the middle of a training."""
    torch.manual_seed(seed)
    loss = FoPro(C, D, Adapter(D, 0) if model else None, **(SMALL | keys)).double()
    g = torch.Generator().manual_seed(seed + 1)
    if phase:
        loss.bank.of_means(torch.randn(12, 5, generator=g, dtype=torch.float64), torch.arange(12) % C)
        loss.density.copy_(torch.tensor([0.1, 0.2, 0.15, 0.3]))
        loss.queue.push(
            torch.nn.functional.normalize(torch.randn(9, 5, generator=g, dtype=torch.float64), dim=-1),
            torch.arange(98, 107)[:, None],  # some of them keys of the batch's own rows
        )
    loss.phase.fill_(phase)
    return loss


def softmax(row):
    top = max(row)
    weights = [math.exp(v - top) for v in row]
    return [w / math.fsum(weights) for w in weights]


def by_loops(loss, batch, phase):
    """The module's equations, row by row."""
    clean, labels = batch["clean"].tolist(), batch["labels"].tolist()
    total = 0.0

    def unit(v):
        return v / v.norm() * D**0.5

    def project(u):
        z = loss.projector(u)
        return z / z.norm()

    c, phi, known = loss.bank.vectors, loss.density.tolist(), range(C)
    own = c @ c.T
    for i, y in enumerate(labels):
        u = unit(batch["features"][i])
        z = project(u)
        p = softmax(loss.classifier(u).tolist())
        votes = [float(z @ w / w.norm()) for w in loss.auxiliary.weight]

        def auxiliary(label, votes=votes):
            shifted = [(v - loss.margin * (k == label)) / loss.temperature for k, v in enumerate(votes)]
            return -math.log(softmax(shifted)[label])

        if phase == 0:
            total += -math.log(p[y])
            total += float((loss.reconstructor(z) - u).square().mean())
            total += auxiliary(y) if clean[i] or p[y] > loss.relabel else 0.0
            continue
        cosines = [float(z @ c[k]) for k in known]
        q = softmax([cosines[k] / phi[k] for k in known])
        s = [loss.alpha * a + (1 - loss.alpha) * b for a, b in zip(p, q, strict=True)]
        if clean[i]:
            s = [float(k == y) for k in known]
        apart = [abs(float(own[y, k]) - cosines[k]) for k in known]
        unlike = 0.5 * abs(1 - cosines[y]) + 0.5 * math.fsum(apart[k] for k in known if k != y)
        relation = loss.relation(z[None], c)[0].tolist()
        now, held, near = y, True, clean[i] or unlike <= loss.sigma
        if phase >= 2:
            u_y = 1 / (1 + math.exp(-relation[y])) if phase >= 3 else 0.0
            firm = clean[i] or u_y > loss.relabel
            if max(s) > loss.relabel and not firm:
                now = s.index(max(s))
            held = near = firm or max(s) > loss.relabel or s[y] > 1 / C
        if held:
            total += s[now] * -math.log(p[now])
            total += (1 - s[now]) * -math.fsum(a * math.log(b) for a, b in zip(s, p, strict=True))
            pulled = [(cosines[k] - loss.margin * (clean[i] and k == now)) / phi[k] for k in known]
            total += -math.log(softmax(pulled)[now])
        if near:
            total += auxiliary(now)
            total += -math.log(softmax(relation)[now])
        key = project(unit(batch["strong"][i]))
        others = [
            float(z @ k) / loss.temperature
            for k, row in zip(loss.queue.filled, loss.queue.filled_payloads[:, 0].tolist(), strict=True)
            if row != batch["rows"][i]
        ]
        total += -math.log(softmax([float(z @ key) / loss.temperature, *others])[0])
    return total


@pytest.mark.parametrize("phase", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", [0, 7])
def test_every_phase_is_its_equations(phase, seed):
    loss = made(phase, seed, relabel=0.5, sigma=0.9).eval()
    outputs, batch = problem(seed)
    total, count = loss(outputs, batch)
    assert int(count) == B == loss.count(batch)
    assert float(total.detach()) == pytest.approx(by_loops(loss, batch, phase), rel=1e-9)


def test_the_cases_of_the_equations_occur():
    """The problem above relabels, drops, keeps and relates: else the comparison would say little."""
    seen = set()
    for seed in (0, 7):
        outputs, batch = problem(seed)
        for phase in (2, 3):
            verdict = made(phase, seed, relabel=0.5).judge(outputs.features, batch["labels"], batch["clean"])
            fates = ledger(
                verdict, batch["labels"], batch["clean"], ids=list("abcdefgh"), classes=list("wxyz"), relabel=0.5
            )
            seen |= {f.what for f in fates}
    assert seen == {"trusted", "kept", "relabelled", "dropped"}


@pytest.mark.parametrize("phase", [0, 1, 2, 3])
def test_cutting_a_step_changes_nothing_while_nothing_moves(phase):
    loss = made(phase).eval()
    outputs, batch = problem()
    whole = outputs.features.clone().requires_grad_(True)
    loss(Outputs(features=whole), batch)[0].backward()
    parts = outputs.features.clone().requires_grad_(True)
    for part in (slice(0, 3), slice(3, B)):
        loss(Outputs(features=parts[part]), {k: v[part] for k, v in batch.items()})[0].backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-9, atol=1e-12)


def test_prototypes_and_keys_get_no_gradient_and_everything_trained_does():
    loss = made(2)
    outputs, batch = problem()
    features = outputs.features.requires_grad_(True)
    loss(Outputs(features=features), batch)[0].backward()
    assert features.grad.abs().sum() > 0
    moved = {n.split(".")[0] for n, p in loss.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {"classifier", "projector", "auxiliary", "relation"}  # the reconstructor is done by now
    first = made(0)
    first(*problem())[0].backward()
    assert first.reconstructor[0].weight.grad.abs().sum() > 0


def test_unlike_is_zero_only_at_the_prototypes_place():
    loss = made(1)
    c = loss.bank.vectors
    y = torch.arange(C)
    assert loss.unlike(c @ c.T, y).abs().max() < 1e-12
    assert loss.unlike(c @ c.T, (y + 1) % C).min() > 1e-3
    # any vector with the same cosines will do: D sees nothing else
    basis = torch.linalg.svd(c)[2][C:]
    other = c[:1] + 0.7 * basis[:1]
    assert loss.unlike(other @ c.T, y[:1]).abs() < 1e-9


def test_alpha_one_does_not_hear_prototypes_and_alpha_zero_nothing_else():
    outputs, batch = problem()
    nobody = torch.zeros(B, dtype=torch.bool)
    loss = made(2, alpha=1.0)
    one = loss.judge(outputs.features, batch["labels"], nobody)
    loss.bank.vectors.copy_(loss.bank.vectors.flip(0))
    assert torch.equal(loss.judge(outputs.features, batch["labels"], nobody).labels, one.labels)
    assert torch.equal(one.scores, one.classifier)
    loss = made(2, alpha=0.0, relabel=0.01)
    zero = loss.judge(outputs.features, batch["labels"], nobody)
    nearest = (zero.z @ loss.bank.vectors.T / loss.density).argmax(1)
    assert torch.equal(zero.labels, nearest)


def test_trusted_rows_are_never_relabelled_nor_dropped():
    for phase, relabel in ((0, 0.01), (1, 0.01), (2, 0.01), (2, 0.99), (3, 0.6)):
        loss = made(phase, relabel=relabel, keep=1.0)
        outputs, batch = problem()
        verdict = loss.judge(outputs.features, batch["labels"], batch["clean"])
        untrusted = (verdict.labels != batch["labels"]) | ~verdict.keep
        assert untrusted.any(), (phase, relabel)
        assert torch.equal(verdict.labels[batch["clean"]], batch["labels"][batch["clean"]])
        assert verdict.keep[batch["clean"]].all()


def test_polishing_is_the_running_mean_and_the_density_its_distances():
    loss = made(2, relabel=0.99, keep=0.0, polish=0.9).train()
    outputs, batch = problem()
    before = loss.bank.vectors.clone()
    z = loss.project(loss.unit(outputs)).detach()
    loss(outputs, batch)
    y = batch["labels"]
    for k in range(C):
        rows = z[y == k]
        n = len(rows)
        mean = 0.9**n * before[k] + 0.1 * sum(0.9 ** (n - 1 - j) * r for j, r in enumerate(rows))
        torch.testing.assert_close(loss.bank.vectors[k], mean / mean.norm())
    far = torch.stack([(z[y == k] - before[k]).norm(dim=1).sum() for k in range(C)])
    torch.testing.assert_close(loss.distance, far)
    loss.visited[2] = loss.distance[2] = 0  # a class of which nothing was kept
    loss.distance[3] = 0  # one whose rows all lie on their prototype
    loss.begin_epoch(9, 10, lambda: iter(()))
    n = B // C
    torch.testing.assert_close(loss.density[:2], far[:2] / (n * math.log(n + 10)))
    assert float(loss.density[2]) == pytest.approx(0.15)
    assert float(loss.density[3]) == pytest.approx(0.02)
    assert not loss.visited.any()


def test_official_departures():
    """Each does something, and what it says."""
    outputs, batch = problem()
    plain, official = (made(2, relabel=0.3, official=o, sigma=1.0) for o in (False, True))
    official.load_state_dict(plain.state_dict())
    a, b = (float(loss.eval()(outputs, batch)[0].detach()) for loss in (plain, official))
    assert a != b
    assert FoPro(200, D, official=True, **SMALL).sigma == 20
    assert FoPro(200, D, **SMALL).sigma == 10
    # the slow copy polishes: with other weights than the model's it gives other prototypes
    for loss in (plain, official):
        loss.momentum = Momentum(torch.nn.Sequential(), 0.9)
        loss.momentum.forward = lambda given: -next(iter(given.values()))
        loss.momentum._followed = (Adapter(D, 0).double(),)
        loss.train()(outputs, batch)
    assert not torch.allclose(plain.bank.vectors, official.bank.vectors)
    # the relation metric learns from relabelled rows alone once it is in use
    quiet = made(3, relabel=1.0, official=True)
    quiet(*problem())[0].backward()
    assert quiet.relation.out.weight.grad is None or not quiet.relation.out.weight.grad.any()


# ------------------------------------------------------------------ phases, epochs, resuming


def rows(n=30, width=D, views=3):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    x = 2 * torch.randn(3, width, generator=g)[y] + torch.randn(n, width, generator=g)
    noisy = torch.where(torch.arange(n) % 5 == 4, (y + 1) % 3, y)
    view = x[:, None] + 0.2 * torch.randn(n, views, width, generator=g)
    return [Item(i, f"row {i}", int(noisy[i]), view[i], clean=i < 3) for i in range(n)]


def test_phases_begin_at_their_shares():
    loss = FoPro(C, D, starts=(0.2, 0.4, 0.4), **SMALL)
    outputs, batch = problem(dtype=torch.float32)
    found = []
    for epoch in range(10):
        loss.begin_epoch(epoch, 10, lambda: iter([(outputs, batch)]))
        found.append(int(loss.phase))
    assert found == [0, 0, 1, 1, 3, 3, 3, 3, 3, 3]
    # class 3 has no trusted row: all its rows stand in
    z = loss.project(loss.unit(outputs))
    for k, mine in ((0, [0]), (2, [2]), (3, [3, 7])):
        torch.testing.assert_close(loss.bank.vectors[k], torch.nn.functional.normalize(z[mine].mean(0), dim=0))


def test_an_epoch_that_ends_early_and_shares_of_zero():
    loss = FoPro(3, D, Adapter(D, 0), starts=(0, 0, 0), **SMALL)
    log = train.fit(
        loss.momentum.followed,
        loss,
        rows(),
        PARAMS.model_copy(update={"max_steps": 2}),
        pad=0,
        scratch=NOWHERE(),
        collator=collate_views,
    )
    assert log.steps == 2
    assert int(loss.phase) == 3


PARAMS = TrainParams(batch=4, epochs=5, checkpoint_seconds=0, precision="float32", learning_rate=1e-2)


def NOWHERE():
    import tempfile
    from pathlib import Path

    return Path(tempfile.mkdtemp())


def fit(scratch, progress=None, params=PARAMS):
    torch.manual_seed(0)
    model = Adapter(D, 8)
    loss = FoPro(3, D, model, starts=(0.2, 0.4, 0.6), relabel=0.5, **SMALL)
    log = train.fit(
        model, loss, rows(20), params, pad=0, scratch=scratch, progress=progress, collator=collate_views, seed=1
    )
    return model, loss, log


def test_resume_is_bit_exact_in_every_phase(tmp_path):
    whole, loss, log = fit(tmp_path / "whole", params=PARAMS.model_copy(update={"checkpoint_seconds": 1e9}))
    assert loss.trace.sum(1)[:5].tolist() == [20] * 5
    for stop in (7, 17):
        with pytest.raises(Stopped):
            fit(tmp_path / f"cut{stop}", StopAfter(stop))
        again, resumed, again_log = fit(tmp_path / f"cut{stop}")
        assert again_log.resumed_from == stop
        assert again_log.loss == log.loss
        for mine, its in ((whole, again), (loss, resumed)):
            for name, tensor in mine.state_dict().items():
                assert torch.equal(tensor, its.state_dict()[name]), (stop, name)


def test_it_finds_wrong_labels_among_separable_rows(tmp_path):
    """30 % symmetric noise on three blobs: what is relabelled gets its true class, and few right labels change."""
    g = torch.Generator().manual_seed(0)
    n = 240
    y = torch.arange(n) % 3
    x = 3 * torch.eye(3)[y] @ torch.randn(3, D, generator=g) + 0.7 * torch.randn(n, D, generator=g)
    wrong = (torch.rand(n, generator=g) < 0.3) & (torch.arange(n) >= 9)
    given = torch.where(wrong, (y + torch.randint(1, 3, (n,), generator=g)) % 3, y)
    items = [Item(i, str(i), int(given[i]), x[i][None], clean=i < 9) for i in range(n)]
    torch.manual_seed(0)
    model = Adapter(D, 16).standardise(x)
    loss = FoPro(3, D, model, starts=(0.3, 0.5, 0.6), project=16, middle=32, queue=64)
    params = TrainParams(batch=16, epochs=10, checkpoint_seconds=1e9, precision="float32", learning_rate=5e-3)
    train.fit(model, loss, items, params, pad=0, scratch=tmp_path, collator=collate_views)
    verdict = loss.judge(model(x).features, given, torch.arange(n) < 9)
    moved = verdict.relabelled
    assert moved.sum() > 0.6 * wrong.sum()
    assert (verdict.labels[moved] == y[moved]).float().mean() > 0.9
    assert (moved & ~wrong).sum() < 0.05 * n
    fates = ledger(verdict, given, torch.arange(n) < 9, ids=[i.id for i in items], classes=["a", "b", "c"], relabel=0.6)
    assert [f.what == "relabelled" for f in fates] == moved.tolist()
    assert all((f.now == "") == (f.what == "dropped") for f in fates)
    assert fates[0].to_json()["why"].startswith("trusted")
    assert sum(f.what == "trusted" for f in fates) == 9


# ------------------------------------------------------------------ the slow copy; other encoders; what may not break it


def test_momentum_follows_by_its_formula():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    model[0].bias.requires_grad_(False)
    for constant, m in ((True, 0.9), (False, min(0.9, 4 / 13))):
        slow = Momentum(model, 0.9, constant)
        old = slow.copy[0].weight.clone()
        with torch.no_grad():
            model[0].weight.add_(1.0)
            model[0].bias.add_(1.0)
            model[1].running_mean.add_(1.0)
        bias = slow.copy[0].bias.clone()
        slow.train()
        assert not slow.copy.training
        slow.follow(0)
        torch.testing.assert_close(slow.copy[0].weight, old)
        slow.follow(3)
        torch.testing.assert_close(slow.copy[0].weight, m * old + (1 - m) * model[0].weight)
        torch.testing.assert_close(slow.copy[0].bias, bias)  # frozen in the model: it has nowhere to go
        torch.testing.assert_close(slow.copy[1].running_mean, model[1].running_mean)
        assert not any(p.requires_grad for p in slow.parameters())
    with pytest.raises(ValueError, match="momentum"):
        Momentum(model, 1.0)


def test_a_whole_network_on_pixels():
    class Net(torch.nn.Module):
        width = 4

        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3, 2)

        def features(self, x):
            return self.conv(x).mean((2, 3))

    torch.manual_seed(0)
    model = ImageFeatures(Net())
    pixels = torch.randn(6, 3, 8, 8)
    batch = {"pixel_values": pixels, "strong": pixels.flip(3), "labels": torch.arange(6) % 2, "rows": torch.arange(6)}
    loss = FoPro(2, 4, model, starts=(0, 0, 0), **SMALL)
    loss.begin_epoch(0, 1, lambda: iter([(Outputs(features=model(pixels).features.detach()), batch)]))
    for step in range(2):
        if step:
            with torch.no_grad():
                model.network.conv.weight.add_(torch.randn_like(model.network.conv.weight))
        loss.begin_step(step, 2)
        total, _ = loss(Outputs(features=model(pixels).features), batch)
        total.backward()
    assert model.network.conv.weight.grad.abs().sum() > 0
    assert len(loss.queue) == 12
    assert not torch.allclose(*(loss.queue.vectors[[0, 6]]))  # the copy has moved: a row's key is another


def test_texts_give_their_other_view_as_a_mapping():
    class Words(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(20, 4)

        def forward(self, input_ids, attention_mask):
            from residency.trainable import Features

            return Features((self.table(input_ids) * attention_mask[..., None]).sum(1))

    model = Words()
    ids = torch.randint(20, (4, 5))
    short = {"input_ids": ids[:, :3], "attention_mask": torch.ones(4, 3)}
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones(4, 5),
        "labels": torch.tensor([0, 1, 0, 1]),
        "rows": torch.arange(4),
        "strong": short,
    }
    loss = FoPro(2, 4, model, starts=(0, 0, 0), **SMALL)
    loss.begin_epoch(0, 1, lambda: iter([(Outputs(features=model(ids, torch.ones(4, 5)).features.detach()), batch)]))
    loss(Outputs(features=model(ids, torch.ones(4, 5)).features), batch)
    expected = loss.project(loss.unit(Outputs(features=model(**short).features)))
    torch.testing.assert_close(loss.queue.filled, expected.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("phase", [0, 7])
def test_half_precision_features(dtype, phase):
    torch.manual_seed(0)
    loss = made(phase).float()
    outputs, batch = problem(dtype=torch.float32)
    features = outputs.features.to(dtype).mul(100).requires_grad_(True)
    total, _ = loss(Outputs(features=features), batch)
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(features.grad).all()


def test_a_class_without_rows_has_no_prototype_and_breaks_nothing():
    loss = FoPro(6, D, Adapter(D, 0), starts=(0, 0, 0), **SMALL)
    outputs, batch = problem(dtype=torch.float32)
    loss.begin_epoch(0, 4, lambda: iter([(outputs, batch)]))
    assert loss.bank.known.tolist() == [True] * 4 + [False] * 2
    for _ in range(3):
        total, _ = loss(outputs, batch | {"labels": (torch.arange(B) % 6)})  # rows of unseen classes come by
        total.backward()
        assert torch.isfinite(total)
    assert all(torch.isfinite(p.grad).all() for p in loss.parameters() if p.grad is not None)
    verdict = loss.judge(outputs.features, batch["labels"], batch["clean"])
    assert not verdict.prototypes[:, 4:].any()
    loss.begin_epoch(1, 4, lambda: iter(()))
    assert torch.isfinite(loss.density).all()


def test_constant_features_one_row_and_a_model_without_a_copy():
    for features in (torch.zeros(B, D), torch.ones(B, D)):
        loss = made(3).float()
        total, _ = loss(Outputs(features=features.requires_grad_(True)), problem(dtype=torch.float32)[1])
        total.backward()
        assert torch.isfinite(total)
    outputs, batch = problem(b=1)
    assert torch.isfinite(made(3)(outputs, batch)[0])
    alone = made(3, model=False)
    assert torch.isfinite(alone(outputs, {k: v for k, v in batch.items() if k not in ("strong", "clean")})[0])
    assert len(alone.queue) == 9


def test_bad_settings_are_refused():
    for keys, said in (
        ({"classes": 1}, "two classes"),
        ({"starts": (0.1, 0.2)}, "three phases"),
        ({"starts": (0.3, 0.2, 0.4)}, "rising"),
        ({"alpha": 2.0}, "α"),
        ({"relabel": 0.0}, "γ"),
    ):
        with pytest.raises(ValueError, match=said):
            FoPro(**({"classes": 3, "width": 4} | keys))
