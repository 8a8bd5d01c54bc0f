"""Width pruning: nothing cut is nothing changed, dead parts go for free, and what is measured is what is said."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from residency.compress import width
from residency.compress.width import Width
from residency.errors import DataError, PlanError

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 64,
}


def model(kind: str = "llama", **changed) -> LlamaForCausalLM | Qwen2ForCausalLM:
    torch.manual_seed(0)
    if kind == "qwen2":  # biases on q, k, v and its own head size rule
        made = Qwen2ForCausalLM(Qwen2Config(**SIZES | changed))
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        return made.eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES | changed)).eval()


def batches():
    ids = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return [{"input_ids": ids[:2], "attention_mask": mask[:2]}, {"input_ids": ids[2:], "attention_mask": mask[2:]}]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_full_width_is_the_same_model(kind, tied):
    old = model(kind, tie_word_embeddings=tied)
    new = width.narrow(old, width.measure(old, batches()), Width())
    ids = torch.arange(9)[None]
    assert torch.equal(new(input_ids=ids).logits, old(input_ids=ids).logits)
    assert new.lm_head.weight.data_ptr() != old.lm_head.weight.data_ptr()


def test_importance_is_what_the_definition_says():
    old = model()
    found = width.measure(old, batches())
    attention, channels = [torch.zeros(6) for _ in range(3)], [torch.zeros(20) for _ in range(3)]
    hidden, tokens = torch.zeros(24), 0
    with torch.no_grad():
        for batch in batches():
            for row, length in zip(batch["input_ids"], batch["attention_mask"].sum(1).tolist(), strict=True):
                taken: dict = {}
                hooks = [
                    m.register_forward_hook(
                        lambda m, a, o, n=n, taken=taken: taken.__setitem__(n, (a[0] if a else None, o))
                    )
                    for n, m in old.named_modules()
                ]
                old(input_ids=row[None, :length])
                for hook in hooks:
                    hook.remove()
                tokens += length
                for i in range(3):
                    a = taken[f"model.layers.{i}.self_attn.o_proj"][0][0]
                    W = old.model.layers[i].self_attn.o_proj.weight
                    for h in range(6):
                        attention[i][h] += (a[:, 4 * h : 4 * h + 4] @ W[:, 4 * h : 4 * h + 4].T).norm(dim=1).sum()
                    x = taken[f"model.layers.{i}.mlp.down_proj"][0][0]
                    for f in range(20):
                        added = x[:, f : f + 1] @ old.model.layers[i].mlp.down_proj.weight[:, f : f + 1].T
                        channels[i][f] += added.norm(dim=1).sum()
                for name, (_, output) in taken.items():
                    if name.endswith("norm"):
                        hidden += output[0].abs().sum(0)
    torch.testing.assert_close(found.heads, torch.stack(attention).double() / tokens, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.ffn, torch.stack(channels).double() / tokens, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.hidden, hidden.double() / tokens, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_dead_channels_and_heads_are_found_and_cost_nothing():
    old = model()
    generator = torch.Generator().manual_seed(3)
    for layer in old.model.layers:
        layer.mlp.down_proj.weight[:, torch.randperm(20, generator=generator)[:8]] = 0
        layer.self_attn.o_proj.weight[:, 8:16] = 0  # both query heads of the second key/value head
    new = width.narrow(old, width.measure(old, batches()), Width(heads=4, kv_heads=2, ffn=12))
    ids = torch.arange(11)[None]
    torch.testing.assert_close(new(input_ids=ids).logits, old(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
    assert new.config.num_key_value_heads == 2
    assert new.config.head_dim == 4


@torch.no_grad()
def test_dead_residual_channels_cost_only_the_norm():
    """With six of 24 channels silent everywhere, dropping them multiplies the mean square by 24/18 in every norm."""
    old = model(tie_word_embeddings=False)
    dead = torch.tensor([0, 3, 7, 8, 20, 23])
    old.model.embed_tokens.weight[:, dead] = 0
    for layer in old.model.layers:
        layer.self_attn.o_proj.weight[dead] = 0
        layer.mlp.down_proj.weight[dead] = 0
    for name, parameter in old.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
    new = width.narrow(old, width.measure(old, batches()), Width(hidden=18))
    for name, parameter in new.named_parameters():
        if "norm" in name:
            parameter.fill_((24 / 18) ** 0.5)
    for module in new.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon *= 24 / 18
    ids = torch.arange(7)[None]
    torch.testing.assert_close(new(input_ids=ids).logits, old(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_saved_students_load_in_plain_transformers(tmp_path):
    for kind in ("llama", "qwen2"):
        old = model(kind)
        small = width.narrow(old, width.measure(old, batches()), Width(hidden=15, heads=3, ffn=10))
        small.save_pretrained(tmp_path / kind)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        ids = torch.arange(8)[None]
        assert torch.equal(again(input_ids=ids).logits, small(input_ids=ids).logits)
        assert again.num_parameters() < 0.7 * old.num_parameters()


def test_half_precision_is_kept():
    old = model().to(torch.bfloat16)
    small = width.narrow(old, width.measure(old, batches()), Width(ffn=8))
    assert small.dtype == torch.bfloat16
    assert torch.isfinite(small(input_ids=torch.arange(8)[None]).logits).all()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Width(ffn=21), "ffn"),
        (Width(hidden=0), None),
        (Width(hidden=20), "multiple"),
        (Width(heads=4), "share"),
        (Width(heads=6, kv_heads=1), "merge"),
        (Width(heads=5, kv_heads=2), "share"),
    ],
)
def test_impossible_sizes_are_refused(wanted, message):
    if message is None:
        assert wanted.of(24, 6, 3, 20).hidden == 24
        return
    with pytest.raises(PlanError, match=message):
        wanted.of(hidden=24, heads=6, kv_heads=3, ffn=20)


def test_other_layouts_and_empty_batches_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(PlanError, match="narrower"):
        width.measure(GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=30)), batches())
    with pytest.raises(DataError, match="no real token"):
        width.measure(model(), [])
