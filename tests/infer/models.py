"""Small random decoders whose greedy text does not fall into a loop at once."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny(vocabulary: int = 61, layers: int = 3, seed: int = 0, **config) -> LlamaForCausalLM:
    """A random llama in float32 and evaluation mode: D = 32, 4 query heads, 2 key/value heads."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | config)).eval().requires_grad_(False)
