"""Parts of a decoder switched off for a while: what attention, a feed-forward layer, or the sink's value does.

    with zero_mlp(model, 0): …                         the feed-forward layer of layer 0 writes nothing
    with zero_attention(model, 2): …                   nor does the attention of layer 2
    with zero_attention(model, 2, head=[0, 3]): …      only these heads
    with move_to_first(model, 2, head=5): …            the head puts all its attention on the first token: dormant
    with replace_sink_value(model, 2, "typical"): …    the first token's value state becomes like any other's

If zeroing an early feed-forward layer makes the residual peak vanish and zeroing early attention does not, the peak is
written by the former. If a head moved to the first token leaves the loss as it was, it was dormant; if the sink's value
can be zeroed without harm and not be made typical, it was drained.

Several blocks nest. Hooks go when the block ends, by an exception too. No layers, or no heads, ablate nothing, and the
outputs are then bit for bit those of the model. Heads are query heads, key/value heads in `replace_sink_value`.

The paper's: zeroed attention and feed-forward layers, attention moved to the first token, zeroed value states of it.
Our choice: "typical", the mean direction of the other tokens' value states at their mean norm.

Cost: none beside the forward pass.

Source: Guo et al., "Active-Dormant Attention Heads", NeurIPS 2024 workshop M3L, arXiv 2410.13835. Official code:
GuoTianYu2000/Active-Dormant-Attention (commit 16b3593, no licence; read for facts).

Inputs: whole texts (no cache from an earlier pass). Relations: `sinks.diagnose` inside the block measures what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from residency.evaluate.textstarts import Starts, chosen_layers

Numbers = int | Sequence[int]


@contextmanager
def zero_attention(model: Any, layer: Numbers, head: Numbers | None = None) -> Iterator[None]:
    """Attention of some layers writes nothing; with `head`, only these query heads.

    Raises:
        ValueError: When there is no such layer or head.
    """

    def silent(module: Any, args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    with ExitStack() as hooks:
        for part in chosen_layers(model, layer):
            if head is None:
                hooks.callback(_attention(part).register_forward_hook(silent).remove)
            else:
                _written(hooks, _attention(part), head, lambda z, chosen: z.index_fill_(2, chosen, 0.0))
        yield


@contextmanager
def zero_mlp(model: Any, layer: Numbers) -> Iterator[None]:
    """The feed-forward part of some layers writes nothing.

    Raises:
        ValueError: When there is no such layer.
    """
    with ExitStack() as hooks:
        for part in chosen_layers(model, layer):
            if part.mlp is None:
                raise ValueError("the layer has no feed-forward part to switch off")
            handle = part.mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
            hooks.callback(handle.remove)
        yield


@contextmanager
def move_to_first(model: Any, layer: Numbers, head: Numbers | None = None) -> Iterator[None]:
    """Some heads (by default all) put all attention of every query on the first token of the text.

    Raises:
        ValueError: When there is no such layer or head.
    """
    with ExitStack() as hooks:
        parts = chosen_layers(model, layer)
        starts = hooks.enter_context(Starts(model))
        for part in parts:
            attention = _attention(part)
            seen: dict[str, Tensor] = {}

            def remember(module: Any, args: Any, output: Tensor, seen: dict[str, Tensor] = seen) -> None:
                seen["v"] = output

            def read_first(z: Tensor, chosen: Tensor, seen: dict[str, Tensor] = seen, own: Any = attention) -> None:
                v = seen["v"].unflatten(-1, (-1, own.head_dim))  # [B, T, G, d]
                first = v[torch.arange(len(v), device=v.device), starts.first]  # [B, G, d]
                shared = z.shape[2] // v.shape[2]
                z[:, :, chosen] = first[:, None, chosen // shared].to(z.dtype)

            hooks.callback(attention.v_proj.register_forward_hook(remember).remove)
            _written(hooks, attention, head, read_first)
        yield


@contextmanager
def replace_sink_value(
    model: Any, layer: Numbers, value: Literal["zero", "typical"], head: Numbers | None = None
) -> Iterator[None]:
    """The first token's value state becomes 0, or one like those of the text's other tokens.

    Args:
        model: As in `textstarts.decoder_layers`, with `v_proj`.
        layer: Which layers.
        value: "typical" is the mean of the other value states, scaled to their mean norm, head by head; a text of one
            token keeps its own.
        head: Which key/value heads; by default all.

    Raises:
        ValueError: When there is no such layer, head or value.
    """
    if value not in ("zero", "typical"):
        raise ValueError(f"value is zero or typical, got {value!r}")
    with ExitStack() as hooks:
        parts = chosen_layers(model, layer)
        starts = hooks.enter_context(Starts(model))
        for part in parts:
            attention = _attention(part)
            chosen = _numbers(head, _heads(attention, "v_proj"))

            def replace(module: Any, args: Any, output: Tensor, own: Any = attention, chosen: Any = chosen) -> Tensor:
                v = output.clone().unflatten(-1, (-1, own.head_dim))  # [B, T, G, d]
                row = torch.arange(len(v), device=v.device)
                others = (starts.real & (starts.places > 0))[..., None, None]
                count = others.sum(1)  # [B, 1, 1]
                mean = (v * others).sum(1) / count.clamp(min=1)
                norm = (v * others).norm(dim=-1, keepdim=True).sum(1) / count.clamp(min=1)
                typical = mean * norm / mean.norm(dim=-1, keepdim=True).clamp(min=1e-12)
                wanted = torch.zeros_like(typical) if value == "zero" else typical
                first = v[row, starts.first]
                wanted = torch.where((count > 0) | (value == "zero"), wanted, first).to(v.dtype)
                for g in chosen:
                    v[row, starts.first, g] = wanted[:, g]
                return v.flatten(-2)

            if chosen:
                hooks.callback(attention.v_proj.register_forward_hook(replace).remove)
        yield


def _attention(layer: Any) -> Any:
    if layer.self_attn is None:
        raise ValueError("the layer has no attention to change")
    return layer.self_attn


def _heads(attention: Any, projection: str) -> int:
    weight = getattr(attention, projection).weight
    return weight.shape[1 if projection == "o_proj" else 0] // attention.head_dim


def _numbers(head: Numbers | None, count: int) -> list[int]:
    """The chosen heads as a list."""
    chosen = list(range(count)) if head is None else [head] if isinstance(head, int) else list(head)
    if bad := [h for h in chosen if not 0 <= h < count]:
        raise ValueError(f"there is no head {bad[0]}: the layer has heads 0 to {count - 1}")
    return chosen


def _written(
    hooks: ExitStack, attention: Any, head: Numbers | None, change: Callable[[Tensor, Tensor], object]
) -> None:
    """Let `change(z, chosen)` alter what the chosen heads hand to W_O: z is a copy of its input, [B, T, H, d]."""
    chosen = torch.tensor(_numbers(head, _heads(attention, "o_proj")), dtype=torch.long)

    def changed(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].clone().unflatten(-1, (-1, attention.head_dim))
        change(z, chosen.to(z.device))
        return (z.flatten(-2), *args[1:])

    if len(chosen):
        hooks.callback(attention.o_proj.register_forward_pre_hook(changed).remove)
