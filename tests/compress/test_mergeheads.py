"""Merging heads: exactness of the alignment on every supported family, planted copies that must be lossless, the disk."""

import copy

import pytest
import torch
import transformers
from headmodels import CONFIGS, batches, build, logits, plant, random_orthogonal, random_planar
from torch.testing import assert_close

from residency.compress import headgrams
from residency.compress.headgrams import attentions, collect
from residency.compress.headsupport import ARCHITECTURES
from residency.compress.mergeheads import (
    LayerPlan,
    apply_alignment,
    merge,
    merge_heads,
    neighbours,
    plan_layer,
    plan_merge,
    text_loss,
)
from residency.errors import DataError, PlanError

LAYOUTS = [(name, heads, kv, new) for name in CONFIGS for heads, kv, new in ((4, 4, 2), (4, 2, 1))]


def random_plan(model, groups, seed=0):
    """Any rotations and any order: the function must not change."""
    generator, plans = torch.Generator().manual_seed(seed), []
    for a in attentions(model):
        keys = torch.stack([random_planar(a.head_dim, generator) for _ in range(a.kv_heads)])
        values = torch.stack([random_orthogonal(a.head_dim, generator) for _ in range(a.kv_heads)])
        plans.append(LayerPlan(groups, keys, values, keys[:0], keys[:0]))
    return plans


def test_every_supported_architecture_is_tested():
    names = {type(transformers.AutoModelForCausalLM.from_config(make())).__name__ for make in CONFIGS.values()}
    assert names == ARCHITECTURES


@pytest.mark.parametrize(("name", "heads", "kv", "new"), LAYOUTS)
def test_alignment_changes_nothing_but_coordinates(name, heads, kv, new):
    groups = ((2, 0), (3, 1)) if kv == 4 else ((1, 0),)
    for dtype, atol in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        model = build(name, dtype=dtype, scale=3, num_key_value_heads=kv)
        before, weights = logits(model, batches()[0]), model.model.layers[0].self_attn.k_proj.weight.clone()
        apply_alignment(model, random_plan(model, groups))
        assert (model.model.layers[0].self_attn.k_proj.weight - weights).abs().max() > 0.1
        assert_close(logits(model, batches()[0]), before, rtol=0, atol=atol * before.abs().max().item())


@pytest.mark.parametrize(("name", "heads", "kv", "new"), LAYOUTS)
def test_a_merged_model_is_a_standard_checkpoint(name, heads, kv, new, tmp_path):
    model, (batch, *_) = build(name, num_key_value_heads=kv), batches()
    before, count = logits(model, batch), sum(p.numel() for p in model.parameters())
    small = merge_heads(model, plan_merge(model, batches(), new))
    assert_close(logits(model, batch), before, rtol=0, atol=0)
    assert model.config.num_key_value_heads == kv
    assert type(small) is type(model)
    small.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_key_value_heads == new
    assert_close(logits(loaded, batch), logits(small, batch), rtol=0, atol=0)
    assert sum(p.numel() for p in loaded.parameters()) < count
    ids = batch["input_ids"][1:2]
    with torch.no_grad():
        whole = small(ids).logits
        first = small(ids[:, :4], use_cache=True)
        rest = small(ids[:, 4:], past_key_values=first.past_key_values).logits
    assert first.past_key_values.layers[0].keys.shape[1] == new
    assert_close(rest, whole[:, 4:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen2", "gemma2"])
@pytest.mark.parametrize("group_by", ["value", "key", "both"])
@pytest.mark.parametrize("criterion", ["cos", "dist"])
def test_planted_copies_are_found_and_merged_without_loss(name, group_by, criterion):
    families = ((0, 3), (1, 2))
    model = plant(build(name, dtype=torch.float64), families)
    before = logits(model, batches()[0])
    plan = plan_merge(model, batches(), 2, group_by, criterion)
    assert [p.groups for p in plan] == [families] * 2
    for p in plan:
        assert_close(p.after[:, [0, 1], [3, 2]], torch.ones(2, 2, dtype=torch.float64))
        assert p.before[:, [0, 1], [3, 2]].max() < 0.99
    assert_close(logits(merge_heads(model, plan), batches()[0]), before, rtol=1e-8, atol=1e-8)
    assert_close(logits(merge_heads(model, plan, "both"), batches()[0]), before, rtol=1e-8, atol=1e-8)
    wrong = merge_heads(model, neighbours(model, 2))
    assert (logits(wrong, batches()[0]) - before).abs().max() > 0.1


def test_planted_copies_in_a_grouped_model():
    """Two query heads read each of four key/value heads."""
    model = build("qwen2", dtype=torch.float64, hidden_size=64, num_attention_heads=8)
    plant(model, ((0, 2), (3, 1)))
    before = logits(model, batches()[0])
    plan = plan_merge(model, batches(), 2)
    assert [p.groups for p in plan] == [((0, 2), (1, 3))] * 2
    assert_close(logits(merge_heads(model, plan), batches()[0]), before, rtol=1e-8, atol=1e-8)


def test_as_many_heads_as_before_changes_nothing():
    model = build(dtype=torch.float64)
    same = merge_heads(model, plan_merge(model, batches(), 4))
    assert_close(logits(same, batches()[0]), logits(model, batches()[0]), rtol=1e-10, atol=1e-10)


def test_the_mean_by_hand_and_its_norm():
    model = build("qwen2")
    plain, restored = (merge(copy.deepcopy(model), 2, r) for r in ("none", "keys"))
    for layer, one, two in zip(*(m.model.layers for m in (model, plain, restored)), strict=True):
        K = layer.self_attn.k_proj.weight.double().view(2, 2, 8, -1)
        b = layer.self_attn.k_proj.bias.double().view(2, 2, 8)
        mean = K.mean(1)
        assert_close(one.self_attn.k_proj.weight, mean.flatten(0, 1).float())
        assert_close(one.self_attn.k_proj.bias, b.mean(1).flatten().float())
        scale = (K.flatten(2).norm(dim=2).mean(1) / mean.flatten(1).norm(dim=1))[:, None, None]
        assert (scale > 1).all()
        assert_close(two.self_attn.k_proj.weight, (mean * scale).flatten(0, 1).float())
        assert_close(two.self_attn.k_proj.bias, (b.mean(1) * scale[:, 0]).flatten().float())
        assert torch.equal(two.self_attn.v_proj.weight, one.self_attn.v_proj.weight)
    values, both = (merge(copy.deepcopy(model), 2, r).model.layers[0].self_attn for r in ("values", "both"))
    assert torch.equal(values.v_proj.weight, both.v_proj.weight)
    assert torch.equal(both.k_proj.weight, restored.model.layers[0].self_attn.k_proj.weight)
    assert not torch.equal(values.v_proj.weight, plain.model.layers[0].self_attn.v_proj.weight)


def test_identical_heads_are_a_fixed_point():
    model = build()
    with torch.no_grad():
        for a in attentions(model):
            for p in (a.module.k_proj.weight, a.module.v_proj.weight):
                p.copy_(p.view(2, 2, 8, -1)[:, :1].expand(2, 2, 8, -1).reshape(p.shape))
    assert_close(logits(merge(copy.deepcopy(model), 2, "both"), batches()[0]), logits(model, batches()[0]))


def test_layers_taken_a_few_at_a_time(monkeypatch):
    model = build()
    whole = plan_merge(model, batches(), 2)
    monkeypatch.setattr("residency.compress.mergeheads.GRAM_BYTES", 1)
    for a, b in zip(whole, plan_merge(model, iter(batches()), 2), strict=True):
        assert a.groups == b.groups
        assert_close(a.keys, b.keys, rtol=0, atol=0)


def test_grouping_by_either_both_or_none():
    grams = collect(build(seed=4), batches())[0]
    S = {k: headgrams_scores(grams, k) for k in ("key", "value")}
    for by in ("key", "value", "both", "none"):
        groups = plan_layer(grams, 2, by).groups
        if by == "none":
            assert groups == ((0, 1), (2, 3))
            continue
        total = S["key"] + S["value"] if by == "both" else S[by]
        best = max((((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))), key=lambda p: sum(total[g] for g in p))
        assert groups == best


def headgrams_scores(grams, kind):
    from residency.compress.headalign import scores

    return scores(grams.keys if kind == "key" else grams.values, kind, "cos")


def test_training_state_is_kept():
    model = build("llama-wide").train().bfloat16()
    model.model.layers[1].self_attn.k_proj.requires_grad_(False)
    small = merge_heads(model, neighbours(model, 2))
    assert small.training
    assert small.dtype == torch.bfloat16
    assert all(m.training for m in small.modules())
    assert not small.model.layers[1].self_attn.k_proj.weight.requires_grad
    assert small.model.layers[1].self_attn.v_proj.weight.requires_grad
    assert small.lm_head.weight is small.get_input_embeddings().weight


def test_text_loss_is_transformers_own():
    model, (batch, *_) = build(), batches()
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    with torch.no_grad():
        expected = model(**batch, labels=labels).loss
    assert text_loss(model, [batch]) == pytest.approx(expected.item(), rel=1e-5)
    labels[:, :4] = -100
    with torch.no_grad():
        expected = model(**batch, labels=labels).loss
    assert text_loss(model, [batch | {"labels": labels}]) == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(DataError, match="no token to predict"):
        text_loss(model, [])


def test_bad_arguments_say_what_to_do():
    model = build()
    for new in (3, 0, 5):
        with pytest.raises(PlanError, match=r"4 key/value heads cannot become"):
            plan_merge(model, batches(), new)
        with pytest.raises(PlanError, match="choose one of 1, 2, 4"):
            merge(copy.deepcopy(model), new)
    plan = plan_merge(model, batches(), 2)
    with pytest.raises(ValueError, match="belong together"):
        apply_alignment(model, plan[:1])
    with pytest.raises(ValueError, match="exactly one group"):
        apply_alignment(model, [LayerPlan(((0, 1), (1, 3)), p.keys, p.values, p.before, p.after) for p in plan])


@pytest.mark.embedded
def test_smollm2_with_its_heads_repeated_comes_back_whole():
    """Nine key/value heads that are three, each in coordinates of its own: aligned merging finds them and loses nothing."""
    from residency import bases

    original = bases.load_causal_lm(bases.resolve("smollm2-135m-instruct").folder)
    wide = copy.deepcopy(original)
    order = torch.tensor([0, 3, 6, 1, 4, 7, 2, 5, 8])  # query heads such that equals are not neighbours
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for a in attentions(wide):
            source = (torch.arange(9) // 3)[order]
            for name in ("k_proj", "v_proj"):
                W = getattr(a.module, name).weight
                made = torch.nn.Linear(W.shape[1], 9 * 64, bias=False)
                made.weight.copy_(W.view(3, 64, -1)[source].flatten(0, 1))
                setattr(a.module, name, made)
            a.module.q_proj.weight.copy_(a.module.q_proj.weight.view(9, 64, -1)[order].flatten(0, 1))
            a.module.o_proj.weight.copy_(a.module.o_proj.weight.view(-1, 9, 64)[:, order].flatten(1))
    headless = wide.model.config
    headless.num_key_value_heads = 9
    for a in headgrams.attentions(wide):
        a.module.num_key_value_groups = 1
    ids = torch.randint(0, 49152, (2, 48), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert_close(logits(wide, batch), logits(original, batch), rtol=1e-4, atol=1e-4)
    turns = random_plan(wide, tuple((i,) for i in range(9)))
    apply_alignment(wide, turns)
    assert (logits(wide, batch) - logits(original, batch)).abs().max() < 2e-3
    plan = plan_merge(wide, [batch], 3)
    assert all(p.groups == ((0, 3, 6), (1, 4, 7), (2, 5, 8)) for p in plan)
    small = merge_heads(wide, plan)
    assert (logits(small, batch) - logits(original, batch)).abs().max() < 2e-3
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in original.parameters())
