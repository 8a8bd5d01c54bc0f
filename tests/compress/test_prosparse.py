"""The schedule against the paper's formula and table; the penalty against plain loops, autograd and the training loop."""

import math

import pytest
import torch
from test_relufy import L, build, relufy
from torch.testing import assert_close

from residency import train
from residency.compress.prosparse import BINS, PAPER_7B, PAPER_13B, ProSparse, SineStages
from residency.compress.relufy import gated_ffns
from residency.errors import PlanError
from residency.objective import IGNORE, Objective, Outputs, next_token_positions
from residency.tokens import Encoded, collate
from residency.trainparams import TrainParams

F = 24


class CrossEntropy(Objective):
    """Dense, by torch."""

    def forward(self, outputs, batch):
        mask, targets = next_token_positions(batch["labels"])
        return torch.nn.functional.cross_entropy(outputs.logits[mask], targets, reduction="sum"), mask.sum()


class Nothing(Objective):
    """A task that asks for nothing: what remains is the penalty."""

    def forward(self, outputs, batch):
        return outputs.logits.sum() * 0, (batch["labels"][:, 1:] != IGNORE).sum()


def items(n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda size: tuple(torch.randint(1, 40, (size,), generator=generator).tolist())  # noqa: E731
    return [Encoded(str(i), draw(1 + i % 4), draw(2 + 2 * i)) for i in range(n)]


def fixed(weight):
    return SineStages((weight,), (0.0, 1.0))


def gradients(model, objective, batches):
    """Of one optimiser step whose rows come in these batches, divided once, as the training loop does."""
    model.zero_grad()
    objective.begin_step(0, 1)
    N = sum(objective.count(batch) for batch in batches)
    value = 0.0
    for batch in batches:
        outputs = Outputs(logits=model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)
        total, count = objective(outputs, batch)
        assert int(count) == objective.count(batch)
        (total / N).backward()
        value += total.item() / N
    return value, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert_close(a[name], b[name], rtol=1e-4, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


# ------------------------------------------------------------------ the schedule


@pytest.mark.parametrize("schedule", [PAPER_7B, PAPER_13B, SineStages((0.1, 0.1, 3.0), (0, 2, 5, 11))])
def test_schedule_is_the_papers_formula(schedule):
    peaks, ends = schedule.peaks, schedule.ends
    for stage in range(1, len(peaks)):
        start, end, low, high = ends[stage], ends[stage + 1], peaks[stage - 1], peaks[stage]
        for u in (1e-9, 0.1, 0.25, 0.5, 0.9, 1.0):
            eta = 0.5 * (math.sin(-math.pi / 2 + math.pi * u) + 1)  # Algorithm 1
            assert schedule.at(start + u * (end - start)) == pytest.approx(low + eta * (high - low), abs=1e-12)
        assert schedule.at(end) == high
        assert schedule.at((start + end) / 2) == pytest.approx((low + high) / 2)
        step = 1e-4 * (end - start)
        for edge in (start, end):  # flat where stages meet
            assert abs(schedule.at(edge + step) - schedule.at(edge)) <= 1e-6 * max(peaks)
    line = [schedule.at(ends[-1] * i / 1000) for i in range(1, 1200)]
    assert line == sorted(line)
    assert line[-1] == peaks[-1]
    if ends[0]:
        assert schedule.at(ends[0]) == 0
    assert schedule.at(ends[0] + 1e-6) == peaks[0]


def test_schedule_by_the_papers_table():
    # λ_i at T_i, LLaMA2-7B (table 6)
    assert [PAPER_7B.at(t) for t in (5000, 6000, 10000, 12000, 16000, 16500)] == [0, 5e-3, 5e-2, 5e-2, 2e-1, 2e-1]
    assert PAPER_7B.at(11000) == 5e-2  # equal peaks: constant


def test_degenerate_schedules():
    none = SineStages()
    assert [none.at(t) for t in (0.1, 1, 5)] == [0, 0, 0]
    assert [fixed(0.3).at(t) for t in (1e-6, 0.5, 1, 7)] == [0.3] * 4
    jump = SineStages((1.0, 2.0), (1, 2, 2))  # a stage without length
    assert [jump.at(t) for t in (1, 1.5, 2, 2.1)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("peaks", "ends", "message"),
    [
        ((1.0,), (1.0,), "1 peaks need 2"),
        ((), (), "0 peaks need 1"),
        ((2.0, 1.0), (0, 1, 2), "peaks must not fall"),
        ((1.0,), (2, 1), "ends must not fall"),
        ((1.0,), (0, 0), "above 0"),
        ((-1.0,), (0, 1), "not negative"),
        ((float("nan"),), (0, 1), "finite"),
    ],
)
def test_impossible_schedules_are_refused(peaks, ends, message):
    with pytest.raises(ValueError, match=message):
        SineStages(peaks, ends)


def test_steps_of_the_training_follow_the_schedule():
    model = relufy(build())
    with ProSparse(Nothing(), model, SineStages((1.0, 3.0), (10, 20, 40))) as objective:
        weights = []
        for step in range(8):
            objective.begin_step(step, 8)
            weights.append(objective.weight)
    assert weights == [
        0,
        0,
        1,
        1,
        pytest.approx(1 + 2 * 0.5 * (1 - math.cos(math.pi / 4))),
        2,
        pytest.approx(1 + (1 - math.cos(3 * math.pi / 4))),
        3,
    ]


# ------------------------------------------------------------------ the penalty


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen2"])
def test_penalty_by_the_definition(name):
    model = relufy(build(name), 0.05)
    data = items()
    expected = 0.0
    for item in data:
        caught = []
        hooks = [
            f.down_proj.register_forward_pre_hook(lambda m, a, caught=caught: caught.append(a[0][0]))
            for f in gated_ffns(model)
        ]
        with torch.no_grad():
            model(torch.tensor([item.prompt + item.answer]))
        [h.remove() for h in hooks]
        per_token = [sum(sum(abs(v) for v in x1[t].tolist()) / F for x1 in caught) for t in range(len(item))]
        expected += len(item.answer) * sum(per_token) / len(per_token)
    expected /= sum(len(item.answer) for item in data)
    with ProSparse(Nothing(), model, fixed(0.7)) as objective:
        value, _ = gradients(model, objective, [collate(data, 0)])
    assert value == pytest.approx(0.7 * expected, rel=1e-5)


def test_where_all_tokens_are_trained_it_is_the_plain_mean():
    # equally long rows, everything trained: the paper's setting
    model = relufy(build())
    tokens = torch.randint(1, 40, (3, 8))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    caught = []
    hooks = [f.down_proj.register_forward_pre_hook(lambda m, a: caught.append(a[0])) for f in gated_ffns(model)]
    with torch.no_grad():
        model(tokens)
    [h.remove() for h in hooks]
    with ProSparse(Nothing(), model, fixed(1.0)) as objective:
        value, _ = gradients(model, objective, [batch])
    assert value == pytest.approx(sum(x1.abs().mean().item() for x1 in caught), rel=1e-5)


def test_batches_padding_and_order_change_no_gradient():
    model, data = relufy(build()), items()
    with ProSparse(CrossEntropy(), model, fixed(2.0)) as objective:
        value, whole = gradients(model, objective, [collate(data, 0)])
        plain, without = gradients(model, ProSparse(CrossEntropy(), model, SineStages()), [collate(data, 0)])
        assert value > plain + 0.1
        assert max((whole[n] - without[n]).abs().max().item() for n in whole) > 1e-3
        wide = collate(data, 0)
        more = {"input_ids": 7, "attention_mask": 0, "labels": IGNORE}  # seven columns of another token, masked
        wide = {k: torch.cat([v, torch.full((len(data), 7), more[k])], 1) for k, v in wide.items()}
        for batches in (
            [collate([item], 0) for item in data],
            [collate(data[::-1], 0)],
            [collate(data[:1], 0), collate(data[1:], 0)],
            [wide],
        ):
            again, split = gradients(model, objective, batches)
            assert again == pytest.approx(value, rel=1e-5)
            close(split, whole)


def test_no_weight_is_exactly_the_task():
    model, batch = relufy(build()), collate(items(), 0)
    task = gradients(model, CrossEntropy(), [batch])
    with ProSparse(CrossEntropy(), model, SineStages()) as objective:
        mine = gradients(model, objective, [batch])
    assert mine[0] == task[0]
    assert all(torch.equal(mine[1][name], task[1][name]) for name in task[1])


def test_prompts_are_penalised_and_padding_is_not():
    model = relufy(build())
    item = Encoded("a", (3, 4, 5), (6, 7))
    batch = collate([item, Encoded("b", (1,), (2,) * 7)], 0)
    caught = {}

    def keep(module, args):
        args[0].retain_grad()
        caught[id(module)] = args[0]

    hooks = [f.down_proj.register_forward_pre_hook(keep) for f in gated_ffns(model)]
    with ProSparse(Nothing(), model, fixed(1.0)) as objective:
        gradients(model, objective, [batch])
    [h.remove() for h in hooks]
    last = caught[id(gated_ffns(model)[-1].down_proj)]  # only the penalty reaches the last layer's
    real = batch["attention_mask"].bool()
    assert not last.grad[~real].any()
    assert (last.grad[real].abs().sum(-1) > 0).all()
    # sign, over F units and the row's real tokens, times the row's share of trained tokens; nothing where silent
    expected = last.sign() / F / real.sum(1)[:, None, None] * torch.tensor([2 / 9, 7 / 9])[:, None, None]
    assert_close(last.grad[real], expected[real].detach())


def test_silent_units_get_no_gradient():
    model = relufy(build())
    ffn = gated_ffns(model)[-1]
    with torch.no_grad():
        ffn.gate_proj.weight[4].zero_()  # exactly at zero for every token
    with ProSparse(Nothing(), model, fixed(1.0)) as objective:
        _, grads = gradients(model, objective, [collate(items(), 0)])
    name = next(n for n, p in model.named_parameters() if p is ffn.gate_proj.weight)
    assert not grads[name][4].any()
    assert grads[name].abs().sum(1).count_nonzero() > F // 2
    assert not grads[name.replace("gate_proj", "up_proj")][4].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_single(dtype):
    model, batch = relufy(build()), collate(items(), 0)
    with ProSparse(Nothing(), model, fixed(1.0)) as objective:
        exact, _ = gradients(model, objective, [batch])
        half, grads = gradients(model.to(dtype), objective, [batch])
    assert half == pytest.approx(exact, rel=0.03)
    assert all(g.isfinite().all() for g in grads.values())


def test_gradient_checkpointing():
    model, batch = relufy(build()).train(), collate(items(), 0)
    with ProSparse(Nothing(), model, fixed(1.0)) as objective:
        _, plain = gradients(model, objective, [batch])
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for _ in range(2):  # what is computed again in backward must not leak into the next step
            _, saved = gradients(model, objective, [batch])
            close(saved, plain)


def test_misuse_says_what_to_do():
    model, batch = relufy(build()), collate(items(), 0)
    outputs = Outputs(logits=model(batch["input_ids"]).logits)

    class Rows(Objective):
        def forward(self, outputs, batch):
            return outputs.logits.sum() * 0, torch.tensor(len(batch["labels"]))

    with ProSparse(Nothing(), model, fixed(1.0)) as objective, pytest.raises(ValueError, match="did not go through"):
        objective(outputs, batch)
    objective = ProSparse(Nothing(), model, fixed(1.0))
    objective.close()
    objective.close()
    model(batch["input_ids"])
    with pytest.raises(ValueError, match="closed"):
        objective(outputs, batch)
    assert not any(f.down_proj._forward_pre_hooks for f in gated_ffns(model))
    with ProSparse(Rows(), model, fixed(1.0)) as objective, pytest.raises(ValueError, match="Rows counts 6 items"):
        objective(Outputs(logits=model(batch["input_ids"]).logits), batch)
    with pytest.raises(PlanError):
        ProSparse(Nothing(), torch.nn.Linear(2, 2), fixed(1.0))
    with ProSparse(Nothing(), model, fixed(1.0)) as objective:
        objective.begin_step(0, 1)
        with torch.no_grad():
            model(batch["input_ids"])
        with pytest.raises(PlanError, match="reentrant"):
            objective(outputs, batch)


# ------------------------------------------------------------------ in the training loop


def fit(tmp_path, schedule, name="run", steps=8, **settings):
    model = relufy(build()).requires_grad_(True)
    given = {"max_steps": steps, "batch": 3, "learning_rate": 5e-3, "precision": "float32"} | settings
    with ProSparse(CrossEntropy(), model, schedule) as objective:
        log = train.fit(model, objective, items(12), TrainParams(**given), pad=0, scratch=tmp_path / name)
    return model, objective, log


def test_training_raises_sparsity_and_keeps_its_history(tmp_path):
    schedule = SineStages((1.0, 20.0), (0.1, 0.3, 1.0))
    _, free, _ = fit(tmp_path, SineStages(), "free", steps=40)
    _, pushed, log = fit(tmp_path, schedule, "pushed", steps=40)
    curve = pushed.curve()
    assert len(curve) == 40
    assert [m.progress for m in curve] == sorted({m.progress for m in curve})
    assert curve[-1].sparsity > free.curve()[-1].sparsity + 0.1
    assert curve[-1].magnitude < 0.5 * free.curve()[-1].magnitude
    assert float(pushed.history[:, 0].sum()) == log.steps / 4 * log.tokens  # every row is seen ten times
    assert curve[-1].weight == pytest.approx(schedule.at(1.0), rel=0.01)
    assert len(fit(tmp_path, schedule, "long", steps=2 * BINS)[1].curve()) == BINS


def test_accumulation_gives_the_same_weights(tmp_path):
    schedule = SineStages((1.0, 5.0), (0.2, 0.4, 1.0))
    one, _, _ = fit(tmp_path, schedule, "one", batch=6)
    two, _, _ = fit(tmp_path, schedule, "two", batch=2, accumulate=3)
    for (name, p), (_, q) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert_close(p, q, rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_a_killed_training_goes_on_where_it_was(tmp_path):
    schedule = SineStages((1.0, 5.0), (0.2, 0.4, 1.0))
    whole, objective, _ = fit(tmp_path, schedule, "whole")

    class Killed(Exception):
        pass

    class Dying(ProSparse):
        def begin_step(self, step, steps):
            if step == 5:
                raise Killed
            super().begin_step(step, steps)

    settings = TrainParams(max_steps=8, batch=3, learning_rate=5e-3, precision="float32", checkpoint_seconds=0)
    model = relufy(build()).requires_grad_(True)
    with Dying(CrossEntropy(), model, schedule) as dying, pytest.raises(Killed):
        train.fit(model, dying, items(12), settings, pad=0, scratch=tmp_path / "killed")
    model = relufy(build(seed=1)).requires_grad_(True)
    with ProSparse(CrossEntropy(), model, schedule) as resumed:
        log = train.fit(model, resumed, items(12), settings, pad=0, scratch=tmp_path / "killed")
    assert log.resumed_from == 5
    assert_close(resumed.history, objective.history, rtol=0, atol=0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole.parameters(), strict=True))
    assert L == 3
