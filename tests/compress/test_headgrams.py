"""Gram blocks against loops over tokens."""

import itertools

import pytest
import torch
import transformers
from headmodels import CONFIGS, SMALL, batches, build
from torch.testing import assert_close

from residency.compress.headgrams import attentions, collect, layer_bytes
from residency.errors import DataError, PlanError


def by_tokens(model, data, layer, name):
    """Σ x_i x_jᵀ and the same of unit vectors, one token and one pair at a time."""
    attention, outputs = model.model.layers[layer].self_attn, []
    handle = getattr(attention, name).register_forward_hook(lambda m, args, out: outputs.append(out.double()))
    real = []
    with torch.no_grad():
        for batch in data:
            model(**batch)
            real.append(batch.get("attention_mask", torch.ones_like(batch["input_ids"])))
    handle.remove()
    d = attention.head_dim
    G = outputs[0].shape[-1] // d
    raw, unit = torch.zeros(2, G, G, d, d, dtype=torch.float64)
    for out, mask in zip(outputs, real, strict=True):
        for b, t in itertools.product(*map(range, mask.shape)):
            if mask[b, t]:
                heads = [out[b, t, i * d : (i + 1) * d] for i in range(G)]
                for i, j in itertools.product(range(G), repeat=2):
                    raw[i, j] += torch.outer(heads[i], heads[j])
                    unit[i, j] += torch.outer(heads[i] / heads[i].norm(), heads[j] / heads[j].norm())
    return raw, unit


@pytest.mark.parametrize("name", ["llama", "qwen2", "llama-wide"])
def test_blocks_by_the_definition(name):
    model, data = build(name, num_key_value_heads=2), batches()
    model.train()
    found = collect(model, iter(data))
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    model.eval()
    for layer, entry in enumerate(found):
        for grams, projection in ((entry.keys, "k_proj"), (entry.values, "v_proj")):
            raw, unit = by_tokens(model, data, layer, projection)
            assert_close(grams.raw, raw)
            assert_close(grams.unit, unit)
            assert grams.tokens == 7 + 9 + 9 + 4 + 6
            assert grams.raw.dtype == torch.float64


def test_padding_and_batching_do_not_count():
    model, (batch, other) = build(), batches()
    rows = [
        {k: v[i : i + 1, : b["attention_mask"][i].sum()] for k, v in b.items()}
        for b in (batch, other)
        for i in range(len(b["input_ids"]))
    ]
    del rows[1]["attention_mask"]
    a, b = collect(model, [batch, other]), collect(model, rows)
    for mine, other_ in zip(a, b, strict=True):
        assert_close(mine.keys.raw, other_.keys.raw, rtol=1e-5, atol=1e-4)
        assert_close(mine.values.unit, other_.values.unit, rtol=1e-5, atol=1e-5)


def test_some_layers_only():
    model, data = build(), batches()
    assert_close(collect(model, data, [1])[0].keys.raw, collect(model, data)[1].keys.raw, rtol=0, atol=0)
    assert layer_bytes(attentions(model)[0]) == 4 * sum(x.nbytes for x in [collect(model, data)[0].keys.raw])


def test_half_precision():
    exact = collect(build(), batches())[0]
    rough = collect(build(dtype=torch.bfloat16), batches())[0]
    assert_close(rough.keys.raw, exact.keys.raw, rtol=0.1, atol=0.1 * exact.keys.raw.abs().max().item())
    model = build(dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1e5)
    with pytest.raises(DataError, match="not finite"):
        collect(model, batches())


def test_a_dead_head_stays_finite():
    model = build()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[:8] = 0
    grams = collect(model, batches())[0].values
    assert grams.unit.isfinite().all()
    assert not grams.unit[0].any()


def test_refusals_say_why():
    with pytest.raises(DataError, match="no real token"):
        collect(build(), [])
    refused = {
        "normalises": transformers.Qwen3Config(**SMALL, head_dim=8),
        "nobody has shown": transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2),
    }
    for why, config in refused.items():
        with pytest.raises(PlanError, match=why):
            attentions(transformers.AutoModelForCausalLM.from_config(config))
    model = build()
    model.model.layers[1].self_attn.k_proj = torch.nn.Sequential(model.model.layers[1].self_attn.k_proj)
    with pytest.raises(PlanError, match=r"layer 1 has a Sequential.*k_proj"):
        attentions(model)
    model = build()
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[:2]
    with pytest.raises(PlanError, match="4 of 8 channels"):
        attentions(model)
    with pytest.raises(PlanError, match="Linear has no decoder"):
        attentions(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", CONFIGS)
def test_layout(name):
    for a in attentions(build(name, num_key_value_heads=2)):
        assert (a.heads, a.kv_heads, a.share) == (4, 2, 2)
        assert a.head_dim == a.module.head_dim
