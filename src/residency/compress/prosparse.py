"""ProSparse: train a ReLU-fied model towards zeros, with a penalty that grows in smooth stages.

The idea. Continued training alone leaves a ReLU-fied model (`relufy.py`) where it is, at about two thirds of zeros. An
L1 penalty on what enters W_down pushes further, but a constant one from the start costs quality: activations change
faster than the rest can follow. So the penalty rises in stages, each a half sine wave, flat at both ends:

    L = L_task + λ(t) · Σ_layers mean |x₁|,        x₁ = FATReLU(W_gate x) ⊙ (W_up x) [F]

    t ≤ T_0                λ = 0                  the model recovers from the substitution
    T_0 < t ≤ T_1          λ = λ_1                warm-up
    T_{i−1} < t ≤ T_i      λ = λ_{i−1} + ½ (1 − cos π u)(λ_i − λ_{i−1}),   u = (t − T_{i−1}) / (T_i − T_{i−1})

Equal consecutive peaks make a constant stage, for stability. A single peak from T_0 = 0 is the fixed penalty the paper
compares with; no peaks are plain ReLU-fication.

The paper's: all of this; peaks 5e-3, 5e-2, 5e-2, 2e-1, 2e-1 for 7B, its stage ends among `PAPER_7B`. It does not say
over what ‖x₁‖₁ is reduced. Our choice: the mean over the F units, the sum over layers, and over tokens a mean as
follows.

Which tokens, and what divides. The training loop divides every sum by N, the trained tokens of the optimiser step,
known before its first forward pass. The penalty is over all real tokens, prompts included, whose number is another.
So each row b contributes its own mean over its real tokens, n_b times, where n_b is the number of its trained tokens:

    Σ_b n_b · mean_{t real in b} (mean_F |x₁[b, t]|)   divided by   N = Σ_b n_b

This is a weighted mean whose weights add up to 1: λ keeps its scale, and since a row is never divided, neither the
batch size nor padding nor accumulation changes a gradient. Where every token is trained (the paper's setting) and rows
are equally long, it is the plain mean over all tokens.

Cost: one reduction of x₁ per layer forward and one product with its signs backward; [B, T] numbers kept per layer. On
the gradient: sign(0) = 0, so a unit that is silent gets none from the penalty.

Paper: Song, Han, Zhang et al., "ProSparse: Introducing and Enhancing Intrinsic Activation Sparsity within Large
Language Models", COLING 2025, arXiv 2402.13516, section 3.2 and appendix B. Training code: none released.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from residency.compress.sparsity import intermediates
from residency.errors import PlanError
from residency.objective import Objective, Outputs, next_token_positions

BINS = 64
"""Parts of a training in which its history is kept. Our choice."""


@dataclass(frozen=True)
class SineStages:
    """λ as a function of progress.

    Args:
        peaks: λ_1 ≤ … ≤ λ_S; none for λ = 0 throughout.
        ends: T_0 ≤ … ≤ T_S in any unit (steps, tokens, shares), one more than peaks; up to T_0 there is no penalty.

    Raises:
        ValueError: When they do not form such stages.
    """

    peaks: tuple[float, ...] = ()
    ends: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if len(self.ends) != len(self.peaks) + 1:
            raise ValueError(
                f"{len(self.peaks)} peaks need {len(self.peaks) + 1} stage ends (the first one ends the stage without "
                f"penalty), got {len(self.ends)}"
            )
        if not all(math.isfinite(v) and v >= 0 for v in (*self.peaks, *self.ends)):
            raise ValueError(f"peaks and stage ends are finite and not negative, got {self.peaks} and {self.ends}")
        if list(self.peaks) != sorted(self.peaks):
            raise ValueError(f"the peaks must not fall, got {self.peaks}")
        if list(self.ends) != sorted(self.ends) or self.ends[-1] == 0:
            raise ValueError(f"the stage ends must not fall and the last lies above 0, got {self.ends}")

    def at(self, t: float) -> float:
        """λ at t > 0; after the last stage it stays at its peak."""
        stage = sum(t > end for end in self.ends)
        if stage == 0 or not self.peaks:
            return 0.0
        if stage > len(self.peaks):
            return self.peaks[-1]
        peak = self.peaks[stage - 1]
        if stage == 1:
            return peak
        low, start, end = self.peaks[stage - 2], self.ends[stage - 1], self.ends[stage]
        return low + (1 - math.cos(math.pi * (t - start) / (end - start))) / 2 * (peak - low)


PAPER_7B = SineStages((5e-3, 5e-2, 5e-2, 2e-1, 2e-1), (5000, 6000, 10000, 12000, 16000, 16500))
"""Table 6 of the paper: LLaMA2-7B, in steps of 2.1 million tokens."""
PAPER_13B = SineStages((5e-3, 1e-2, 1e-2, 2e-2, 2e-2), (5500, 6750, 10750, 11000, 15000, 16000))
"""Table 6 of the paper: LLaMA2-13B, in steps of 8.4 million tokens."""


@dataclass(frozen=True)
class Moment:
    """A part of the training: its progress (0 to 1], and means over its tokens."""

    progress: float
    weight: float
    loss: float
    magnitude: float
    sparsity: float


class ProSparse(Objective):
    """Another objective plus the progressive L1 penalty; works with any that counts trained tokens.

    Inputs: those of `inner`; `attention_mask` [B, T] where rows are padded, `labels` [B, T].
    Relations: `inner` is the cross-entropy of the task, or a `Distillation` from the model as it was before `relufy`.

    Args:
        inner: The task's objective; its form of outputs is asked for, its count divides.
        model: The model that is trained, ReLU-fied. Its down projections get hooks until `close`.
        schedule: λ; its last stage ends with the training, whatever unit it is written in.

    Attributes:
        weight: λ of the current step.
        history: [BINS, 4] sums over parts of the training (tokens, loss, mean |x₁| summed over layers, share of zeros);
            a buffer, so that a resumed training has it whole.

    Example:
        >>> with ProSparse(inner, relufy(model), SineStages((0.5, 2.0), (0.2, 0.4, 1.0))) as objective:
        ...     train.fit(model, objective, items, params, pad=0, scratch=folder)
    """

    history: Tensor

    def __init__(self, inner: Objective, model: nn.Module, schedule: SineStages) -> None:
        super().__init__()
        self.inner, self.schedule = inner, schedule
        self.wants = inner.wants  # type: ignore[misc]
        self.weight = 0.0
        self.register_buffer("history", torch.zeros(BINS, 4))
        self._bin = 0
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._hooks = intermediates(model, self._keep)

    def close(self) -> None:
        """Take the hooks off the model; harmless to repeat."""
        self._hooks.close()

    def __enter__(self) -> ProSparse:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin_step(self, step: int, steps: int) -> None:
        """Set λ: the last of `steps` optimiser steps has the last peak."""
        self.inner.begin_step(step, steps)
        self.weight = self.schedule.at((step + 1) / steps * self.schedule.ends[-1])
        self._bin = min(step * BINS // steps, BINS - 1)

    def count(self, batch: dict[str, Any]) -> int:
        """As of `inner`."""
        return self.inner.count(batch)

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return (loss sum + λ · penalty sum, trained tokens)."""
        seen, self._seen = self._seen, {}
        total, count = self.inner(outputs, batch)
        trained = next_token_positions(batch["labels"])[0].sum(1, keepdim=True)
        if int(trained.sum()) != int(count):
            raise ValueError(
                f"{type(self.inner).__name__} counts {int(count)} items where {int(trained.sum())} tokens are trained; "
                "ProSparse needs an objective that counts trained tokens"
            )
        if not seen:
            raise ValueError("the forward pass did not go through the model ProSparse was made with (or it was closed)")
        real = batch.get("attention_mask")
        real = torch.ones_like(batch["labels"]) if real is None else real
        weights = real / real.sum(1, keepdim=True).clamp(min=1) * trained  # [B, T], adds up to count
        penalty = sum(((weights * size.reshape(real.shape)).sum() for size, _ in seen.values()), weights.new_zeros(()))
        if self.weight and total.requires_grad and not penalty.requires_grad:
            raise PlanError(
                "the penalty has no gradient: no feed-forward layer is trained, or gradient checkpointing is reentrant",
                hint='gradient_checkpointing_kwargs={"use_reentrant": False}, or train the feed-forward layers',
            )
        with torch.no_grad():
            zeros = sum((weights * silent.reshape(real.shape)).sum() for _, silent in seen.values()) / len(seen)
            row = [count.to(penalty), total.detach().to(penalty), penalty.detach(), zeros]
            self.history[self._bin] += torch.stack(row).to(self.history)
        return (total + self.weight * penalty if self.weight else total), count

    def curve(self) -> list[Moment]:
        """What the training went through: one entry per part of it that had steps."""
        moments = []
        for place, (tokens, loss, size, zeros) in enumerate(self.history.tolist()):
            if tokens:
                progress = (place + 1) / BINS
                weight = self.schedule.at(progress * self.schedule.ends[-1])
                moments.append(Moment(progress, weight, loss / tokens, size / tokens, zeros / tokens))
        return moments

    def _keep(self, layer: int, x1: Tensor) -> None:
        """Mean |x₁| and share of zeros of every token; x₁ itself is not held beyond what autograd holds anyway."""
        size = torch.linalg.vector_norm(x1, 1, dim=-1, dtype=torch.promote_types(x1.dtype, torch.float32))
        silent = (x1.detach() == 0).sum(-1)
        self._seen[layer] = size / x1.shape[-1], silent / x1.shape[-1]
