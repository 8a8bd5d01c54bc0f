"""Ablations against models whose weights are changed by hand; identity where nothing is ablated."""

import copy

import pytest
import torch
from sinkmodels import build, ids, padded

from residency.evaluate.ablate import move_to_first, replace_sink_value, zero_attention, zero_mlp
from residency.evaluate.backcopy import TinyConfig, TinyTransformer

D = 12


def logits(model, batch=None):
    batch = {"input_ids": ids(2, 15)} if batch is None else batch
    with torch.no_grad():
        return model(**batch).logits


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture(params=["llama", "qwen3", "gemma2"])
def model(request):
    return build(request.param)


def test_nothing_ablated_is_the_model_itself(model):
    plain = logits(model)
    for block in (
        zero_attention(model, []),
        zero_attention(model, 1, head=[]),
        zero_mlp(model, []),
        move_to_first(model, 1, head=[]),
        replace_sink_value(model, 1, "zero", head=[]),
        replace_sink_value(model, [], "typical"),
    ):
        with block:
            assert torch.equal(logits(model), plain)
    assert hooks(model) == 0


def test_zeroed_parts_equal_zeroed_weights(model):
    plain = logits(model)
    for change, block in (
        (lambda m: m.base_model.layers[1].mlp.down_proj.weight.zero_(), zero_mlp(model, 1)),
        (lambda m: m.base_model.layers[0].self_attn.o_proj.weight.zero_(), zero_attention(model, 0)),
        (
            lambda m: [m.base_model.layers[0].self_attn.o_proj.weight[:, h * D : h * D + D].zero_() for h in (1, 3)],
            zero_attention(model, 0, head=[1, 3]),
        ),
        (
            lambda m: [m.base_model.layers[i].mlp.down_proj.weight.zero_() for i in (0, 2)],
            zero_mlp(model, [0, 2]),
        ),
    ):
        other = copy.deepcopy(model)
        with torch.no_grad():
            change(other)
        with block:
            ablated = logits(model)
        torch.testing.assert_close(ablated, logits(other), rtol=1e-5, atol=1e-5)
        assert (ablated - plain).abs().max() > 1e-3
    assert torch.equal(logits(model), plain)


def by_hand(model, batch, layer, first_value=None, moved=()):
    """The layer's attention with eager weights, in loops: another value for token 0, some heads moved to token 0."""
    attention = model.base_model.layers[layer].self_attn
    seen = {}

    def rewrite(module, args, kwargs, output):
        hidden = kwargs["hidden_states"]
        B, T, _ = hidden.shape
        v = attention.v_proj(hidden).view(B, T, -1, D).clone()
        weights = output[1]
        for b in range(B):
            start = 0 if "attention_mask" not in batch else int(batch["attention_mask"][b].argmax())
            end = T if "attention_mask" not in batch else start + int(batch["attention_mask"][b].sum())
            if first_value is not None:
                v[b, start] = first_value(v[b, start + 1 : end])
        z = torch.zeros(B, T, weights.shape[1], D)
        for b in range(B):
            start = 0 if "attention_mask" not in batch else int(batch["attention_mask"][b].argmax())
            for h in range(weights.shape[1]):
                g = h // (weights.shape[1] // v.shape[2])
                z[b, :, h] = v[b, start, g] if h in moved else weights[b, h] @ v[b, :, g]
        seen["used"] = True
        return (attention.o_proj(z.flatten(2)), *output[1:])

    model.set_attn_implementation("eager")
    handle = attention.register_forward_hook(rewrite, with_kwargs=True)
    out = logits(model, batch)
    handle.remove()
    assert seen
    return out


def typical(others):
    mean, norms = torch.zeros_like(others[0]), torch.zeros(others.shape[1])
    for token in others:
        mean += token / len(others)
        norms += token.norm(dim=-1) / len(others)
    return mean / mean.norm(dim=-1, keepdim=True) * norms[:, None]


@pytest.mark.parametrize("side", ["left", "right"])
def test_replaced_values_and_moved_heads_equal_loops(side):
    model = build("qwen3", attention="eager")
    _, batch = padded(side)
    real = batch["attention_mask"].bool()
    for block, expected in (
        (replace_sink_value(model, 1, "zero"), {"first_value": lambda others: torch.zeros_like(others[0])}),
        (replace_sink_value(model, 1, "typical"), {"first_value": typical}),
        (move_to_first(model, 1, head=[0, 3]), {"moved": (0, 3)}),
        (move_to_first(model, 1, head=2), {"moved": (2,)}),
        (move_to_first(model, 1), {"moved": (0, 1, 2, 3)}),
    ):
        with block:
            found = logits(model, batch)
        torch.testing.assert_close(found[real], by_hand(model, batch, 1, **expected)[real], rtol=1e-4, atol=1e-4)


def test_one_key_value_head_only():
    """Zeroing one key/value head's first value changes what its query heads write, and those alone."""
    model = build("llama", num_hidden_layers=1)
    written = []
    handle = model.base_model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda m, a: written.append(a[0].unflatten(-1, (-1, D)))
    )
    logits(model)
    with replace_sink_value(model, 0, "zero", head=1):
        logits(model)
    handle.remove()
    change = (written[0] - written[1]).abs().amax((0, 1, 3))
    assert (change[:2] == 0).all()
    assert (change[2:] > 0).all()


def test_blocks_nest_and_hooks_go_even_on_exceptions(model):
    plain = logits(model)
    with zero_mlp(model, 0), zero_attention(model, 0):
        both = logits(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.base_model.layers[0].mlp.down_proj.weight.zero_()
        other.base_model.layers[0].self_attn.o_proj.weight.zero_()
    torch.testing.assert_close(both, logits(other), rtol=1e-5, atol=1e-5)
    for make in (
        lambda: zero_attention(model, 1),
        lambda: zero_attention(model, 1, head=0),
        lambda: zero_mlp(model, 1),
        lambda: move_to_first(model, 1),
        lambda: replace_sink_value(model, 1, "typical"),
    ):
        with pytest.raises(RuntimeError, match="stop"), make():
            raise RuntimeError("stop")
        assert hooks(model) == 0
    assert torch.equal(logits(model), plain)


def test_wrong_numbers_are_refused_and_leave_no_hooks():
    model = build()
    for make, message in (
        (lambda: zero_mlp(model, 3), "layers 0 to 2"),
        (lambda: zero_attention(model, [0, -1]), "layers 0 to 2"),
        (lambda: zero_attention(model, 0, head=4), "heads 0 to 3"),
        (lambda: replace_sink_value(model, 0, "zero", head=2), "heads 0 to 1"),
        (lambda: replace_sink_value(model, 0, "mean"), "zero or typical"),
        (lambda: move_to_first(model, 0, head=9), "heads 0 to 3"),
    ):
        with pytest.raises(ValueError, match=message), make():
            pass
        assert hooks(model) == 0
    with pytest.raises(ValueError, match="llama layout"), zero_mlp(torch.nn.Linear(2, 2), 0):
        pass


def test_half_precision_and_a_text_of_one_token():
    for dtype in (torch.bfloat16, torch.float16):
        model = build(dtype=dtype, scale=2.0)
        for block in (
            move_to_first(model, 0, head=1),
            replace_sink_value(model, 0, "typical"),
            zero_attention(model, 0),
        ):
            with block:
                assert torch.isfinite(logits(model)).all()
    model = build()
    one = {"input_ids": ids(1, 1)}
    with replace_sink_value(model, 0, "typical"):
        assert torch.equal(logits(model, one), logits(model, one))
        kept = logits(model, one)
    torch.testing.assert_close(kept, logits(model, one))


def test_they_work_on_the_tiny_transformer():
    torch.manual_seed(0)
    model = TinyTransformer(TinyConfig(20, layers=2, width=16, length=12, without_attention=(1,)))
    x = torch.randint(0, 20, (3, 12))
    bare = TinyTransformer(TinyConfig(20, layers=2, width=16, length=12, without_attention=(0, 1)))
    bare.load_state_dict(model.state_dict(), strict=False)
    with zero_attention(model, 0):
        torch.testing.assert_close(model(x), bare(x))
    trace, moved = [], []
    model(x, trace)
    with move_to_first(model, 0):
        model(x, moved)
    assert not torch.equal(trace[0]["residual"], moved[0]["residual"])
    with pytest.raises(ValueError, match="no attention"), zero_attention(model, 1):
        pass
