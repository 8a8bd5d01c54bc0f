"""Second moments of keys and values per attention head: all that aligning and merging heads needs to know of the data.

The idea. Whether two key/value heads can be merged depends on how their vectors agree on real text. Caching those
vectors costs gigabytes per layer; but every quantity used later (rotations, similarities, distances, norms) is a
function of the Gram blocks alone, which are summed while the text streams by:

    C_ij = Σ_n x_i,n x_j,nᵀ            x_i,n [d]: key before RoPE, or value, of head i at token n
    mean cos(x_i R, x_j)   = tr(Rᵀ Ĉ_ij) / N        Ĉ: the same with every x_i,n scaled to length 1
    mean ‖x_i R − x_j‖²    = (tr C_ii + tr C_jj − 2 tr(Rᵀ C_ij)) / N         R orthogonal

The paper's: statistics of keys before RoPE and of values. Our choice: Gram blocks in float64 instead of the official
code's caches of all tokens (8.6 GB per layer and projection at 7B), real tokens only, and vectors of length 0 (a head
that is switched off) stay 0 when scaled.

Cost. Time: one forward pass per call and 2·2·N·(G·d)² multiply-adds per layer. Memory: 4·G²·d²·8 bytes per layer: 1.2
MB for SmolLM2-135M, 537 MB for Llama-2-7B, whose layers are therefore taken a few at a time (`layers`).

Paper: Jin et al., "Align Attention Heads Before Merging Them", Findings of EMNLP 2025, arXiv 2412.20677. Official code:
github.com/fpcsong/mha2gqa, commit c0706da (its calibration script reads layer 0 only).

Shapes: G key/value heads, H query heads, d head width, D model width, N tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from residency.compress.decoder import decoder
from residency.compress.headsupport import refusal
from residency.errors import DataError, PlanError
from residency.modes import evaluating
from residency.progress import Progress

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Attention:
    """One attention module and its layout.

    Args:
        module: The attention module.
        heads, kv_heads, head_dim: H, G, d.
    """

    module: Any
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def share(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Grams:
    """Gram blocks of one projection of one layer, float64 on the CPU.

    Args:
        raw: [G, G, d, d], Σ_n x_i,n x_j,nᵀ.
        unit: [G, G, d, d], the same of vectors scaled to length 1.
        tokens: N.
    """

    raw: Tensor
    unit: Tensor
    tokens: int


@dataclass(frozen=True)
class LayerGrams:
    """Keys before RoPE and values of one layer."""

    keys: Grams
    values: Grams


def attentions(model: PreTrainedModel) -> list[Attention]:
    """The attention modules of a model whose heads can be merged, in order of the layers.

    Raises:
        PlanError: When the architecture is not one of `headsupport.ARCHITECTURES`, a projection is no plain linear
            layer (adapters, quantisation), or RoPE turns only a part of the channels.
    """
    backbone, layers = decoder(model)
    if reason := refusal(type(model).__name__):
        raise PlanError(f"the heads of a {type(model).__name__} cannot be merged: {reason[0]}", hint=reason[1])
    config = backbone.config
    heads, found = config.num_attention_heads, []
    for index, layer in enumerate(layers):
        module: Any = getattr(layer, "self_attn", None)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            if type(getattr(module, name, None)) is not nn.Linear:
                raise PlanError(
                    f"layer {index} has a {type(getattr(module, name, None)).__name__} where a linear {name} is needed",
                    hint="merge adapters first (peft_model.merge_and_unload()); quantise after merging heads",
                )
        d = module.q_proj.out_features // heads
        turned = 2 * len(backbone.rotary_emb.inv_freq)
        if d % 2 or turned != d:
            raise PlanError(
                f"RoPE turns {turned} of {d} channels per head; heads are merged only where it turns all of them",
                where=f"layer {index}",
                hint="choose a base model with full rotary embeddings (llama, mistral, qwen2, gemma, …)",
            )
        found.append(Attention(module, heads, module.k_proj.out_features // d, d))
    return found


def needs_float64(model: PreTrainedModel) -> None:
    """Raise PlanError on a device without float64, in which all statistics and maps are computed."""
    if model.device.type == "mps":
        raise PlanError(
            "heads are merged in float64, which MPS does not have", hint="model.to('cpu'), and back afterwards"
        )


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    layers: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[LayerGrams]:
    """Gram blocks of keys before RoPE and of values, over the real tokens of all batches.

    Args:
        model: A supported causal language model; its mode is restored.
        batches: `input_ids` [B, T] and, unless nothing is padded, `attention_mask` [B, T].
        layers: Which layers to watch; by default all.
        progress: Where to report; None is silent.

    Returns:
        One entry per watched layer.

    Raises:
        DataError: When there is no real token, or keys or values are not finite.
    """
    needs_float64(model)
    batches, all_of_them = list(batches), attentions(model)
    watched = [all_of_them[i] for i in (range(len(all_of_them)) if layers is None else layers)]
    sums = [{name: _zeros(a) for name in ("k_proj", "v_proj")} for a in watched]
    tokens, real = 0, torch.empty(0, dtype=torch.bool)

    def watch(attention: Attention, into: list[Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            x = output[real.to(output.device)].double().reshape(-1, attention.kv_heads, attention.head_dim)
            into[0] += (x.flatten(1).T @ x.flatten(1)).cpu()
            x = x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
            into[1] += (x.flatten(1).T @ x.flatten(1)).cpu()

        return hook

    with evaluating(model), contextlib.ExitStack() as hooks:
        for attention, into in zip(watched, sums, strict=True):
            for name, pair in into.items():
                handle = getattr(attention.module, name).register_forward_hook(watch(attention, pair))
                hooks.callback(handle.remove)
        with (progress or Progress()).task("statistics of heads", len(batches)) as advance:
            for batch in batches:
                inputs = model_inputs(batch, model)
                real = real_tokens(inputs)
                decoder(model)[0](**inputs, use_cache=False)
                tokens += int(real.sum())
                advance(1)
    if not tokens:
        raise DataError("no real token in the batches", hint="merging heads needs at least one row to calibrate on")
    return [
        LayerGrams(*(_blocks(pair, a, tokens) for pair in into.values())) for a, into in zip(watched, sums, strict=True)
    ]


def layer_bytes(attention: Attention) -> int:
    """Memory of one layer's Gram blocks."""
    return 4 * (attention.kv_heads * attention.head_dim) ** 2 * 8


def model_inputs(batch: Batch, model: PreTrainedModel) -> dict[str, Any]:
    """The entries of a batch that the decoder takes, on its device."""
    names = ("input_ids", "attention_mask", "position_ids")
    return {name: batch[name].to(model.device) for name in names if name in batch}


def real_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """[B, T] boolean: the tokens that are not padding."""
    return inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()


def _zeros(attention: Attention) -> list[Tensor]:
    width = attention.kv_heads * attention.head_dim
    return [torch.zeros(width, width, dtype=torch.float64) for _ in range(2)]


def _blocks(pair: list[Tensor], attention: Attention, tokens: int) -> Grams:
    G, d = attention.kv_heads, attention.head_dim
    raw, unit = (x.reshape(G, d, G, d).permute(0, 2, 1, 3).contiguous() for x in pair)
    if not raw.isfinite().all():
        raise DataError(
            "keys or values are not finite on the calibration text", hint="load the model in float32 or bfloat16"
        )
    return Grams(raw, unit, tokens)
