"""The optimiser's settings, apart from the loop that uses them, so that a recipe is checked without importing torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from residency.step import Params, State


class TrainParams(Params):
    """The optimiser's settings; a step that trains inherits these keys."""

    epochs: float = Field(1.0, gt=0, le=1000)
    """Passes over the rows."""
    learning_rate: float = Field(2e-4, gt=0, le=1)
    """Peak learning rate of AdamW; a cosine to zero after the warm-up."""
    batch: int = Field(8, ge=1)
    """Rows per forward pass."""
    accumulate: int = Field(1, ge=1)
    """Forward passes per optimiser step; batch × accumulate rows make one step, and only their product matters."""
    warmup: float = Field(0.1, ge=0, le=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after so many optimiser steps, whatever `epochs` says."""
    max_tokens: int = Field(512, ge=8)
    """Rows with more tokens than this go to quarantine; they are not cut."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast of the forward pass; auto takes bfloat16 where the hardware has it (AVX512-BF16, AMX, Ampere).
    Weights stay float32.
    """
    checkpoint_seconds: float = Field(60.0, ge=0)
    """A checkpoint at most this often; a killed training loses no more."""

    def rows_seen(self, state: State) -> float:
        """How many rows pass through the model, with repetition."""
        return state.rows * self.epochs if self.max_steps is None else self.max_steps * self.batch * self.accumulate


def activation_bytes(state: State, batch: int) -> int:
    """Rough bytes kept for the backward pass of one batch.

    34 × width bytes per token and layer in 16 bits (Korthikanti et al. 2022, arXiv 2205.05198, eq. 1, without the
    attention scores), doubled for float32; and four times that, because the batch of the longest rows decides, and what
    an allocator has had it keeps (measured on the demo: 3.4 GiB where the mean length said 1.6).
    """
    return 4 * 2 * 34 * state.model.hidden * state.model.layers * batch * state.tokens_per_row
