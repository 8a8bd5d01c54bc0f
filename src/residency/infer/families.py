"""Which models keep their meaning when entries of their cache are dropped or taken back.

Evicting keeps keys and values of some tokens, and gives what is left the positions 0, 1, 2, … again. That is exact
only where a key can be moved to another position by a rotation: rotary positions whose frequencies are fixed. It has
no meaning where the layer itself forgets by distance (sliding windows, chunked or linear attention) or where a
position is learned or added as a bias. Drafting takes rejected guesses back out of the cache, and reads positions
beyond the last certain one: it asks for the same full attention and the same fixed frequencies, and for the final norm
of llama-like decoders, in front of which drafters read the target's state.

Read from a config, so that a plan can refuse without weights, by the same predicates as the run. What a config does
not tell (the layout of the rotation, the modules of a decoder nobody listed here) the run finds on the model itself:
`rotation.rotation_of`, `drafter.final_norm`.

Paper of rotary positions: Su et al., "RoFormer", 2021, arXiv 2104.09864. Cost: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from residency.store import read_json

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

NORMLESS = (
    "Bamba", "Bart", "Bert", "BigBird", "BioGpt", "Blenderbot", "Bloom", "Blt", "CTRL", "Camembert", "CodeGen",
    "CpmAnt", "Data2Vec", "Electra", "ErnieFor", "Falcon", "Fuyu", "GPT", "Git", "HrmText", "Jamba", "Lfm", "Llama4",
    "MBart", "Mamba", "Marian", "MegatronBert", "Mllama", "ModernBert", "Mpt", "Musicgen", "Mvp", "NemotronH", "OPT",
    "OpenAIGPT", "PLBart", "Pegasus", "Persimmon", "PhiFor", "ProphetNet", "RecurrentGemma", "Reformer", "RemBert",
    "RoCBert", "RoFormer", "Roberta", "Rwkv", "TrOCR", "Whisper", "XGLM", "XLM", "XLNet", "Xmod", "Zamba", "xLSTM",
)  # fmt: skip
"""Beginnings of architectures of transformers whose decoder has no `norm` between its last layer and the head."""


def unevictable(config: Mapping[str, Any]) -> str | None:
    """Why entries of this model's cache cannot be dropped; None when nothing speaks against it.

    Args:
        config: The content of a config.json, or `model.config.to_dict()`.
    """
    architecture = _architecture(config)
    if architecture.startswith(UNROTATED):
        return f"a {architecture} has no rotary keys that could be moved to new positions"
    if (reason := forgetful(config)) is not None:
        return reason
    if _text(config).get("attn_logit_softcapping"):
        return "its attention logits are capped, and the scores of entries would not be what the model attends to"
    return drifting(config)


def undraftable(config: Mapping[str, Any]) -> str | None:
    """Why guesses cannot be verified for this model; None when nothing speaks against it.

    Args:
        config: The content of a config.json, or `model.config.to_dict()`.
    """
    architecture = _architecture(config)
    if architecture.startswith(NORMLESS):
        return f"a {architecture} has no final norm like llama's, in front of which drafters read its state"
    return forgetful(config) or drifting(config)


def forgetful(config: Mapping[str, Any]) -> str | None:
    """Why the cache is not one entry per layer and token, which stays until it is taken out; None when it is."""
    text = _text(config)
    if config.get("is_encoder_decoder") or text.get("is_encoder_decoder"):
        return "an encoder-decoder has a second cache"
    kinds = text.get("layer_types")
    if other := sorted(set(kinds or ()) - {"full_attention"}):
        return f"its layers are not all full attention: {', '.join(other)}"
    if not kinds and text.get("sliding_window") and text.get("use_sliding_window", True):
        return f"its attention sees a sliding window of {text['sliding_window']:,} tokens, which forgets by distance"
    return None


def drifting(config: Mapping[str, Any]) -> str | None:
    """Why the rotation of a position is not the same in every text that contains it; None when it is."""
    text = _text(config)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    parts = [v for v in rope.values() if isinstance(v, Mapping)] or [rope]
    for part in parts:
        kind = part.get("rope_type") or part.get("type") or "default"
        if kind not in FIXED:
            return f"its rotary positions are of kind `{kind}`, whose frequencies change with the length of the text"
    return None


def config_of(architecture: str, folder: str) -> dict[str, Any]:
    """What a plan knows of a model that does not exist yet: its ancestor's config.json, and its own architecture.

    Args:
        architecture: Of the planned model.
        folder: Of the base it descends from, or "". A base of another architecture lends only its tokenizer, and its
            config says nothing.
    """
    file = Path(folder) / "config.json"
    known = read_json(file) if folder and file.exists() else {}
    if (_architecture(known) or architecture) != architecture:
        known = {}
    return known | {"architectures": [architecture]}


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("text_config") or config


def _architecture(config: Mapping[str, Any]) -> str:
    return (config.get("architectures") or [""])[0] or ""
