"""How sparse a model's feed-forward layers are: the share of exact zeros in x₁, per layer and place in the text.

    sparsity = #{x₁ = 0} / F, averaged over real tokens and layers,     x₁ = σ(W_gate x) ⊙ (W_up x) [F]

x₁ is what enters W_down. Its zeros include those of σ, which let rows of W_up be skipped too, and the rare ones where
W_up x vanishes. Padding is not counted. Places are counted from the first real token of a row, so left and right
padding give the same; the first token of a text is usually far less sparse than the others (it serves as attention
sink), which is why places come in buckets that double.

The paper's: the definition, over a large token sample. Our choice: the buckets.

Cost: one comparison and one sum of x₁ per layer; memory does not depend on the number of rows.

Source: Song et al., "ProSparse", COLING 2025, arXiv 2402.13516, section 2. Official code: none for the measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from residency.compress.relufy import gated_ffns
from residency.errors import DataError
from residency.modes import evaluating

EDGES = (0, 1, 4, 16, 64, 256, 1024)
"""First place of each bucket: the first token, 2-4, 5-16, and so on."""


@dataclass(frozen=True)
class Sparsity:
    """Counts of zeros; parts measured apart can be added.

    Args:
        zeros: [L, P] exact zeros of x₁ in each layer and bucket of places, float64.
        tokens: [P] real tokens in each bucket, float64.
        width: F.
        edges: First place of each bucket.
    """

    zeros: Tensor
    tokens: Tensor
    width: int
    edges: tuple[int, ...]

    @property
    def per_layer(self) -> Tensor:
        """[L] share of zeros over all tokens."""
        return self.zeros.sum(1) / (self.tokens.sum() * self.width)

    @property
    def per_place(self) -> Tensor:
        """[P] share of zeros over all layers; NaN where no token was seen."""
        return self.zeros.mean(0) / (self.tokens * self.width)

    @property
    def grid(self) -> Tensor:
        """[L, P] share of zeros; NaN where no token was seen."""
        return self.zeros / (self.tokens * self.width)

    @property
    def mean(self) -> float:
        """Share of zeros over all tokens and layers: the model's sparsity."""
        return float(self.per_layer.mean())

    def __add__(self, other: Sparsity) -> Sparsity:
        if (self.edges, self.width) != (other.edges, other.width):
            raise ValueError("these were measured with other buckets or on another model")
        return Sparsity(self.zeros + other.zeros, self.tokens + other.tokens, self.width, self.edges)

    def labels(self) -> list[str]:
        """The buckets as text, places counted from 1: "1", "2-4", …, "1025+"."""
        ends = [*self.edges[1:], None]
        return [
            f"{a + 1}+" if b is None else str(b) if b == a + 1 else f"{a + 1}-{b}"
            for a, b in zip(self.edges, ends, strict=True)
        ]


def intermediates(model: Any, keep: Callable[[int, Tensor], None]) -> ExitStack:
    """Hand the x₁ [B, T, F] of every layer to `keep(layer, x1)` in each forward pass, until the result is closed."""
    hooks = ExitStack()
    for place, ffn in enumerate(gated_ffns(model)):
        handle = ffn.down_proj.register_forward_pre_hook(partial(_hand, keep, place))
        hooks.callback(handle.remove)
    return hooks


def _hand(keep: Callable[[int, Tensor], None], place: int, module: Any, args: tuple[Tensor, ...]) -> None:
    keep(place, args[0])


class Meter:
    """Adds up `Sparsity` while batches go through the model; `measure_sparsity` is the short way.

    Args:
        layers: L.
        edges: First place of each bucket, ascending from 0.
    """

    def __init__(self, layers: int, edges: tuple[int, ...] = EDGES) -> None:
        if not edges or edges[0] != 0 or list(edges) != sorted(set(edges)):
            raise ValueError(f"the buckets start at 0 and ascend, got {edges}")
        self.edges, self.width = edges, 0
        self.zeros = torch.zeros(layers, len(edges), dtype=torch.float64)
        self.tokens = torch.zeros(len(edges), dtype=torch.float64)
        self._member: Tensor | None = None

    def begin(self, real: Tensor) -> None:
        """Announce the next batch by its mask [B, T] of real tokens."""
        place = (real.long().cumsum(1) - 1).clamp(min=0).flatten()
        bucket = torch.bucketize(place, torch.tensor(self.edges, device=real.device), right=True) - 1
        self._member = torch.nn.functional.one_hot(bucket, len(self.edges)) * real.long().flatten()[:, None]  # [BT, P]
        self.tokens += self._member.sum(0).double().cpu()

    def keep(self, layer: int, x1: Tensor) -> None:
        """Count the zeros of one layer's x₁ [B, T, F]."""
        assert self._member is not None
        self.width = x1.shape[-1]
        zeros = (x1 == 0).sum(-1).flatten()
        self.zeros[layer] += (self._member * zeros[:, None]).sum(0).double().cpu()

    def result(self) -> Sparsity:
        """What was counted.

        Raises:
            DataError: When there was no real token.
        """
        if not self.tokens.sum():
            raise DataError("there is no real token to measure sparsity on", hint="give at least one row")
        return Sparsity(self.zeros, self.tokens, self.width, self.edges)


def measure_sparsity(model: Any, batches: Iterable[Mapping[str, Tensor]], edges: tuple[int, ...] = EDGES) -> Sparsity:
    """Count the exact zeros of x₁ on some batches.

    Args:
        model: A causal language model with gated layers; its mode is restored.
        batches: `input_ids` and, where rows are padded, `attention_mask` [B, T].
        edges: First place of each bucket, ascending from 0.

    Raises:
        DataError: When the batches hold no real token.
    """
    meter = Meter(len(gated_ffns(model)), edges)
    with torch.no_grad(), evaluating(model), intermediates(model, meter.keep):
        for batch in batches:
            ids = batch["input_ids"].to(model.device)
            real = batch["attention_mask"].to(model.device) if "attention_mask" in batch else torch.ones_like(ids)
            if ids.numel():
                meter.begin(real)
                model.base_model(input_ids=ids, attention_mask=real, use_cache=False)
    return meter.result()
