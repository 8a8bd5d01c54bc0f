"""The engine: per-token statistics against closed forms and against transformers, for several families of models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from residency.curate.forward import COLUMNS, Reader, batches
from residency.testing.tinyllama import tiny_llama

PAIRS = [([1, 2, 3], [4, 5]), ([7], [8]), ([9] * 11, [1, 2, 3, 4, 5, 6]), ([3, 1], [60, 0, 60])]


def tokens(model, pairs=PAIRS, batch_tokens=2_048, **more):
    with Reader(model, None, batch_tokens) as reader:
        return reader.tokens(pairs, **more)


def column(found, name):
    return np.concatenate([t[COLUMNS.index(name)] for t in found])


def test_a_model_that_knows_nothing_has_the_closed_forms():
    model, V = tiny_llama(), 61
    torch.nn.init.zeros_(model.lm_head.weight)
    found = tokens(model)
    closed = {
        "nll": math.log(V),
        "entropy": math.log(V),
        "best": 1 / V,
        "log_best": -math.log(V),
        "margin": 0,
        "el2n": math.sqrt((1 - 1 / V) ** 2 + (V - 1) / V**2),
    }
    for name, value in closed.items():
        np.testing.assert_allclose(column(found, name), value, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(("right", "error", "hit"), [(True, 0.0, 1), (False, math.sqrt(2), 0)])
def test_a_certain_model_is_wholly_right_or_wholly_wrong(right, error, hit):
    model = tiny_llama()
    model.lm_head.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(61).index_fill(0, torch.tensor([5]), 200.0))
    found = tokens(model, [([1], [5 if right else 6])])
    np.testing.assert_allclose(column(found, "el2n"), error, atol=1e-6)
    np.testing.assert_allclose(column(found, "nll"), 0 if right else 200, atol=1e-4)
    assert column(found, "hits") == hit
    np.testing.assert_allclose(column(found, "margin"), 1, atol=1e-6)
    np.testing.assert_allclose(column(found, "entropy"), 0, atol=1e-6)


def test_small_errors_of_a_sure_prediction_keep_their_digits():
    model = tiny_llama()
    model.lm_head.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(61).index_fill(0, torch.tensor([5]), 15.0))
    rest = math.exp(-15) / (1 + 60 * math.exp(-15))  # probability of each other token, 3e-7
    found = tokens(model, [([1], [5])])
    np.testing.assert_allclose(column(found, "el2n"), math.hypot(60 * rest, math.sqrt(60) * rest), rtol=1e-2)


def families():
    import transformers as t

    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = small | {"intermediate_size": 24, "num_key_value_heads": 1, "initializer_range": 0.4}
    yield "gemma2 (soft cap)", t.Gemma2Config(**llama, head_dim=8, final_logit_softcapping=2.0)
    yield "granite (divided)", t.GraniteConfig(**llama, logits_scaling=4.0)
    yield "cohere (multiplied)", t.CohereConfig(**llama, logit_scale=0.25)
    yield "gpt2 (learned positions)", t.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4)
    yield "qwen3", t.Qwen3Config(**llama, head_dim=8)
    yield "opt (positions from the mask)", t.OPTConfig(**small, ffn_dim=24, word_embed_proj_dim=16, init_std=0.4)
    yield "bloom (alibi)", t.BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.4)


@pytest.mark.parametrize(("name", "config"), [pytest.param(n, c, id=n) for n, c in families()])
def test_every_family_gives_what_its_own_logits_give(name, config):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    pairs = [([1, 2, 3], [4, 5]), ([7], [8]), ([9] * 11, [1, 2, 3, 4, 5, 6])]
    found = tokens(model, pairs)
    for (prompt, answer), mine in zip(pairs, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none")
        np.testing.assert_allclose(mine[0], expected, rtol=1e-4, atol=1e-5)
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        np.testing.assert_allclose(mine[COLUMNS.index("entropy")], entropy, rtol=1e-4, atol=1e-5)


def test_an_unknown_change_of_logits_is_refused():
    model = tiny_llama()
    forward = model.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 3
        return out

    model.forward = scaled
    with pytest.raises(ValueError, match="behind the head"):
        tokens(model)


def test_a_model_without_a_head_is_refused():
    from transformers import LlamaModel

    with pytest.raises(ValueError, match="output embedding"):
        tokens(LlamaModel(tiny_llama().config))


@pytest.mark.parametrize("batch_tokens", [1, 13, 10_000])
def test_batches_change_nothing(batch_tokens):
    for mine, whole in zip(tokens(tiny_llama(), batch_tokens=batch_tokens), tokens(tiny_llama()), strict=True):
        np.testing.assert_allclose(mine, whole, atol=1e-4)


def test_blocks_of_the_head_change_nothing(monkeypatch):
    from residency import fusedhead

    whole = tokens(tiny_llama())
    monkeypatch.setattr(fusedhead, "LOGITS_BYTES", 4 * 61 * 2)  # two positions at a time
    for mine, other in zip(tokens(tiny_llama()), whole, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


def test_no_logits_of_whole_sequences_are_ever_made():
    shapes = []
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    tokens(model)
    assert shapes
    assert all(shape[1] == 1 for shape in shapes)


def test_only_nll_is_the_first_column():
    model = tiny_llama()
    for short, full in zip(tokens(model, only_nll=True), tokens(model), strict=True):
        assert short.shape[0] == 1
        np.testing.assert_allclose(short[0], full[0], atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.2), (torch.float16, 0.02)])
def test_half_precision_is_finite_and_near(dtype, tolerance):
    exact = tokens(tiny_llama())
    for mine, other in zip(tokens(tiny_llama().to(dtype)), exact, strict=True):
        assert mine.dtype == np.float32
        assert np.isfinite(mine).all()
        np.testing.assert_allclose(mine[0], other[0], atol=tolerance, rtol=tolerance)


def test_broken_weights_give_nan_and_no_number():
    model = tiny_llama()
    model.lm_head.weight[3] = float("nan")
    assert np.isnan(column(tokens(model), "nll")).all()


def test_model_mode_hooks_and_random_state_are_left_alone():
    model = tiny_llama().train()
    state = torch.get_rng_state()
    tokens(model)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert not model.lm_head._forward_pre_hooks


def test_batches_hold_what_fits():
    found = list(batches([5, 1, 9, 2, 5], 10))
    assert found == [[1, 3], [0, 4], [2]]
    assert list(batches([], 10)) == []
    assert list(batches([50], 10)) == [[0]]
