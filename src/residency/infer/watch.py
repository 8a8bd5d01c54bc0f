"""How much attention chosen queries pay to every cached entry, while the model runs as it always does.

`output_attentions` exists for eager attention only and hands out [B, H, T, S] for every layer. Here the main pass
keeps its kernel (sdpa, or the model's own eager function), and beside it only the rows asked for are computed again:

    mass[b, g, s] = Σ_x mean over the query heads h of group g of softmax_s(q[b, h, x] · k[b, g, s] · scale)

in float32, block by block, so that [B, H, X, S] never exists when it is large. Queries and keys are those the kernel
gets: rotated, normalised, after the cache. They are seen through transformers' own `AttentionInterface`: for the
length of a block the model's config names an attention function of ours, which calls the usual one and looks. A
boolean mask (true: attend) goes to sdpa as it is and to eager as an additive one; the other way round it would be
added as 0 and 1.

Cost: X · S · H · d multiply-adds per layer for X queries, against T · S · H · d of the pass itself. Not meant for
several threads that run one model at once. The idea of recomputing a window's attention is SnapKV's (arXiv 2404.14469)
and kvpress's (github.com/NVIDIA/kvpress, commit 8bb29b9); this way to get at the queries is our choice.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from residency.errors import PlanError

NAME = "residency_watched"
BLOCK = 1 << 24
"""Most attention probabilities held at once by `attention_mass` (64 MiB). Our choice."""


@dataclass
class Watch:
    """What is looked at in the passes inside `watching`.

    Args:
        see: Called for every layer with its index and the mass [B, G, S]; None looks at nothing.
        rows: Indices [B, X] of the queries of a pass; None means all of them.
        asked: Which of those count, [B, X]; None means all.
        eager: Whether the model's own eager function runs, instead of sdpa.
    """

    see: Callable[[int, Tensor], None] | None = None
    rows: Tensor | None = None
    asked: Tensor | None = None
    eager: bool = False


_current: ContextVar[Watch | None] = ContextVar("watch", default=None)


def attention_mass(query: Tensor, key: Tensor, scale: float, mask: Tensor | None, asked: Tensor | None) -> Tensor:
    """Attention that queries pay to entries, summed over queries and averaged over the heads of a group.

    Args:
        query: [B, H, X, d], rotated.
        key: [B, G, S, d], rotated.
        scale: Factor of the logits.
        mask: [B or 1, 1, X, S], true where a query may look; None lets all look everywhere.
        asked: [B, X], which queries count; None counts all.

    Returns:
        [B, G, S], float32.
    """
    rows, heads, count, width = query.shape
    groups, size = key.shape[1], key.shape[2]
    keys = key.float().transpose(-1, -2)  # [B, G, d, S]
    mass = torch.zeros(rows, groups, size, device=query.device)
    step = max(1, BLOCK // max(1, rows * heads * size))
    weight = torch.ones(rows, count, device=query.device) if asked is None else asked.float()
    for start in range(0, count, step):
        some = query[:, :, start : start + step].float()
        length = some.shape[2]
        logits = some.reshape(rows, groups, -1, width) @ keys
        logits = logits.view(rows, groups, heads // groups, length, size) * scale
        if mask is not None:
            logits = logits.masked_fill(~mask[:, :, None, start : start + step], -torch.inf)
        mass += torch.einsum("bgrxs,bx->bgs", logits.softmax(-1), weight[:, start : start + step])
    return mass / (heads // groups)


@contextlib.contextmanager
def watching(model: Any, watch: Watch) -> Iterator[None]:
    """Run the model's attention under a `Watch` for the length of a block.

    Args:
        model: A transformers model whose attention goes through the `AttentionInterface`.
        watch: May be changed between passes.
    """
    config = model.base_model.config
    before = config._attn_implementation
    if before != NAME:
        watch.eager = before == "eager"
    token = _current.set(watch)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _current.reset(token)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function that `watching` puts into the config."""
    watch = _current.get() or Watch()
    mask = _visible(attention_mask, query.shape[2], key.shape[2], query.device)
    if watch.see is not None:
        rows, seen = query, mask
        if watch.rows is not None:
            at = watch.rows[:, None, :, None]
            rows = query.gather(2, at.expand(-1, query.shape[1], -1, query.shape[3]))
            if mask is not None:
                seen = mask.expand(len(query), -1, -1, -1).gather(2, at.expand(-1, mask.shape[1], -1, mask.shape[3]))
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        watch.see(module.layer_idx, attention_mass(rows, key, scale, seen, watch.asked))
    if not watch.eager:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise PlanError(f"{type(module).__name__} has no eager attention function", hint="load the model with sdpa")
    if mask is not None:
        mask = torch.where(mask, torch.zeros((), dtype=query.dtype), torch.finfo(query.dtype).min)
    return own(module, query, key, value, mask, **kwargs)


def _visible(mask: Tensor | None, queries: int, entries: int, device: torch.device) -> Tensor | None:
    """The boolean mask that `None` stands for, or an additive mask as a boolean one."""
    if mask is not None:
        return mask if mask.dtype == torch.bool else mask >= 0
    if queries == 1:
        return None
    return torch.ones(queries, entries, dtype=torch.bool, device=device).tril(entries - queries)[None, None]


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
