"""Tiny random decoders of every supported family, with attention far from uniform."""

import torch
import transformers

V = 61
SMALL = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 128}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": lambda **k: transformers.LlamaConfig(**SMALL | k),
    "llama-scaled": lambda **k: transformers.LlamaConfig(
        **SMALL
        | {"attention_bias": True, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}
        | k
    ),
    "mistral": lambda **k: transformers.MistralConfig(**SMALL | {"sliding_window": 11} | k),
    "qwen2": lambda **k: transformers.Qwen2Config(**{n: v for n, v in SMALL.items() if n != "head_dim"} | k),
    "qwen3": lambda **k: transformers.Qwen3Config(**SMALL | k),
    "gemma": lambda **k: transformers.GemmaConfig(**SMALL | k),
    "gemma2": lambda **k: transformers.Gemma2Config(
        **SMALL | {"sliding_window": 13, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 2.0} | k
    ),
    "gemma3": lambda **k: transformers.Gemma3TextConfig(
        **SMALL | {"sliding_window": 13, "query_pre_attn_scalar": 9} | k
    ),
}


def build(name="llama", seed=0, dtype=torch.float32, scale=10.0, attention=None, **changes):
    torch.manual_seed(seed)
    config = CONFIGS[name](**changes)
    if attention:
        config._attn_implementation = attention
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in key:
                parameter.mul_(scale)
            elif "norm" in key or "bias" in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def ids(B, T, seed=0):
    return torch.randint(3, V, (B, T), generator=torch.Generator().manual_seed(seed))


def padded(side, lengths=(25, 14, 19), seed=0):
    """Texts, and a batch of them padded on one side."""
    texts = [ids(1, n, seed + i)[0] for i, n in enumerate(lengths)]
    width = max(lengths)
    inputs, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    for i, text in enumerate(texts):
        where = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        inputs[i, where], mask[i, where] = text, 1
    return texts, {"input_ids": inputs, "attention_mask": mask}
