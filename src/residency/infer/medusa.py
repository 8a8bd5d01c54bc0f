"""Medusa-1: one residual block per token ahead, each guessing from the same state and none knowing what another said.

    oⁱ_t = n_t + SiLU(Wᵢ n_t + bᵢ)        n_t: the target's state after its final norm        i = 1 … N

and an LM head turns oⁱ_t into the distribution of x_{t+1+i}. In the paper every head has LM-head weights of its own,
started as a copy of the target's; here all share the target's frozen rows (our choice, also of later Medusa code),
restricted to the draft vocabulary, so that it has the same head cost as the other drafters. Blocks start at zero: an
untrained Medusa guesses the token after the root to be the root's own prediction.

Cost: D² + D parameters per head; per level one matrix product, whatever the number of nodes.

Paper: Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads", ICML 2024, arXiv
2401.10774; official code github.com/FasterDecoding/Medusa.

Relations: the baseline of `clover.Clover2`, which feeds guessed tokens back in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from residency.errors import PlanError
from residency.infer.clover import ResidualBlock
from residency.infer.drafter import Drafter, final_norm
from residency.step import Params


class MedusaParams(Params):
    """What a Medusa drafter is made of."""

    heads: int = Field(4, ge=1)
    """How many tokens ahead it is trained to guess (the paper: 4 or 5)."""


class Medusa(Drafter):
    """Independent heads.

    Args:
        target: The model to draft for.
        params: Sizes.
        token_ids: [V'] draft vocabulary, or None for all tokens.
    """

    Params = MedusaParams

    def __init__(self, target: PreTrainedModel, params: MedusaParams | None = None, token_ids: Tensor | None = None):
        super().__init__(token_ids)
        params = params or MedusaParams()
        self.width, self.heads = target.config.get_text_config().hidden_size, params.heads
        self.blocks = nn.ModuleList(ResidualBlock(self.width) for _ in range(params.heads))

    def fit_check(self, width: int, vocabulary: int) -> None:
        """See `Drafter.fit_check`."""
        super().fit_check(width, vocabulary)
        if width != self.width:
            raise PlanError(f"the draft is {self.width} wide, and the model {width}", hint="train the draft again")

    def unroll(self, hidden: Tensor, following: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """oⁱ [B, T, D] for i = 0, 1, …: at t it predicts x_{t+2+i}; `following` is not read."""
        with torch.no_grad():
            n = final_norm(self.target)(hidden)
        for block in self.blocks:
            yield block(n)

    def observe(self, hidden: Tensor, following: Tensor, counts: Sequence[int], pads: Sequence[int]) -> None:
        """See `Drafter.observe`; only the last certain state is kept."""
        last = torch.tensor([n - 1 for n in counts], device=hidden.device)
        h = hidden[torch.arange(len(hidden), device=hidden.device), last][:, None]
        self._root = final_norm(self.target)(h)

    def first(self) -> tuple[Tensor, Any]:
        """See `Drafter.first`."""
        return self.logits(self.blocks[0](self._root)), 0

    def next(self, state: Any, parents: Tensor, tokens: Tensor) -> tuple[Tensor, Any]:
        """See `Drafter.next`: the same distribution at every node of a level."""
        level = min(state + 1, self.heads - 1)
        logits = self.logits(self.blocks[level](self._root))
        return logits.expand(-1, tokens.shape[1], -1), level
