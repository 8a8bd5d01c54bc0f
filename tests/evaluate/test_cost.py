"""Cost: the cache formula against a real cache, bytes against the file system, speed against a slowed model."""

import time

import pytest
import torch
import transformers as tf

from residency.errors import DataError
from residency.evaluate.cost import folder_bytes, kv_bytes_per_token, measure_speed

SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "config",
    [
        tf.LlamaConfig(**SMALL),
        tf.LlamaConfig(**SMALL, num_key_value_heads=1),
        tf.LlamaConfig(**SMALL, num_key_value_heads=2, head_dim=16),
        tf.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4),
        tf.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8),
    ],
    ids=["mha", "mqa", "head-size", "gpt2", "gemma2"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_formula_is_what_a_cache_holds(config, dtype):
    model = tf.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.ones(1, 7, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_bytes_per_token(model.config, dtype) == held / 7
    assert kv_bytes_per_token(model.config.to_dict(), dtype) == held / 7


def test_cache_takes_the_type_of_the_config():
    config = tf.LlamaConfig(**SMALL, dtype="bfloat16")
    assert kv_bytes_per_token(config) == kv_bytes_per_token(config.to_dict()) == 2 * 3 * 32 * 2
    assert kv_bytes_per_token(tf.LlamaConfig(**SMALL)) == 2 * 3 * 32 * 4


def test_layers_of_linear_attention_hold_no_cache():
    config = tf.LlamaConfig(**SMALL).to_dict() | {"layer_types": ["linear_attention", "full_attention", "mamba"]}
    assert kv_bytes_per_token(config, torch.float32) == 2 * 32 * 4


def test_folder_bytes(tmp_path):
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**SMALL))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "training_args.bin").write_bytes(b"x" * 999)
    weights = sum(p.nbytes for p in model.parameters())
    assert weights <= folder_bytes(tmp_path) < weights * 1.2
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there are no"):
        folder_bytes(tmp_path / "empty")


def test_speed_sees_where_the_time_goes():
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**SMALL)).train()
    plain = measure_speed(model, [1, 2, 3], new_tokens=4)
    assert model.training
    assert plain.tokens_per_second > 0

    def slow(module, args):
        time.sleep(0.1 if args[0].shape[1] > 1 else 0.02)  # prefill 100 ms, each step 20 ms

    handle = model.get_input_embeddings().register_forward_pre_hook(slow)
    slowed = measure_speed(model, [1, 2, 3], new_tokens=6)
    handle.remove()
    assert 100 <= slowed.time_to_first_token_ms < 100 + plain.time_to_first_token_ms + 400
    assert 5 < slowed.tokens_per_second <= 50


def test_every_token_after_the_first_is_one_step():
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**SMALL)).eval()
    seen = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    measure_speed(model, [4, 5, 6, 7], new_tokens=5, repeats=2)
    handle.remove()
    assert seen == [4, 1, *[4, 1, 1, 1, 1] * 2]


def test_bad_input_is_refused():
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**SMALL))
    with pytest.raises(DataError, match="no tokens"):
        measure_speed(model, [])
    with pytest.raises(ValueError, match="new_tokens"):
        measure_speed(model, [1], new_tokens=1)
