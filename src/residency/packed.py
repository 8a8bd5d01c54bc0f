"""Linear layers whose weights lie in the order in which the processor reads them: the same product, sooner.

Decoding reads every weight once per step, so a step should cost what reading the weights costs, whether it brings one
token or the eight nodes of a tree. `torch.nn.functional.linear` on a CPU is far from that for few rows: measured here
(AMD EPYC, 2 threads, all layers of SmolLM2-135M, float32) 36 ms for one row and 52 ms for eight. oneDNN's kernels with
weights reordered in advance ("packed") need 20 and 19 ms. Packing costs a second copy of the weights in memory and
some tens of milliseconds, once.

`packed(model)` gives every plain `nn.Linear` of a model on a CPU such a copy for the duration of a `with` block, and
takes it away again. Layers of other classes, other devices and training are left as they are, and a weight that is
written to or converted inside the block falls back to the plain product. A model cannot be copied while it is packed.
Results agree with the plain ones to rounding (about 1e-6 relative).

Modules given as `rough` may also be rounded to bfloat16, where the processor multiplies it: half the bytes to read, and
half the time. Drafters can have that for nothing, since they only guess and the target's own products stay as they are.

Uses `torch.ops.mkldnn._linear_pointwise`, which torch's own compiler emits; where a build of torch lacks it, the block
changes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from residency.compat import fast_bf16

TYPICAL_ROWS = 8
"""Rows per pass that the packed order is chosen for; any number works."""


def available() -> bool:
    """Whether this build of torch has the packed kernels."""
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def pack(weight: Tensor, rows: int = TYPICAL_ROWS) -> Tensor:
    """A weight [out, in] in the kernel's own order (opaque: only `linear` can read it)."""
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
    return reordered


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply with a packed weight: [..., in] → [..., out]."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


@contextlib.contextmanager
def packed(*models: nn.Module, rough: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Models with packed linear layers, for inference inside the block.

    Args:
        models: Any modules; changed in place and restored.
        rough: Further modules, whose weights and inputs may be rounded to bfloat16.
    """
    taken: list[nn.Module] = []
    given = [(layer, False) for model in models for layer in model.modules()]
    given += [(layer, fast_bf16("cpu")) for model in rough for layer in model.modules()]
    try:
        if available():
            with torch.no_grad():
                for layer, half in given:
                    if not _suits(layer):
                        continue
                    assert isinstance(layer, nn.Linear)
                    if half:
                        bias = None if layer.bias is None else layer.bias.detach().bfloat16()
                        forward: Any = partial(_rounded, layer, pack(layer.weight.bfloat16()), bias, _state(layer))
                    else:
                        forward = partial(_forward, layer, pack(layer.weight), _state(layer))
                    object.__setattr__(layer, "forward", forward)  # an instance attribute, not the class's
                    taken.append(layer)
        yield
    finally:
        for layer in taken:
            layer.__dict__.pop("forward", None)


def _suits(layer: nn.Module) -> bool:
    """Plain linear layers in float32 or bfloat16 on a CPU, not packed (or otherwise replaced) already."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__ or not layer.weight.numel():
        return False
    half = layer.weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return layer.weight.device.type == "cpu" and (layer.weight.dtype == torch.float32 or half)


def _state(layer: nn.Linear) -> tuple[Any, ...]:
    """What changes when a weight is replaced, converted or written to."""
    weight = layer.weight
    return weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version


def _forward(layer: nn.Linear, weight: Tensor, packed_from: tuple[Any, ...], x: Tensor) -> Tensor:
    if torch.is_grad_enabled() or x.dtype != layer.weight.dtype or not x.numel() or _state(layer) != packed_from:
        return nn.functional.linear(x, layer.weight, layer.bias)
    return linear(x, weight, layer.bias)


def _rounded(layer: nn.Linear, weight: Tensor, bias: Tensor | None, packed_from: tuple[Any, ...], x: Tensor) -> Tensor:
    if torch.is_grad_enabled() or x.dtype != layer.weight.dtype or not x.numel() or _state(layer) != packed_from:
        return nn.functional.linear(x, layer.weight, layer.bias)
    return linear(x.bfloat16(), weight, bias).to(x.dtype)
