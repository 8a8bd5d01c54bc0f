"""The probe against transformers' own attention weights; a planted sink; and that it disturbs nothing."""

import pytest
import torch
import transformers
from sinkmodels import CONFIGS, SMALL, build, ids, padded

from residency.errors import DataError, PlanError
from residency.evaluate import sinks
from residency.evaluate.sinks import FAMILIES, SinkProbe, changed_heads, diagnose

N0 = 8


def brute_force(model, texts, places=4):
    """The measures from output_attentions, output_hidden_states and loops over tokens, text by text."""
    model.set_attn_implementation("eager")
    L, H = model.config.num_hidden_layers, model.config.num_attention_heads
    mass, queries = torch.zeros(L, H, places), 0
    first, others = torch.zeros(2, L, H), 0
    residual = torch.zeros(2, L + 1)
    values, residuals = {}, {}
    base = model.base_model
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda m, a, out, i=i: values.__setitem__(i, out))
        for i, layer in enumerate(base.layers)
    ]
    hooks += [
        layer.register_forward_hook(lambda m, a, out, i=i: residuals.__setitem__(i + 1, out))
        for i, layer in enumerate(base.layers)
    ]
    for text in texts:
        with torch.no_grad():
            out = model(text[None], output_attentions=True, output_hidden_states=True)
        residuals[0] = out.hidden_states[0]
        queries += len(text) - N0
        others += len(text) - 1
        for i, layer in enumerate(base.layers):
            mass[i] += out.attentions[i][0, :, N0:, :places].sum(1)
            d = layer.self_attn.head_dim
            G = values[i].shape[-1] // d
            v = values[i].view(len(text), G, d)
            for h in range(H):
                w = layer.self_attn.o_proj.weight[:, h * d : (h + 1) * d]
                norms = (v[:, h // (H // G)] @ w.T).norm(dim=-1)
                first[0, i, h] += norms[0]
                first[1, i, h] += norms[1:].sum()
        for place, hidden in residuals.items():
            norms = hidden[0].norm(dim=-1)
            residual[0, place] += norms[0]
            residual[1, place] += norms[1:].sum()
    for hook in hooks:
        hook.remove()
    n = len(texts)
    return {
        "mass": mass / queries,
        "value_first": first[0] / n,
        "value_others": first[1] / others,
        "residual_first": residual[0] / n,
        "residual_others": residual[1] / others,
    }


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_transformers_eager_attention(name, side):
    model = build(name)
    texts, batch = padded(side)
    found = diagnose(model, [batch], first_query=N0)
    assert (found.rows, found.tokens, found.queries) == (3, 58, 58 - 3 * N0)
    for key, expected in brute_force(model, texts).items():
        torch.testing.assert_close(getattr(found, key).float(), expected, rtol=2e-5, atol=1e-5, msg=f"{name} {key}")
    assert float(found.sink_mass.std()) > 0.005  # the heads differ, so the comparison means something


def test_logit_gap_equals_log_ratios_of_attention():
    """log A[n, 0] − mean log A[n, j] is the gap, whatever the softmax divided by."""
    for name in ("llama", "qwen3", "gemma2"):
        model = build(name, attention="eager", scale=4.0)
        text = ids(1, 12)
        found = diagnose(model, [{"input_ids": text}], first_query=N0)
        with torch.no_grad():
            weights = model(text, output_attentions=True).attentions
        for layer, A in enumerate(weights):
            rows = [A[0, :, n, 0].log() - A[0, :, n, 1 : n + 1].log().mean(-1) for n in range(N0, 12)]
            torch.testing.assert_close(found.gap[layer].float(), torch.stack(rows).mean(0), rtol=1e-4, atol=1e-4)


def test_sdpa_and_eager_give_the_same_map():
    texts = {"input_ids": ids(2, 20)}
    maps = [diagnose(build("llama", attention=kind), [texts]) for kind in ("sdpa", "eager")]
    torch.testing.assert_close(maps[0].mass, maps[1].mass, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_bit_for_bit_the_same(name, dtype):
    model = build(name, dtype=dtype)
    _, batch = padded("left")
    with torch.no_grad():
        plain = model(**batch).logits
        with SinkProbe(model) as probe:
            probed = model(**batch).logits
        after = model(**batch).logits
    assert torch.equal(plain, probed)
    assert torch.equal(plain, after)
    assert probe.result().rows == 3
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_batches_padding_blocks_and_order_change_nothing(monkeypatch):
    model = build("llama")
    texts, batch = padded("right")
    whole = diagnose(model, [batch])
    apart = diagnose(model, [{"input_ids": text[None]} for text in reversed(texts)])
    monkeypatch.setattr(sinks, "BLOCK", 3 * 4 * 25 * 2)  # two queries at a time
    blocks = diagnose(model, [batch])
    for other in (apart, blocks):
        for key in ("mass", "gap", "value_first", "value_others", "residual_first", "residual_others"):
            torch.testing.assert_close(getattr(other, key), getattr(whole, key), rtol=1e-5, atol=1e-6, msg=key)


def test_half_precision_is_near_and_the_mode_is_restored():
    model = build("llama", scale=3.0)
    exact = diagnose(model, [{"input_ids": ids(2, 24)}])
    for dtype in (torch.bfloat16, torch.float16):
        half = build("llama", scale=3.0, dtype=dtype).train()
        half.base_model.layers[1].eval()
        found = diagnose(half, [{"input_ids": ids(2, 24)}])
        torch.testing.assert_close(found.sink_mass, exact.sink_mass, rtol=0, atol=0.02)
        torch.testing.assert_close(found.residual_ratio, exact.residual_ratio, rtol=0.02, atol=0)
        assert half.training
        assert not half.base_model.layers[1].training


def test_a_planted_sink_is_found():
    """Layer 1, head 2: queries all point along one axis, and only the first token's key does; its value is drained."""
    model = build("llama", scale=1.0, rope_parameters={"rope_type": "default", "rope_theta": 1e30})
    attention, d = model.base_model.layers[1].self_attn, 12
    text = ids(3, 30)
    text[:, 0], text[:, 1:] = 5, text[:, 1:].clamp(min=6)
    mark = torch.zeros(32)
    mark[0] = 1.0
    with torch.no_grad():
        model.base_model.embed_tokens.weight.zero_()
        model.base_model.embed_tokens.weight[:, 1] = 1.0
        model.base_model.embed_tokens.weight[5] = 100 * mark  # the peak
        for layer in model.base_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            layer.input_layernorm.weight.fill_(1.0)
        # RMSNorm makes every token ±√32 along its axis; the last pair of RoPE hardly turns with this theta
        q, k, v, o = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight, attention.o_proj.weight
        q.zero_(), k.zero_(), v.zero_()
        q[2 * d + 5, 1] = 1.0
        k[1 * d + 5, 0] = 12**0.5 * 5.0 / 32  # head 2 reads key/value head 1: logit 5
        v[1 * d, 0], v[1 * d, 1] = 0.25, 1.0
        o[3, 2 * d] = 1e-6
    found = diagnose(model, [{"input_ids": text}])
    n = torch.arange(8, 30, dtype=torch.float64)
    e = torch.tensor(5.0, dtype=torch.float64).exp()
    assert float(found.sink_mass[1, 2]) == pytest.approx(float((e / (e + n)).mean()), rel=1e-4)
    assert float(found.gap[1, 2]) == pytest.approx(5.0, rel=1e-4)
    assert float(found.gap[1, 1]) == pytest.approx(0.0, abs=1e-5)
    assert float(found.value_ratio[1, 2]) == pytest.approx(0.25, rel=1e-4)
    assert float(found.residual_ratio[1]) == pytest.approx(100.0, rel=1e-5)
    assert found.dormant() == [(1, 2)]
    assert found.dormant(0.999) == []
    row = found.table()[1 * 4 + 2]
    assert (row["layer"], row["head"], round(row["sink_mass"], 3)) == (1, 2, round(float(found.sink_mass[1, 2]), 3))


def test_the_sink_is_the_first_place_whatever_the_token():
    model = build("llama")
    found = diagnose(model, [{"input_ids": ids(2, 30)}], places=3)
    assert found.mass.shape == (3, 4, 3)
    everywhere = diagnose(model, [{"input_ids": ids(2, 30)}], first_query=29, places=29)
    assert float(everywhere.mass.sum(-1).max()) <= 1 + 1e-6
    assert found.share == pytest.approx(float(found.sink_mass.mean()))


def test_changed_heads_come_in_order_of_their_change():
    model = build("llama")
    a, b = (diagnose(model, [{"input_ids": ids(2, 30, seed)}], str(seed)) for seed in (0, 1))
    heads = changed_heads(a, b, most=12)
    sizes = [abs(x - y) for *_, x, y in heads]
    assert sizes == sorted(sizes, reverse=True)
    assert {(layer, h) for layer, h, *_ in heads} == {(layer, h) for layer in range(3) for h in range(4)}
    layer, h, x, y = heads[0]
    assert (x, y) == (float(a.sink_mass[layer, h]), float(b.sink_mass[layer, h]))
    with pytest.raises(ValueError, match="different models"):
        changed_heads(a, diagnose(build("llama", num_hidden_layers=2), [{"input_ids": ids(2, 30)}]))


def test_memory_of_a_long_text_stays_bounded():
    """The largest tensor of logits at T = 2,048 holds at most BLOCK numbers."""
    model = build("llama", max_position_embeddings=2048, num_hidden_layers=1)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    with Watch():
        diagnose(model, [{"input_ids": ids(2, 2048)}])
    assert max(sizes) <= max(sinks.BLOCK, 2 * 2048 * 2048)  # the model's own causal mask may be as large


@pytest.mark.embedded
def test_the_phenomena_on_the_real_model():
    """SmolLM2 has no token for beginnings: the sink is whatever stands first."""
    from pathlib import Path

    from residency import bases

    folder = bases.resolve("smollm2-135m-instruct").folder
    model, tokenizer = bases.load_causal_lm(folder), bases.load_tokenizer(folder)
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    for start in (2000, 5000):
        found = diagnose(model, [{"input_ids": torch.tensor([tokenizer(text[start : start + 600])["input_ids"][:96]])}])
        assert found.share > 10 * float(found.mass[..., 1:].mean())
        assert 0.3 < float((found.sink_mass > 0.3).double().mean()) < 0.7
        dormant = found.sink_mass > 0.5
        assert float(found.value_ratio[dormant].median()) < 0.8 * float(found.value_ratio[~dormant].median())
        assert float(found.residual_first[15]) > 10_000
        assert float(found.residual_others[15]) < 1_000


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(DataError, match="longer than 8"):
        diagnose(build(), [{"input_ids": ids(2, 8)}])
    with pytest.raises(DataError, match="longer than 8"):
        diagnose(build(), [])
    with pytest.raises(ValueError, match="places"):
        SinkProbe(build(), first_query=2, places=3)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(PlanError, match="gpt2"):
        SinkProbe(gpt2)
    phi = transformers.Phi3ForCausalLM(transformers.Phi3Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}))
    with pytest.raises(PlanError, match="phi3"):
        SinkProbe(phi)
    model = build()
    with torch.no_grad():
        cache = model(ids(1, 10)).past_key_values
        with SinkProbe(model), pytest.raises(ValueError, match="continues a cache"):
            model(ids(1, 4), past_key_values=cache)
        with SinkProbe(model), pytest.raises(ValueError, match="another shape"):
            model(ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))
    assert set(FAMILIES) >= {build(name).config.model_type for name in CONFIGS}
