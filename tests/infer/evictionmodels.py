"""Models and texts for the tests of caches that forget."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def llama(implementation="sdpa", **changes):
    """A tiny random Llama with grouped heads and attention that is not flat."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.25, attn_implementation=implementation,
        bos_token_id=None, eos_token_id=None, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def text(length, rows=1, seed=0):
    return torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(seed))
