"""Sparsity by the definition: loops over tokens, planted zeros, padding on either side."""

import pytest
import torch
from test_relufy import L, build, ids, relufy
from torch.testing import assert_close

from residency.compress.relufy import gated_ffns, set_thresholds
from residency.compress.sparsity import EDGES, intermediates, measure_sparsity
from residency.errors import DataError, PlanError

F = 24


def rows(seed=0, lengths=(9, 5, 1, 7)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 40, (n,), generator=generator) for n in lengths]


def pad(rows, side="right"):
    width = max(map(len, rows))
    tokens, real = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, where], real[i, where] = row, 1
    return {"input_ids": tokens, "attention_mask": real}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_by_the_definition(name):
    model = relufy(build(name), 0.1)
    data = rows()
    zeros, tokens = torch.zeros(L, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for row in data:
        caught = []
        handles = [
            f.down_proj.register_forward_pre_hook(lambda m, a, caught=caught: caught.append(a[0][0]))
            for f in gated_ffns(model)
        ]
        with torch.no_grad():
            model(row[None])
        [h.remove() for h in handles]
        for t in range(len(row)):
            bucket = 0 if t == 0 else 1 if t < 4 else 2
            tokens[bucket] += 1
            for layer in range(L):
                zeros[layer, bucket] += sum(v == 0.0 for v in caught[layer][t].tolist())
    found = measure_sparsity(model, [pad(data[:3]), pad(data[3:])], edges=(0, 1, 4))
    assert_close(found.zeros, zeros, rtol=0, atol=0)
    assert_close(found.tokens, tokens, rtol=0, atol=0)
    assert_close(found.per_layer, zeros.sum(1) / tokens.sum() / F)
    assert_close(found.per_place, zeros.sum(0) / tokens / F / L)
    assert_close(found.grid, zeros / tokens / F)
    assert found.mean == pytest.approx(float(zeros.sum() / tokens.sum() / F / L))
    assert found.labels() == ["1", "2-4", "5+"]
    assert 0.3 < found.mean < 0.9


def test_padding_batches_and_order_do_not_matter():
    model, data = relufy(build()), rows()
    whole = measure_sparsity(model, [pad(data)])
    for batches in (
        [pad(data[::-1])],
        [pad([row]) for row in data],
        [pad(data, "left")],
        [pad(data[:2]), pad(data[2:], "left")],
    ):
        found = measure_sparsity(model, batches)
        # logits move in the last bits with the batch, and a gate at zero may cross it
        assert_close(found.zeros, whole.zeros, rtol=0, atol=2)
        assert_close(found.tokens, whole.tokens, rtol=0, atol=0)
    parts = measure_sparsity(model, [pad(data[:1])]) + measure_sparsity(model, [pad(data[1:])])
    assert_close(parts.tokens, whole.tokens, rtol=0, atol=0)
    bare = measure_sparsity(model, [{"input_ids": row[None]} for row in data])
    assert_close(bare.tokens, whole.tokens, rtol=0, atol=0)


def test_planted_zeros_are_found():
    model = relufy(build())
    with torch.no_grad():
        gated_ffns(model)[0].gate_proj.weight.zero_()  # silent
        gated_ffns(model)[1].up_proj.weight.zero_()  # gates fire, products vanish
        gated_ffns(model)[2].up_proj.weight[:6].zero_()
    found = measure_sparsity(model, [{"input_ids": ids()}])
    silent = relufy(build())
    with torch.no_grad():
        for part in ("gate_proj", "up_proj"):
            for mine, theirs in zip(gated_ffns(silent), gated_ffns(model), strict=True):
                getattr(mine, part).weight.copy_(getattr(theirs, part).weight)
    assert found.per_layer[:2].tolist() == [1.0, 1.0]
    assert found.per_layer[2] >= 6 / F


def test_sparsity_grows_with_the_threshold_and_silu_has_none():
    model, batch = build(), {"input_ids": ids(3, 9)}
    assert measure_sparsity(model, [batch]).mean == 0
    relufy(model)
    found = [
        measure_sparsity(set_thresholds(model, [0, 0, t]), [batch]).per_layer[2].item()
        for t in (0, 0.05, 0.2, 1, 5, 1e9)
    ]
    assert found == sorted(found)
    assert found[0] < found[3] < found[-1] == 1.0


def test_the_mode_comes_back_and_no_hook_stays():
    model = relufy(build()).train()
    measure_sparsity(model, [{"input_ids": ids()}])
    assert model.training
    with pytest.raises(IndexError):
        measure_sparsity(model, [{"input_ids": ids() + 100}])
    assert model.training
    assert not any(f.down_proj._forward_pre_hooks for f in gated_ffns(model))
    seen = []
    with intermediates(model, lambda layer, x1: seen.append((layer, x1.shape))):
        model(ids())
    model(ids())
    assert seen == [(layer, (2, 7, F)) for layer in range(L)]


def test_half_precision():
    model = relufy(build()).bfloat16()
    assert 0.3 < measure_sparsity(model, [{"input_ids": ids()}]).mean < 0.9


def test_nothing_to_measure():
    model = relufy(build())
    for batches in (
        [],
        [{"input_ids": ids(0, 3)}],
        [{"input_ids": ids(), "attention_mask": torch.zeros(2, 7, dtype=torch.long)}],
    ):
        with pytest.raises(DataError, match="no real token"):
            measure_sparsity(model, batches)
    for edges in ((), (1, 2), (0, 3, 3)):
        with pytest.raises(ValueError, match="start at 0"):
            measure_sparsity(model, [], edges)
    with pytest.raises(PlanError):
        measure_sparsity(torch.nn.Linear(2, 2), [])
    assert EDGES[0] == 0
