"""Merging heads gradually: masks that fade, while training, from every head's own key and value to its group's.

The idea. Merged at once, a model is thrown far from where it was and must find back. Instead each aligned head h keeps
its own projections at first and a mask z_h ∈ [0, 1], one for key and value, mixes in the shared ones before RoPE:

    k_h = z_h · W_K^h x + (1 − z_h) · W̃_K^g(h) x          v_h likewise

Training starts at z ≈ 1, the original model, and must end at z = 0, the merged one, at which point own projections
and masks are dropped and a standard checkpoint is left. Masks are hard-concrete variables, so that they can be
exactly 0 and 1 and still have a gradient:

    s = σ((log u − log(1 − u) + log α + c) / β),  z = clip(s·(ζ − γ) + γ, 0, 1),  u ~ U(0, 1)
    P(z ≠ 0) = σ(log α + c − β log(−γ/ζ)),  ρ = 1 − mean over all heads of all layers of P(z ≠ 0)

The share ρ of closed masks rises linearly from 0 to 1. The common offset c is solved for such that ρ is exactly on
schedule at every step; the gradient of the distillation loss through log α decides which heads close first. From step
closed · steps on, z = 0: the rest of the training sees the model that will be saved.

The paper's: one mask for key and value, mixing before RoPE, a linear schedule to sparsity 1, z = 0 for the last
fifth, shared heads learning at twice the rate. Our choice: textbook hard-concrete (β = 2/3, γ = −0.1, ζ = 1.1)
instead of the code's noise U(0.4, 0.6) with a straight-through gradient; and the offset. The official code adds
|ρ − t| + (ρ − t)² to the loss and also has a callback that drags the lowest masks to zero. We tried the penalty alone
once, untuned, on a tiny random model: in 20 steps ρ was 0.38 ten steps after t had reached 1. The noise is drawn once
per optimiser step, so that splitting a step into micro-batches changes nothing.

Cost: a forward pass of the teacher per step, and twice the key and value projections until the masks are closed.

Paper: Jin et al., Findings of EMNLP 2025, arXiv 2412.20677; official code: github.com/fpcsong/mha2gqa, commit c0706da
(l0_module.py). Masks: Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization", ICLR 2018,
arXiv 1712.01312.

Relations: `mergeheads.apply_alignment` comes first; where no training follows, `headfit` is the better merge.

Example:
    >>> apply_alignment(model, plan)
    >>> objective = GradualMerge(model, kv_heads, Distillation(KL(), teacher))
    >>> train.fit(model, objective, items, params, learning_rates=objective.learning_rates(steps, rate), ...)
    >>> objective.finish()
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from residency.compress.distillation import Distillation
from residency.compress.headgrams import Attention, attentions
from residency.compress.mergeheads import Restore, check_heads, declare, mean_projection
from residency.objective import Objective, Outputs

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature and stretch of the hard-concrete distribution (Louizos et al., section 4)."""
REACH = 50.0
"""Bound of the offset: beyond it every mask is 0 or 1."""


class HeadMasks(nn.Module):
    """The masks z of all heads of all layers.

    Args:
        layers, heads: L, G.

    Attributes:
        log_alpha: [L, G] parameter.
        noise: [L, G] buffer: log u − log(1 − u) of the present step.
        offset: c.
        fixed: A value that all masks have instead, or None.
    """

    log_alpha: nn.Parameter
    noise: Tensor
    offset: float
    fixed: float | None

    def __init__(self, layers: int, heads: int) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.zeros(layers, heads))
        self.register_buffer("noise", torch.zeros(layers, heads))
        self.offset, self.fixed = REACH, None

    def draw(self, seed: int) -> None:
        """Fresh noise; a function of the seed alone, so that a resumed training sees what an uninterrupted one does."""
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(self.noise.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
        self.noise.copy_(torch.logit(u))

    def values(self, layer: int, training: bool) -> Tensor:
        """The masks [G] of a layer: with noise in training, at the median of it otherwise."""
        if self.fixed is not None:
            return torch.full_like(self.log_alpha[layer], self.fixed)
        logit = self.log_alpha[layer] + self.offset + (self.noise[layer] if training else 0.0)
        return (torch.sigmoid(logit / BETA) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    @torch.no_grad()
    def sparsity(self) -> float:
        """ρ, the expected share of closed masks."""
        logit = self.log_alpha.double() + self.offset - BETA * math.log(-GAMMA / ZETA)
        return 1 - float(torch.sigmoid(logit).mean())

    def close(self, target: float) -> None:
        """Choose the offset such that `sparsity()` is the target, by bisection."""
        low, high = -REACH, REACH
        for _ in range(60):
            self.offset = (low + high) / 2
            low, high = (self.offset, high) if self.sparsity() > target else (low, self.offset)


class MixedProjection(nn.Module):
    """k_proj or v_proj of an aligned layer: every head's own projection, faded by its mask into its group's.

    Args:
        own: The layer's projection, [G·d, D].
        shared: The groups', [n·d, D]; heads of a group are neighbours.
        masks: Not a submodule: the objective owns and trains it.
        layer: Which row of the masks.
        a: Layout of the attention module.
    """

    def __init__(self, own: nn.Linear, shared: nn.Linear, masks: HeadMasks, layer: int, a: Attention) -> None:
        super().__init__()
        self.own, self.shared = own, shared
        self._masks, self._layer, self._layout = [masks], layer, a

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] → [B, T, G·d]."""
        a, masks = self._layout, self._masks[0]
        shared = self.shared(x).unflatten(-1, (-1, a.head_dim))
        shared = shared.repeat_interleave(a.kv_heads // shared.shape[-2], -2)
        if masks.fixed == 0:
            return shared.flatten(-2)
        z = masks.values(self._layer, self.training).to(shared)[:, None]
        own = self.own(x).unflatten(-1, (a.kv_heads, a.head_dim))
        return (z * own + (1 - z) * shared).flatten(-2)


class GradualMerge(Objective):
    """Distillation under closing masks; changes the model it is given until `finish`.

    Inputs: those of `Distillation`.

    Args:
        model: Aligned (`mergeheads.apply_alignment`), not yet merged. Its k and v projections are replaced in place.
        kv_heads: Heads in the end.
        inner: The loss against the unmerged model.
        closed: Share of the steps in which the masks close; after it all are 0.
        restore: As in `mergeheads.merge`, for the shared heads at the start.
        seed: Of the masks' noise.

    Raises:
        PlanError: When the model's heads cannot be merged so.
    """

    wants = "hidden"

    def __init__(
        self,
        model: PreTrainedModel,
        kv_heads: int,
        inner: Distillation,
        closed: float = 0.8,
        restore: Restore = "none",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < closed <= 1:
            raise ValueError(f"closed is a share of the steps, 0 < closed ≤ 1, got {closed}")
        found = attentions(model)
        for a in found:
            check_heads(a, kv_heads)
        self.inner, self.closed, self.seed = inner, closed, seed
        self.masks = HeadMasks(len(found), found[0].kv_heads).to(model.device)
        self._model, self._modules_to_restore, self.kv_heads = [model], [a.module for a in found], kv_heads
        for layer, a in enumerate(found):
            for name, kind in (("k_proj", "keys"), ("v_proj", "values")):
                own = getattr(a.module, name)
                shared = mean_projection(own, a, kv_heads, restore in (kind, "both"))
                setattr(a.module, name, MixedProjection(own, shared, self.masks, layer, a).train(model.training))

    def begin_step(self, step: int, steps: int) -> None:
        """See `Objective.begin_step`: how far the masks are closed, and their noise."""
        self.inner.begin_step(step, steps)
        share = step / (self.closed * steps)
        self.masks.fixed = 0.0 if share >= 1 else None
        self.masks.close(share)
        self.masks.draw((self.seed << 24) + step)

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return (loss sum, trained tokens) of the loss against the unmerged model."""
        return self.inner(outputs, batch)

    def count(self, batch: dict[str, Any]) -> int:
        """See `Objective.count`."""
        return self.inner.count(batch)

    def learning_rates(self, steps: int, learning_rate: float) -> dict[str, float]:
        """Factors for `train.fit`: shared heads 2 (the paper's); log α fast enough to decide an order in time.

        AdamW moves a parameter by about its learning rate per step; the masks' distribution is some 8 wide.
        """
        return {"masks.log_alpha": 8 / max(1.0, self.closed * steps) / learning_rate, "_proj.shared": 2.0}

    def finish(self) -> PreTrainedModel:
        """Drop own projections and masks; returns the model, a standard one with `kv_heads` key/value heads."""
        model = self._model[0]
        for module in self._modules_to_restore:
            for name in ("k_proj", "v_proj"):
                projection = getattr(module, name)
                if isinstance(projection, MixedProjection):
                    setattr(module, name, projection.shared)
        return declare(model, self.kv_heads)
