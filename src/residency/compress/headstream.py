"""A model run layer by layer on all calibration batches, so that a layer can be changed before the next one runs.

The hidden states of all batches wait in front of a layer; running it leaves the other layers idle, so that the model's
own code makes masks and position embeddings. One pass through all layers costs one forward pass of the model; memory is
one [B, T, D] per batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from residency.compress.decoder import decoder, hidden_output, passing, recording, replaced
from residency.compress.headgrams import Attention, Batch, model_inputs, real_tokens


class Stream:
    """The hidden states of all batches on their way through one model, a layer at a time."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self.model = model
        self.backbone, self.layers = decoder(model)
        self.idle = passing(model)
        self.inputs = [model_inputs(batch, model) for batch in batches]
        self.real = [real_tokens(inputs) for inputs in self.inputs]
        self.hidden: list[Tensor] = []
        rest = dict.fromkeys(range(1, len(self.layers)), self.idle)
        for inputs in self.inputs:
            with replaced(self.layers, {0: recording(self.layers[0], self.hidden.append)} | rest):
                self.backbone(**inputs, use_cache=False)

    def run(self, index: int, batch: int, a: Attention) -> dict[str, Tensor]:
        """Layer `index` on its hidden states of one batch.

        Returns:
            q, k, v [B, T, ·], z (input of W_O), attention, hidden [B, T, D]; eager attention's probabilities [B, H,
            T, T].
        """
        seen: dict[str, Tensor] = {}
        own, hidden = self.layers[index].forward, self.hidden[batch]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                args = (hidden, *args[1:])
            else:
                kwargs["hidden_states"] = hidden
            output = own(*args, **kwargs)
            seen["hidden"] = hidden_output(output)
            return output

        def attend(module: Any, args: Any, output: Any) -> None:
            seen["attention"] = output[0]
            if output[1] is not None:
                seen["probabilities"] = output[1]

        with contextlib.ExitStack() as hooks:
            for name in ("q_proj", "k_proj", "v_proj"):
                handle = getattr(a.module, name).register_forward_hook(
                    lambda module, args, output, name=name: seen.__setitem__(name[0], output)
                )
                hooks.callback(handle.remove)
            hooks.callback(
                a.module.o_proj.register_forward_pre_hook(lambda module, args: seen.__setitem__("z", args[0])).remove
            )
            hooks.callback(a.module.register_forward_hook(attend).remove)
            rest = {i: self.idle for i in range(len(self.layers)) if i != index}
            with replaced(self.layers, rest | {index: forward}):
                self.backbone(**self.inputs[batch], use_cache=False)
        return seen


@contextlib.contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """Attention that hands over its probabilities, and the implementation it was afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
