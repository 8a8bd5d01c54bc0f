"""What a drafter is trained on: to think ahead as its frozen target thinks.

The target reads a text; from its states h_t before, and n_t after, the final norm the drafter makes o¹_t … oᴺ_t, where
oⁱ_t is to predict x_{t+1+i} and should therefore be what the target itself feeds its head one token before,
n_{t+i}. With p the target's distribution there and mask m over trained tokens,

    L_value = mean over D of SmoothL1(oⁱ_t, n_{t+i})        L_word = − Σ_v p(v) log softmax(Head(oⁱ_t))(v)
    L = Σ_t m · Σ_i decayⁱ⁻¹ · (value · L_value + word · L_word)

The paper's (Clover-2): decay 0.7, value 10, word 1. Medusa and Clover learn the text's own tokens instead (`soft` off,
value 0). Our choices: with a draft vocabulary, p is the target's softmax over those V' tokens only, and L_word leaves
out positions whose true token is not among them (a guess cannot be right there); the sum is divided by the number of
positions that train the first head, and not per head.

The drafter's parameters are the objective's own, so `train.fit(target, DraftLoss(...), …)` trains and checkpoints them,
and the target, whose parameters need no gradient, stays as it is.

Cost per trained token: one forward pass of the target, and for each head forward and backward of D × V' of the LM head;
memory [tokens × V'] per head, recomputed in the backward pass and so held for one head at a time.

Paper: Xiao et al., "Clover-2", 2024, arXiv 2408.00264; official code github.com/XiaoBin1992/clover, commit 9d37214.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from residency.infer.drafter import Drafter, final_norm
from residency.objective import IGNORE, Objective, Outputs


@runtime_checkable
class Trainable(Protocol):
    """A drafter whose heads can be unrolled over whole texts."""

    heads: int

    def unroll(self, hidden: Tensor, following: Tensor, mask: Tensor | None) -> Any:
        """See `clover.Regressive.unroll`."""


@dataclass(frozen=True)
class DraftWeights:
    """The terms of the loss.

    Args:
        decay: Weight of a head relative to the one before it.
        value: Of the distance between states.
        word: Of the cross-entropy.
        soft: Learn the target's distribution; off: the text's own tokens.
    """

    decay: float = 0.7
    value: float = 10.0
    word: float = 1.0
    soft: bool = True


class DraftLoss(Objective):
    """Loss of a drafter on texts, the target frozen.

    Args:
        target: Its parameters must not require gradients.
        drafter: Attached here; its parameters are trained in float32.
        weights: Terms.

    Raises:
        ValueError: When the target would be trained along, or the drafter has nothing to train.
    """

    wants: ClassVar[Literal["hidden"]] = "hidden"

    def __init__(self, target: PreTrainedModel, drafter: Drafter, weights: DraftWeights | None = None) -> None:
        super().__init__()
        if any(p.requires_grad for p in target.parameters()):
            raise ValueError("the target must be frozen: target.requires_grad_(False)")
        if not isinstance(drafter, Trainable):
            raise ValueError(f"a {type(drafter).__name__} has nothing to train")
        self.drafter = drafter.attach(target).requires_grad_(True)
        self.weights = weights or DraftWeights()
        self._before: Tensor | None = None
        self._hook = final_norm(target).register_forward_pre_hook(self._keep)
        places = torch.full((target.get_output_embeddings().weight.shape[0],), -1, dtype=torch.long)
        ids = drafter.token_ids
        if ids is None:
            places = torch.arange(len(places))
        else:
            places[ids.cpu()] = torch.arange(len(ids))
        self.register_buffer("_places", places, persistent=False)  # the target's id → index in the draft vocabulary

    def close(self) -> None:
        """Take the hook off the target."""
        self._hook.remove()

    def _keep(self, _: nn.Module, given: tuple[Any, ...]) -> None:
        self._before = given[0].detach()

    def count(self, batch: dict[str, Any]) -> int:
        """Positions that train the first head: tokens with a label and at least two tokens before them."""
        return int((batch["labels"][:, 2:] != IGNORE).sum())

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """See `Objective.forward`; `outputs.hidden` [B, T, D] are the target's states after its final norm."""
        assert outputs.hidden is not None
        assert self._before is not None
        assert isinstance(self.drafter, Trainable)
        n, h = outputs.hidden.detach().float(), self._before.float()
        labels, ids, N = batch["labels"], batch["input_ids"], self.drafter.heads
        T = ids.shape[1]
        following = nn.functional.pad(ids[:, 1:], (0, N))
        total = n.new_zeros(())
        for i, out in enumerate(self.drafter.unroll(h, following, batch.get("attention_mask"))):
            if i + 3 > T:
                break
            trained = labels[:, i + 2 :] != IGNORE  # of x_{t+2+i}, for t = 0 … T − 3 − i
            mine, theirs = out[:, : T - 2 - i][trained], n[:, i + 1 : T - 1][trained]
            words = ids[:, i + 2 :][trained]
            term = n.new_zeros(())
            if self.weights.value:
                value = nn.functional.smooth_l1_loss(mine, theirs.to(mine.dtype), reduction="none")
                term = term + self.weights.value * value.mean(-1).sum()
            if self.weights.word:
                term = term + self.weights.word * checkpoint(self._word, mine, theirs, words, use_reentrant=False)
            total = total + self.weights.decay**i * term
        return total, torch.as_tensor(self.count(batch), device=total.device)

    def _word(self, mine: Tensor, theirs: Tensor, words: Tensor) -> Tensor:
        """Summed cross-entropy over the draft vocabulary: states [M, D] and true tokens [M]."""
        places: Any = self._places
        at = places[words]
        known = at >= 0
        mine, theirs, at = mine[known], theirs[known], at[known]
        logp = self.drafter.logits(mine).float().log_softmax(-1)
        if not self.weights.soft:
            return nn.functional.nll_loss(logp, at, reduction="sum")
        with torch.no_grad():
            p = self.drafter.logits(theirs.to(mine.dtype)).float().softmax(-1)
        return -(p * logp).sum()
