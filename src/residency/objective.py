"""What a loss looks like in this house, so that one training loop can drive all of them.

An `Objective` is a plain `nn.Module` that maps `(outputs, batch)` to `(loss sum, count)`. It never divides:
`train.py` divides once, by the count of the whole optimiser step, so that batch size, padding and gradient
accumulation cannot change a gradient.

Shapes use one legend throughout the project: B batch, T tokens, V vocabulary, H heads, G key/value heads, D width,
K shots or top-k, C classes, N rows or selected tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

IGNORE = -100
"""Label of a position that is not trained (the Hugging Face convention)."""


@dataclass(frozen=True)
class Head:
    """A language-model head: logits = hidden @ weight.T + bias.

    Args:
        weight: [V, D].
        bias: [V] or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Map hidden states [..., D] to logits [..., V]."""
        return nn.functional.linear(hidden, self.weight, self.bias)


@dataclass(frozen=True)
class Outputs:
    """What a forward pass hands to an objective.

    Either `logits` [B, T, V] (or [B, C] for a classifier), or `hidden` [B, T, D] with the `head` that would turn it
    into logits: the second form lets a loss apply the head chunk by chunk and never hold [B, T, V]. Encoders give
    `features` [B, D], one vector per row.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    head: Head | None = None
    features: Tensor | None = None


Look = Callable[[], Iterator[tuple[Outputs, dict[str, Any]]]]
"""Outputs and batches over all rows in their order: the model in eval mode, without gradients."""


class Objective(nn.Module):
    """A loss that returns (sum, count).

    `wants` tells the training loop which form of `Outputs` to produce: "logits", "hidden", "features" of an encoder, or
    "nothing" where the batch holds all that is needed and the objective calls what is trained itself. Parameters of
    the objective itself (a projection, masks) are trained along with the model, and its whole `state_dict` is part of
    every checkpoint, so that a resumed training finds queues and prototypes as they were.
    """

    wants: ClassVar[Literal["logits", "hidden", "features", "nothing"]] = "logits"

    def rows_per_epoch(self, rows: int) -> int:
        """How many of so many rows an epoch trains on; less than all only where `begin_epoch` chooses."""
        return rows

    def begin_epoch(self, epoch: int, epochs: int, look: Look) -> Sequence[int] | None:
        """Prepare epoch `epoch`, counted from 0, of `epochs`: phases, prototypes, curricula.

        Called once per epoch, with random numbers of its own; a training resumed within an epoch does not call it
        again, so what it computes belongs in buffers (its answer is kept by the loop).

        Args:
            epoch: Counted from 0.
            epochs: Of the whole training, the last one perhaps unfinished.
            look: Shows all rows as the model sees them now; costs a forward pass over them.

        Returns:
            Indices of the rows to train on, `rows_per_epoch` many; None for all.
        """
        return None

    def begin_step(self, step: int, steps: int) -> None:
        """Prepare optimiser step `step`, counted from 0, of `steps`; schedules live here."""

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the summed loss (scalar, with gradient) and the number of items it sums over (scalar)."""
        raise NotImplementedError("abstract: an Objective defines forward(outputs, batch)")

    per_row: ClassVar[bool] = False
    """Whether what is summed over are the rows of a batch, and not their trained tokens."""

    def count(self, batch: dict[str, Any]) -> int:
        """How many items `forward` will sum over, known from the batch alone: its rows, or its trained tokens.

        The training loop adds this up over an optimiser step before the first forward pass, and divides every sum
        by it.
        """
        return len(batch["labels"]) if self.per_row else int((batch["labels"][:, 1:] != IGNORE).sum())


def next_token_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that predict a trained token, and the tokens they predict.

    Args:
        labels: [B, T] token ids, `IGNORE` where nothing is trained; labels[b, t] is the token AT t.

    Returns:
        A boolean mask [B, T] that is true at t where the token at t + 1 is trained, and the targets [N] in the
        order in which `hidden[mask]` lists those positions.
    """
    shifted = torch.full_like(labels, IGNORE)
    shifted[:, :-1] = labels[:, 1:]
    mask = shifted != IGNORE
    return mask, shifted[mask]
