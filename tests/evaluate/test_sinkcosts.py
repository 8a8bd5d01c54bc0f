"""Dropped cache entries against a cache that was really cut; int8 by hand; planted faults that must cost."""

import pytest
import torch
from sinkmodels import build, ids

from residency.errors import DataError
from residency.evaluate import sinkcosts
from residency.evaluate.sinkcosts import as_int8, eviction_cost, groups, padded, quantisation_cost
from residency.evaluate.textstarts import Starts


def texts(lengths=(24, 13, 18), seed=0):
    return [ids(1, n, seed + i)[0].tolist() for i, n in enumerate(lengths)]


def nats(logits, targets):
    return float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))


@torch.no_grad()
def with_cut_cache(model, text, keep):
    """Sum of nats of the second half, the entries outside `keep` taken out of the cache's tensors."""
    text = torch.tensor([text])
    half = text.shape[1] // 2
    cache = model(text[:, :half]).past_key_values
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, keep].contiguous(), layer.values[:, :, keep].contiguous()
    total = 0.0
    for n in range(half, text.shape[1] - 1):  # one token at a time, at the positions they had
        logits = model(text[:, n : n + 1], past_key_values=cache, position_ids=torch.tensor([[n]])).logits
        total += nats(logits[0], text[0, n + 1 : n + 2])
    return total


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_eviction_equals_a_cache_that_was_cut(name):
    model, some = build(name, scale=4.0), texts()
    found = eviction_cost(model, some, draws=1, seed=3)
    count = sum(len(text) - len(text) // 2 - 1 for text in some)
    assert (found.texts, found.tokens) == (3, count)
    for key, keep in (
        ("whole", lambda half: list(range(half))),
        ("without_first", lambda half: list(range(1, half))),
        ("newest", lambda half: list(range(half - half // 2, half))),
        ("first_and_newest", lambda half: [0, *range(half - half // 2 + 1, half)]),
    ):
        expected = sum(with_cut_cache(model, text, keep(len(text) // 2)) for text in some) / count
        assert getattr(found, key) == pytest.approx(expected, rel=1e-5), key
    assert found.whole != pytest.approx(found.without_first, abs=1e-4)
    import random

    draw = random.Random(3)
    expected = 0.0
    for text in some:
        half = len(text) // 2
        dropped = draw.randrange(1, half)
        expected += with_cut_cache(model, text, [i for i in range(half) if i != dropped])
    assert found.without_another == pytest.approx(expected / count, rel=1e-5)


def test_eviction_is_seeded_and_refuses_short_texts():
    model = build()
    assert eviction_cost(model, texts(), seed=1) == eviction_cost(model, texts(), seed=1)
    assert (
        eviction_cost(model, texts(), seed=1).without_another != eviction_cost(model, texts(), seed=2).without_another
    )
    assert eviction_cost(model, [*texts(), [1, 2, 3]]) == eviction_cost(model, texts())
    for nothing in ([], [[1, 2, 3]]):
        with pytest.raises(DataError, match="shorter than 8"):
            eviction_cost(model, nothing)


def test_int8_rounds_with_one_scale_per_text():
    model = build()
    batch = padded(texts((9, 5)))
    with Starts(model) as starts, torch.no_grad():
        model(**batch)
    x = torch.randn(2, 9, 7, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 50
    x[1, 5:] = 1e6  # padding sets no scale
    shared, apart = (as_int8(x, starts, apart=a) for a in (False, True))
    for b, length in ((0, 9), (1, 5)):
        for found, begin in ((shared, 0), (apart, 1)):
            scale = float(x[b, begin:length].abs().max()) / 127
            for n in range(length):
                expected = x[b, n] if n < begin else (x[b, n] / scale).round() * scale
                torch.testing.assert_close(found[b, n], expected)
            assert len((found[b, begin:length] / scale).round().unique()) <= 255


def test_quantisation_errors_equal_loops():
    model, some = build("llama", num_hidden_layers=2), texts()
    found = quantisation_cost(model, some)
    inputs = {}
    for layer, part in enumerate(model.base_model.layers):
        for name, module in part.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(
                    lambda m, a, key=(layer, name): inputs.setdefault(key, []).append(a[0][0])
                )
    total, count = 0.0, 0
    for text in some:
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[0]
        total, count = total + nats(logits[:-1], torch.tensor(text[1:])), count + len(text) - 1
    assert found.nats == pytest.approx(total / count, rel=1e-5)
    assert found.tokens == count
    for apart, errors in ((False, found.error_shared), (True, found.error_apart)):
        for layer in range(2):
            ratios = []
            for (place, _), seen in inputs.items():
                if place == layer:
                    error = square = 0.0
                    for x in seen:
                        scale = x[int(apart) :].abs().max() / 127
                        error += float((((x / scale).round() * scale - x)[1:] ** 2).sum())
                        square += float((x[1:] ** 2).sum())
                    ratios.append(error / square)
            assert len(ratios) == 7
            assert float(errors[layer]) == pytest.approx(sum(ratios) / 7, rel=1e-4)


def test_a_giant_first_token_costs_until_it_is_kept_apart():
    """Planted: token 5 alone drives one hidden unit of layer 1 to millions, and nothing reads that unit."""
    model = build("llama", scale=3.0)
    layer = model.base_model.layers[1]
    with torch.no_grad():
        for part in model.base_model.layers:  # coordinate 3 stays what the embedding says
            part.self_attn.o_proj.weight[3] = part.mlp.down_proj.weight[3] = 0
        layer.mlp.up_proj.weight[0] = 0
        layer.mlp.up_proj.weight[0, 3] = 300.0
        layer.mlp.gate_proj.weight[0] = 0
        layer.mlp.gate_proj.weight[0, 3] = 300.0
        layer.mlp.down_proj.weight[:, 0] = 0
        model.base_model.embed_tokens.weight[:, 3] = -0.001
        model.base_model.embed_tokens.weight[5, 3] = 30.0
    some = [[5, *[token for token in text if token != 5]] for text in texts((30, 25, 28))]
    found = quantisation_cost(model, some)
    assert float(found.error_shared[1]) > 10 * float(found.error_apart[1])
    assert abs(found.nats_apart - found.nats) < abs(found.nats_shared - found.nats)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_batches_hold_every_text_once_and_change_nothing(monkeypatch):
    some = texts((24, 13, 18, 9, 9))
    for tokens in (1, 30, 60, 10_000):
        batches = list(groups(some, tokens))
        assert sorted(tuple(text) for batch in batches for text in batch) == sorted(map(tuple, some))
        assert all(len(batch) == 1 or len(batch) * max(map(len, batch)) <= tokens for batch in batches)
    batch = padded(some[:2])
    assert batch["attention_mask"].sum(1).tolist() == [24, 13]
    assert batch["input_ids"][1, :13].tolist() == some[1]
    model = build()
    whole = quantisation_cost(model, some)
    monkeypatch.setattr(sinkcosts, "BATCH_TOKENS", 1)
    apart = quantisation_cost(model, some)
    assert apart.nats == pytest.approx(whole.nats, rel=1e-6)
    assert apart.nats_shared == pytest.approx(whole.nats_shared, rel=1e-3)
    torch.testing.assert_close(apart.error_shared, whole.error_shared, rtol=1e-3, atol=0)


def test_half_precision_and_short_texts():
    for dtype in (torch.bfloat16, torch.float16):
        found = quantisation_cost(build(dtype=dtype, scale=2.0), texts())
        assert 0 < float(found.error_shared.max()) < 0.1
        assert eviction_cost(build(dtype=dtype, scale=2.0), texts()).whole > 0
    for nothing in ([], [[4]]):
        with pytest.raises(DataError, match="two tokens"):
            quantisation_cost(build(), nothing)
