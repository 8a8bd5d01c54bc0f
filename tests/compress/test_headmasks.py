"""Gradual merging: its two ends bitwise, its schedule, its gradient, and a training that is killed."""

import copy
import math

import pytest
import torch
import transformers
from headmodels import V, batches, build, logits
from torch.testing import assert_close

from residency import train
from residency.compress.distillation import Distillation
from residency.compress.headgrams import attentions
from residency.compress.headmasks import GradualMerge, HeadMasks
from residency.compress.kl import KL
from residency.compress.mergeheads import apply_alignment, merge, plan_merge
from residency.errors import PlanError
from residency.objective import Head, Outputs
from residency.tokens import Encoded
from residency.trainparams import TrainParams


def aligned(name="llama", **changes):
    model = build(name, **changes)
    apply_alignment(model, plan_merge(model, batches(), 2))
    return model


def gradual(model, **settings):
    return GradualMerge(model, 2, Distillation(KL(), build(seed=1)), **settings)


def items(n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda k: tuple(torch.randint(3, V, (k,), generator=generator).tolist())  # noqa: E731
    return [Encoded(f"i{i}", draw(3), draw(3 + i % 4)) for i in range(n)]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_both_ends_bitwise(name):
    model = aligned(name)
    model.set_attn_implementation("eager")
    original, merged = copy.deepcopy(model), merge(copy.deepcopy(model), 2, "keys")
    objective = gradual(model, restore="keys")
    for open_, reference in ((1.0, original), (0.0, merged)):
        objective.masks.fixed = open_
        assert torch.equal(logits(model, batches()[0]), logits(reference, batches()[0]))
    objective.masks.fixed = 0.5
    assert not torch.equal(logits(model, batches()[0]), logits(merged, batches()[0]))


def test_half_open_by_the_definition():
    model = aligned()
    own = {n: getattr(model.model.layers[0].self_attn, n).weight.clone() for n in ("k_proj", "v_proj")}
    objective = gradual(model)
    objective.masks.offset = 1.0
    with torch.no_grad():
        objective.masks.log_alpha[0] = torch.tensor([-9.0, 9.0, -1.0, 0.0])
    z = (torch.sigmoid((objective.masks.log_alpha[0].detach() + 1) * 1.5) * 1.2 - 0.1).clamp(0, 1)
    assert z.tolist()[:2] == [0, 1]
    x = torch.randn(2, 3, 32)
    for name, W in own.items():
        shared = W.view(2, 2, 8, -1).mean(1)
        for h in range(4):
            expected = z[h] * (x @ W[8 * h : 8 * h + 8].T) + (1 - z[h]) * (x @ shared[h // 2].T)
            found = getattr(model.model.layers[0].self_attn, name)(x)[..., 8 * h : 8 * h + 8]
            assert_close(found, expected)


def test_the_distribution_is_hard_concrete():
    masks = HeadMasks(1, 20_000)
    for log_alpha in (-2.0, 0.3, 4.0):
        with torch.no_grad():
            masks.log_alpha.fill_(log_alpha - 1)
        masks.offset = 1.0
        masks.draw(1)
        z = masks.values(0, training=True)
        open_ = torch.special.expit(torch.tensor(log_alpha - 2 / 3 * math.log(0.1 / 1.1)))
        assert (z > 0).float().mean().item() == pytest.approx(open_.item(), abs=0.015)
        assert 1 - masks.sparsity() == pytest.approx(open_.item(), abs=1e-6)
        assert z.min() >= 0
        assert z.max() <= 1
    state = torch.random.get_rng_state()
    masks.draw(2)
    other = masks.noise.clone()
    masks.draw(1)
    assert not torch.equal(masks.noise, other)
    masks.draw(2)
    assert torch.equal(masks.noise, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def step(objective, model, batch, at, of):
    objective.begin_step(at, of)
    hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return objective(Outputs(hidden=hidden, head=Head(model.lm_head.weight)), batch)


def test_the_offset_keeps_the_schedule_and_the_order():
    masks = HeadMasks(3, 8)
    with torch.no_grad():
        masks.log_alpha.normal_(std=3, generator=torch.Generator().manual_seed(0))
    before = None
    for target in (0.0, 0.01, 0.3, 0.5, 0.99):
        masks.close(target)
        assert masks.sparsity() == pytest.approx(target, abs=1e-9)
        z = torch.stack([masks.values(layer, training=False) for layer in range(3)])
        assert before is None or (z <= before).all()
        for row, alpha in zip(z, masks.log_alpha, strict=True):
            assert (row[alpha.argsort()].diff() >= 0).all()
        before = z
    masks.close(0)
    assert torch.equal(masks.values(0, training=True), torch.ones(8))
    masks.close(1)
    assert torch.equal(masks.values(0, training=True), torch.zeros(8))


def test_schedule_and_gradients():
    model = aligned()
    objective = gradual(model).train()
    model.train()
    batch = batches()[0]
    batch["labels"] = batch["input_ids"].clone()
    for at in range(8):
        _, count = step(objective, model, batch, at, 10)
        assert objective.masks.sparsity() == pytest.approx(at / 8, abs=1e-9)
        assert objective.masks.fixed is None
        assert int(count) == objective.count(batch) == 3 * 8
    attention = model.model.layers[0].self_attn
    step(objective, model, batch, 8, 10)[0].backward()
    assert objective.masks.fixed == 0
    assert objective.masks.log_alpha.grad is None
    assert attention.k_proj.own.weight.grad is None
    assert attention.k_proj.shared.weight.grad.abs().sum() > 0
    step(objective, model, batch, 4, 10)[0].backward()
    assert (objective.masks.log_alpha.grad.abs() > 0).sum() >= 2
    assert attention.v_proj.own.weight.grad.abs().sum() > 0


def test_heads_that_differ_most_from_their_group_stay_open_longest(tmp_path):
    """Two pairs are identical already, two are not: the gradient must keep the latter open."""
    model = build()
    with torch.no_grad():
        for a in attentions(model):
            for p in (a.module.k_proj.weight, a.module.v_proj.weight):
                p.view(4, 8, -1)[1] = p.view(4, 8, -1)[0]
    objective = GradualMerge(model, 2, Distillation(KL(), copy.deepcopy(model)))
    given = TrainParams(max_steps=30, batch=4, precision="float32", learning_rate=1e-6)
    rates = objective.learning_rates(30, given.learning_rate)
    train.fit(model, objective, items(), given, pad=0, scratch=tmp_path, learning_rates=rates)
    order = objective.masks.log_alpha.detach()
    assert order[:, 2:].min() > order[:, :2].max()


def fit(scratch, seed=0, **params):
    teacher = build()
    model = aligned()
    objective = GradualMerge(model, 2, Distillation(KL(), teacher), seed=seed)
    given = {"max_steps": 12, "batch": 4, "precision": "float32", "checkpoint_seconds": 1e9, "learning_rate": 1e-3}
    given = TrainParams(**given | params)
    rates = objective.learning_rates(given.max_steps, given.learning_rate)
    seen = []
    begin = objective.begin_step

    def watch(at, of):
        begin(at, of)
        seen.append((objective.masks.sparsity(), objective.masks.fixed))

    objective.begin_step = watch
    train.fit(model, objective, items(), given, pad=0, scratch=scratch, learning_rates=rates)
    return model, objective, seen


def test_training_closes_the_masks_and_leaves_a_standard_model(tmp_path):
    model, objective, seen = fit(tmp_path / "a", max_steps=20)
    sparsity, fixed = zip(*seen, strict=True)
    assert sparsity[:17] == pytest.approx([i / 16 for i in range(17)], abs=1e-6)
    assert fixed == (None,) * 16 + (0.0,) * 4
    closed = logits(model, batches()[0])
    small = objective.finish()
    assert small is model
    assert small.config.num_key_value_heads == 2
    assert [a.kv_heads for a in attentions(small)] == [2, 2]
    assert_close(logits(small, batches()[0]), closed, rtol=1e-4, atol=1e-4)
    small.save_pretrained(tmp_path / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_close(logits(loaded, batches()[0]), logits(small, batches()[0]), rtol=0, atol=0)


def test_micro_batches_change_nothing(tmp_path):
    whole, one, _ = fit(tmp_path / "a", max_steps=5)
    parts, two, _ = fit(tmp_path / "b", max_steps=5, batch=2, accumulate=2)
    assert_close(one.masks.log_alpha, two.masks.log_alpha, rtol=1e-3, atol=1e-4)
    for (name, p), (_, q) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert_close(p, q, rtol=1e-3, atol=1e-3, msg=name)


class Killed(Exception):
    pass


def test_killed_and_resumed_is_the_same_training(tmp_path, monkeypatch):
    whole, masks, _ = fit(tmp_path / "a")
    begin = GradualMerge.begin_step

    def die(self, at, of):
        if at == 7:
            raise Killed
        begin(self, at, of)

    monkeypatch.setattr(GradualMerge, "begin_step", die)
    with pytest.raises(Killed):
        fit(tmp_path / "b", checkpoint_seconds=0)
    monkeypatch.setattr(GradualMerge, "begin_step", begin)
    again, resumed, seen = fit(tmp_path / "b")
    assert len(seen) == 5
    assert torch.equal(masks.masks.log_alpha, resumed.masks.log_alpha)
    for (name, p), (_, q) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_bad_arguments():
    with pytest.raises(ValueError, match="0 < closed ≤ 1"):
        gradual(aligned(), closed=1.5)
    with pytest.raises(PlanError, match="cannot become 3"):
        GradualMerge(aligned(), 3, Distillation(KL(), build()))
