"""ReLU-fication: what torch and transformers make of the same activation, and checkpoints that plain transformers reads."""

import json

import pytest
import torch
import transformers
from torch.testing import assert_close

from residency.compress import relufy as module
from residency.compress.relufy import (
    THRESHOLD_KEY,
    FATReLU,
    gated_ffns,
    install_thresholds,
    relufy,
    set_thresholds,
    thresholds,
)
from residency.errors import DataError, PlanError

V, L = 40, 3
SMALL = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": L}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "llama-bias": lambda: transformers.LlamaConfig(**SMALL, mlp_bias=True),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL),
    "gemma": lambda: transformers.GemmaConfig(**SMALL, head_dim=4, pad_token_id=0),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=4, pad_token_id=0),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=4, pad_token_id=0),
}


def build(name="llama", seed=0):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(12)
    return model


def ids(B=2, T=7, seed=0):
    return torch.randint(1, V, (B, T), generator=torch.Generator().manual_seed(seed))


def logits(model, tokens=None):
    with torch.no_grad():
        return model(ids() if tokens is None else tokens).logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fatrelu_is_torch_threshold_but_keeps_ties(dtype):
    z = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    for t in (0.0, 0.25, 1.0):
        free = z[z != t]  # of ties below
        mine, theirs = FATReLU(t)(free), torch.nn.functional.threshold(free, t, 0.0)
        assert mine.dtype == dtype
        assert_close(mine, theirs, rtol=0, atol=0)
    tie = torch.tensor([0.25, 0.5, 1.0], dtype=dtype)
    assert FATReLU(0.5)(tie).tolist() == [0.0, 0.5, 1.0]
    assert torch.nn.functional.threshold(tie, 0.5, 0.0).tolist() == [0.0, 0.0, 1.0]
    assert_close(FATReLU(0.0)(z), torch.relu(z), rtol=0, atol=0)


def test_fatrelu_extremes_and_gradient():
    z = torch.tensor([-torch.inf, -1.0, 0.2, 0.3, torch.inf, torch.nan], requires_grad=True)
    out = FATReLU(0.25)(z)
    assert out[:5].tolist() == [0, 0, 0, pytest.approx(0.3), torch.inf]
    assert out[5].isnan()
    out[:5].sum().backward()
    assert z.grad[:5].tolist() == [0, 0, 0, 1, 1]
    assert FATReLU(1.0)(torch.empty(0, 3)).shape == (0, 3)
    for bad in (-0.1, float("nan"), float("inf"), True, "0.1"):
        with pytest.raises(ValueError, match="threshold"):
            FATReLU(bad)


@pytest.mark.parametrize("name", MODELS)
def test_a_relufied_model_is_what_transformers_builds_with_relu(name, tmp_path):
    model = build(name)
    before = logits(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    assert relufy(model) is model
    assert (logits(model) - before).abs().max() > 1e-3
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    config = MODELS[name]()
    for key in ("hidden_act", "hidden_activation"):
        if hasattr(config, key):
            setattr(config, key, "relu")
    torch.manual_seed(1)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.load_state_dict(weights)
    assert_close(logits(model), logits(theirs), rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    assert THRESHOLD_KEY not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
def test_thresholds_survive_the_disk_and_plain_transformers_reads_relu(name, tmp_path):
    model, given = build(name), [0.3, 0.0, 1.5]
    plain = logits(relufy(model))
    shifted = logits(set_thresholds(model, given))
    assert (shifted - plain).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())[THRESHOLD_KEY] == given
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(logits(loaded), plain, rtol=0, atol=0)
    assert install_thresholds(loaded) is loaded
    assert thresholds(loaded) == given
    assert_close(logits(loaded), shifted, rtol=0, atol=0)
    set_thresholds(loaded, 0)
    assert_close(logits(loaded), plain, rtol=0, atol=0)
    assert THRESHOLD_KEY not in loaded.config.to_dict()


def test_an_endless_threshold_silences_the_layer():
    model = relufy(build(), threshold=1e30)
    x = torch.randn(2, 3, 16)
    for ffn in gated_ffns(model):
        assert not ffn(x).any()
    assert thresholds(model) == [1e30] * L


def test_models_without_thresholds_pass_through():
    for model in (
        build(),
        torch.nn.Linear(2, 2),
        transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=V)),
    ):
        before = model.state_dict()
        assert install_thresholds(model) is model
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_edited_config_is_refused():
    for given, message in (
        ([0.1], "1 thresholds for 3 layers"),
        ([0.1, -1, 0], "negative"),
        ("auto", "threshold"),
        (["a", "b", "c"], "number"),
    ):
        model = relufy(build())
        setattr(model.config, THRESHOLD_KEY, given)
        with pytest.raises(DataError, match=message):
            install_thresholds(model)
    model = build()  # SiLU
    setattr(model.config, THRESHOLD_KEY, [0.1] * L)
    with pytest.raises(DataError, match="SiLU"):
        install_thresholds(model)


def test_what_has_no_gated_layers_is_refused():
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=V))
    phi3 = transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**SMALL, pad_token_id=0, eos_token_id=1, bos_token_id=1)
    )
    experts = transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(**SMALL, num_experts=2, moe_intermediate_size=8, shared_expert_intermediate_size=8)
    )
    mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=2))
    for model in (gpt2, phi3, experts, mixtral):
        with pytest.raises(PlanError, match="layer 0 of a"):
            relufy(model)
    with pytest.raises(PlanError, match="SiLU"):
        thresholds(build())
    with pytest.raises(PlanError, match="SiLU"):
        set_thresholds(build(), 0.1)
    with pytest.raises(ValueError, match="2 thresholds for 3 layers"):
        set_thresholds(relufy(build()), [0.1, 0.2])


def test_a_model_that_does_not_read_its_config_is_left_alone(monkeypatch):
    model = build()
    before = logits(model)

    class Stubborn(type(model)):
        def __init__(self, config):
            super().__init__(config)
            for ffn in gated_ffns(self):
                ffn.act_fn = torch.nn.SiLU()

    model.__class__ = Stubborn
    with pytest.raises(PlanError, match="would have SiLU"):
        relufy(model)
    assert model.config.hidden_act == "silu"
    assert_close(logits(model), before, rtol=0, atol=0)


def test_through_an_adapter_and_without_touching_the_random_state():
    import peft

    model = build()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["down_proj", "gate_proj"]))
    state = torch.random.get_rng_state()
    relufy(adapted, 0.1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.config.hidden_act == "relu"
    assert thresholds(model) == [0.1] * L
    assert len(module.gated_ffns(adapted)) == L
