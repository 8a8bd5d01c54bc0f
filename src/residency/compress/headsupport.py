"""Which architectures' heads can be merged exactly; known without importing torch, so that a plan can refuse early.

A planar rotation of keys and queries leaves attention as it was only if nothing but RoPE stands between projection
and dot product. Norms of queries and keys (Qwen3, Gemma 3, OLMo 2) weigh channels and break that; so do RoPE on
interleaved channels (Cohere, GLM), which would need another layout, and projections in one matrix (Phi-3).
"""

from __future__ import annotations

ARCHITECTURES = frozenset(
    {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "GraniteForCausalLM",
        "SmolLM3ForCausalLM",
        "Starcoder2ForCausalLM",
    }
)
"""Proven by the tests: rotated and permuted, each gives the same logits, and its merged checkpoint loads as it is."""

_NORMED = ("Qwen3", "Gemma3", "Olmo2", "Olmo3", "Cohere")
_SUPPORTED = "supported are " + ", ".join(sorted(name.removesuffix("ForCausalLM") for name in ARCHITECTURES))


def refusal(architecture: str) -> tuple[str, str] | None:
    """Why the heads of this architecture cannot be merged and what would help; None when they can."""
    if architecture in ARCHITECTURES:
        return None
    if architecture.startswith(_NORMED):
        return "it normalises queries and keys per channel, so rotating them is not exact", _SUPPORTED
    return "nobody has shown that rotating its heads is exact", _SUPPORTED
