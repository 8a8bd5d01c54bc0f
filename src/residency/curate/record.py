"""A record of which rows a training has right, epoch by epoch: what forgetting is counted from.

`Recorded` wraps any objective of the training loop. Before every epoch it looks at all rows and writes down which are
right, so the first entry is the model before training, and what comes after the last epoch's beginning is not in it. A
row to classify is right when the largest logit is its label's; a row with an answer when at least `threshold` of its
tokens are each the likeliest after the true ones before it.

After Toneva et al., ICLR 2019, arXiv 1812.05159 (`forgetting.py`), who classify and look at a row when it is in a
batch, which is once an epoch too; looking at all rows at one moment is our choice, and so is the share of tokens.

Cost: one forward pass over all rows per epoch, E · N bytes; a checkpoint holds the record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from residency.objective import Look, Objective, Outputs, next_token_positions


class Recorded(Objective):
    """Trains like another objective, and keeps a record.

    Args:
        inner: What is trained.
        rows: N.
        epochs: E; later epochs are not recorded.
        threshold: Share of an answer's tokens that make it right.

    Attributes:
        record: [E, N] int8: 1 right, 0 wrong, −1 not looked at yet.
    """

    record: Tensor

    def __init__(self, inner: Objective, rows: int, epochs: int, threshold: float = 0.5) -> None:
        super().__init__()
        self.inner, self.threshold = inner, threshold
        self.wants = inner.wants  # type: ignore[misc]
        self.per_row = inner.per_row  # type: ignore[misc]
        self.register_buffer("record", torch.full((epochs, rows), -1, dtype=torch.int8))

    def columns(self, prefix: str = "right-") -> dict[str, Any]:
        """The record as columns [N] of 0, 1 and NaN, in the form `Forgetting` reads."""
        seen = self.record.double().where(self.record >= 0, torch.nan).cpu().numpy()
        return {f"{prefix}{epoch}": row for epoch, row in enumerate(seen, 1)}

    def rows_per_epoch(self, rows: int) -> int:
        """See `Objective.rows_per_epoch`."""
        return self.inner.rows_per_epoch(rows)

    def begin_epoch(self, epoch: int, epochs: int, look: Look) -> Sequence[int] | None:
        """Look at all rows, then let the inner objective prepare."""
        if epoch < len(self.record):
            found = torch.cat([right(outputs, batch, self.threshold) for outputs, batch in look()])
            self.record[epoch] = found.to(self.record)
        return self.inner.begin_epoch(epoch, epochs, look)

    def begin_step(self, step: int, steps: int) -> None:
        """See `Objective.begin_step`."""
        self.inner.begin_step(step, steps)

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The inner objective's (loss sum, count)."""
        return self.inner(outputs, batch)

    def count(self, batch: dict[str, Any]) -> int:
        """See `Objective.count`."""
        return self.inner.count(batch)


def right(outputs: Outputs, batch: Mapping[str, Any], threshold: float = 0.5) -> Tensor:
    """Which rows of a batch are right.

    Args:
        outputs: Logits [B, C] of a classifier, or logits [B, T, V], or hidden states and a head, of a language model.
        batch: `labels` [B] or [B, T].
        threshold: Share of an answer's tokens that must be right.

    Returns:
        [B] bool.

    Raises:
        ValueError: When the outputs have no logits.
    """
    labels = batch["labels"]
    if outputs.logits is not None and outputs.logits.ndim == 2:
        return outputs.logits.argmax(1) == labels
    mask, targets = next_token_positions(labels)
    if outputs.logits is not None:
        logits = outputs.logits[mask]
    elif outputs.hidden is not None and outputs.head is not None:
        logits = outputs.head(outputs.hidden[mask])
    else:
        raise ValueError("what is right is read from logits, and this objective works on features")
    good = torch.zeros(mask.shape, device=mask.device)
    good[mask] = (logits.argmax(-1) == targets).float()
    return good.sum(1) >= threshold * mask.sum(1)
