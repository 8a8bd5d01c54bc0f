"""In which order a training sees its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


class LengthGrouped(torch.utils.data.Sampler[int]):
    """Random order in which the rows of one optimiser step have similar lengths, so that little is padded.

    The order is a function of seed and epoch alone. (transformers' own length-grouped sampler draws from the global
    random state, and a training resumed in a later epoch gets another order; measured with 5.23.)

    Args:
        lengths: Of every row.
        step: Rows per optimiser step.
        seed: Of the order.
        rows: How many rows an epoch has; `chosen` says which, or all.
    """

    def __init__(self, lengths: Sequence[int], step: int, seed: int, rows: int | None = None) -> None:
        self.lengths, self.step, self.seed, self.epoch = lengths, step, seed, 0
        self.rows = len(lengths) if rows is None else rows
        self.chosen: Sequence[int] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(self.rows, generator=generator).tolist()
        if self.chosen is not None:
            order = [self.chosen[i] for i in order]
        pools = [order[i : i + 50 * self.step] for i in range(0, len(order), 50 * self.step)]
        ranked = [i for pool in pools for i in sorted(pool, key=lambda i: -self.lengths[i])]
        steps = [ranked[i : i + self.step] for i in range(0, len(ranked), self.step)]
        full = self.rows // self.step  # a short last step stays last, or it would shift all that follow
        for at in [*torch.randperm(full, generator=generator).tolist(), *range(full, len(steps))]:
            yield from steps[at]
