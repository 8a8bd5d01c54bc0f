"""What a plan refuses by the architecture's name is what the run refuses on the model itself."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from residency.errors import PlanError
from residency.infer.drafted import check
from residency.infer.drafter import final_norm
from residency.infer.families import config_of, drifting, forgetful, undraftable, unevictable

NAMES = (
    "Bloom CodeGen Cohere Falcon Gemma GPT2 GPTBigCode GPTJ GPTNeo GPTNeoX Gemma2 Gemma3 GptOss Granite Llama Mamba "
    "Mistral Mpt OPT Olmo2 Persimmon Phi Phi3 Qwen2 Qwen3 StableLm Starcoder2"
)
LENGTHS = ("dynamic", "longrope")


@pytest.mark.parametrize("name", NAMES.split())
def test_a_name_stands_for_the_final_norm_of_the_model(name):
    """Without weights (meta device), so with transformers' own classes and no checkpoint of any of them."""
    kind = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    config = kind.config_class()
    with torch.device("meta"):
        model = kind(config)
    asked = config_of(kind.__name__, "")
    if undraftable(asked) is None:
        assert isinstance(final_norm(model), torch.nn.Module)
        assert getattr(model.get_output_embeddings(), "bias", None) is None  # the other thing a draft needs
    else:
        with pytest.raises(PlanError, match="cannot be drafted for"):
            final_norm(model)
    # and of the whole config: what the run refuses on the model, the plan refuses on its config.json
    written = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [kind.__name__]}
    try:
        check(model)
    except PlanError:
        assert undraftable(written)
    else:
        assert undraftable(written) is None


def test_eviction_and_drafting_share_what_they_share():
    for config in (
        {"is_encoder_decoder": True},
        {"layer_types": ["full_attention", "chunked_attention"]},
        {"sliding_window": 8},
        {"text_config": {"sliding_window": 8}},
    ):
        assert undraftable(config) == unevictable(config) == forgetful(config) is not None
        assert drifting(config) is None
    for kind in LENGTHS:
        for config in (
            {"rope_parameters": {"rope_type": kind}},
            {"rope_scaling": {"type": kind}},
            {"text_config": {"rope_parameters": {"full_attention": {"rope_type": kind}}}},
        ):
            assert undraftable(config) == unevictable(config) == drifting(config) is not None
            assert forgetful(config) is None
    assert forgetful({}) is drifting({}) is undraftable({}) is unevictable({}) is None


def test_which_rotations_depend_on_the_length():
    """transformers' own table: the kinds it updates while a text grows are refused, the others are not."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fixed = [kind for kind in ROPE_INIT_FUNCTIONS if drifting({"rope_parameters": {"rope_type": kind}}) is None]
    assert set(LENGTHS).isdisjoint(fixed)
    assert {"linear", "llama3", "yarn"} <= set(fixed)


def test_the_config_of_an_ancestor(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "sliding_window": 8}))
    here = str(tmp_path)
    assert config_of("LlamaForCausalLM", here) == {"architectures": ["LlamaForCausalLM"], "sliding_window": 8}
    assert config_of("OtherForCausalLM", here) == {"architectures": ["OtherForCausalLM"]}
    assert config_of("LlamaForCausalLM", "") == config_of("LlamaForCausalLM", here + "/none")
    (tmp_path / "config.json").write_text(json.dumps({"sliding_window": 8}))
    assert config_of("LlamaForCausalLM", here)["sliding_window"] == 8
