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

The target's states are recorded once (`record`) and stay in memory, so that training never runs it: what is trained is
the drafter alone, `train.fit(drafter, DraftLoss(drafter), record(...), ...)`. All tokens of a text train, those of the
question too (our choice; the paper trains on answers): the target has an opinion everywhere, and texts are few.

Cost: one forward pass of the target per token and D floats of memory (2.3 KB at D = 576), once. Then per token and
pass, for each head, forward and backward of D × V' of the LM head; [tokens × V'] is held for one head at a time.

Paper: Xiao et al., "Clover-2", 2024, arXiv 2408.00264; official code github.com/XiaoBin1992/clover, commit 9d37214.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from residency.infer.drafter import Drafter, final_norm
from residency.objective import Objective, Outputs
from residency.progress import Progress
from residency.tokens import collate


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


@dataclass(frozen=True)
class Thought:
    """A text and what the target thought at each of its tokens.

    Args:
        id: Of the row.
        ids: [T] tokens.
        states: [T, D] of the target before its final norm, in its own precision.
    """

    id: str
    ids: tuple[int, ...]
    states: Tensor

    def __len__(self) -> int:
        return len(self.ids)


def record(target: PreTrainedModel, items: Sequence[Any], pad: int, progress: Progress | None = None) -> list[Thought]:
    """Run the target once over all texts.

    Args:
        target: In evaluation mode.
        items: Encoded rows (`prompt` and `answer`).
        pad: Padding id.
        progress: Where progress goes.

    Returns:
        One `Thought` per row, in their order, on the CPU.
    """
    kept: list[Tensor] = []
    found: dict[int, Thought] = {}
    order = sorted(range(len(items)), key=lambda i: len(items[i]))
    handle = final_norm(target).register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    try:
        with (progress or Progress()).task("reading the texts", len(items)) as advance, torch.no_grad():
            for start in range(0, len(order), 8):
                part = order[start : start + 8]
                batch = collate([items[i] for i in part], pad)
                given = {name: batch[name].to(target.device) for name in ("input_ids", "attention_mask")}
                target(**given, logits_to_keep=1, use_cache=False)
                states = kept.pop().cpu()
                for row, i in enumerate(part):
                    ids = (*items[i].prompt, *items[i].answer)
                    found[i] = Thought(items[i].id, ids, states[row, : len(ids)].clone())
                advance(len(part))
    finally:
        handle.remove()
    return [found[i] for i in range(len(items))]


def collate_thoughts(thoughts: Sequence[Thought], pad: int) -> dict[str, Tensor]:
    """Right-padded `input_ids`, `attention_mask` [B, T] and `states` [B, T, D]."""
    width, B = max(map(len, thoughts)), len(thoughts)
    ids = torch.full((B, width), pad)
    mask = torch.zeros(B, width, dtype=torch.long)
    states = thoughts[0].states.new_zeros(B, width, thoughts[0].states.shape[-1])
    for row, thought in enumerate(thoughts):
        n = len(thought)
        ids[row, :n], mask[row, :n], states[row, :n] = torch.tensor(thought.ids), 1, thought.states
    return {"input_ids": ids, "attention_mask": mask, "states": states}


class DraftLoss(Objective):
    """Loss of a drafter on recorded texts.

    Args:
        drafter: Attached to its target; it is what `train.fit` trains.
        weights: Terms.
        autocast: Whether the drafter computes in bfloat16 (its weights stay as they are).

    Raises:
        ValueError: When the drafter has nothing to train.
    """

    wants: ClassVar[Literal["nothing"]] = "nothing"

    def __init__(self, drafter: Drafter, weights: DraftWeights | None = None, *, autocast: bool = False) -> None:
        super().__init__()
        if not isinstance(drafter, Trainable):
            raise ValueError(f"a {type(drafter).__name__} has nothing to train")
        object.__setattr__(self, "drafter", drafter)  # the model that is trained, and not part of the objective
        self.drafter: Any
        self.weights, self.autocast = weights or DraftWeights(), autocast
        size = drafter.target.get_output_embeddings().weight.shape[0]
        places = torch.arange(size) if drafter.token_ids is None else torch.full((size,), -1)
        if drafter.token_ids is not None:
            places[drafter.token_ids.cpu()] = torch.arange(len(drafter.token_ids))
        self.register_buffer("_places", places, persistent=False)  # the target's id → index in the draft vocabulary

    def count(self, batch: dict[str, Any]) -> int:
        """Positions that train the first head: all but the last two tokens of each text."""
        return int((batch["attention_mask"].sum(1) - 2).clamp_min(0).sum())

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """See `Objective.forward`; `outputs` is empty, `batch` comes from `collate_thoughts`."""
        h, ids, mask = batch["states"], batch["input_ids"], batch["attention_mask"]
        with torch.no_grad():
            n = final_norm(self.drafter.target)(h)
        N, T = self.drafter.heads, ids.shape[1]
        following = nn.functional.pad(ids[:, 1:], (0, N))
        total = torch.zeros((), device=ids.device)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.autocast):
            for i, out in enumerate(self.drafter.unroll(h.to(self.drafter.dtype), following, mask)):
                if i + 3 > T:
                    break
                trained = mask[:, i + 2 :].bool()  # where x_{t+2+i} is, for t = 0 … T − 3 − i
                mine, theirs = out[:, : T - 2 - i][trained], n[:, i + 1 : T - 1][trained]
                words = ids[:, i + 2 :][trained]
                term = torch.zeros((), device=ids.device)
                if self.weights.value:
                    value = nn.functional.smooth_l1_loss(mine.float(), theirs.float(), reduction="none")
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
        logp = self.drafter.logits(mine.to(self.drafter.head.weight.dtype)).float().log_softmax(-1)
        if not self.weights.soft:
            return nn.functional.nll_loss(logp, at, reduction="sum")
        with torch.no_grad():
            p = self.drafter.logits(theirs.to(self.drafter.head.weight.dtype)).float().softmax(-1)
        return -(p * logp).sum()
