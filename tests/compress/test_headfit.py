"""Least-squares merging against NumPy, against planted structure only it can find, and against the mean."""

import copy

import numpy as np
import pytest
import torch
import transformers
from headmodels import CONFIGS, batches, build, logits, plant
from torch.testing import assert_close

from residency.compress.headfit import FitSettings, fit_heads, reduced_rank
from residency.compress.mergeheads import merge_heads, neighbours, plan_merge
from residency.errors import DataError

EXACT = FitSettings(refit=False)


def many(seed=0):
    return batches(seed, ((4, 24),) * 4)


def output_error(old, new, data):
    """Mean squared difference of the last hidden states."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in data:
            mask = batch["attention_mask"].bool()
            x, y = (m.model(**batch).last_hidden_state[mask].double() for m in (old, new))
            total, count = total + float((x - y).square().sum()), count + x.numel()
    return total / count


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_reduced_rank_is_the_truncated_svd(complex_, rank):
    rng = np.random.default_rng(0)
    draw = lambda *s: rng.standard_normal(s) + (1j * rng.standard_normal(s) if complex_ else 0)  # noqa: E731
    X, T = draw(40, 6), draw(9, 6)  # rows of X are samples of x; errors e cost ‖T e‖²
    B, E = reduced_rank(torch.from_numpy(T.conj().T @ T), torch.from_numpy(X.T @ X.conj()), rank)
    B, E = B.numpy(), E.numpy()
    left = (T @ (X.T - E @ B @ X.T)).ravel()
    s = np.linalg.svd(T @ X.T, compute_uv=False)
    assert (abs(left) ** 2).sum() == pytest.approx((s[rank:] ** 2).sum(), abs=1e-9)
    assert_close(B @ X.T @ (B @ X.T).conj().T, np.eye(rank).astype(B.dtype), rtol=1e-8, atol=1e-8)


def test_reduced_rank_of_degenerate_moments_is_finite():
    X = np.random.default_rng(0).standard_normal((40, 2)) @ np.random.default_rng(1).standard_normal((2, 6))
    B, E = reduced_rank(torch.eye(6, dtype=torch.float64), torch.from_numpy(X.T @ X), 3)
    assert_close(torch.from_numpy(X) @ B.T @ E.T, torch.from_numpy(X), rtol=1e-6, atol=1e-6)
    for moment in (torch.zeros(4, 4).double(), torch.eye(4).double()):
        for part in reduced_rank(torch.zeros(4, 4).double(), moment, 2):
            assert part.isfinite().all()


@pytest.mark.parametrize("name", CONFIGS)
def test_copies_in_any_invertible_coordinates_are_merged_without_loss(name):
    """Keys that differ by complex factors, values by any matrix: more than rotations can undo."""
    families = ((0, 3), (1, 2))
    model = plant(build(name, dtype=torch.float64, scale=4), families, scaled=True)
    plan = plan_merge(model, batches(), 2)
    assert [p.groups for p in plan] == [families] * 2
    before = logits(model, batches()[0])
    fitted = fit_heads(model, plan, many(), EXACT)
    assert_close(logits(fitted, batches()[0]), before, rtol=1e-6, atol=1e-6)
    rotated = merge_heads(model, plan)
    assert (logits(rotated, batches()[0]) - before).abs().max() > 1e-3
    refitted = fit_heads(model, plan, many())
    assert_close(logits(refitted, batches()[0]), before, rtol=1e-6, atol=1e-6)


def test_grouped_queries_and_the_disk(tmp_path):
    model = plant(
        build("qwen2", dtype=torch.float64, hidden_size=64, num_attention_heads=8), ((0, 2), (3, 1)), scaled=True
    )
    before = logits(model, batches()[0])
    small = fit_heads(model, plan_merge(model, batches(), 2), many())
    assert_close(logits(small, batches()[0]), before, rtol=1e-6, atol=1e-6)
    assert_close(logits(model, batches()[0]), before, rtol=0, atol=0)
    assert small.config._attn_implementation == model.config._attn_implementation
    small.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert_close(logits(loaded, batches()[0]), logits(small, batches()[0]), rtol=0, atol=0)


def test_as_many_heads_as_before_changes_nothing():
    model = build("llama-biased", dtype=torch.float64)
    same = fit_heads(model, neighbours(model, 4), many(), FitSettings(slack=0.0))
    assert_close(logits(same, batches()[0]), logits(model, batches()[0]), rtol=1e-4, atol=1e-5)
    model.model.rotary_emb.inv_freq.fill_(0.3)  # one band of equal frequencies: mixing them is exact
    folded = fit_heads(model, neighbours(model, 4), many())
    assert_close(logits(folded, batches()[0]), logits(model, batches()[0]), rtol=1e-4, atol=1e-4)
    key = folded.model.layers[0].self_attn.k_proj.weight
    assert (key - model.model.layers[0].self_attn.k_proj.weight).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_each_step_brings_the_outputs_nearer(name):
    errors = {}
    for seed in range(3):
        model = build(name, seed=seed, scale=4)
        plan = plan_merge(model, many(1), 2)
        made = {
            "mean": merge_heads(model, neighbours(model, 2)),
            "aligned": merge_heads(model, plan),
            "lowrank": fit_heads(model, plan, many(1), EXACT),
            "fitted": fit_heads(model, plan, many(1)),
        }
        for key, small in made.items():
            errors[key] = errors.get(key, 0.0) + output_error(model, small, many(1))
    assert errors["fitted"] < errors["lowrank"] < errors["aligned"] < errors["mean"]


def test_the_output_projection_is_ridge_regression():
    """One layer, so that nothing comes before it: W_O against NumPy's least squares with the prior as a prior."""
    model, data = build(num_hidden_layers=1), many()
    plan = plan_merge(model, data, 2)
    prior = fit_heads(model, plan, data, EXACT)
    for ridge in (1e-9, 0.1):
        fitted = fit_heads(model, plan, data, FitSettings(ridge=ridge))
        z, y = [], []
        hooks = [
            prior.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, args, z=z: z.append(args[0])),
            model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda m, args, out, y=y: y.append(out)),
        ]
        with torch.no_grad():
            for batch in data:
                prior(**batch)
                model(**batch)
        [hook.remove() for hook in hooks]
        mask = torch.cat([b["attention_mask"].flatten() for b in data]).bool()
        Z, Y = (torch.cat([x.flatten(0, 1) for x in part])[mask].double().numpy() for part in (z, y))
        W0 = prior.model.layers[0].self_attn.o_proj.weight.detach().double().numpy()
        strength = np.sqrt(ridge * (Z**2).sum(0).mean())
        left = np.concatenate([Z, strength * np.eye(Z.shape[1])])
        right = np.concatenate([Y - Z @ W0.T, np.zeros((Z.shape[1], len(W0)))])
        W = W0 + np.linalg.lstsq(left, right, rcond=None)[0].T
        assert_close(fitted.model.layers[0].self_attn.o_proj.weight.detach().double().numpy(), W, rtol=1e-3, atol=1e-3)
        assert torch.equal(
            fitted.model.layers[0].self_attn.v_proj.weight, prior.model.layers[0].self_attn.v_proj.weight
        )


def test_padding_does_not_count():
    model = build(scale=4)
    batch = batches()[0]
    rows = [{k: v[i : i + 1, : batch["attention_mask"][i].sum()] for k, v in batch.items()} for i in range(3)]
    del rows[1]["attention_mask"]
    plan = neighbours(model, 2)
    a, b = fit_heads(model, plan, [batch]), fit_heads(model, plan, rows)
    assert_close(logits(a, batch), logits(b, batch), rtol=1e-2, atol=1e-2)


def test_bands():
    from residency.compress.headfit import _bands

    model = build()  # frequencies 1, .1, .01, .001
    assert _bands(model, FitSettings(slack=0)) == [[0], [1], [2], [3]]
    assert _bands(model, FitSettings(slack=0.5, horizon=50)) == [[0], [1], [2, 3]]
    assert _bands(model, FitSettings(slack=50, horizon=50)) == [[0, 1, 2, 3]]


def test_refusals():
    model = build()
    with pytest.raises(DataError, match="no real token"):
        fit_heads(model, neighbours(model, 2), [])
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(DataError, match="layer 1 is not finite"):
        fit_heads(broken, neighbours(broken, 2), batches())
    with pytest.raises(ValueError, match="belong together"):
        fit_heads(model, neighbours(model, 2)[:1], batches())
