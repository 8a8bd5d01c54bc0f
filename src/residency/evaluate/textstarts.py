"""Where a decoder's layers are, and which token of each row is the first: what a probe and an ablation both ask.

A model's own tokens may start anywhere in a row of a batch: with left padding the first token of a text stands behind
the padding. `Starts` listens at the decoder's entrance and remembers, for the batch under way, which tokens are real
and where each text begins, so that hooks deeper inside can find the token that serves as attention sink.

Works for the models of transformers in the llama layout (`base_model.layers`, each with `self_attn` and `mlp`) and for
any module built the same way, such as `backcopy.TinyTransformer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn


def decoder_layers(model: Any) -> Sequence[Any]:
    """The decoder layers, each with `self_attn` and `mlp`.

    Raises:
        ValueError: When the model is not laid out like that.
    """
    layers = getattr(getattr(model, "base_model", model), "layers", None)
    if layers is None or not len(layers) or not all(hasattr(layers[0], name) for name in ("self_attn", "mlp")):
        raise ValueError(
            f"{type(model).__name__} has no decoder layers with self_attn and mlp; give a model in the llama layout"
        )
    return layers


def chosen_layers(model: Any, layer: int | Sequence[int]) -> list[Any]:
    """One layer or several by number, counted from 0.

    Raises:
        ValueError: When there is no such layer.
    """
    layers = decoder_layers(model)
    wanted = [layer] if isinstance(layer, int) else list(layer)
    if bad := [i for i in wanted if not 0 <= i < len(layers)]:
        raise ValueError(f"there is no layer {bad[0]}: the model has layers 0 to {len(layers) - 1}")
    return [layers[i] for i in wanted]


def first_tensor(output: Any) -> Tensor:
    """The hidden states of a module that returns them alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


class Starts:
    """Which tokens of the batch under way are real, and where each text begins.

    Attributes:
        real: [B, T] bool.
        first: [B] index of the first real token of each row.
        places: [B, T] place of each token in its text, from 0; negative before it begins.
    """

    real: Tensor
    first: Tensor
    places: Tensor

    def __init__(self, model: Any) -> None:
        self._handle = getattr(model, "base_model", model).register_forward_pre_hook(self._begin, with_kwargs=True)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs["inputs_embeds"]
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 and isinstance(args[1], Tensor) else None)
        past = kwargs.get("past_key_values")
        if past is not None and past.get_seq_length():
            raise ValueError("the probe and the ablations look at whole texts, but this batch continues a cache")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self.real = mask.bool()
        elif mask is None:
            self.real = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        else:
            raise ValueError("give attention_mask as [B, T]: a mask of another shape does not tell where texts begin")
        self.first = self.real.long().argmax(1)
        self.places = self.real.long().cumsum(1) - 1

    def close(self) -> None:
        """Stop listening."""
        self._handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
