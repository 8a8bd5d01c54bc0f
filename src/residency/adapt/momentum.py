"""A second copy of a model that follows the first slowly, to make keys that change little from step to step.

    θ_k ← m_t θ_k + (1 − m_t) θ_q,      m_t = min(m, (1 + t) / (10 + t)),    t optimiser steps done

The papers use a constant m = 0.999 over some hundred thousand steps; a specialist is trained for a few hundred, after
which a constant 0.999 would still be the model as it began. The rising m_t is the usual remedy for short averages
(Abadi et al., TensorFlow's `ExponentialMovingAverage(num_updates)`), and our choice; `constant` gives the papers'.
Buffers (batch statistics) are copied. The copy is always in eval mode: without dropout, a row's key is a function of
the row (our choice; the releases shuffle batches among GPUs to keep batch norm from telling keys apart).

Cost: the copy's memory; a multiply-add over the trained weights per step, and a forward pass without gradient per key.

Paper: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, arXiv 1911.05722.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Momentum(nn.Module):
    """The slow copy.

    Args:
        model: What it follows; held by reference, not as a part of this module. Answers with `.features`.
        momentum: m.
        constant: m from the first step on.
    """

    def __init__(self, model: nn.Module, momentum: float = 0.999, constant: bool = False) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"a momentum lies in [0, 1), not {momentum}")
        self.momentum, self.constant = momentum, constant
        self.copy = copy.deepcopy(model).requires_grad_(False).eval()
        self._followed = (model,)  # a tuple, so that its weights are not this module's too

    @property
    def followed(self) -> nn.Module:
        """The model itself."""
        return self._followed[0]

    def train(self, mode: bool = True) -> Momentum:
        """Nothing changes here: the copy stays in eval mode."""
        return self

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move towards the model; `step` optimiser steps have been done."""
        if not step:
            return
        m = self.momentum if self.constant else min(self.momentum, (1 + step) / (10 + step))
        for mine, its in zip(self.copy.parameters(), self.followed.parameters(), strict=True):
            if its.requires_grad:
                mine.lerp_(its.detach().to(mine.dtype), 1 - m)
        for copied, buffer in zip(self.copy.buffers(), self.followed.buffers(), strict=True):
            copied.copy_(buffer)

    @torch.no_grad()
    def forward(self, given: Mapping[str, Tensor]) -> Tensor:
        """Features [B, D] of model inputs."""
        found: Tensor = self.copy(**given).features
        return found


def inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch is the model's."""
    from residency.train import MODEL_INPUTS

    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


def strong_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The other view of the same rows: `strong` in the place of the model's only input, or as a mapping of inputs.

    Batches without `strong` show their rows as they are.
    """
    given = inputs(batch)
    strong = batch.get("strong")
    if strong is None:
        return given
    return dict(strong) if isinstance(strong, Mapping) else {next(iter(given)): strong}
