"""The drafters' loss: plain loops beside it, padding and batches without influence, and training that pays."""

from __future__ import annotations

import pytest
import torch
from models import tiny
from torch.nn.functional import cross_entropy, smooth_l1_loss

from residency import tokens, train
from residency.infer.clover import Clover, Clover2, CloverParams
from residency.infer.drafted import Drafted
from residency.infer.drafter import final_norm
from residency.infer.draftloss import DraftLoss, DraftWeights, collate_thoughts, record
from residency.infer.medusa import Medusa
from residency.infer.tree import StaticTree
from residency.objective import Outputs
from residency.trainparams import TrainParams


def loss_of(model, drafter, rows, weights=None):
    """(sum, count) of a batch of texts."""
    thoughts = record(model, [tokens.Encoded(str(i), tuple(row[:1]), tuple(row[1:])) for i, row in enumerate(rows)], 0)
    loss = DraftLoss(drafter.attach(model), weights)
    batch = collate_thoughts(thoughts, 0)
    total, count = loss(Outputs(), batch)
    assert int(count) == loss.count(batch)
    return total, count


ROWS = [[5, 9, 33, 12, 7, 41, 3, 3, 18], [60, 2, 14, 9, 25, 31]]


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("ids", [None, torch.arange(0, 45)])
def test_equals_plain_loops(soft, ids):
    model = tiny()
    torch.manual_seed(0)
    drafter = Clover2(model, CloverParams(heads=3), ids)
    weights = DraftWeights(decay=0.6, value=3.0, word=0.5, soft=soft)
    total, count = loss_of(model, drafter, ROWS, weights)
    expected, counted = 0.0, 0
    V = 61 if ids is None else len(ids)
    head = model.lm_head.weight[:V]
    for row in ROWS:
        kept = []
        hook = final_norm(model).register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0]))
        n = model(torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0]
        hook.remove()
        following = torch.tensor([[*row[1:], 0, 0, 0]])
        for i, out in enumerate(drafter.unroll(kept[0], following, None)):
            for t in range(len(row)):
                target = t + 2 + i
                if target >= len(row):
                    continue
                counted += i == 0
                o, teacher = out[0, t], n[t + 1 + i]
                term = 3.0 * smooth_l1_loss(o, teacher)
                if row[target] < V:
                    wanted = (teacher @ head.T).softmax(-1) if soft else torch.tensor(row[target])
                    term = term + 0.5 * cross_entropy(o @ head.T, wanted)
                expected = expected + 0.6**i * term
    assert int(count) == counted
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)


def test_gradients_reach_the_drafter_and_nothing_else():
    model = tiny()
    drafter = Clover2(model, CloverParams(heads=3))
    loss_of(model, drafter, ROWS)[0].backward()
    bare = [name for name, p in drafter.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not bare
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="call drafter.attach"):
        DraftLoss(Clover2(model))


def test_thoughts_are_the_targets_states_whatever_the_batch():
    model = tiny()
    items = [tokens.Encoded(str(i), tuple(row[:2]), tuple(row[2:])) for i, row in enumerate(ROWS)]
    both = record(model, items, 0)
    assert [t.ids for t in both] == [tuple(row) for row in ROWS]
    for item, thought in zip(items, both, strict=True):
        (alone,) = record(model, [item], 0)
        torch.testing.assert_close(thought.states, alone.states, rtol=1e-5, atol=1e-5)
        logits = model.lm_head(final_norm(model)(thought.states))
        torch.testing.assert_close(logits, model(torch.tensor([thought.ids])).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Clover, Clover2, Medusa])
def test_sums_add_up_over_rows(kind):
    model = tiny()
    drafter = kind(model)
    whole, count = loss_of(model, drafter, ROWS)
    parts = [loss_of(model, drafter, [row]) for row in ROWS]
    torch.testing.assert_close(sum(p[0] for p in parts), whole, rtol=1e-5, atol=1e-4)
    assert sum(int(p[1]) for p in parts) == int(count)


def test_texts_too_short_for_any_head_train_nothing():
    model = tiny()
    drafter = Clover2(model, CloverParams(heads=5))
    total, count = loss_of(model, drafter, [[1, 2]])
    assert (float(total), int(count)) == (0.0, 0)
    total, count = loss_of(model, drafter, [[1, 2, 3]])  # one position, for the first head alone
    assert int(count) == 1
    assert torch.isfinite(total)


def test_bfloat16_is_near():
    model = tiny()
    drafter = Clover2(model, CloverParams(heads=3)).attach(model)
    items = [tokens.Encoded(str(i), tuple(row[:2]), tuple(row[2:])) for i, row in enumerate(ROWS)]
    batch = collate_thoughts(record(model, items, 0), 0)
    exact, near = (DraftLoss(drafter, autocast=on)(Outputs(), batch)[0] for on in (False, True))
    assert float(near) == pytest.approx(float(exact), rel=0.03)
    assert float(near) != float(exact)


@pytest.mark.parametrize("kind", [Clover, Clover2, Medusa])
def test_training_makes_guesses_come_true(kind, tmp_path):
    """A target that repeats a cycle of seven tokens: a few steps, and most of a chain is accepted."""
    model = tiny(vocabulary=31, layers=2)
    cycle = [3, 11, 7, 19, 4, 28, 13]
    with torch.no_grad():  # plant the cycle: the next token's row answers to this token's embedding
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(0.1)
        model.model.embed_tokens.weight.copy_(torch.randn(31, 32, generator=torch.Generator().manual_seed(0)))
        for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            model.lm_head.weight[b] = 5 * model.model.embed_tokens.weight[a]
    rows = [tokens.Encoded(str(i), tuple((cycle * 4)[i : i + 3]), tuple((cycle * 4)[i + 3 : i + 19])) for i in range(7)]
    settings = {"max_new_tokens": 36, "do_sample": False, "pad_token_id": 0}
    ids = torch.tensor([cycle[:3]])
    drafter = kind(model, token_ids=torch.arange(1, 30))
    before = {name: p.clone() for name, p in model.named_parameters()}
    decode = Drafted(drafter, StaticTree.chain(3))
    model.generate(ids, custom_generate=decode, **settings)
    untrained = decode.stats.tokens_per_step
    weights = DraftWeights() if kind is Clover2 else DraftWeights(value=0, soft=False)
    loss = DraftLoss(drafter.attach(model), weights)
    params = TrainParams(max_steps=60, batch=7, learning_rate=1e-2, precision="float32", checkpoint_seconds=1e9)
    log = train.fit(
        drafter,
        loss,
        record(model, rows, 0),
        params,
        pad=0,
        scratch=tmp_path,
        collator=lambda b: collate_thoughts(b, 0),
    )
    assert log.loss[-1] < 0.5 * log.loss[0]
    decode.reset()
    drafter.eval().requires_grad_(False)
    text = model.generate(ids, custom_generate=decode, **settings)
    assert torch.equal(text, model.generate(ids, **settings))
    assert decode.stats.tokens_per_step > max(3.0, untrained + 0.5)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
