"""The decoder layers of a causal language model: find them, and run the model with some of them replaced for a while.

Depth pruning, layer skipping and the study of layers all need a model to run as if some layers did something else.
The layers stay in place here, with every attribute the backbone may ask them for; only their `forward` is exchanged,
and put back when the block ends, however it ends. Not safe while another thread runs the same model.

Example:
    >>> _, layers = decoder(model)
    >>> idle = passing(model)
    >>> with evaluating(model), replaced(layers, {3: idle, 7: idle}):
    ...     model(**batch)  # without layers 3 and 7
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from residency.errors import PlanError

Forward = Callable[..., Any]


def decoder(model: PreTrainedModel) -> tuple[Any, nn.ModuleList]:
    """The backbone without its head, and its list of layers: a decoder's, or those of a BERT-like encoder.

    Raises:
        PlanError: For what is not a transformers model, or has no list `.layers`, `.h` or `.encoder.layer` of all its
            layers.
    """
    if not isinstance(model, PreTrainedModel):
        raise PlanError(
            f"a {type(model).__name__} has no decoder layers to work on, only a transformers model has",
            hint="merge adapters first: model = peft_model.merge_and_unload()",
        )
    backbone = model.base_model
    encoder = getattr(backbone, "encoder", None)
    for layers in (getattr(backbone, "layers", None), getattr(backbone, "h", None), getattr(encoder, "layer", None)):
        if isinstance(layers, nn.ModuleList) and len(layers) == getattr(backbone.config, "num_hidden_layers", None):
            return backbone, layers
    raise PlanError(
        f"no list of layers in {type(model).__name__}: neither `.layers` nor `.h` nor `.encoder.layer` in its backbone",
        hint="supported are decoders such as llama, qwen, mistral, gemma, phi and gpt2, and encoders such as bert",
    )


@contextlib.contextmanager
def replaced(layers: nn.ModuleList, forwards: Mapping[int, Forward]) -> Iterator[None]:
    """Give the layers at these indices another forward for a while."""
    before = {index: vars(layers[index]).get("forward") for index in forwards}
    try:
        for index, forward in forwards.items():
            vars(layers[index])["forward"] = forward  # found before the method of the class
        yield
    finally:
        for index, own in before.items():
            vars(layers[index]).pop("forward", None)
            if own is not None:  # somebody else, such as accelerate, had replaced it already
                vars(layers[index])["forward"] = own


def recording(layer: nn.Module, keep: Callable[[Tensor], None]) -> Forward:
    """The layer's own forward, which also hands its input [B, T, D] to `keep`."""
    forward = layer.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        keep(hidden_input(args, kwargs))
        return forward(*args, **kwargs)

    return record


def passing(model: PreTrainedModel) -> Callable[..., Any]:
    """A forward that returns `instead`, or else its input, in the form in which this model's layers return.

    Most layers return the hidden states, those of bloom, falcon and gpt_neo a tuple: one token is run to see which.
    """
    backbone, layers = decoder(model)
    outputs: list[Any] = []
    handle = layers[0].register_forward_hook(lambda layer, args, output: outputs.append(output))
    try:
        with torch.no_grad():
            backbone(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
    finally:
        handle.remove()
    in_tuple = isinstance(outputs[0], tuple)

    def forward(*args: Any, instead: Tensor | None = None, **kwargs: Any) -> Any:
        hidden = hidden_input(args, kwargs) if instead is None else instead
        return (hidden,) if in_tuple else hidden

    return forward


def uncached(model: PreTrainedModel) -> dict[str, bool]:
    """The argument that keeps a language model from filling a cache nobody reads; encoders do not know it."""
    return {"use_cache": False} if model.get_output_embeddings() is not None else {}


def hidden_input(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states [B, T, D] in the arguments of a decoder layer."""
    return args[0] if args else kwargs["hidden_states"]


def hidden_output(output: Any) -> Tensor:
    """The hidden states [B, T, D] in what a decoder layer returns."""
    return output[0] if isinstance(output, tuple) else output
