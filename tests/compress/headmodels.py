"""Tiny random models with attention heads to merge, and heads planted in them (used by the tests of head merging)."""

import torch
import transformers

V, D, L, HEAD = 61, 32, 2, 8
SMALL = {"vocab_size": V, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": L, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
SMALL |= {"bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": lambda **k: transformers.LlamaConfig(**SMALL | k),
    "llama-biased": lambda **k: transformers.LlamaConfig(**SMALL | {"attention_bias": True, "rope_theta": 50.0} | k),
    "llama-wide": lambda **k: transformers.LlamaConfig(**SMALL | {"head_dim": 12, "tie_word_embeddings": True} | k),
    "mistral": lambda **k: transformers.MistralConfig(**SMALL | {"sliding_window": 3} | k),
    "qwen2": lambda **k: transformers.Qwen2Config(**SMALL | k),
    "gemma": lambda **k: transformers.GemmaConfig(**SMALL | {"head_dim": 8} | k),
    "gemma2": lambda **k: transformers.Gemma2Config(
        **SMALL | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8} | k
    ),
    "granite": lambda **k: transformers.GraniteConfig(**SMALL | {"residual_multiplier": 0.5} | k),
    "smollm3": lambda **k: transformers.SmolLM3Config(**SMALL | {"no_rope_layers": [1, 0]} | k),
    "starcoder2": lambda **k: transformers.Starcoder2Config(**SMALL | k),
}


def build(name="llama", seed=0, dtype=torch.float32, scale=12.0, **changes):
    """A model whose attention is far from uniform, with random biases."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](**changes)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
            elif "bias" in key:
                parameter.normal_()
    return model.to(dtype)


def batches(seed=0, sizes=((3, 9), (2, 6))):
    """Batches with padding on the right of their first row."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for B, T in sizes:
        mask = torch.ones(B, T, dtype=torch.long)
        mask[0, T - 2 :] = 0
        made.append({"input_ids": torch.randint(3, V, (B, T), generator=generator), "attention_mask": mask})
    return made


@torch.no_grad()
def logits(model, batch):
    """[tokens, V] of the real tokens."""
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return out[batch["attention_mask"].bool()]


def random_planar(d, generator, scaled=False):
    """A rotation of every RoPE pair, written with complex numbers; with `scaled`, times a random length."""
    angle = torch.rand(d // 2, generator=generator, dtype=torch.float64) * 6.3
    size = torch.rand(d // 2, generator=generator, dtype=torch.float64) + 0.5 if scaled else torch.ones_like(angle)
    R = torch.zeros(d, d, dtype=torch.float64)
    for m in range(d // 2):
        a, b = size[m] * angle[m].cos(), size[m] * angle[m].sin()
        R[m, m], R[m, m + d // 2], R[m + d // 2, m], R[m + d // 2, m + d // 2] = a, -b, b, a
    return R


def random_orthogonal(d, generator):
    """Either orientation."""
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]


@torch.no_grad()
def plant(model, families, seed=0, scaled=False):
    """Make the key/value heads of each family copies of its first, each in coordinates of its own.

    Keys get planar maps, values orthogonal ones (any invertible ones with `scaled`).
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        attention = layer.self_attn
        d = attention.head_dim
        for family in families:
            for j in family[1:]:
                key = random_planar(d, generator, scaled)
                value = random_orthogonal(d, generator)
                if scaled:
                    value = value + 0.3 * torch.randn(d, d, generator=generator, dtype=torch.float64)
                for projection, R in ((attention.k_proj, key), (attention.v_proj, value)):
                    for parameter in (projection.weight, projection.bias):
                        if parameter is not None:
                            rows = parameter.view(-1, d, *parameter.shape[1:])
                            rows[j] = (R @ rows[family[0]].double()).to(parameter.dtype)
    return model
