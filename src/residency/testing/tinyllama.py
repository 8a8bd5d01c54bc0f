"""A random model small enough for hundreds of checks, whose answers are not trivial."""

from __future__ import annotations

from typing import Any


def tiny_llama(seed: int = 0, **changes: Any) -> Any:
    """A Llama in float32 and evaluation mode: three layers, D = 32, four query heads on two key/value heads, V = 61.

    Its weights are wide enough that attention is not flat and greedy text does not fall into a loop at once; no token
    ends a text. torch's random state stays as it was.

    Args:
        seed: Of the weights.
        changes: Other settings of `LlamaConfig`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval().requires_grad_(False)
