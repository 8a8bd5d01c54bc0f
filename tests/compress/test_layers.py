"""Depth pruning on tiny random models: planted signals, brute force, and checkpoints that survive the disk."""

import copy
import itertools

import pytest
import torch
import transformers
from torch.testing import assert_close

from residency.compress.decoder import decoder
from residency.compress.layers import (
    block_influence,
    choose_layers,
    keep_layers,
    loss_increase,
    prune_greedily,
)
from residency.errors import DataError, PlanError
from residency.objective import IGNORE

V, L = 50, 4
SMALL = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": L}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": [2, 3, 4, 5]}  # four of them, like the layers
SLIDING = ["sliding_attention", "full_attention"] * 2
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "llama-tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=3, layer_types=SLIDING),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, head_dim=8, sliding_window=3, layer_types=SLIDING, final_logit_softcapping=2.0
    ),
    "smollm3": lambda: transformers.SmolLM3Config(**SMALL, no_rope_layers=[1, 0, 1, 0]),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=V, n_embd=16, n_layer=L, n_head=4, n_positions=64),
    "falcon": lambda: transformers.FalconConfig(  # its layers return tuples
        vocab_size=V, hidden_size=16, num_hidden_layers=L, num_attention_heads=4, alibi=False
    ),
}


def build(name="llama", seed=0):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).eval()
    with torch.no_grad():  # the default initialisation makes every layer nearly an identity
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(12)
    return model


def batches(seed=0, sizes=((3, 9), (2, 6))):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for B, T in sizes:
        ids = torch.randint(6, V, (B, T), generator=generator)
        mask = torch.ones(B, T, dtype=torch.long)
        mask[0, T - 2 :] = 0
        labels = ids.clone()
        labels[:, :2] = IGNORE
        labels[mask == 0] = IGNORE
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def answer_loss(model, data):
    total, count = 0.0, 0
    for batch in data:
        z, y = logits(model, batch)[:, :-1], batch["labels"][:, 1:]
        total += torch.nn.functional.cross_entropy(z[y != IGNORE], y[y != IGNORE], reduction="sum").item()
        count += int((y != IGNORE).sum())
    return total / count


def make_identity(model, layer):
    """Zero what the layer adds to the residual stream."""
    with torch.no_grad():
        for name, parameter in decoder(model)[1][layer].named_parameters():
            if any(part in name for part in ("o_proj", "down_proj", "c_proj", "post_feedforward", "post_attention")):
                parameter.zero_()


@pytest.mark.parametrize("name", MODELS)
def test_all_layers_give_the_same_model_and_share_nothing(name):
    model, (batch, *_) = build(name), batches()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    copied = keep_layers(model, range(L))
    assert type(copied) is type(model)
    assert_close(logits(copied, batch), logits(model, batch), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    copied.config.vocab_size = 1
    assert model.config.vocab_size == V
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kept", [[0, 3], [1, 2, 3]])
def test_a_shallower_model_survives_the_disk(name, kept, tmp_path):
    model, (batch, *_) = build(name), batches()
    small = keep_layers(model, kept)
    assert small.config.num_hidden_layers == len(kept) == len(decoder(small)[1])
    assert model.config.num_hidden_layers == L
    small.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(logits(loaded, batch), logits(small, batch), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_of_a_shallower_model_has_no_gap(name):
    small = keep_layers(build(name), [0, 3])
    ids = batches()[0]["input_ids"][:1]
    with torch.no_grad():
        whole = small(ids).logits
        first = small(ids[:, :4], use_cache=True)
        rest = small(ids[:, 4:], past_key_values=first.past_key_values).logits
    assert len(first.past_key_values.layers) == 2
    assert_close(rest, whole[:, 4:], rtol=1e-4, atol=1e-4)


def test_per_layer_lists_follow_and_other_lists_stay():
    small = keep_layers(build("qwen2"), [0, 1, 3])
    assert small.config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert small.config.eos_token_id == [2, 3, 4, 5]
    small = keep_layers(build("smollm3"), [1, 2, 3])
    assert small.config.no_rope_layers == [0, 1, 0]


def test_training_state_is_kept():
    model = build("llama-tied").train().bfloat16()
    decoder(model)[1][3].requires_grad_(False)
    small = keep_layers(model, [0, 3])
    assert small.training
    assert small.dtype == torch.bfloat16
    assert small.lm_head.weight is small.get_input_embeddings().weight
    assert [p.requires_grad for p in decoder(small)[1][1].parameters()].count(True) == 0
    state = torch.random.get_rng_state()
    keep_layers(model, [0])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_layers_that_depend_on_their_place_are_refused():
    config = MODELS["gpt2"]()
    config.scale_attn_by_inverse_layer_idx = True
    model = transformers.GPT2LMHeadModel(config)
    keep_layers(model, [0, 1])
    with pytest.raises(PlanError, match=r"layer 3 cannot become layer 1.*attn\.scaling"):
        keep_layers(model, [0, 3])
    experts = transformers.Qwen2MoeConfig(
        **SMALL, num_experts=2, moe_intermediate_size=8, shared_expert_intermediate_size=8, mlp_only_layers=[0]
    )
    model = transformers.Qwen2MoeForCausalLM(experts)
    keep_layers(model, [0, 2])
    with pytest.raises(PlanError, match=r"layer 1 cannot become layer 0.*mlp"):
        keep_layers(model, [1, 2])


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_influence_by_the_definition(name):
    model, data = build(name), batches()
    turned, tokens = torch.zeros(L, dtype=torch.float64), 0
    for batch in data:
        seen = []
        hooks = [
            layer.register_forward_hook(
                lambda _, args, out, seen=seen: seen.append((args[0], out[0] if isinstance(out, tuple) else out))
            )
            for layer in decoder(model)[1]
        ]
        logits(model, batch)
        [hook.remove() for hook in hooks]
        for b, t in itertools.product(*map(range, batch["input_ids"].shape)):
            if batch["attention_mask"][b, t]:
                tokens += 1
                for l, (x, y) in enumerate(seen):  # noqa: E741
                    x_, y_ = x[b, t].double(), y[b, t].double()
                    turned[l] += 1 - (x_ @ y_ / x_.norm() / y_.norm()).item()
    model.train()
    influence = block_influence(model, iter(data))
    assert_close(influence, turned / tokens)
    assert model.training
    assert not any(layer._forward_hooks for layer in decoder(model)[1])


def test_padding_does_not_count():
    model, (batch, *_) = build(), batches()
    rows = [{k: v[i : i + 1, : batch["attention_mask"][i].sum()] for k, v in batch.items()} for i in range(3)]
    assert_close(block_influence(model, [batch]), block_influence(model, rows), rtol=1e-6, atol=1e-8)
    assert_close(loss_increase(model, [batch]), loss_increase(model, rows), rtol=1e-4, atol=1e-5)
    del rows[1]["attention_mask"], rows[2]["attention_mask"]
    assert_close(block_influence(model, rows), block_influence(model, [batch]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("idle", [1, 2])
def test_a_layer_that_does_nothing_goes_first(name, idle):
    model, data = build(name), batches()
    make_identity(model, idle)
    influence, increase = block_influence(model, data), loss_increase(model, data)
    assert influence[idle].abs() < 1e-12
    assert increase[idle] == 0
    assert influence.argmin() == idle
    assert idle not in choose_layers(influence, L - 1)
    small = keep_layers(model, choose_layers(influence, L - 1))
    assert_close(logits(small, data[0]), logits(model, data[0]), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2", "falcon"])
def test_loss_increase_by_brute_force(name):
    model, data = build(name), batches()
    model.train()
    increase = loss_increase(model, data)
    assert model.training
    model.eval()
    base = answer_loss(model, data)
    expected = [answer_loss(keep_layers(model, [i for i in range(L) if i != out]), data) - base for out in range(L)]
    assert_close(increase, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    assert all("forward" not in vars(layer) for layer in decoder(model)[1])


@pytest.mark.parametrize("name", ["llama", "falcon"])
@pytest.mark.parametrize("ends", [(0, 0), (1, 1)])
def test_greedy_pruning_by_brute_force(name, ends):
    model, data = build(name, seed=3), batches()
    base = answer_loss(model, data)
    kept, expected = list(range(L)), []
    while len(kept) > 2:
        free = [i for i in kept if ends[0] <= i < L - ends[1]]
        costs = {out: answer_loss(keep_layers(model, [i for i in kept if i != out]), data) - base for out in free}
        kept.remove(min(costs, key=costs.get))
        expected.append(costs)
    before = copy.deepcopy(model.state_dict())
    found, increase = prune_greedily(model, iter(data), 2, ends=ends)
    assert found == kept
    assert increase.shape == (2, L)
    for row, costs in zip(increase, expected, strict=True):
        for layer, cost in costs.items():
            assert row[layer].item() == pytest.approx(cost, rel=1e-4, abs=1e-5)
    assert_close(increase[0], loss_increase(model, data))
    assert increase[1].isnan().sum() == (1 if ends == (0, 0) else 3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert prune_greedily(model, data, L, ends=ends).kept == list(range(L))


def test_greedy_sees_what_single_layers_hide():
    # Layers 1 and 2 both take the absolute value: either is dispensable, the pair is not. Layer 3 matters a little.
    model, data = build(), batches()
    for layer in (1, 2):
        vars(decoder(model)[1][layer])["forward"] = lambda hidden, **kwargs: hidden.abs()
    vars(decoder(model)[1][3])["forward"] = lambda hidden, **kwargs: hidden + 0.01 * hidden.roll(1, dims=-1)
    for batch in data:  # the complete model is right about everything
        batch["labels"][:, 1:] = logits(model, batch)[:, :-1].argmax(-1)
    increase = loss_increase(model, data)
    assert increase[1] == increase[2] == 0
    assert choose_layers(increase, 2, ends=(1, 0)) == [0, 3]
    kept, rounds = prune_greedily(model, data, 2, ends=(1, 0))
    assert kept == [0, 1]
    assert rounds[1, 1] > 10 * rounds[1, 3] > 0
    assert vars(decoder(model)[1][1])["forward"](-torch.ones(1)) == 1  # a forward that was replaced before stays so


def test_choose_layers():
    influence = torch.tensor([0.0, 0.5, 0.2, 0.2, 0.9, 0.0])
    assert choose_layers(influence, 6) == [0, 1, 2, 3, 4, 5]
    assert choose_layers(influence, 4) == [0, 1, 4, 5]
    assert choose_layers(influence, 5) == [0, 1, 2, 4, 5]  # of equals, the earlier
    assert choose_layers(influence, 2) == [0, 5]
    assert choose_layers(influence, 2, ends=(0, 0)) == [1, 4]
    assert choose_layers(influence, 3, ends=(2, 1)) == [0, 1, 5]
    assert choose_layers(torch.ones(1), 1) == [0]


def test_bad_arguments_say_what_to_do():
    model, data = build(), batches()
    for keep in (0, 1, 5):
        with pytest.raises(ValueError, match="between 2"):
            choose_layers(torch.ones(L), keep)
        with pytest.raises(ValueError, match="between 2"):
            prune_greedily(model, data, keep)
    with pytest.raises(ValueError, match="NaN"):
        choose_layers(torch.tensor([0.1, torch.nan, 0.2]), 2)
    for layers in ([], [1, 0], [0, 0], [-1, 2], [0, 4]):
        with pytest.raises(ValueError, match="ascending"):
            keep_layers(model, layers)
    with pytest.raises(DataError, match="no trained token"):
        loss_increase(model, [batch | {"labels": torch.full_like(batch["labels"], IGNORE)} for batch in data])
    with pytest.raises(DataError, match="no real token"):
        block_influence(model, [])
    with pytest.raises(PlanError, match="merge_and_unload"):
        keep_layers(torch.nn.Linear(2, 2), [0])
    with pytest.raises(PlanError, match="T5ForConditionalGeneration"):
        keep_layers(
            transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=V, d_model=16, num_layers=1, num_heads=2, d_ff=8, d_kv=8)
            ),
            [0],
        )


def encoder(labels: int = 3):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=16,
        num_hidden_layers=L,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=64,
        num_labels=labels,
        initializer_range=0.3,
    )
    return transformers.BertForSequenceClassification(config).eval()


@pytest.mark.parametrize("labels", [3, 1])
def test_layers_of_a_classifier_are_measured_and_kept(labels, tmp_path):
    """Loss without a layer, by deleting it; and the smaller classifier loads in plain transformers."""
    model = encoder(labels)
    batch = {k: v for k, v in batches()[0].items() if k != "labels"}
    n = len(batch["input_ids"])
    batch["labels"] = torch.arange(n) % 3 if labels == 3 else torch.linspace(-1, 1, n)

    def loss(some):
        with torch.no_grad():
            out = some(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        if labels == 1:
            return float(torch.nn.functional.mse_loss(out[:, 0], batch["labels"]))
        return float(torch.nn.functional.cross_entropy(out, batch["labels"]))

    found = loss_increase(model, [batch])
    for layer in range(L):
        without = keep_layers(model, [i for i in range(L) if i != layer])
        assert float(found[layer]) == pytest.approx(loss(without) - loss(model), abs=1e-5)
    assert (block_influence(model, [batch]) > 0).all()
    small = keep_layers(model, [0, L - 1])
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loss(again) == pytest.approx(loss(small), abs=1e-6)


def test_a_failure_leaves_the_model_as_it_was():
    model, data = build(), batches()
    data[1]["input_ids"] = data[1]["input_ids"] + V  # outside the vocabulary
    expected = logits(model, batches()[0])
    for measure in (block_influence, loss_increase):
        with pytest.raises(IndexError):
            measure(model.train(), data)
        assert model.training
        assert all("forward" not in vars(layer) and not layer._forward_hooks for layer in decoder(model)[1])
    assert_close(logits(model.eval(), batches()[0]), expected, rtol=0, atol=0)


def test_a_batch_without_answers_is_passed_over():
    model, data = build(), batches()
    mute = data[1] | {"labels": torch.full_like(data[1]["labels"], IGNORE)}
    assert_close(loss_increase(model, [data[0], mute]), loss_increase(model, data[:1]))
