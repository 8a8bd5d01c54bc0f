"""Moving keys to other positions: what a rotary embedding did at one place can be done over for another.

A rotary embedding turns the pairs (k_i, k_{i+r/2}) of a key at position p by the angles pθ_i. Turning once more by
(p' − p)θ_i gives the key at p', because rotations about one axis add up:

    R(p' − p) R(p) k = R(p') k,        (R(a) k)_i = k_i cos aθ_i − k_{i+r/2} sin aθ_i
                                       (R(a) k)_{i+r/2} = k_{i+r/2} cos aθ_i + k_i sin aθ_i

Scaled variants with fixed frequencies (linear, llama3, yarn) multiply cosine and sine by a constant; the key has it
already, so the turn has none of it: a second time would scale twice. Computed in float32, rounded once to the key's
type. Where r is smaller than the head, the rest of the key stays as it is; layers without positions are left alone.

Whether a model rotates so is not read from its name but measured once: two copies of a token at two positions, each
seeing only itself, must leave keys that the turn maps onto each other, in every layer.

Source: Su et al., "RoFormer", 2021, arXiv 2104.09864; moving cached keys is StreamingLLM's (arXiv 2309.17453).
Cost: six operations per element; the measurement is one pass over two tokens, remembered per model.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from residency.errors import PlanError
from residency.infer.families import unevictable
from residency.infer.watch import Watch, watching

Angles = tuple[Tensor, Tensor]
"""Cosines and sines."""


@dataclass(frozen=True)
class Rotation:
    """How a model rotates its keys.

    Args:
        frequencies: θ [r/2], float32.
        turned: Per layer, whether it rotates at all.
    """

    frequencies: Tensor
    turned: tuple[bool, ...]

    def angles(self, steps: Tensor) -> Angles:
        """Cosine and sine of a turn by whole positions: [B, S] → two of [B, 1, S, r/2]; [B, g, S] → [B, g, S, r/2]."""
        steps = steps[:, None] if steps.ndim == 2 else steps
        angles = steps[..., None].float() * self.frequencies.to(steps.device)
        return angles.cos(), angles.sin()


def turn(keys: Tensor, angles: Angles, back: bool = False) -> Tensor:
    """Rotate keys [B, G, S, d] by angles [B, 1 or G, S, r/2]; `back` rotates the other way."""
    cos, sin = angles
    half = cos.shape[-1]
    kind = torch.promote_types(keys.dtype, torch.float32)
    first, second = keys[..., :half].to(kind), keys[..., half : 2 * half].to(kind)
    sin = -sin if back else sin
    turned = torch.empty_like(keys)
    turned[..., :half] = first * cos - second * sin
    turned[..., half : 2 * half] = second * cos + first * sin
    turned[..., 2 * half :] = keys[..., 2 * half :]
    return turned


_known: weakref.WeakKeyDictionary[Any, Rotation] = weakref.WeakKeyDictionary()


def rotation_of(model: Any) -> Rotation:
    """How this model rotates its keys, measured.

    Raises:
        PlanError: When its cache cannot be evicted from: no decoder of transformers, a window, frequencies that depend
            on the length, another layout of the rotation, or an attention that cannot be watched.
    """
    if not isinstance(model, PreTrainedModel):
        raise PlanError(
            f"a {type(model).__name__} has no cache that this works on, only a transformers model has",
            hint="merge adapters first: model = peft_model.merge_and_unload()",
        )
    layers = model.config.get_text_config().num_hidden_layers
    known = _known.get(model)
    if known is None or len(known.turned) != layers:
        known = _known[model] = _measure(model, layers)
    return known


def _measure(model: Any, layers: int) -> Rotation:
    name = type(model).__name__
    if (reason := unevictable(model.config.to_dict())) is not None:
        raise PlanError(f"entries of the cache of a {name} cannot be evicted: {reason}", hint="use the full cache")
    frequencies = getattr(getattr(model.base_model, "rotary_emb", None), "inv_freq", None)
    if not isinstance(frequencies, Tensor):
        raise PlanError(
            f"a {name} has no rotary positions, so kept keys cannot move together", hint="use the full cache"
        )
    frequencies = frequencies.detach().float()
    seen: set[int] = set()
    far = 29
    device = model.device
    cache = DynamicCache()
    ids = torch.ones(1, 2, dtype=torch.long, device=device)
    watch = Watch(see=lambda layer, _: seen.add(layer))
    with torch.no_grad(), watching(model, watch):
        model.base_model(
            input_ids=ids,
            attention_mask=torch.eye(2, dtype=torch.bool, device=device)[None, None],
            position_ids=torch.tensor([[0, far]], device=device),
            past_key_values=cache,
            use_cache=True,
        )
    if len(seen) != layers or len(cache.layers) != layers:
        raise PlanError(f"the attention of a {name} cannot be watched", hint="use the full cache")
    angles = Rotation(frequencies, ()).angles(torch.tensor([[far]], device=device))
    turned = []
    layer: Any
    for index, layer in enumerate(cache.layers):
        near, distant = layer.keys[:, :, :1], layer.keys[:, :, 1:]
        fits = 2 * len(frequencies) <= near.shape[-1]
        slack = (1e-3 if near.dtype in (torch.float32, torch.float64) else 5e-2) * float(distant.float().norm())
        if fits and float((turn(near, angles).float() - distant.float()).norm()) <= slack:
            turned.append(True)
        elif float((near.float() - distant.float()).norm()) <= slack:
            turned.append(False)
        else:
            raise PlanError(
                f"layer {index} of a {name} does not rotate its keys in two halves by fixed frequencies",
                hint="use the full cache",
            )
    return Rotation(frequencies, tuple(turned))
