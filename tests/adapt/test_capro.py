"""CAPro against its equations by loops in float64, its collective opinion, label sets, its limits, and resuming."""

from __future__ import annotations

import math

import pytest
import torch

from residency import train
from residency.adapt.bootstrapping import collective, soft_cross_entropy
from residency.adapt.capro import CAPro
from residency.adapt.caprolabels import CAProLabels, balance, correct_entries
from residency.objective import Outputs
from residency.trainable import Adapter
from residency.trainparams import TrainParams
from residency.views import Item, collate_views
from stopping import StopAfter, Stopped

B, D, C = 8, 6, 4
SMALL = {"project": 5, "middle": 7, "queue": 20}
UNIT = torch.nn.functional.normalize


def problem(seed=0, b=B, dtype=torch.float64, several=False):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(b, D, generator=g, dtype=dtype)
    batch = {
        "features": features,
        "strong": features + 0.3 * torch.randn(b, D, generator=g, dtype=dtype),
        "labels": (torch.rand(b, C, generator=g) < 0.4).long() if several else torch.arange(b) % C,
        "rows": torch.arange(b) + 100,
        "clean": torch.arange(b) < 2,
    }
    return Outputs(features=features), batch


def made(phase, seed=0, kind=CAPro, **keys):
    torch.manual_seed(seed)
    loss = kind(C, D, Adapter(D, 0), **(SMALL | keys)).double()
    g = torch.Generator().manual_seed(seed + 1)
    if phase:
        slots = len(loss.bank.vectors)
        loss.bank.of_means(torch.randn(3 * slots, 5, generator=g, dtype=torch.float64), torch.arange(3 * slots) % slots)
    keys_of = UNIT(torch.randn(11, 5, generator=g, dtype=torch.float64), dim=-1)
    loss.queue.push(keys_of, torch.arange(98, 109)[:, None])
    loss.phase.fill_(phase)
    return loss


def softmax(row):
    top = max(row)
    weights = [math.exp(v - top) for v in row]
    return [w / math.fsum(weights) for w in weights]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def project(loss, v):
    return UNIT(loss.projector(UNIT(v, dim=-1) * D**0.5), dim=-1)


def instance(loss, z, key, row):
    others = [
        float(z @ k) / loss.temperature
        for k, r in zip(loss.queue.filled, loss.queue.filled_payloads[:, 0].tolist(), strict=True)
        if r != row
    ]
    return -math.log(softmax([float(z @ key) / loss.temperature, *others])[0])


def alike(z, keys):
    weights = [min(1.0, max(0.0, float(z @ k))) + 1e-7 for k in keys]
    return [w / math.fsum(weights) for w in weights]


def by_loops(loss, batch, phase):
    tau, c = loss.temperature, loss.bank.vectors
    total = 0.0

    def votes(z):
        return [float(z @ w / w.norm()) / tau for w in loss.auxiliary.weight]

    def prototypes(z):
        return softmax([float(z @ c[k]) / tau for k in range(C)])

    keys = list(loss.queue.filled)
    for i, y in enumerate(batch["labels"].tolist()):
        v = batch["features"][i]
        z = project(loss, v)
        p, q = softmax(loss.classifier(UNIT(v, dim=-1) * D**0.5).tolist()), softmax(votes(z))
        total += instance(loss, z, project(loss, batch["strong"][i]), int(batch["rows"][i]))
        if phase == 0:
            total += float((loss.reconstructor(z) - UNIT(v, dim=-1) * D**0.5).square().mean())
        now, held = y, True
        if phase >= 2 and not batch["clean"][i]:
            s = [loss.alpha * a + (1 - loss.alpha) * b for a, b in zip(p, prototypes(z), strict=True)]
            if max(s) > loss.relabel:
                now = s.index(max(s))
            held = max(s) > loss.relabel or s[y] > 1 / C
        if not held:
            continue
        total += -math.log(p[now])
        if phase:
            total += -math.log(prototypes(z)[now])
        opinions = []
        for k in keys:
            o = softmax(votes(k))
            if phase:
                o = [loss.alpha * a + (1 - loss.alpha) * b for a, b in zip(o, prototypes(k), strict=True)]
            opinions.append(o)
        weights = alike(z, keys)
        b = [math.fsum(w * o[k] for w, o in zip(weights, opinions, strict=True)) for k in range(C)]
        total += (1 - loss.beta) * -math.log(q[now])
        total += loss.beta * -math.fsum(x * math.log(w) for x, w in zip(b, q, strict=True))
    return total


@pytest.mark.parametrize("phase", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 5])
def test_every_phase_is_its_equations(phase, seed):
    loss = made(phase, seed, relabel=0.5, beta=0.3).eval()
    outputs, batch = problem(seed)
    total, count = loss(outputs, batch)
    assert int(count) == B == loss.count(batch)
    assert float(total.detach()) == pytest.approx(by_loops(loss, batch, phase), rel=1e-9)


def test_the_dictionary_holds_the_rows_own_key_and_forgets_the_oldest():
    loss = made(1).train()
    outputs, batch = problem()
    loss(outputs, batch)
    key = project(loss, batch["strong"]).detach()
    assert len(loss.queue) == 19
    torch.testing.assert_close(loss.queue.vectors[11:19], key)
    assert loss.queue.payloads[11:19, 0].tolist() == batch["rows"].tolist()
    loss(outputs, batch)
    assert len(loss.queue) == 20


def test_the_gradient_is_right_although_queue_and_prototypes_move_before_it():
    """Finite differences of the training loss, from the same state every time."""
    loss = made(2, relabel=0.5, beta=0.3).train()
    state = {k: v.clone() for k, v in loss.state_dict().items()}
    outputs, batch = problem()
    features = outputs.features.clone().requires_grad_(True)

    def value(x):
        loss.load_state_dict(state)
        # the momentum copy and the queue see the rows as they were: keys are of `strong`
        return loss(Outputs(features=x), batch)[0]

    (slope,) = torch.autograd.grad(value(features), features)
    # the target b and the scores are constants in the loss, and change with x: so compare with them left out
    plain = made(1, beta=0.0).train()
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    loss = plain
    (slope,) = torch.autograd.grad(value(features), features)
    step = 1e-6
    for i, d in ((0, 0), (3, 2), (7, 5)):
        moved = [features.detach().clone() for _ in range(2)]
        moved[0][i, d] += step
        moved[1][i, d] -= step
        numeric = (value(moved[0]) - value(moved[1])).item() / (2 * step)
        assert slope[i, d].item() == pytest.approx(numeric, rel=1e-5, abs=1e-8)


# ------------------------------------------------------------------ the collective opinion


def test_the_collective_opinion_is_a_probability_vector():
    g = torch.Generator().manual_seed(0)
    z, keys = (UNIT(torch.randn(n, 5, generator=g, dtype=torch.float64), dim=-1) for n in (6, 30))
    opinions = torch.randn(30, C, generator=g, dtype=torch.float64).softmax(-1)
    b = collective(z, keys, opinions)
    torch.testing.assert_close(b.sum(1), torch.ones(6, dtype=torch.float64))
    assert (b > 0).all()
    order = torch.randperm(30, generator=g)
    torch.testing.assert_close(collective(z, keys[order], opinions[order]), b)


def test_one_key_that_is_alike_decides_alone():
    z = torch.tensor([[1.0, 0, 0]], dtype=torch.float64)
    keys = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    opinions = torch.tensor([[0.7, 0.2, 0.1], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(collective(z, keys, opinions)[0], opinions[0], atol=1e-6, rtol=0)


def test_soft_cross_entropy_is_torchs():
    g = torch.Generator().manual_seed(0)
    logits, b = torch.randn(5, C, generator=g), torch.randn(5, C, generator=g).softmax(-1)
    torch.testing.assert_close(
        soft_cross_entropy(logits, b), torch.nn.functional.cross_entropy(logits, b, reduction="none")
    )


def test_without_beta_the_queue_has_no_say_in_labels():
    outputs, batch = problem()
    for kind, several in ((CAPro, False), (CAProLabels, True)):
        outputs, batch = problem(several=several)
        values = []
        for beta in (0.0, 0.4):
            loss = made(1, kind=kind, beta=beta, instance=0.0).eval()
            a = float(loss(outputs, batch)[0].detach())
            loss.queue.vectors.copy_(loss.queue.vectors.roll(1, 1))
            values.append((a, float(loss(outputs, batch)[0].detach())))
        assert values[0][0] == values[0][1]
        assert values[1][0] != values[1][1]


def test_official_departures():
    outputs, batch = problem()
    for phase in (0, 2):
        losses = [made(phase, relabel=0.5, official=o).eval() for o in (False, True)]
        assert float(losses[0](outputs, batch)[0].detach()) != float(losses[1](outputs, batch)[0].detach())
    keys = losses[0].queue.filled
    early = made(0, official=True)
    p = early._votes(keys).softmax(-1)
    torch.testing.assert_close(early.opinions(keys), 0.5 * p + 0.5 / C)
    torch.testing.assert_close(made(0).opinions(keys), made(0)._votes(keys).softmax(-1))


# ------------------------------------------------------------------ label sets


def labels_by_loops(loss, batch, phase):
    tau, c = loss.temperature, loss.bank.vectors.view(C, 2, -1)
    total, keys = 0.0, list(loss.queue.filled)

    def bce(p, y, w=1.0):
        return -w * y * math.log(p) - (1 - y) * math.log(1 - p)

    def seen(z, k):
        return UNIT(z @ loss.as_seen_by[k] + loss.shift[k], dim=-1)

    def vote(z, k):
        w = loss.auxiliary.weight[k]
        return sigmoid(float(seen(z, k) @ w) if loss.official else float(seen(z, k) @ w / w.norm()) / tau)

    def positive(z, k):
        return softmax([float(seen(z, k) @ c[k, s]) / tau for s in (0, 1)])[1]

    for i, given in enumerate(batch["labels"].tolist()):
        v = batch["features"][i]
        u = UNIT(v, dim=-1) * D**0.5
        z = project(loss, v)
        total += instance(loss, z, project(loss, batch["strong"][i]), int(batch["rows"][i]))
        if phase == 0:
            total += float((loss.reconstructor(z) - u).square().mean())
        weights = alike(z, keys)
        for k, y in enumerate(given):
            p = sigmoid(float(loss.classifier(u)[k]))
            if phase >= 2 and not batch["clean"][i]:
                s = loss.alpha * p + (1 - loss.alpha) * positive(z, k)
                own = s if y else 1 - s
                if 1 - own > loss.relabel:
                    y = 1 - y
                elif not own > loss.keep:
                    continue
            entry = bce(p, y, float(loss.positives[k]))
            if phase:
                entry += bce(positive(z, k), y)
            entry += (1 - loss.beta) * bce(vote(z, k), y)
            opinions = [
                loss.alpha * vote(key, k) + (1 - loss.alpha) * positive(key, k)
                if phase
                else (loss.alpha * vote(key, k) + (1 - loss.alpha) / 2 if loss.official else vote(key, k))
                for key in keys
            ]
            b = math.fsum(w * o for w, o in zip(weights, opinions, strict=True))
            soft = -b * math.log(vote(z, k)) if loss.official else bce(vote(z, k), b)
            total += (entry + loss.beta * soft) / C
    return total


@pytest.mark.parametrize("phase", [0, 1, 2])
@pytest.mark.parametrize(("seed", "official"), [(0, False), (5, False), (0, True)])
def test_label_sets_are_their_equations(phase, seed, official):
    """And the release's: auxiliary weights as they are, and of BCE(q, b) only the half that pushes up."""
    outputs, batch = problem(seed, several=True)
    positives = balance(batch["labels"])
    loss = made(phase, seed, CAProLabels, relabel=0.75, keep=0.4, beta=0.3, positives=positives)
    loss.eval().official = official
    total, count = loss(outputs, batch)
    assert int(count) == B
    assert float(total.detach()) == pytest.approx(labels_by_loops(loss, batch, phase), rel=1e-9)


def test_pairs_of_prototypes_sum_to_one():
    loss = made(1, kind=CAProLabels)
    z = UNIT(torch.randn(7, 5, dtype=torch.float64), dim=-1)
    seen = loss.seen(z)
    both = torch.einsum("bce,cse->bcs", seen, loss.bank.vectors.view(C, 2, -1)) / loss.temperature
    torch.testing.assert_close(both.softmax(-1)[..., 1], loss.by_pairs(seen).sigmoid())
    torch.testing.assert_close(both.softmax(-1).sum(-1), torch.ones(7, C, dtype=torch.float64))


def test_entries_truth_table():
    for y in (0.0, 1.0):
        for own, expected in ((0.9, (y, True)), (0.5, (y, True)), (0.3, (y, False)), (0.1, (1 - y, True))):
            s = torch.tensor([[own if y else 1 - own]], dtype=torch.float64)
            for trusted in (False, True):
                now, there, flipped = correct_entries(s, torch.tensor([[y]]), 0.8, 0.4, torch.tensor([[trusted]]))
                assert (float(now), bool(there)) == ((y, True) if trusted else expected)
                assert bool(flipped) == (float(now) != y)


def test_as_published_no_entry_is_ever_left_out():
    s = torch.rand(200, 81, dtype=torch.float64)
    y = (torch.rand(200, 81) < 0.1).double()
    _, there, _ = correct_entries(s, y, 0.9, 1 / 81, torch.zeros(200, 81, dtype=torch.bool))
    assert there.all()


def test_balance():
    y = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0]])
    assert balance(y).tolist() == pytest.approx([3**0.5, 1.0, 1.0])


def test_label_sets_learn_and_find_missing_labels(tmp_path):
    """A quarter of the labels is missing from otherwise clear rows."""
    g = torch.Generator().manual_seed(0)
    n = 200
    true = (torch.rand(n, 3, generator=g) < 0.5).long()
    x = true.float() @ (3 * torch.eye(3, D)) + 0.4 * torch.randn(n, D, generator=g)
    missing = (torch.rand(n, 3, generator=g) < 0.25) & (true > 0) & (torch.arange(n)[:, None] >= 20)
    given = true * ~missing
    items = [Item(i, str(i), given[i], x[i][None], clean=i < 20) for i in range(n)]
    torch.manual_seed(0)
    model = Adapter(D, 16).standardise(x)
    loss = CAProLabels(3, D, model, starts=(0.2, 0.5), relabel=0.7, project=16, middle=32, queue=64)
    params = TrainParams(batch=16, epochs=12, checkpoint_seconds=1e9, precision="float32", learning_rate=5e-3)
    train.fit(model, loss, items, params, pad=0, scratch=tmp_path, collator=collate_views)
    verdict = loss.judge(model(x).features, given, torch.arange(n) < 20)
    added = (verdict.labels == 1) & (given == 0)
    assert (true[added] == 1).float().mean() > 0.9
    assert (added & missing).sum() > 0.5 * missing.sum()
    assert torch.equal(verdict.labels[:20], given[:20])


# ------------------------------------------------------------------ phases, resuming, and what may not break it


def test_prototypes_begin_as_means_of_the_chosen_and_move_with_kept_rows():
    loss = CAPro(C, D, Adapter(D, 0), starts=(0.1, 0.5), polish=0.8, **SMALL)
    outputs, batch = problem(dtype=torch.float32)
    look = lambda: iter([(outputs, batch)])  # noqa: E731
    loss.begin_epoch(0, 10, look)
    assert not loss.bank.known.any()
    loss.begin_epoch(1, 10, look)
    z = project(loss, batch["features"]).detach()
    assert loss.bank.known.all()
    for k, mine in ((0, [0]), (1, [1]), (2, [2, 6]), (3, [3, 7])):
        torch.testing.assert_close(loss.bank.vectors[k], UNIT(z[mine].mean(0), dim=0))
    before = loss.bank.vectors.clone()
    loss.train()(outputs, batch)
    for k in range(C):
        a, b = z[batch["labels"] == k]
        torch.testing.assert_close(loss.bank.vectors[k], UNIT(0.64 * before[k] + 0.16 * a + 0.2 * b, dim=0))
    loss.phase.fill_(2)
    loss.keep, loss.relabel = 1.0, 1.0  # nothing but chosen rows is kept
    before = loss.bank.vectors.clone()
    loss(outputs, batch)
    assert torch.equal(loss.bank.vectors[2:], before[2:])
    assert not torch.equal(loss.bank.vectors[:2], before[:2])


@pytest.mark.parametrize("several", [False, True])
def test_resume_is_bit_exact(tmp_path, several):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(15, 3, D, generator=g)
    y = (torch.rand(15, C, generator=g) < 0.4).long() if several else torch.arange(15) % C
    items = [Item(i, str(i), y[i] if several else int(y[i]), x[i], clean=i < 4) for i in range(15)]
    params = TrainParams(batch=4, epochs=4, precision="float32", learning_rate=1e-2)

    def fit(scratch, progress=None):
        torch.manual_seed(0)
        model = Adapter(D, 8)
        loss = (CAProLabels if several else CAPro)(C, D, model, starts=(0.25, 0.5), relabel=0.5, **SMALL)
        log = train.fit(
            model,
            loss,
            items,
            params.model_copy(update={"checkpoint_seconds": 0 if progress else 1e9}),
            pad=0,
            scratch=scratch,
            progress=progress,
            collator=collate_views,
            seed=1,
        )
        return model, loss, log

    whole, loss, log = fit(tmp_path / "whole")
    for stop in (3, 10):
        with pytest.raises(Stopped):
            fit(tmp_path / f"cut{stop}", StopAfter(stop))
        again, resumed, again_log = fit(tmp_path / f"cut{stop}")
        assert again_log.resumed_from == stop
        assert again_log.loss == log.loss
        for mine, its in ((whole, again), (loss, resumed)):
            for name, tensor in mine.state_dict().items():
                assert torch.equal(tensor, its.state_dict()[name]), (stop, name)


@pytest.mark.parametrize("kind", [CAPro, CAProLabels])
@pytest.mark.parametrize("phase", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features(kind, phase, dtype):
    loss = made(phase, kind=kind).float()
    outputs, batch = problem(dtype=torch.float32, several=kind is CAProLabels)
    features = (outputs.features * 100).to(dtype).requires_grad_(True)
    total, _ = loss(Outputs(features=features), batch)
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(features.grad).all()


def test_constant_features_a_class_without_rows_one_row_and_no_copy():
    for kind in (CAPro, CAProLabels):
        several = kind is CAProLabels
        outputs, batch = problem(dtype=torch.float32, several=several)
        if several:
            batch["labels"][:, 3] = 0
        else:
            batch["labels"] = batch["labels"].clamp_max(2)
        for model in (Adapter(D, 0), None):
            loss = kind(C, D, model, starts=(0, 0), **SMALL)
            loss.begin_epoch(0, 2, lambda o=outputs, b=batch: iter([(o, b)]))
            assert loss.bank.known.tolist() == ([True] * 7 + [False] if several else [True] * 3 + [False])
            for features in (outputs.features, torch.zeros(B, D)):
                total, _ = loss(Outputs(features=features), batch)
                total.backward()
                assert torch.isfinite(total)
            assert all(torch.isfinite(p.grad).all() for p in loss.parameters() if p.grad is not None)
            one = {k: v[:1] for k, v in batch.items()}
            assert torch.isfinite(loss(Outputs(features=outputs.features[:1]), one)[0])
            verdict = loss.judge(outputs.features, batch["labels"], batch["clean"])
            assert torch.isfinite(verdict.scores).all()


def test_bad_settings_are_refused():
    for keys, said in (({"starts": (0.1,)}, "two phases"), ({"beta": 1.5}, "β"), ({"temperature": 0.0}, "τ")):
        with pytest.raises(ValueError, match=said):
            CAPro(3, 4, **keys)
