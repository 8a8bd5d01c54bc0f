"""Thresholds chosen on calibration rows: against exhaustive search, numpy's quantiles and the loss of transformers."""

import copy
import functools
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_relufy import L, build, ids, relufy
from torch.testing import assert_close

from residency.compress.fatrelu import GateQuantiles, loss_and_sparsity, shift_thresholds
from residency.compress.relufy import gated_ffns, set_thresholds, thresholds
from residency.compress.sparsity import measure_sparsity
from residency.errors import DataError, PlanError
from residency.objective import IGNORE


def batches(seed=0, sizes=((3, 9), (2, 6))):
    made = []
    for B, T in sizes:
        tokens = ids(B, T, seed)
        mask = torch.ones(B, T, dtype=torch.long)
        mask[0, T - 2 :] = 0
        labels = tokens.clone()
        labels[:, :2] = IGNORE
        labels[mask == 0] = IGNORE
        made.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return made


def learnt(steps=60):
    """A ReLU-fied model that knows the calibration rows, so that silencing units costs."""
    return copy.deepcopy(_learnt(steps))


@functools.cache
def _learnt(steps):
    model, data = relufy(build()), batches()
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        for batch in data:
            optimiser.zero_grad()
            model(**batch).loss.backward()
            optimiser.step()
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_loss_is_transformers_own(name):
    model, data = relufy(build(name)).train(), batches()
    loss, zeros = loss_and_sparsity(model, data)
    assert model.training
    model.eval()
    counts = [int((b["labels"][:, 1:] != IGNORE).sum()) for b in data]
    with torch.no_grad():
        expected = sum(model(**b).loss.item() * n for b, n in zip(data, counts, strict=True)) / sum(counts)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_close(zeros.zeros, measure_sparsity(model, data).zeros, rtol=0, atol=1)


@pytest.mark.parametrize("per_layer", [False, True])
def test_quantiles_are_numpys(per_layer):
    model, data = relufy(build()), batches()
    caught = [[] for _ in range(L)]
    for i, ffn in enumerate(gated_ffns(model)):
        ffn.gate_proj.register_forward_hook(lambda m, a, out, i=i: caught[i].append(out))
    with torch.no_grad():
        for batch in data:
            model(batch["input_ids"], attention_mask=batch["attention_mask"])
    real = [b["attention_mask"].bool() for b in data]
    gates = [torch.cat([z[r].flatten() for z, r in zip(of, real, strict=True)]).numpy() for of in caught]
    found = GateQuantiles(model, data)
    for share in (0.1, 0.6, 0.75, 0.9, 0.99, 1.0):
        pools = gates if per_layer else [np.concatenate(gates)] * L
        for t, pool in zip(found.at(share, per_layer), pools, strict=True):
            below = (pool < t).mean() if t else (pool <= 0).mean()
            assert below >= share
            exact = max(0.0, float(np.quantile(pool, share, method="inverted_cdf")))
            assert exact <= t <= exact * 2 ** (1 / 128) * (1 + 1e-6)
    line = [found.at(s, per_layer) for s in np.linspace(0, 1, 30)]
    assert all(a <= b for one, two in pairwise(line) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 0.02, 0.3])
def test_by_tolerance_keeps_its_promise(tolerance, per_layer):
    model, data = learnt(), batches()
    base, _ = loss_and_sparsity(model, data)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    shift = shift_thresholds(model, data, tolerance=tolerance, per_layer=per_layer)
    assert thresholds(model) == shift.chosen.thresholds
    assert per_layer or len(set(shift.chosen.thresholds)) == 1
    loss, zeros = loss_and_sparsity(model, data)
    assert loss == shift.chosen.loss <= base + tolerance
    assert zeros.mean == shift.chosen.sparsity
    # nothing that was measured beyond it, up to the first that costs too much, was affordable
    beyond = [c for c in shift.measured if c.share > shift.chosen.share]
    assert beyond
    assert beyond[0].loss > base + tolerance
    assert shift.measured[0].thresholds == [0.0] * L
    shares = [c.share for c in shift.measured]
    assert shares == sorted(shares)
    assert all(a.thresholds <= b.thresholds for a, b in pairwise(shift.measured))
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_more_tolerance_is_never_less_sparse():
    found = [shift_thresholds(learnt(), batches(), tolerance=t).chosen for t in (0.0, 0.05, 0.5, 100.0)]
    assert [c.sparsity for c in found] == sorted(c.sparsity for c in found)
    assert found[0].sparsity < found[-1].sparsity
    assert found[-1].sparsity > 0.95


@pytest.mark.parametrize(("target", "per_layer"), [(0.7, False), (0.85, True), (0.95, False)])
def test_by_sparsity_against_exhaustive_search(target, per_layer):
    model, data = learnt(), batches()
    shift = shift_thresholds(model, data, sparsity=target, per_layer=per_layer)
    assert loss_and_sparsity(model, data)[1].mean == shift.chosen.sparsity >= target
    assert shift.chosen.sparsity < target + 0.03
    set_thresholds(model, 0)
    gates = GateQuantiles(model, data)
    for share in np.linspace(0, 1, 80):
        set_thresholds(model, gates.at(share, per_layer))
        if loss_and_sparsity(model, data)[1].mean >= target:
            break
    assert shift.chosen.share == pytest.approx(share, abs=1 / 79 + 1 / 2**12)


def test_what_is_sparse_enough_gets_no_threshold():
    model = learnt()
    shift = shift_thresholds(model, batches(), sparsity=0.1)
    assert thresholds(model) == [0.0] * L
    assert len(shift.measured) == 1


def test_earlier_thresholds_are_replaced_or_kept_on_failure():
    model = set_thresholds(learnt(), 0.4)
    shift_thresholds(model, batches(), sparsity=0.1)
    assert thresholds(model) == [0.0] * L
    set_thresholds(model, [0.1, 0.2, 0.3])
    mute = [b | {"labels": torch.full_like(b["labels"], IGNORE)} for b in batches()]
    for data in (mute, []):
        with pytest.raises(DataError):
            shift_thresholds(model, data, tolerance=0.1)
    assert thresholds(model) == [0.1, 0.2, 0.3]
    assert not any(f.gate_proj._forward_hooks or f.down_proj._forward_pre_hooks for f in gated_ffns(model))


def test_bad_arguments_say_what_to_do():
    model = learnt(steps=1)
    for given in ({}, {"tolerance": 0.1, "sparsity": 0.5}):
        with pytest.raises(ValueError, match="either"):
            shift_thresholds(model, batches(), **given)
    for given in ({"tolerance": -1}, {"tolerance": float("nan")}, {"sparsity": 0.0}, {"sparsity": 1.0}):
        with pytest.raises(ValueError, match="tolerance is|sparsity lies"):
            shift_thresholds(model, batches(), **given)
    with pytest.raises(PlanError, match="SiLU"):
        shift_thresholds(build(), batches(), tolerance=0.1)
