"""Medusa: what its heads say before and after training, and that they do not listen to each other."""

from __future__ import annotations

import torch
from models import tiny

from residency.infer.drafter import final_norm
from residency.infer.medusa import Medusa, MedusaParams


def state(model, ids):
    kept = []
    hook = final_norm(model).register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    model(ids)
    hook.remove()
    return kept[0]


def test_it_starts_as_the_targets_own_prediction():
    model = tiny()
    drafter = Medusa(model).attach(model)
    drafter.start(1, 0)
    ids = torch.tensor([[4, 8, 15]])
    drafter.observe(state(model, ids), ids, [3], [0])
    logits, level = drafter.first()
    torch.testing.assert_close(logits[0, 0], model(ids).logits[0, -1])
    both, _ = drafter.next(level, torch.tensor([[0, 0]]), torch.tensor([[1, 2]]))
    assert torch.equal(both[0, 0], both[0, 1])  # whatever was guessed before


def test_heads_are_blocks_on_the_normed_state():
    model = tiny()
    drafter = Medusa(model, MedusaParams(heads=2), torch.arange(3, 40)).attach(model)
    with torch.no_grad():
        for p in drafter.parameters():
            p.normal_()
    ids = torch.tensor([[4, 8, 15], [16, 23, 42]])
    h = state(model, ids)
    n = final_norm(model)(h)
    for i, out in enumerate(drafter.unroll(h, ids, None)):
        z = n @ drafter.blocks[i].linear.weight.T + drafter.blocks[i].linear.bias
        torch.testing.assert_close(out, n + z / (1 + (-z).exp()))
        torch.testing.assert_close(drafter.logits(out), out @ model.lm_head.weight[3:40].T)
