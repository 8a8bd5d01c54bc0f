"""Which models keep their meaning when entries of their cache are dropped and the rest moves together.

Evicting keeps keys and values of some tokens, and gives what is left the positions 0, 1, 2, … again. That is exact
only where a key can be moved to another position by a rotation: rotary positions whose frequencies are fixed. It has
no meaning where the layer itself forgets by distance (sliding windows, chunked or linear attention) or where a
position is learned or added as a bias. Read from a config, so that a plan can refuse without weights; what a config
does not tell (the layout of the rotation) is measured by `rotation.rotation_of`.

Paper of rotary positions: Su et al., "RoFormer", 2021, arXiv 2104.09864. Cost: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIXED = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose frequencies do not depend on the length of the text."""

UNROTATED = (
    "Bert",
    "Bloom",
    "CodeGen",
    "GPT2",
    "GPTBigCode",
    "GPTJ",
    "GPTNeoFor",
    "Jamba",
    "Mamba",
    "Mpt",
    "OPT",
    "RecurrentGemma",
    "Rwkv",
    "XGLM",
)
"""Beginnings of architectures without rotary keys in a common cache, so that a plan can refuse them."""


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why entries of this model's cache cannot be dropped; None when nothing speaks against it.

    Args:
        config: The content of a config.json, or `model.config.to_dict()`.
    """
    text = config.get("text_config") or config
    architecture = (config.get("architectures") or [""])[0] or ""
    if text.get("is_encoder_decoder"):
        return "an encoder-decoder has a second cache that no eviction sees"
    if architecture.startswith(UNROTATED):
        return f"a {architecture} has no rotary keys that could be moved to new positions"
    kinds = text.get("layer_types")
    if other := sorted(set(kinds or ()) - {"full_attention"}):
        return f"its layers are not all full attention: {', '.join(other)}"
    if not kinds and text.get("sliding_window") and text.get("use_sliding_window", True):
        return f"its attention sees a sliding window of {text['sliding_window']:,} tokens, which forgets by distance"
    if text.get("attn_logit_softcapping"):
        return "its attention logits are capped, and the scores of entries would not be what the model attends to"
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    parts = [v for v in rope.values() if isinstance(v, Mapping)] or [rope]
    for part in parts:
        kind = part.get("rope_type") or part.get("type") or "default"
        if kind not in FIXED:
            return f"its rotary positions are of kind `{kind}`, whose frequencies change with the length of the text"
    return None
